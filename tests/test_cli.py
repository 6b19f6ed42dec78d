"""The command, as a user calls it: the walk, a fresh process, bad wishes, and kills."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

COMMAND = str(Path(sys.executable).parent / "ressa")
QUICK = ["--limit", "40", "--steps", "4", "--batch-size", "8", "--calibration", "16"]


def within(capsys, *args):
    "The command without a process of its own, which would import everything again: exit code, output, errors."
    from ressa.cli.app import main

    try:
        code = main([*map(str, args)])
    except SystemExit as end:
        code = end.code
    return code, *capsys.readouterr()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    "The output of one short walk."
    out = tmp_path_factory.mktemp("walk") / "out"
    done = subprocess.run(
        [COMMAND, "repair", "--out", str(out), *QUICK], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def test_results_hold_what_they_promise(finished):
    results = json.loads((finished[0] / "results.json").read_text())
    for row in ("dense", "pruned", "plain_lora", "repaired", "blind"):
        low, high = results[row]["accuracy_ci"]
        assert 0 <= low <= results[row]["accuracy"] <= high <= 1
        if row != "blind":
            assert 0 <= results[row]["caption_exact"] <= 1
    assert results["zeros_filled"] == 0
    assert (
        0.78 < results["sparsity"]["vision"] <= 0.8
        and 0.78 < results["sparsity"]["language"] <= 0.8
    )
    assert results["sparsity"]["interface"] == 0
    assert (
        results["seconds"]["repaired_training"] > 0 and results["peak_memory_mb"] < 2000
    )
    assert results["dense"]["accuracy"] > 0.9 > results["pruned"]["accuracy"]


def test_report_is_one_whole_page(finished):
    page = (finished[0] / "report.html").read_text()
    assert page.endswith("</html>") and page.count("data:image/png") >= 3
    assert 'src="http' not in page and "<script" not in page
    assert (
        "Zeros filled by the repair: 0" in page
        and "Zeros filled by the repair: 0" in finished[1]
    )


def test_nothing_is_left_over(finished):
    assert sorted(p.name for p in finished[0].iterdir()) == [
        "model",
        "report.html",
        "results.json",
        "run.json",
    ]
    assert not [
        p
        for p in (finished[0] / "model").iterdir()
        if p.suffix in (".bin", ".pt", ".pkl", ".part")
    ]


def test_called_again_it_shows_the_same(finished, capsys):
    assert within(capsys, "repair", "--out", finished[0], *QUICK)[:2] == (
        0,
        finished[1],
    )


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
inputs = processor(images=picture, text="Question: is there a red shape? Short answer:", return_tensors="pt")
print(processor.decode(model.generate(**inputs, max_new_tokens=5)[0], skip_special_tokens=True))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(finished[0] / "model")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and done.stdout.strip(), done.stderr


def test_evaluate_opens_it(finished, capsys):
    code, said, _ = within(
        capsys, "evaluate", "--model", finished[0] / "model", "--limit", 20
    )
    assert code == 0 and "yes/no color" in said and "CIDEr" in said


def test_prune_saves_a_sparse_model(tmp_path, capsys):
    from ressa.cli.results import part_sparsity
    from ressa.models.load_model import load_model

    assert (
        within(
            capsys,
            "prune",
            "--pattern",
            "2:4",
            "--calibration",
            8,
            "--out",
            tmp_path / "out",
        )[0]
        == 0
    )
    sparsity = part_sparsity(load_model(str(tmp_path / "out" / "model"), "cpu")[0])
    assert sparsity == {"vision": 0.5, "interface": 0.0, "language": 0.5}


@pytest.mark.parametrize(
    "wrong, said",
    [
        (["--method", "wandering"], "method must be one of"),
        (["--sparsity", "1.3"], "sparsity must be in [0, 1)"),
        (["--sparsity", "-0.1"], "sparsity must be in [0, 1)"),
        (["--pattern", "2:7"], "divisible by 7"),
        (["--pattern", "4:2"], "pattern must be 'N:M'"),
        (["--pattern", "2:4", "--vision", "0.5"], "--pattern cannot go with --vision"),
        (["--limit", "0"], "--limit must be 1 or more"),
        (["--steps", "0"], "--steps must be 1 or more"),
        (["--lr", "-1"], "--lr must be above 0"),
        (["--distill-weight", "2"], "--distill-weight must be in [0, 1]"),
        (["--temperature", "0"], "--temperature must be above 0"),
        (["--device", "abacus"], "device 'abacus' is unknown"),
        (["--calibration", "1000000"], "rows are there"),
        (["--model", "no/such-model"], "no vision-language model there"),
    ],
)
def test_bad_wishes(tmp_path, capsys, wrong, said):
    from ressa.cli.app import main

    out = tmp_path / "out"
    assert main(["repair", "--out", str(out), *wrong]) == 2
    error = capsys.readouterr().err
    assert (
        error.startswith("ressa: error:")
        and said in error
        and len(error.splitlines()) == 1
    )
    assert not out.exists()


def test_a_folder_that_is_not_ours_is_not_touched(tmp_path, capsys):
    from ressa.cli.app import main

    (tmp_path / "thesis.txt").write_text("years of work")
    assert main(["repair", "--out", str(tmp_path), *QUICK]) == 2
    assert "is not empty" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_path_that_cannot_be_written(tmp_path, capsys):
    from ressa.cli.app import main

    (tmp_path / "file").write_text("")
    assert (
        main(["prune", "--calibration", "8", "--out", str(tmp_path / "file" / "out")])
        == 2
    )
    assert "cannot be written" in capsys.readouterr().err


def test_broken_checkpoints_are_refused(tmp_path, capsys):
    import shutil

    from ressa.cli.app import main
    from ressa.models.bundled import BUNDLED

    for name, damage in (
        ("cut", lambda f: f.write_bytes(f.read_bytes()[:1000])),
        ("pickle", lambda f: f.rename(f.with_name("pytorch_model.bin"))),
    ):
        shutil.copytree(BUNDLED, tmp_path / name)
        damage(tmp_path / name / "model.safetensors")
        assert main(["evaluate", "--model", str(tmp_path / name), "--limit", "5"]) == 2
        assert "no vision-language model there" in capsys.readouterr().err


def test_killed_and_called_again(tmp_path, finished):
    "SIGKILL in the middle leaves nothing that looks whole, and the same command finishes with the same numbers."
    out = tmp_path / "out"
    command = [COMMAND, "repair", "--out", str(out), *QUICK]
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"TQDM_DISABLE": "1"},
    )
    for line in process.stderr:
        if "repaired: 4 steps" in line:
            break  # tests/reliability/faults.py kills at any moment
    time.sleep(0.5)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (out / "run.json").exists() and not (out / "results.json").exists()
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results, undisturbed = (
        json.loads((place / "results.json").read_text()) for place in (out, finished[0])
    )
    for row in ("dense", "pruned", "plain_lora", "repaired"):
        assert results[row]["accuracy"] == undisturbed[row]["accuracy"], row
    assert results["zeros_filled"] == 0


def test_a_full_disk_is_said_and_nothing_is_lost(tmp_path, monkeypatch, capsys):
    import errno

    from ressa import cli

    monkeypatch.setattr(
        cli,
        "save_model",
        lambda *a: (_ for _ in ()).throw(
            OSError(errno.ENOSPC, "No space left on device")
        ),
    )
    assert (
        cli.main(["prune", "--calibration", "8", "--out", str(tmp_path / "out")]) == 1
    )
    assert "No space left on device" in capsys.readouterr().err
    assert (
        not (tmp_path / "out" / "model").exists()
        and not (tmp_path / "out" / "results.json").exists()
    )


def test_help_teaches(capsys):
    for command in ((), ("repair",), ("prune",), ("evaluate",)):
        code, said, _ = within(capsys, *command, "--help")
        assert code == 0 and "examples:" in said
    assert "in [0, 1)" in within(capsys, "repair", "--help")[1]


@pytest.fixture(scope="module")
def vqav2(tmp_path_factory):
    "Twelve rows a split in VQAv2's columns, in a folder of parquet files."
    from datasets import Dataset
    from tiny_models import picture

    folder = tmp_path_factory.mktemp("vqav2")
    for split in ("train", "validation"):
        rows = [
            dict(
                image=picture(20, 24, i),
                question="what color is the shape ?",
                answer_type="other",
                image_id=i,
                multiple_choice_answer="red",
                answers=[
                    dict(answer=a, answer_confidence="yes", answer_id=k)
                    for k, a in enumerate(["red"] * 7 + ["blue"] * 3)
                ],
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


TINY_RUN = [
    "--limit",
    "8",
    "--calibration",
    "4",
    "--test-batch",
    "4",
    "--sparsity",
    "0.5",
]


@pytest.mark.parametrize("name", ["LLaVA", "Idefics3", "InstructBLIP, T5"])
def test_repair_of_another_model_on_other_data(tmp_path, vqav2, name):
    from ressa.cli.app import main
    from ressa.cli.results import part_sparsity
    from ressa.models.load_model import load_model

    model, out = saved(name, tmp_path / "model"), tmp_path / "out"
    assert (
        main(
            [
                "repair",
                "--model",
                str(model),
                "--data",
                str(vqav2),
                "--out",
                str(out),
                "--steps",
                "2",
                "--batch-size",
                "4",
                *TINY_RUN,
            ]
        )
        == 0
    )
    results = json.loads((out / "results.json").read_text())
    assert results["dense"]["metric"] == "VQA accuracy" and results["zeros_filled"] == 0
    assert (
        results["blind"]["accuracy"] == 1
    )  # the commonest answer, and more than three people gave it
    for row in ("dense", "pruned", "plain_lora", "repaired"):
        assert 0 <= results[row]["accuracy"] <= 1
    assert (out / "report.html").read_text().endswith("</html>")
    repaired, processor = load_model(str(out / "model"), "cpu")
    assert part_sparsity(repaired)["language"] == pytest.approx(0.5, abs=0.01)
    assert (
        main(
            [
                "evaluate",
                "--model",
                str(out / "model"),
                "--data",
                str(vqav2),
                "--limit",
                "4",
            ]
        )
        == 0
    )


def test_evaluate_and_prune_on_other_data(tmp_path, vqav2, capsys):
    from ressa.cli.app import main
    from ressa.models.load_model import load_model

    model = saved("LLaVA", tmp_path / "model")
    assert (
        main(
            [
                "evaluate",
                "--model",
                str(model),
                "--data",
                str(vqav2),
                "--split",
                "train[:5]",
            ]
        )
        == 0
    )
    assert "VQA accuracy" in (said := capsys.readouterr().out) and "all      5" in said
    assert (
        main(
            [
                "prune",
                "--model",
                str(model),
                "--data",
                str(vqav2),
                "--dtype",
                "bfloat16",
                "--pattern",
                "2:4",
                "--calibration",
                "4",
                "--out",
                str(tmp_path / "out"),
            ]
        )
        == 0
    )
    pruned, _ = load_model(str(tmp_path / "out" / "model"), "cpu", "bfloat16")
    assert str(pruned.dtype) == "torch.bfloat16"
    assert (
        main(["evaluate", "--model", str(model), "--limit", "2"]) == 0
    )  # easy-VQA, in the model's own manner


def test_two_towers_are_measured_by_retrieval(tmp_path, capsys):
    from ressa.cli.app import main

    model = saved("CLIP", tmp_path / "model")
    assert (
        main(
            [
                "prune",
                "--model",
                str(model),
                "--calibration",
                "4",
                "--sparsity",
                "0.5",
                "--out",
                str(tmp_path / "out"),
            ]
        )
        == 0
    )
    capsys.readouterr()
    assert (
        main(["evaluate", "--model", str(tmp_path / "out" / "model"), "--limit", "12"])
        == 0
    )
    assert (
        "image→text: R@1" in (said := capsys.readouterr().out)
        and "text→image: R@1" in said
    )
    assert (
        main(
            ["repair", "--model", str(model), "--out", str(tmp_path / "no"), *TINY_RUN]
        )
        == 2
    )
    assert "two towers" in capsys.readouterr().err and not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    "wrong, said",
    [
        (["--data", "no/such-data"], "data no/such-data"),
        (["--split", "test"], "Unknown split"),
        (["--train-split", "training"], "say which split"),
        (["--dtype", "int3"], "dtype must be one of"),
        (["--train-limit", "0"], "--train-limit must be 1 or more"),
        (["--calibration", "13"], "only 12 rows are there"),
    ],
)
def test_bad_wishes_about_data(tmp_path, vqav2, capsys, wrong, said):
    from ressa.cli.app import main

    assert (
        main(
            [
                "repair",
                "--data",
                str(vqav2),
                "--calibration",
                "4",
                *wrong,
                "--out",
                str(tmp_path / "out"),
            ]
        )
        == 2
    )
    error = capsys.readouterr().err
    assert (
        said in error
        and len(error.splitlines()) == 1
        and not (tmp_path / "out").exists()
    )


def test_pack_and_unpack_give_the_same_weights(tmp_path, capsys):
    from safetensors.torch import load_file

    ordinary = next(
        (Path(__file__).parent.parent / "ressa" / "assets").rglob("model.safetensors")
    )
    packed, again = tmp_path / "packed", tmp_path / "again"
    assert (
        "MB became"
        in within(capsys, "pack", "--model", ordinary.parent, "--out", packed)[1]
    )
    assert within(capsys, "unpack", "--model", packed, "--out", again)[0] == 0
    old, new = load_file(ordinary), load_file(again / "model.safetensors")
    assert old.keys() == new.keys() and all(old[name].equal(new[name]) for name in old)
    code, _, error = within(
        capsys, "pack", "--model", tmp_path / "nowhere", "--out", tmp_path / "x"
    )
    assert code == 2 and "nowhere" in error
