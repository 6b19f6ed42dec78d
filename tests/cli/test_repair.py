"""`ressa repair`, as a user calls it: whole runs, fresh processes, wrong options."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from warm_processes import started

from ressa.cli.app import main

COMMAND = str(Path(sys.executable).parent / "ressa")
QUICK = "--limit 40 --steps 4 --batch-size 8 --calibration 16".split()
TINY_RUN = "--limit 8 --calibration 4 --test-batch 4 --sparsity 0.5".split()


# A whole run


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    "The folder and the output of one short run."
    out = tmp_path_factory.mktemp("walk") / "out"
    line = [COMMAND, "repair", "--out", str(out), *QUICK]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out, done.stdout


@pytest.mark.slow
def test_results_hold_what_they_promise(finished):
    results = json.loads((finished[0] / "results.json").read_text())
    for row in ("dense", "pruned", "repaired", "blind"):
        low, high = results[row]["accuracy_ci"]
        assert 0 <= low <= results[row]["accuracy"] <= high <= 1 + 1e-9
        if row != "blind":
            assert 0 <= results[row]["caption_exact"] <= 1
    sparsity = results["sparsity"]
    assert 0.78 < sparsity["vision"] <= 0.8 and 0.78 < sparsity["language"] <= 0.8
    assert sparsity["interface"] == 0 and results["zeros_filled"] == 0
    assert results["seconds"]["repaired_training"] > 0
    assert results["peak_memory_mb"] > 100  # of the whole process, other tests included
    assert results["dense"]["accuracy"] > 0.9 > results["pruned"]["accuracy"]
    assert "plain_lora" not in results  # a rival, which was not asked for


@pytest.mark.slow
def test_report_is_one_whole_page(finished):
    page = (finished[0] / "report.html").read_text()
    assert page.endswith("</html>") and page.count("data:image/png") >= 1
    assert 'src="http' not in page and "<script" not in page
    for text in (page, finished[1]):
        assert "Zeros filled by the repair: 0" in text


@pytest.mark.slow
def test_nothing_is_left_over(finished):
    names = sorted(path.name for path in finished[0].iterdir())
    files = ["recipe.yaml", "report.html", "results.json", "run.json"]
    assert names == ["model", *files]
    endings = {path.suffix for path in (finished[0] / "model").iterdir()}
    assert not endings & {".bin", ".pt", ".pkl", ".part"}


@pytest.mark.slow
def test_called_again_it_shows_the_same(finished, run):
    code, said, _ = run("repair", "--out", finished[0], *QUICK)
    assert (code, said) == (0, finished[1])


@pytest.mark.slow
def test_the_model_answers_in_a_fresh_process(finished):
    code = """
import sys
from PIL import Image, ImageDraw
from transformers import AutoModelForImageTextToText, AutoProcessor
assert not any(name.startswith("ressa") for name in sys.modules)
model = AutoModelForImageTextToText.from_pretrained(sys.argv[1])
processor = AutoProcessor.from_pretrained(sys.argv[1])
picture = Image.new("RGB", (64, 64), "white")
ImageDraw.Draw(picture).rectangle((10, 10, 40, 30), fill=(255, 0, 0))
text = "Question: is there a red shape? Short answer:"
inputs = processor(images=picture, text=text, return_tensors="pt")
ids = model.generate(**inputs, max_new_tokens=5)[0]
print(processor.decode(ids, skip_special_tokens=True))
"""
    line = [sys.executable, "-c", code, str(finished[0] / "model")]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip(), done.stderr


@pytest.mark.slow
def test_killed_and_called_again(tmp_path, finished, run):
    """Nothing half-written looks whole, and the same command ends with the same numbers.

    tests/tools/reliability/faults.py kills at any moment.
    """
    out = tmp_path / "out"
    line = ["repair", "--out", str(out), *QUICK]
    process = started(main, line)
    while not (out / "checkpoints").exists() and process.is_alive():
        time.sleep(0.01)  # the training begins
    time.sleep(0.5)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert (out / "run.json").exists() and not (out / "results.json").exists()
    code, _, error = run(*line)
    assert code == 0, error
    resumed = json.loads((out / "results.json").read_text())
    undisturbed = json.loads((finished[0] / "results.json").read_text())
    for row in ("dense", "pruned", "repaired"):
        assert resumed[row]["accuracy"] == undisturbed[row]["accuracy"], row
    assert resumed["zeros_filled"] == 0


# Wrong options


@pytest.mark.slow
@pytest.mark.parametrize(
    "wrong, said",
    [
        ("--sparsity -0.1", "sparsity must be in [0, 1)"),
        ("--pattern 2:7", "divisible by 7"),
        ("--pattern 4:2", "--pattern must be N:M"),
        ("--pattern 2:4 --vision 0.5", "--pattern cannot go with --vision"),
        ("--device abacus", "device 'abacus' is unknown"),
        ("--dtype int3", "dtype: invalid choice"),
        ("--teacher self --method sparsegpt", "use --teacher cached"),
        ("--teacher self --adapter full", "use --teacher cached"),
        ("--compare pissa", "--compare: 'pissa' is unknown"),
        ("--allocation owl --vision 0.5", "spreads one sparsity"),
        ("--patience 2", "--patience needs --held-out"),
        ("--label-smoothing-factor 0.1", "does not support label_smoothing_factor"),
        ("--split validation", "--split of easy-vqa must be test"),
        ("--calibration 1000000", "examples are there"),
        ("--model no/such-model", "no model that ressa can load"),
    ],
)
def test_options_that_cannot_be_met(tmp_path, run, wrong, said):
    out = tmp_path / "out"
    code, _, error = run("repair", "--out", out, *wrong.split())
    assert code == 2 and error.startswith("ressa: error:") and said in error
    assert len(error.splitlines()) == 1 and not out.exists()


@pytest.mark.slow
def test_a_folder_of_something_else_is_not_touched(tmp_path, run):
    (tmp_path / "thesis.txt").write_text("years of work")
    code, _, error = run("repair", "--out", tmp_path, *QUICK)
    assert code == 2 and "is not empty" in error
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_stopped_by_ctrl_c(tmp_path, monkeypatch, run):
    from ressa.cli import main_job

    def stop(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(main_job, "load_model", stop)
    code, _, error = run("repair", "--out", tmp_path / "out")
    assert code == 130 and "stopped. What was done is kept" in error


# Other models and other data


@pytest.mark.slow
@pytest.mark.parametrize("name", ["LLaVA", "Idefics3", "InstructBLIP, T5"])
def test_repair_of_another_model_on_other_data(tmp_path, run, vqav2, name, saved_model):
    from ressa.cli.results import part_sparsity
    from ressa.models.load_model import load_model

    model, out = saved_model(name, tmp_path / "model"), tmp_path / "out"
    line = ["repair", "--model", model, "--data", vqav2, "--out", out, *TINY_RUN]
    code, said, error = run(*line, "--steps", 2, "--batch-size", 4)
    assert code == 0, error
    assert "VQA accuracy" in said.splitlines()[0]
    results = json.loads((out / "results.json").read_text())
    assert results["dense"]["metric"] == "VQA accuracy" and results["zeros_filled"] == 0
    # the most frequent answer, and more than three people gave it
    assert results["blind"]["accuracy"] == 1
    for row in ("dense", "pruned", "repaired"):
        assert 0 <= results[row]["accuracy"] <= 1
    assert (out / "report.html").read_text().endswith("</html>")
    repaired, _ = load_model(out / "model", "cpu")
    assert part_sparsity(repaired)["language"] == pytest.approx(0.5, abs=0.01)
    line = ["evaluate", "--model", out / "model", "--data", vqav2, "--limit", 4]
    assert run(*line)[0] == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "wrong, said",
    [
        ("--data no/such-data", "data no/such-data"),
        ("--split test", "Unknown split"),
        ("--train-split training", "say which split"),
        ("--train-limit 0", "--train-limit must be 1 or more"),
        ("--calibration 13", "only 12 examples are there"),
    ],
)
def test_options_about_data(tmp_path, vqav2, run, wrong, said):
    out = tmp_path / "out"
    line = ["repair", "--data", vqav2, "--calibration", 4, *wrong.split()]
    code, _, error = run(*line, "--out", out)
    assert code == 2 and said in error
    assert len(error.splitlines()) == 1 and not out.exists()
