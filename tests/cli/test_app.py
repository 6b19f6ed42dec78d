"""The command, as a user calls it: whole runs, fresh processes, wrong options, full disks."""

import errno
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ressa import files
from ressa.cli.app import COMMANDS, main

COMMAND = str(Path(sys.executable).parent / "ressa")
QUICK = "--limit 40 --steps 4 --batch-size 8 --calibration 16".split()
TINY_RUN = "--limit 8 --calibration 4 --test-batch 4 --sparsity 0.5".split()


def run(capsys, *args):
    "The command without a process of its own: exit code, output and errors."
    try:
        code = main([*map(str, args)])
    except SystemExit as end:
        code = end.code
    return code, *capsys.readouterr()


# Help, without anything heavy


@pytest.mark.parametrize("command", [(), *((name,) for name in COMMANDS)])
def test_help_teaches(capsys, command):
    code, said, _ = run(capsys, *command, "--help")
    assert code == 0 and said.startswith("usage: ressa")
    if not command:
        for name, (_, about) in COMMANDS.items():
            assert name in said and about in said


def test_the_table_of_commands():
    for name, (module_name, about) in COMMANDS.items():
        module = importlib.import_module(module_name)
        assert callable(module.add_options) and callable(module.run), name
        assert about and "\n" not in about


def test_only_the_chosen_command_is_imported():
    code = """
import sys
from ressa.cli.app import COMMANDS, parse
parse(["pack"])
print([name for name, (module, _) in COMMANDS.items() if module in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "['pack']", done.stderr


def test_version(capsys):
    import ressa

    code, said, _ = run(capsys, "--version")
    assert code == 0 and said.strip() == f"ressa {ressa.__version__}"


@pytest.mark.parametrize("line", ["--help", "repair --help"])
def test_help_imports_nothing_heavy(line):
    code = f"""
import sys
from ressa.cli.app import main
try:
    main({line.split()!r})
except SystemExit:
    pass
heavy = ("torch", "transformers", "datasets", "numpy", "matplotlib", "safetensors")
print([name for name in heavy if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


@pytest.mark.parametrize("line", ["--help", "repair --help"])
def test_help_is_quick(line):
    "Half a second, counted in processor time, since other programs run beside the tests."
    resource = pytest.importorskip("resource")  # not on Windows

    def processor_seconds():
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    start = processor_seconds()
    subprocess.run([COMMAND, *line.split()], capture_output=True, check=True)
    assert processor_seconds() - start < 0.5


def test_the_package_runs_as_a_module():
    line = [sys.executable, "-m", "ressa"]
    done = subprocess.run([*line, "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("usage: ressa")
    done = subprocess.run([*line, "mend"], capture_output=True, text=True)
    assert done.returncode == 2 and "invalid choice: 'mend'" in done.stderr


def test_a_line_that_cannot_be_read(capsys):
    for line in ("", "mend", "repair --steps three", "repair --no-such-flag 1"):
        code, _, error = run(capsys, *line.split())
        assert code == 2 and "error:" in error


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
    assert results["peak_memory_mb"] < 2000
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
    assert names == ["model", "report.html", "results.json", "run.json"]
    endings = {path.suffix for path in (finished[0] / "model").iterdir()}
    assert not endings & {".bin", ".pt", ".pkl", ".part"}


@pytest.mark.slow
def test_called_again_it_shows_the_same(finished, capsys):
    code, said, _ = run(capsys, "repair", "--out", finished[0], *QUICK)
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
def test_evaluate_opens_it(finished, capsys):
    line = ["evaluate", "--model", finished[0] / "model", "--limit", 20]
    code, said, _ = run(capsys, *line)
    assert code == 0 and "yes/no color" in said and "CIDEr" in said


@pytest.mark.slow
def test_killed_and_called_again(tmp_path, finished):
    """Nothing half-written looks whole, and the same command ends with the same numbers.

    tests/tools/reliability/faults.py kills at any moment.
    """
    out = tmp_path / "out"
    line = [COMMAND, "repair", "--out", str(out), *QUICK]
    quiet = os.environ | {"TQDM_DISABLE": "1"}
    process = subprocess.Popen(line, stderr=subprocess.PIPE, text=True, env=quiet)
    for message in process.stderr:
        if "train: repaired" in message:
            break
    time.sleep(0.5)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (out / "run.json").exists() and not (out / "results.json").exists()
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    resumed = json.loads((out / "results.json").read_text())
    undisturbed = json.loads((finished[0] / "results.json").read_text())
    for row in ("dense", "pruned", "repaired"):
        assert resumed[row]["accuracy"] == undisturbed[row]["accuracy"], row
    assert resumed["zeros_filled"] == 0


# Single commands


@pytest.mark.slow
def test_prune_saves_a_sparse_model(tmp_path, capsys):
    from ressa.cli.results import part_sparsity
    from ressa.models.load_model import load_model

    line = f"prune --pattern 2:4 --calibration 8 --out {tmp_path / 'out'}"
    assert run(capsys, *line.split())[0] == 0
    model, _ = load_model(tmp_path / "out" / "model", "cpu")
    assert part_sparsity(model) == {"vision": 0.5, "interface": 0.0, "language": 0.5}


def test_pack_and_unpack_give_the_same_weights(tmp_path, capsys):
    from safetensors.torch import load_file

    from ressa.models.bundled import BUNDLED

    packed, again = tmp_path / "packed", tmp_path / "again"
    code, said, _ = run(capsys, "pack", "--model", BUNDLED, "--out", packed)
    assert code == 0 and "MB became" in said
    assert run(capsys, "unpack", "--model", packed, "--out", again)[0] == 0
    code, _, error = run(capsys, "pack", "--model", tmp_path / "no", "--out", again)
    assert code == 2 and "no: is not a folder" in error
    old = load_file(BUNDLED / "model.safetensors")
    new = load_file(again / "model.safetensors")
    assert old.keys() == new.keys()
    assert all(old[name].equal(new[name]) for name in old)


@pytest.mark.slow
@pytest.mark.parametrize(
    "wrong, said",
    [
        ("--sparsity -0.1", "sparsity must be in [0, 1)"),
        ("--pattern 2:7", "divisible by 7"),
        ("--pattern 4:2", "pattern must be 'N:M'"),
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
def test_options_that_cannot_be_met(tmp_path, capsys, wrong, said):
    out = tmp_path / "out"
    code, _, error = run(capsys, "repair", "--out", out, *wrong.split())
    assert code == 2 and error.startswith("ressa: error:") and said in error
    assert len(error.splitlines()) == 1 and not out.exists()


@pytest.mark.slow
def test_a_folder_of_something_else_is_not_touched(tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("years of work")
    code, _, error = run(capsys, "repair", "--out", tmp_path, *QUICK)
    assert code == 2 and "is not empty" in error
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.slow
def test_a_path_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "out"
    code, _, error = run(capsys, "prune", "--calibration", 8, "--out", out)
    assert code == 1 and "cannot be written" in error


def test_broken_checkpoints_are_refused(tmp_path, capsys):
    from ressa.models.bundled import BUNDLED

    def cut(file):
        file.write_bytes(file.read_bytes()[:1000])

    def called_a_pickle(file):
        file.rename(file.with_name("pytorch_model.bin"))

    for damage in (cut, called_a_pickle):
        model = tmp_path / damage.__name__
        shutil.copytree(BUNDLED, model)
        damage(model / "model.safetensors")
        code, _, error = run(capsys, "evaluate", "--model", model, "--limit", 5)
        assert code == 2 and "no model that ressa can load" in error


@pytest.mark.slow
@pytest.mark.parametrize("where", ["save_model", "_put_in_place"])
def test_a_full_disk_is_said_and_nothing_is_lost(tmp_path, monkeypatch, capsys, where):
    def full_disk(*args, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    out = tmp_path / "out"
    monkeypatch.setattr(files, where, full_disk)
    code, _, error = run(capsys, "prune", "--calibration", 8, "--out", out)
    assert code == 1 and "No space left on device. Nothing half-written" in error
    assert [path.name for path in out.iterdir()] == ["run.json"]


def test_stopped_by_ctrl_c(tmp_path, monkeypatch, capsys):
    from ressa.cli import main_job

    def stop(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(main_job, "load_model", stop)
    code, _, error = run(capsys, "repair", "--out", tmp_path / "out")
    assert code == 130 and "stopped. What was done is kept" in error


# Other models and other data


@pytest.fixture(scope="module")
def vqav2(tmp_path_factory):
    "Twelve examples a split in VQAv2's columns, in a folder of parquet files."
    from datasets import Dataset
    from tiny_models import picture

    folder = tmp_path_factory.mktemp("vqav2")
    given = ["red"] * 7 + ["blue"] * 3
    answers = [
        dict(answer=text, answer_confidence="yes", answer_id=k)
        for k, text in enumerate(given)
    ]
    for split, first in {"train": 0, "validation": 100}.items():
        rows = [
            dict(
                image=picture(20, 24, first + i),
                question="what color is the shape ?",
                answer_type="other",
                image_id=i,
                multiple_choice_answer="red",
                answers=answers,
            )
            for i in range(12)
        ]
        Dataset.from_list(rows).to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return folder


def saved(name, folder):
    "A tiny model of a real class with its processor, as a hub repository holds them."
    from tiny_models import tiny

    _, processor = tiny(name, folder)
    processor.save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", ["LLaVA", "Idefics3", "InstructBLIP, T5"])
def test_repair_of_another_model_on_other_data(tmp_path, capsys, vqav2, name):
    from ressa.cli.results import part_sparsity
    from ressa.models.load_model import load_model

    model, out = saved(name, tmp_path / "model"), tmp_path / "out"
    line = ["repair", "--model", model, "--data", vqav2, "--out", out, *TINY_RUN]
    code, said, error = run(capsys, *line, "--steps", 2, "--batch-size", 4)
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
    assert run(capsys, *line)[0] == 0


@pytest.mark.slow
def test_evaluate_and_prune_on_other_data(tmp_path, vqav2, capsys):
    from ressa.models.load_model import load_model

    model, out = saved("LLaVA", tmp_path / "model"), tmp_path / "out"
    line = ["evaluate", "--model", model, "--data", vqav2, "--split", "train[:5]"]
    code, said, _ = run(capsys, *line)
    assert code == 0 and "VQA accuracy" in said
    *_, total = (row.split() for row in said.splitlines() if row.strip())
    assert total[:2] == ["all", "5"]
    options = "--dtype bfloat16 --pattern 2:4 --calibration 4".split()
    line = ["prune", "--model", model, "--data", vqav2, *options, "--out", out]
    assert run(capsys, *line)[0] == 0
    pruned, _ = load_model(out / "model", "cpu", "bfloat16")
    assert str(pruned.dtype) == "torch.bfloat16"
    # easy-VQA, with prompts in the model's own manner
    assert run(capsys, "evaluate", "--model", model, "--limit", 2)[0] == 0


@pytest.mark.slow
def test_two_towers_are_measured_by_retrieval(tmp_path, capsys):
    model, out = saved("CLIP", tmp_path / "model"), tmp_path / "out"
    options = "--calibration 4 --sparsity 0.5".split()
    assert run(capsys, "prune", "--model", model, *options, "--out", out)[0] == 0
    line = ["evaluate", "--model", out / "model", "--limit", 12]
    code, said, _ = run(capsys, *line)
    assert code == 0 and "image→text: R@1" in said and "text→image: R@1" in said
    line = ["repair", "--model", model, "--out", tmp_path / "no", *TINY_RUN]
    code, _, error = run(capsys, *line)
    assert code == 2 and "two towers" in error and not (tmp_path / "no").exists()


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
def test_options_about_data(tmp_path, vqav2, capsys, wrong, said):
    out = tmp_path / "out"
    line = ["repair", "--data", vqav2, "--calibration", 4, *wrong.split()]
    code, _, error = run(capsys, *line, "--out", out)
    assert code == 2 and said in error
    assert len(error.splitlines()) == 1 and not out.exists()
