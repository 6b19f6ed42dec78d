"""Studies that are stopped: nothing is lost, nothing is done twice."""

import functools
import json
import signal
import time

import numpy as np
import pytest
from runs import fails_at_two, noted
from warm_processes import started

from ressa.course.studies import pack_right, run_study, unpack_right

SETTINGS = [dict(x=x, seed=seed) for seed in range(10) for x in range(3)]


def rows_in(path):
    "The rows of the file; fails if the file is not complete."
    if not path.exists():
        return []
    return json.loads(path.read_text())["rows"]


@pytest.mark.slow
def test_a_killed_study_loses_nothing(tmp_path):
    "The file is complete after each kill, and only interrupted runs are made twice."
    path, log = tmp_path / "study.json", tmp_path / "log"
    run = functools.partial(noted, log=log, wait=0.05)
    before = 0
    for more in (3, 8):
        child = started(run_study, path, run, SETTINGS, progress=False)
        while len(rows_in(path)) < before + more and child.is_alive():
            time.sleep(0.01)
        child.kill()
        child.join()
        assert child.exitcode == -signal.SIGKILL
        kept = len(rows_in(path))
        assert before + more <= kept < len(SETTINGS)
        before = kept
    rows = run_study(path, functools.partial(noted, log=log), SETTINGS, progress=False)
    assert [row["setting"] for row in rows] == SETTINGS
    assert len(rows_in(path)) == len(SETTINGS)
    for row in rows:
        assert row["sum"] == row["setting"]["x"] + row["setting"]["seed"]
    made = log.read_text().split("\n")[:-1]
    assert len(set(made)) == len(SETTINGS) <= len(made) <= len(SETTINGS) + 2


@pytest.mark.slow
def test_two_workers_give_the_same_rows_in_the_same_order(tmp_path):
    settings = SETTINGS[:6]
    run = functools.partial(noted, log=tmp_path / "log")
    one, two = tmp_path / "one.json", tmp_path / "two.json"
    alone = run_study(one, run, settings, progress=False)
    assert run_study(two, run, settings, workers=2, progress=False) == alone
    assert sorted(map(str, rows_in(two))) == sorted(map(str, alone))


@pytest.mark.parametrize("again", [dict(seed=0, x=1), dict(x=1, seed=0)])
def test_equal_settings_run_once_whatever_the_order_of_keys(tmp_path, again):
    log, path = tmp_path / "log", tmp_path / "study.json"
    run = functools.partial(noted, log=log)
    first = run_study(path, run, [dict(x=1, seed=0), again], progress=False)
    second = run_study(path, run, [again], progress=False)
    assert first == second * 2
    assert log.read_text() == "1 0\n"


def test_a_failing_run_leaves_the_earlier_rows(tmp_path):
    path = tmp_path / "study.json"
    settings = [dict(x=x) for x in range(5)]
    with pytest.raises(ZeroDivisionError):
        run_study(path, fails_at_two, settings, progress=False)
    assert [row["setting"]["x"] for row in rows_in(path)] == [0, 1]
    run_study(path, fails_at_two, settings[3:], progress=False)
    assert [row["setting"]["x"] for row in rows_in(path)] == [0, 1, 3, 4]
    assert [file.name for file in tmp_path.iterdir()] == ["study.json"]


@pytest.mark.slow
def test_a_failing_worker_ends_the_study_with_its_error(tmp_path):
    path = tmp_path / "study.json"
    settings = [dict(x=2), dict(x=4)]
    with pytest.raises(ZeroDivisionError, match="at two"):
        run_study(path, fails_at_two, settings, workers=2, progress=False)


def test_a_result_that_json_cannot_hold_spoils_nothing(tmp_path):
    path = tmp_path / "study.json"

    def run(x):
        return {"x": np.float32(x) if x else 0}

    with pytest.raises(TypeError, match="float32"):
        run_study(path, run, [dict(x=0), dict(x=1)], progress=False)
    assert rows_in(path) == [{"setting": {"x": 0}, "x": 0}]


def test_what_the_file_says_about_itself_is_kept(tmp_path):
    path = tmp_path / "study.json"
    first = dict(device="cpu", command="a")
    run_study(path, fails_at_two, [dict(x=0)], progress=False, **first)
    run_study(path, fails_at_two, [dict(x=1)], progress=False, command="b")
    study = json.loads(path.read_text())
    assert (study["device"], study["command"], len(study["rows"])) == ("cpu", "b", 2)


@pytest.mark.parametrize("run", [lambda x: {}, functools.partial(lambda x: {})])
def test_functions_that_cannot_be_sent_are_refused_before_anything_runs(tmp_path, run):
    path = tmp_path / "study.json"
    with pytest.raises(ValueError, match="put it into a module"):
        run_study(path, run, [dict(x=0)], workers=2, progress=False)
    with pytest.raises(ValueError, match="workers must be"):
        run_study(path, run, [dict(x=0)], workers=0, progress=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("n", [1, 7, 8, 9, 1000, 9673])
def test_packing_is_exact_and_short(n):
    right = (np.random.default_rng(0).random(n) < 0.5).astype(float)
    text = pack_right(right)
    assert (unpack_right(text, n) == right).all()
    assert len(text) <= n / 6 + 4
    for wrong in (n + 8, n - 9):
        with pytest.raises(ValueError, match="does not fit"):
            unpack_right(text, wrong)
