"""The benchmarks of pruning and of large models run, on small ones and on a CPU."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "tools" / "benchmarks"))

import big
import gpu
import pruning
import pruning_formulas


@pytest.mark.slow
def test_the_gpu_benchmark_runs_on_a_small_model_and_a_cpu():
    found = gpu.run(tiny=True, device="cpu", examples=4, micro_batch=2, steps=1)
    assert [row["method"] for row in found["pruning"]] == ["wanda", "sparsegpt"]
    for row in found["pruning"]:
        assert row["layers"] == 8 + 14  # the ViT fuses query, key and value
        assert all(0.49 < part["sparsity"] < 0.51 for part in row["parts"].values())
    assert found["repair"]["ratio"] > 0
    assert set(found["repair"]["seconds"]) == {"lora", "sparselora"}
    assert found["semi_structured"] == []  # needs a GPU's kernels


def test_the_7b_model_has_the_shape_that_it_is_named_after():
    model = gpu.make(gpu.VICUNA_7B, "meta")
    assert sum(p.numel() for p in model.language_model.parameters()) == 6_738_423_808
    assert 0.98e9 < sum(p.numel() for p in model.vision_model.parameters()) < 1.02e9
    assert next(model.parameters()).dtype == torch.bfloat16


@pytest.mark.slow
def test_the_benchmark_of_200_million_weights_runs_on_a_small_model():
    found = big.compare(rounds=2, examples=2, tokens=32, vision_layers=1, layers=1)
    assert found["ratio"] > 0
    assert all(0.49 < part["sparsity"] <= 0.5 for part in found["parts"].values())
    assert found["bytes"]["weights"] == 4 * found["parameters"]
    assert found["bytes"]["logits"] == 2 * 32 * big.VOCABULARY * 4


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_the_usual_way_of_pruning_gives_the_same_masks(method, monkeypatch):
    monkeypatch.setattr(pruning, "LAYERS", 2)
    monkeypatch.setattr(pruning, "EXAMPLES", 8)
    monkeypatch.setattr(pruning, "TOKENS", 16)
    found = pruning.compare(hidden=64, method=method, rounds=1)
    # SparseGPT: layers that share an input share a threshold, in our way of pruning.
    least = {"wanda": 0.999, "sparsegpt": 0.9}[method]
    assert found["equal_masks_block_by_block"] > least
    assert found["ours_over_plain"] > 0


CLEAR_REFS = Path("/proc/self/clear_refs")  # of Linux: sets a peak of memory back


@pytest.mark.slow
@pytest.mark.skipif(not CLEAR_REFS.exists(), reason="Linux alone sets a peak back")
def test_both_formulas_of_pruning_stand_beside_a_measurement():
    small = dict(examples=2, tokens=32, vision_layers=1, layers=1)
    found = pruning_formulas.measure("as the command: no dense copy", **small)
    assert found["one layer"] == 13 * 768 * 3072
    assert found["memory_needed"] > found["one layer"]
    assert found["measured"] > 0
