"""The steps of a run: its folder, its models, and that each step is made once."""

import json

import pytest
import torch
from command_run import main_job_of
from warm_processes import together

from ressa.cli import main_job
from ressa.cli.app import parse
from ressa.cli.main_job import open_out, settings_of, stored_results
from ressa.cli.read_recipe import read_options
from ressa.cli.repair import KEYS


def options(*line):
    "The options of `ressa repair`."
    parsed = parse(["repair", *map(str, line)])
    read = read_options(parsed, *KEYS, training=True)
    read.line = parsed.line
    return read


TINY = "--limit 10 --train-limit 64 --steps 2 --batch-size 4 --calibration 8".split()


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
    one, other = settings_of(options("--out", "here")), settings_of(options())
    assert one == other and "version" in one and "out" not in one
    assert one["learning_rate"] == 2e-3 and one["sparsity"] == 0.8
    assert settings_of(options("--seed", "1")) != one
    assert settings_of(options("--weight-decay", "0.1")) != one
    assert settings_of(options("--test-batch", "3")) == one  # the same answers
    assert json.loads(json.dumps(one)) == one


def test_looking_writes_nothing(tmp_path):
    assert stored_results(tmp_path / "new", {"seed": 0}) is None
    assert not (tmp_path / "new").exists()


def count_models(monkeypatch):
    "Count the models with weights that are alive, and the most of them at once."
    import gc
    import weakref

    alive, counts = weakref.WeakSet(), []
    load = main_job.load_model

    def counted(*args, **more):
        model, processor = load(*args, **more)
        gc.collect()
        alive.add(model)
        counts.append(len(alive))
        return model, processor

    monkeypatch.setattr(main_job, "load_model", counted)
    return counts


COMPARED = (*TINY, "--compare", "labels", "--positions", "answer")


def without_drawings(monkeypatch):
    "Reports are looked at elsewhere; drawing one takes a third of a run as small as these."
    monkeypatch.setattr(main_job, "html_report", lambda *what: "<html></html>")


@pytest.fixture(scope="module")
def whole_runs(tmp_path_factory):
    "One whole run with each teacher: (folder, results, most models alive at once)."
    folder = tmp_path_factory.mktemp("teachers")
    runs = {}
    for teacher in ("model", "self", "cached"):
        out = folder / teacher
        with pytest.MonkeyPatch.context() as patched:
            counts = count_models(patched)
            without_drawings(patched)
            args = options(*COMPARED, "--teacher", teacher, "--out", out)
            results = main_job.main_job(args)
        runs[teacher] = out, results, max(counts)
    return runs


@pytest.mark.slow
@pytest.mark.parametrize("teacher, most", [("model", 2), ("self", 1), ("cached", 1)])
def test_how_many_models_are_alive(whole_runs, teacher, most):
    _, results, alive = whole_runs[teacher]
    assert alive <= most and results["zeros_filled"] == 0
    assert "labels" in results and "plain_lora" not in results


@pytest.mark.slow
def test_teachers_say_the_same(whole_runs):
    "The dense model in memory, and the removed values put back."
    logs = [whole_runs[name][1]["training"]["repaired"] for name in ("model", "self")]
    for one, other in zip(*logs):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)


@pytest.mark.slow
def test_two_processes_make_the_same_run(tmp_path, whole_runs):
    """Both train, on half of each batch; the first one alone measures and writes.

    Each reads what the first one has asked the teacher.
    """
    from safetensors.torch import load_file

    line = [*COMPARED, "--teacher", "cached", "--batch-size", "2"]
    together(2, main_job_of, [*line, "--out", str(tmp_path / "two")])
    results = json.loads((tmp_path / "two" / "results.json").read_text())
    alone, expected, _ = whole_runs["cached"]
    assert results["zeros_filled"] == 0
    for row in ("dense", "pruned"):
        assert results[row]["accuracy"] == expected[row]["accuracy"]
    for name, weight in load_file(tmp_path / "two/model/model.safetensors").items():
        one = load_file(alone / "model" / "model.safetensors")[name]
        torch.testing.assert_close(weight, one, rtol=0, atol=1e-3, msg=name)
    left = {path.name for path in (tmp_path / "two").iterdir()}
    assert left == {path.name for path in alone.iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize("teacher", ["model", "cached"])
def test_a_stopped_run_goes_on_where_it_was(tmp_path, monkeypatch, whole_runs, teacher):
    "Ctrl-C as the training begins: dense and pruned are not measured again."
    from safetensors.torch import load_file

    measured, measure = [], main_job.measure

    def stopped(*given, **more):
        raise KeyboardInterrupt

    def watched(*given, progress, **more):
        measured.append(progress)
        return measure(*given, progress=progress, **more)

    args = options(*COMPARED, "--teacher", teacher, "--out", tmp_path / "out")
    with monkeypatch.context() as patched:
        patched.setattr(main_job, "repair", stopped)
        with pytest.raises(KeyboardInterrupt):
            main_job.main_job(args)
    monkeypatch.setattr(main_job, "measure", watched)
    without_drawings(monkeypatch)
    results = main_job.main_job(args)
    assert measured == ["repaired", "labels"]
    folder, whole, _ = whole_runs[teacher]
    assert results["repaired"]["accuracy"] == whole["repaired"]["accuracy"]
    one = load_file(folder / "model" / "model.safetensors")
    other = load_file(tmp_path / "out" / "model" / "model.safetensors")
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert main_job.main_job(args)["repaired"] == json.loads(
        json.dumps(results["repaired"])
    )
    assert len(measured) == 2  # a run that has ended measures nothing


@pytest.mark.slow
def test_every_option_of_a_run_is_read(tmp_path):
    "An option that no code asks for would be ignored without a word."
    import dataclasses

    read = set()

    class Watched(type(options())):
        def __getattribute__(self, name):
            read.add(name)
            return super().__getattribute__(name)

    args = Watched(**vars(options(*TINY, "--out", tmp_path / "out", "--held-out", "4")))
    main_job.main_job(args)
    # of other data than easy-VQA
    args.data, args.split, args.columns = str(tmp_path / "none"), "x", '{"image": "i"}'
    with pytest.raises(ValueError):
        main_job.load_tests(args, None)
    own = {field.name for cls in KEYS for field in dataclasses.fields(cls)}
    assert own - read == set()


@pytest.mark.slow
def test_out_of_memory_ends_in_advice(tmp_path, monkeypatch):
    from ressa.cli.memory import TooLittleMemory

    def too_large(*given, **more):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

    monkeypatch.setattr(main_job, "draw_calibration", too_large)
    with pytest.raises(TooLittleMemory, match="What helps: .*saves") as caught:
        main_job.main_job(options(*TINY, "--out", tmp_path / "out"))
    assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)


@pytest.mark.slow
def test_too_little_memory_is_said_before_anything_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(main_job, "available_bytes", lambda *a, **more: 10**6)
    monkeypatch.setattr(main_job, "load_model", None)
    with pytest.raises(ValueError, match="needs .* by formula, and cpu has 1 MB free"):
        main_job.main_job(options(*TINY, "--out", tmp_path / "out"))
    assert not (tmp_path / "out").exists()
