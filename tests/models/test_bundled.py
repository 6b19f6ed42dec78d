"""The model that comes with the package is whole and ready to answer."""

import pytest
import torch

from ressa.data.prompts import write_prompt
from ressa.devices import pick_dtype
from ressa.models.bundled import BUNDLED, load_bundled


def test_it_is_in_evaluation_mode_and_stored_in_float32(bundled):
    model, _ = bundled
    assert not model.training
    assert model.dtype == torch.float32
    assert model.num_parameters() == 580_608
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("dtype", ["bfloat16", torch.float16])
def test_other_formats(dtype):
    model, _ = load_bundled("cpu", dtype)
    # transformers keeps InstructBLIP's query tokens in float32
    assert model.language_model.dtype == pick_dtype(dtype)
    assert model.vision_model.dtype == pick_dtype(dtype)


def test_it_answers(bundled, data):
    model, processor = bundled
    example = data[1][0]
    inputs = processor(
        images=example["image"],
        text=write_prompt("what color is the shape?"),
        return_tensors="pt",
    )
    ids = model.generate(**inputs, max_new_tokens=4)
    text = processor.tokenizer.decode(ids[0], skip_special_tokens=True)
    assert text.endswith("red")


def test_it_is_an_ordinary_checkpoint():
    names = {path.name for path in BUNDLED.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pkl"))]
