"""The benchmarks of large models run, on small ones and on a CPU."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))


def test_the_gpu_benchmark_runs_tiny_on_a_cpu():
    import gpu

    found = gpu.run(tiny=True, device="cpu", rows=4, micro_batch=2, steps=1)
    assert [row["method"] for row in found["pruning"]] == ["wanda", "sparsegpt"]
    for row in found["pruning"]:
        assert row["layers"] == 8 + 14  # the ViT fuses query, key and value
        assert all(0.49 < part["sparsity"] < 0.51 for part in row["parts"].values())
    assert found["repair"]["ratio"] > 0 and found["repair"]["seconds"].keys() == {
        "lora",
        "sparselora",
    }
    assert found["semi_structured"] == []  # needs a GPU's kernels


def test_the_7b_model_has_the_shape_it_is_named_after():
    import gpu

    model = gpu.make(gpu.VICUNA_7B, "meta")
    assert sum(p.numel() for p in model.language_model.parameters()) == 6_738_423_808
    assert 0.98e9 < sum(p.numel() for p in model.vision_model.parameters()) < 1.02e9
    assert next(model.parameters()).dtype == torch.bfloat16


def test_the_benchmark_of_200_million_weights_runs_small():
    import big

    found = big.compare(rounds=1, rows=2, tokens=32, vision_layers=1, layers=1)
    assert found["ratio"] > 0 and all(
        0.49 < part["sparsity"] <= 0.5 for part in found["parts"].values()
    )
    assert (
        found["bytes"]["weights"] == 4 * found["parameters"]
        and found["bytes"]["logits"] == 2 * 32 * big.VOCABULARY * 4
    )
