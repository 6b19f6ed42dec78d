"""What all tests share."""

import os
import sys
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")
sys.path.insert(0, str(Path(__file__).parent / "tools"))

import pytest
import torch


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def data():
    "Training questions, test questions and test captions of easy-VQA."
    from ressa.data.easy_vqa import load_easy_vqa

    return (
        load_easy_vqa("train"),
        load_easy_vqa("test"),
        load_easy_vqa("test", task="caption"),
    )


@pytest.fixture
def bundled():
    "The bundled model and its processor, fresh for each test."
    from ressa.models.bundled import load_bundled

    return load_bundled("cpu")
