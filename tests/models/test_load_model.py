"""Models from the package, from folders and from the hub, and what goes wrong."""

import json

import pytest
import torch
import transformers
from tiny_models import examples, tiny
from transformers import CLIPModel, CLIPProcessor

from ressa.checkpoints.sparse import save_sparse
from ressa.data.collate import collate
from ressa.files import save_model
from ressa.models import load_model as module
from ressa.models.bundled import BUNDLED
from ressa.models.inputs import require_matching_batch
from ressa.models.load_model import load_model
from ressa.parts import modality_map
from ressa.pruning.engine import prune


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


@pytest.mark.parametrize(
    ("kind", "length"),
    [
        ("BLIP-2, OPT", "num_query_tokens"),
        ("InstructBLIP, Llama", "num_query_tokens"),
        ("LLaVA", "patch_size"),
        ("LLaVA-NeXT", "patch_size"),
    ],
)
def test_a_length_that_is_not_stored_is_that_of_the_model(kind, length, tmp_path):
    "BLIP-2 answered without its image."
    model, processor = tiny(kind, tmp_path)
    right = getattr(processor, length)
    setattr(processor, length, None)
    processor.save_pretrained(tmp_path)
    loaded, again = load_model(tmp_path, "cpu")
    assert getattr(again, length) == right
    require_matching_batch(loaded, collate(examples(kind, again), again))


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
    with pytest.raises(ValueError, match="no model that ressa can load"):
        load_model(folder, "cpu")
    assert not marker.exists()


def test_pickles_are_not_read(tmp_path, bundled):
    model, processor = bundled
    model.config.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="no model that ressa can load"):
        load_model(tmp_path, "cpu")


# --- folders of all kinds


def test_a_packed_folder(tmp_path, bundled):
    model, processor = bundled
    save_sparse(model, processor, tmp_path / "packed")
    loaded, loaded_processor = load_model(tmp_path / "packed", "cpu")
    expected = weights_of(model)
    assert all(torch.equal(w, expected[k]) for k, w in weights_of(loaded).items())
    assert not loaded.training
    assert loaded_processor.tokenizer.padding_side == "left"
    half, _ = load_model(tmp_path / "packed", "cpu", "bfloat16", teacher=True)
    assert half.dtype == torch.bfloat16
    assert not any(p.requires_grad for p in half.parameters())
    save_sparse(model, None, tmp_path / "alone")
    with pytest.raises(ValueError, match="holds no processor"):
        load_model(tmp_path / "alone", "cpu")


@pytest.fixture
def llama(tmp_path):
    "A folder with a small language model and its tokenizer."
    import tiny_models

    folder = tmp_path / "llama"
    config = transformers.LlamaConfig(**tiny_models.LLAMA)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer = tiny_models.tokenizer()
    tokenizer.padding_side = "right"
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("method", ["magnitude", "wanda"])
def test_a_language_model_is_pruned_and_stored(llama, tmp_path, method):
    model, tokenizer = load_model(llama, "cpu")
    assert type(model) is transformers.LlamaForCausalLM
    assert tokenizer.padding_side == "left"
    rows = [{"prompt": "what color is two ?", "answer": "red"}] * 4
    report = prune(model, collate(rows, tokenizer), method, sparsity=0.5)
    assert {layer.name for layer in report.layers} == set(modality_map(model).layers)
    save_sparse(model, tokenizer, tmp_path / "packed")
    save_model(model, tokenizer, tmp_path / "ordinary")
    for name in ("packed", "ordinary"):
        loaded, loaded_tokenizer = load_model(tmp_path / name, "cpu")
        expected = weights_of(model)
        assert all(torch.equal(w, expected[k]) for k, w in weights_of(loaded).items())
        assert loaded_tokenizer.padding_side == "left"


def test_weights_that_came_from_gguf_are_ordinary(llama, tmp_path):
    config = json.loads((llama / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gguf"}
    (llama / "config.json").write_text(json.dumps(config))
    model, tokenizer = load_model(llama, "cpu")
    model.config.quantization_config = {"quant_method": "gguf"}
    save_sparse(model, tokenizer, tmp_path / "packed")
    assert "quantization" not in (tmp_path / "packed/config.json").read_text()
    assert load_model(tmp_path / "packed", "cpu")[0].dtype == torch.float32
    model.config.quantization_config = {"quant_method": "bitsandbytes"}
    with pytest.raises(ValueError, match="a quantized model cannot be packed"):
        save_sparse(model, tokenizer, tmp_path / "other")


def test_gguf_weights_say_how_to_convert_them(tmp_path):
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    for name in (tmp_path, tmp_path / "a.gguf"):
        with pytest.raises(ValueError, match=r"Convert them.*gguf_file='a.gguf'"):
            load_model(name, "cpu")


def test_what_is_no_folder_with_a_model(tmp_path):
    with pytest.raises(ValueError, match="the folder has no config.json"):
        load_model(tmp_path, "cpu")
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(ValueError, match="is a file: give the folder"):
        load_model(tmp_path / "a.txt", "cpu")


def test_the_cause_of_an_error_stays(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError) as caught:
        load_model(tmp_path, "cpu")
    assert caught.value.__cause__ is not None
