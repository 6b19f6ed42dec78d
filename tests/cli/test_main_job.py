"""The steps of a run: its folder, its data, and that each step is made once."""

import json
from argparse import Namespace

import pytest

from ressa.cli import main_job
from ressa.cli.app import parse
from ressa.cli.main_job import (
    draw_calibration,
    load_tests,
    load_training,
    open_out,
    settings_of,
)


def test_a_folder_belongs_to_one_run(tmp_path):
    out = tmp_path / "new" / "out"
    assert open_out(out, {"seed": 0}) is None
    assert open_out(out, {"seed": 0}) is None  # the same run, resumed
    with pytest.raises(ValueError, match="a run with another seed"):
        open_out(out, {"seed": 1})
    (out / "results.json").write_text('{"dense": 1}')
    assert open_out(out, {"seed": 0}) == {"dense": 1}  # it had ended


def test_killed_as_the_settings_were_written(tmp_path):
    (tmp_path / "run.json.part").write_text('{"see')
    assert open_out(tmp_path, {"seed": 0}) is None
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_a_folder_of_something_else(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="is not empty"):
        open_out(tmp_path, {})
    with pytest.raises(ValueError, match="cannot be written"):
        open_out(tmp_path / "thesis.txt" / "in", {})


@pytest.mark.parametrize("name", ["run.json", "results.json"])
def test_a_broken_file_of_a_run_is_named(tmp_path, name):
    open_out(tmp_path / "out", {"seed": 0})
    (tmp_path / "out" / name).write_text('{"seed"')
    with pytest.raises(ValueError, match=name):
        open_out(tmp_path / "out", {"seed": 0})


def test_settings_are_what_decides_the_results():
    one = settings_of(parse(["repair", "--out", "here"]))
    other = settings_of(parse(["repair", "--out", "there"]))
    assert one == other and "version" in one and "out" not in one
    assert settings_of(parse(["repair", "--seed", "1"])) != one
    assert json.loads(json.dumps(one)) == one


def test_tests_and_training_of_easy_vqa(bundled):
    _, processor = bundled
    args = Namespace(data="easy-vqa", limit=7)
    questions, captions = load_tests(args, processor)
    assert len(questions) == len(captions) == 7
    assert set(captions["question_type"]) == {"caption"}
    args.limit = None
    assert [len(test) for test in load_tests(args, processor)] == [9673, 888]
    prompt = load_training(args, processor)["prompt"][0]
    assert prompt.startswith("Question: ") and prompt.endswith(" Short answer:")


def test_calibration_is_drawn_by_the_seed(bundled, data):
    import torch

    model, processor = bundled

    def drawn(seed):
        args = Namespace(calibration=5, seed=seed)
        return draw_calibration(args, model, data[0], processor)["input_ids"]

    assert torch.equal(drawn(0), drawn(0)) and not torch.equal(drawn(0), drawn(1))
    with pytest.raises(ValueError, match="--calibration 9: only 3 examples"):
        args = Namespace(calibration=9, seed=0)
        draw_calibration(args, model, data[0].select(range(3)), processor)


@pytest.mark.slow
def test_a_stopped_run_goes_on_where_it_was(tmp_path, monkeypatch, capsys):
    "Ctrl-C as the second training begins: only that training is made again."
    options = "--limit 10 --steps 2 --batch-size 4 --calibration 8".split()
    args = parse(["repair", *options, "--out", str(tmp_path / "out")])
    repair, adapters = main_job.repair, []

    def stopped(*given, adapter, **more):
        if adapter == "sparselora":
            raise KeyboardInterrupt
        return repair(*given, adapter=adapter, **more)

    def watched(*given, adapter, **more):
        adapters.append(adapter)
        return repair(*given, adapter=adapter, **more)

    with monkeypatch.context() as patched:
        patched.setattr(main_job, "repair", stopped)
        with pytest.raises(KeyboardInterrupt):
            main_job.main_job(args)
    kept = json.loads((tmp_path / "out" / "steps.json").read_text())
    assert "plain_lora" in kept and "repaired" not in kept
    monkeypatch.setattr(main_job, "repair", watched)
    results = main_job.main_job(args)
    assert adapters == ["sparselora"]
    assert results["plain_lora"]["accuracy"] == kept["plain_lora"]["accuracy"]
    assert main_job.main_job(args)["repaired"] == json.loads(
        json.dumps(results["repaired"])
    )
    assert adapters == ["sparselora"]  # a run that has ended trains nothing
