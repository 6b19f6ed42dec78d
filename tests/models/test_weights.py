"""Weights that are missing, left over, of another shape or not finite are errors that name them."""

import json

import pytest
import tiny_models
import torch
import transformers
from safetensors.torch import load_file, save_file

from ressa.checkpoints.sparse import load_sparse, pack
from ressa.cli.app import main
from ressa.models.load_model import load_model


def stored(model, processor, folder):
    "A checkpoint in a folder; returns its weights."
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def replace(weights, folder):
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def without_vision(weights):
    return {k: w for k, w in weights.items() if not k.startswith("vision_model.")}


def with_extra(weights):
    return weights | {"language_model.spare.weight": torch.ones(2)}


def of_another_shape(weights):
    return weights | {"query_tokens": torch.ones(1, 3, 64)}


def with_value(value):
    def damage(weights):
        changed = weights["query_tokens"].clone()
        changed.view(-1)[5] = value
        return weights | {"query_tokens": changed}

    return damage


def as_numbers_of(dtype):
    def damage(weights):
        return weights | {"query_tokens": weights["query_tokens"].to(dtype)}

    return damage


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64])
def test_weights_that_are_no_floats_are_named(bundled, tmp_path, dtype):
    weights = stored(*bundled, tmp_path)
    replace(as_numbers_of(dtype)(weights), tmp_path)
    with pytest.raises(ValueError, match="are no floats: query_tokens .stored as"):
        load_model(tmp_path)


@pytest.mark.parametrize("index", [{}, {"weight_map": {}}, {"weight_map": [1]}])
def test_a_damaged_index_says_what_to_do(bundled, tmp_path, index):
    stored(*bundled, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="save its files again: one is damaged"):
        load_model(tmp_path)


DAMAGES = {
    "missing": (without_vision, r"missing: vision_model\..* and \d+ more"),
    "unexpected": (with_extra, r"unexpected: language_model\.spare\.weight"),
    "mismatched": (of_another_shape, r"query_tokens \(stored \(1, 3, 64\), expected"),
    "NaN": (with_value(float("nan")), r"NaN or infinite: query_tokens"),
    "infinite": (with_value(float("-inf")), r"NaN or infinite: query_tokens"),
}


@pytest.mark.parametrize("kind", DAMAGES)
@pytest.mark.parametrize("load", ["ordinary", "packed", "load_sparse"])
def test_no_loader_takes_damaged_weights(bundled, tmp_path, kind, load):
    damage, message = DAMAGES[kind]
    folder = tmp_path / "model"
    weights = stored(*bundled, folder)
    replace(damage(weights), folder)
    if load != "ordinary":
        pack(folder, tmp_path / "packed")
        folder = tmp_path / "packed"
    with pytest.raises(ValueError, match=message) as caught:
        if load == "load_sparse":
            load_sparse(folder)
        else:
            load_model(folder, "cpu")
    assert str(folder) in str(caught.value)


def test_the_command_stops(bundled, tmp_path, capsys):
    weights = stored(*bundled, tmp_path)
    replace(without_vision(weights), tmp_path)
    assert main(["evaluate", "--model", str(tmp_path), "--limit", "4"]) != 0
    assert "missing: vision_model." in capsys.readouterr().err


def test_a_value_too_large_for_the_format_is_named(bundled, tmp_path):
    weights = stored(*bundled, tmp_path)
    weights["language_projection.bias"][0] = 1e6
    replace(weights, tmp_path)
    load_model(tmp_path, "cpu", "float32")
    with pytest.raises(ValueError, match="language_projection.bias.*dtype='float32'"):
        load_model(tmp_path, "cpu", "float16")


# --- what is no error


def small_llama(**options):
    config = transformers.LlamaConfig(**(tiny_models.LLAMA | options))
    return transformers.LlamaForCausalLM(config)


def test_tied_weights_are_stored_once(tmp_path):
    model = small_llama(tie_word_embeddings=True)
    weights = stored(model, tiny_models.tokenizer(), tmp_path)
    assert "lm_head.weight" not in weights
    loaded, _ = load_model(tmp_path, "cpu")
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


def test_weights_that_are_tied_and_not_there_at_all_are_missing(tmp_path):
    weights = stored(
        small_llama(tie_word_embeddings=True), tiny_models.tokenizer(), tmp_path
    )
    del weights["model.embed_tokens.weight"]
    replace(weights, tmp_path)
    with pytest.raises(ValueError, match="missing: .*model.embed_tokens.weight"):
        load_model(tmp_path, "cpu")


@pytest.mark.parametrize(
    "leftover",
    [
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "model.embeddings.position_ids",
        "mtp.layers.0.weight",
    ],
)
def test_leftovers_of_older_versions_are_ignored(tmp_path, leftover):
    weights = stored(small_llama(), tiny_models.tokenizer(), tmp_path)
    replace(weights | {leftover: torch.ones(4)}, tmp_path)
    load_model(tmp_path, "cpu")


@pytest.mark.parametrize("name", tiny_models.TINY)
def test_every_small_model_is_whole_after_saving(name, tmp_path):
    config, processor = tiny_models.TINY[name]()
    if name in tiny_models.RETRIEVING:
        model = transformers.AutoModel.from_config(config)
    else:
        model = transformers.AutoModelForImageTextToText.from_config(config)
    model.save_pretrained(tmp_path)
    from ressa.models.weights import load_whole

    loaded = load_whole(type(model), tmp_path)
    for key, weight in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], weight), key
