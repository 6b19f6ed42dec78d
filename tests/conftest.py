"""What all tests share."""

import os
import sys
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")
sys.path.insert(0, str(Path(__file__).parent / "tools"))

# jsonschema, which reads notebooks, builds a grammar of web addresses when it is imported. No
# notebook needs it, and it takes seconds in each process.
sys.modules.setdefault("rfc3987_syntax", None)  # type: ignore[assignment]

import pytest

# Whole files that take long together, though each of their tests is short: they walk many
# classes, devices or settings. `make quick` leaves them out; `make test` runs them.
LONG_FILES = (
    "test_placement_on_cards.py",
    "test_offloaded.py",
    "test_any_model.py",
    "test_reliability.py",
    "test_any_class.py",
    "test_repair_safety.py",
    "test_devices_of_training.py",
    "test_answer_tokens.py",
    "test_plain_greedy.py",
    "test_encoding.py",
    "test_weights.py",
    "test_wrappers.py",
    "test_allocation_study.py",
    "test_anatomy.py",
    "test_exercises.py",
    "test_adapter_folders.py",
    "test_real_training.py",
    "test_repair.py",
    "test_resume.py",
    "test_trainer.py",
    "test_teachers.py",
    "test_engine.py",
    "test_every_method.py",
    "test_rules.py",
    "test_search.py",
    "test_adapter_checks.py",
    "test_load_data.py",
    "test_load_model.py",
    "test_held_out.py",
    "test_claims.py",
    "test_explorers.py",
)


# Files in which every test runs a notebook or a browser.
NOTEBOOK_FILES = ("test_notebooks.py", "test_site.py", "test_lab.py")


def pytest_ignore_collect(collection_path, config):
    "`make quick` does not even import what it leaves out: that alone takes seconds."
    is_quick = "not slow" in config.option.markexpr
    if is_quick and collection_path.name in (*LONG_FILES, *NOTEBOOK_FILES):
        return True
    return None


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.name in LONG_FILES:
            item.add_marker(pytest.mark.slow)
    items.sort(key=_place_in_the_queue)


# The longest tests come first, so that two workers end together.
# The laboratory closes its browser before the site opens one.
FIRST = ("test_lab.py", "test_site.py", "course/00_story", "course/11_repair")


def _place_in_the_queue(item):
    "0 for the tests of the first entry of `FIRST`, …; other notebooks; everything else."
    for place, words in enumerate(FIRST):
        if words in item.nodeid:
            return place
    return len(FIRST) if "test_notebooks.py" in item.nodeid else len(FIRST) + 1


@pytest.fixture(autouse=True)
def seeded():
    import torch  # here: the process that only hands out tests needs none

    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def figures_closed():
    "What a test draws is no open figure of the next one."
    yield
    if "matplotlib.pyplot" in sys.modules:
        sys.modules["matplotlib.pyplot"].close("all")


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
