"""`ressa evaluate`: models and data of several kinds."""

import shutil

import pytest

TINY_RUN = "--limit 8 --calibration 4 --test-batch 4 --sparsity 0.5".split()


def test_broken_checkpoints_are_refused(tmp_path, run):
    from ressa.models.bundled import BUNDLED

    def cut(file):
        file.write_bytes(file.read_bytes()[:1000])

    def called_a_pickle(file):
        file.rename(file.with_name("pytorch_model.bin"))

    for damage in (cut, called_a_pickle):
        model = tmp_path / damage.__name__
        shutil.copytree(BUNDLED, model)
        damage(model / "model.safetensors")
        code, _, error = run("evaluate", "--model", model, "--limit", 5)
        assert code == 2 and "no model that ressa can load" in error


@pytest.mark.slow
def test_evaluate_and_prune_on_other_data(tmp_path, vqav2, run, saved_model):
    from ressa.models.load_model import load_model

    model, out = saved_model("LLaVA", tmp_path / "model"), tmp_path / "out"
    line = ["evaluate", "--model", model, "--data", vqav2, "--split", "train[:5]"]
    code, said, _ = run(*line)
    assert code == 0 and "VQA accuracy" in said
    *_, total = (row.split() for row in said.splitlines() if row.strip())
    assert total[:2] == ["all", "5"]
    options = "--dtype bfloat16 --pattern 2:4 --calibration 4".split()
    line = ["prune", "--model", model, "--data", vqav2, *options, "--out", out]
    assert run(*line)[0] == 0
    pruned, _ = load_model(out / "model", "cpu", "bfloat16")
    assert str(pruned.dtype) == "torch.bfloat16"
    # easy-VQA, with prompts in the model's own manner
    assert run("evaluate", "--model", model, "--limit", 2)[0] == 0


@pytest.mark.slow
def test_two_towers_are_measured_by_retrieval(tmp_path, run, saved_model):
    model, out = saved_model("CLIP", tmp_path / "model"), tmp_path / "out"
    options = "--calibration 4 --sparsity 0.5".split()
    assert run("prune", "--model", model, *options, "--out", out)[0] == 0
    line = ["evaluate", "--model", out / "model", "--limit", 12]
    code, said, _ = run(*line)
    assert code == 0 and "image→text: R@1" in said and "text→image: R@1" in said
    line = ["repair", "--model", model, "--out", tmp_path / "no", *TINY_RUN]
    code, _, error = run(*line)
    assert code == 2 and "two towers" in error and not (tmp_path / "no").exists()
