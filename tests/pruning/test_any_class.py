"""Each class of models in each situation; padding and pictures, with the right numbers."""

import copy
import json

import pytest
import situations
import torch

from ressa.parts import modality_map
from ressa.pruning.engine import prune
from ressa.pruning.passes import in_pieces, picture_counts

# Two cards are slow to pretend: classes with cross-attention, experts, tiles, one row of
# patches, (in, out) weights and two vision parts. The others are in the stored table.
ON_TWO_CARDS = [
    "ViT and GPT-2",
    "BLIP",
    "Idefics",
    "Mllama",
    "Qwen3-VL-MoE",
    "Video-LLaVA",
]


@pytest.mark.slow
@pytest.mark.parametrize("name", situations.ALL)
def test_a_class_in_each_situation(name):
    "One test for all of them, because they share a model and its pruned copy."
    stored = json.loads(situations.RESULTS.read_text())["classes"][name]["situations"]
    for situation in situations.SITUATIONS:
        if situation == "two cards" and name not in ON_TWO_CARDS:
            continue
        said = situations.outcome(name, situation)
        assert said in (None, "refused"), f"{situation}: {said}"
        assert stored[situation] == (said or "passed"), situation
    situations.case_of.cache_clear()


def test_the_stored_table_is_of_these_classes_and_situations():
    stored = json.loads(situations.RESULTS.read_text())["classes"]
    assert list(stored) == situations.ALL
    for found in stored.values():
        assert list(found["situations"]) == list(situations.SITUATIONS)
        assert "failed" not in found["situations"].values()


def dense(name):
    case = situations.case_of(name)
    return case.model, case.batch


def pruned(name):
    return situations.case_of(name).whole


# --- padding


def tokens_of(name):
    _, report = pruned(name)
    return {line.name: line.tokens for line in report.layers}


@pytest.mark.parametrize("name", ["Florence-2", "InstructBLIP, T5", "BLIP-2, T5"])
def test_encoder_and_decoder_are_measured_without_their_own_padding(name):
    _, batch = dense(name)
    of_encoder = int(batch["attention_mask"].sum())
    of_decoder = int((batch["labels"] != -100).sum())
    assert of_encoder != of_decoder
    seen = set()
    for layer, tokens in tokens_of(name).items():
        words = layer.split(".")
        if "language_model" not in words:
            continue
        crosses = {"encoder_attn", "EncDecAttention"} & set(words)
        reads_encoder = crosses and words[-1] in ("k_proj", "v_proj", "k", "v")
        in_encoder = "encoder" in words or reads_encoder
        assert tokens == (of_encoder if in_encoder else of_decoder), layer
        seen.add((bool(crosses), bool(in_encoder)))
    assert len(seen) == 4  # of both stacks, in and outside of a cross-attention


def test_patches_are_measured_without_padding():
    _, batch = dense("Pix2Struct")
    patches = int(batch["attention_mask"].sum())
    answers = int((batch["labels"] != -100).sum())
    for layer, tokens in tokens_of("Pix2Struct").items():
        words = layer.split(".")
        crosses = "encoder_decoder_attention" in words and words[-1] in ("key", "value")
        assert tokens == (patches if words[0] == "encoder" or crosses else answers)


def test_a_mask_is_not_laid_over_what_is_no_text():
    "Keys and values of BLIP's cross-attention read five patches of each picture."
    model, batch = dense("BLIP")
    batch = {
        key: value[:, :5] if value.shape == batch["input_ids"].shape else value
        for key, value in batch.items()
    }
    batch["attention_mask"] = batch["attention_mask"].clone()
    batch["attention_mask"][0, :2] = 0
    report = prune(copy.deepcopy(model), batch, sparsity=0.5, progress=False)
    for line in report.layers:
        if line.part == "language":
            reads_pictures = ".crossattention.self." in line.name and (
                line.name.endswith(("key", "value"))
            )
            assert line.tokens == (15 if reads_pictures else 13), line.name


# --- pictures


@pytest.mark.parametrize(
    "name", ["LLaVA-NeXT", "Idefics3", "SmolVLM", "Qwen2-VL", "Qwen2.5-VL", "Qwen3-VL"]
)
def test_a_vision_part_is_cut_between_pictures(name):
    model, batch = dense(name)
    parts = modality_map(model)
    blocks = {n.rpartition(".self_attn")[0] for n in parts.linears["vision"]}
    blocks |= {n.rpartition(".attn")[0] for n in parts.linears["vision"]}
    blocks = {block for block in blocks if block}
    visited = {}

    def visit(block, forward, pieces):
        visited[block] = len(pieces)

    with torch.no_grad():
        whole = model(**batch, use_cache=False).logits
        with in_pieces(model, blocks, 3, 1, visit, picture_counts(batch)):
            cut = model(**batch, use_cache=False).logits
    assert torch.allclose(whole, cut, atol=1e-4)
    assert visited == dict.fromkeys(blocks, 3)


def test_the_report_counts_fused_experts_among_all_weights():
    model, report = pruned("Qwen3-VL-MoE")
    row = report.parts()["language"]
    assert row["sparsity"] == 0.5
    weights = model.model.language_model.parameters()
    assert row["of_all"] * sum(w.numel() for w in weights) == row["weights"] / 2
    assert row["of_all"] < 0.3
    assert "of all" in repr(report)
