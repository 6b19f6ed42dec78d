"""Models from the package, from folders and from the hub, and what goes wrong."""

import json

import pytest
import torch
from transformers import CLIPModel, CLIPProcessor

from ressa.models import load_model as module
from ressa.models.bundled import BUNDLED
from ressa.models.load_model import load_model


def weights_of(model):
    return {name: weight.detach() for name, weight in model.named_parameters()}


def test_the_bundled_model_by_name_and_by_folder(bundled):
    expected = weights_of(bundled[0])
    for name in ("bundled", BUNDLED, str(BUNDLED)):
        model, processor = load_model(name, "cpu")
        weights = weights_of(model)
        assert all(torch.equal(weights[key], expected[key]) for key in expected)
        assert not model.training
        assert processor.tokenizer.padding_side == "left"
    assert weights_of(load_model(device="cpu")[0]).keys() == expected.keys()


def test_a_teacher_learns_nothing():
    student, _ = load_model("bundled", "cpu")
    teacher, _ = load_model("bundled", "cpu", teacher=True)
    assert all(p.requires_grad for p in student.parameters())
    assert not any(p.requires_grad for p in teacher.parameters())


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
def test_the_format_of_the_weights(dtype, tmp_path):
    model, _ = load_model("bundled", "cpu", dtype)
    assert model.dtype == torch.bfloat16
    model.save_pretrained(tmp_path)
    load_model("bundled", "cpu")[1].save_pretrained(tmp_path)
    assert load_model(tmp_path, "cpu")[0].dtype == torch.bfloat16  # as it is stored
    assert load_model(tmp_path, "cpu", "float32")[0].dtype == torch.float32


def test_a_model_that_compares_keeps_its_padding(tmp_path):
    from tiny_models import TINY

    config, processor = TINY["CLIP"]()
    CLIPModel(config).save_pretrained(tmp_path)
    assert isinstance(processor, CLIPProcessor)
    processor.tokenizer.padding_side = "right"
    processor.save_pretrained(tmp_path)
    model, loaded = load_model(tmp_path, "cpu")
    assert isinstance(model, CLIPModel)
    assert loaded.tokenizer.padding_side == "right"


def test_a_tokenizer_without_padding_pads_with_its_end(tmp_path, bundled):
    model, processor = bundled
    model.save_pretrained(tmp_path)
    processor.tokenizer.pad_token = None
    processor.tokenizer.padding_side = "right"
    processor.save_pretrained(tmp_path)
    tokenizer = load_model(tmp_path, "cpu")[1].tokenizer
    assert tokenizer.pad_token == tokenizer.eos_token
    assert tokenizer.padding_side == "left"


@pytest.mark.parametrize(
    "message, what_to_do",
    [
        (
            "You are trying to access a gated repo.\nMake sure to have access to it.",
            "ask for access",
        ),
        (
            "x/y is not a local folder and is not a valid model identifier listed on "
            "'https://huggingface.co/models'",
            "check the spelling",
        ),
        (
            "We couldn't connect to 'https://huggingface.co' to load the files",
            "go online, or give a folder",
        ),
    ],
)
def test_errors_of_the_hub(monkeypatch, message, what_to_do):
    def fail(*args, **options):
        raise OSError(message)

    monkeypatch.setattr(module.AutoConfig, "from_pretrained", fail)
    with pytest.raises(ValueError, match=f"model x/y: .*{what_to_do}"):
        load_model("x/y", "cpu")


def test_unknown_devices_and_formats_are_refused_before_anything_is_read():
    with pytest.raises(ValueError, match="device 'abacus' is unknown"):
        load_model("no/such-model", "abacus")
    with pytest.raises(ValueError, match="dtype must be auto or one of"):
        load_model("no/such-model", "cpu", "int3")


def test_code_of_a_repository_is_not_run(tmp_path):
    folder = tmp_path / "odd"
    marker = tmp_path / "ran"
    folder.mkdir()
    (folder / "odd.py").write_text(
        f"open({str(marker)!r}, 'w')\nfrom transformers import PretrainedConfig as Odd"
    )
    config = {"model_type": "odd", "auto_map": {"AutoConfig": "odd.Odd"}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="no vision-language model there"):
        load_model(folder, "cpu")
    assert not marker.exists()


def test_pickles_are_not_read(tmp_path, bundled):
    model, processor = bundled
    model.config.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="no vision-language model there"):
        load_model(tmp_path, "cpu")
