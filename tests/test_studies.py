"""Studies that are stopped: nothing is lost, nothing is done twice."""

import functools
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from runs import fails_at_two, noted

from ressa.course.studies import pack_right, run_study, unpack_right
from ressa.evaluation.intervals import interval

SETTINGS = [dict(x=x, seed=seed) for seed in range(10) for x in range(3)]


def whole(path):
    "The rows of the file; fails if the file is not whole."
    return json.loads(path.read_text())["rows"] if path.exists() else []


def test_a_killed_study_loses_nothing(tmp_path):
    "SIGKILL at several moments: the file is whole each time, and only interrupted runs are made twice."
    path, log = tmp_path / "study.json", tmp_path / "log"
    code = (
        f"import functools, sys; sys.path.insert(0, {os.path.dirname(__file__)!r})\n"
        "from runs import noted; from ressa.studies import run_study\n"
        f"run = functools.partial(noted, log={str(log)!r}, wait=0.05)\n"
        f"run_study({str(path)!r}, run, {SETTINGS}, progress=False)"
    )
    before = 0
    for more in (3, 8):
        child = subprocess.Popen([sys.executable, "-c", code])
        while len(whole(path)) < before + more and child.poll() is None:
            time.sleep(0.01)
        child.send_signal(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
        assert before + more <= len(rows := whole(path)) < len(SETTINGS)
        before = len(rows)
    rows = run_study(path, functools.partial(noted, log=log), SETTINGS, progress=False)
    made = log.read_text().split("\n")[:-1]
    assert [row["setting"] for row in rows] == SETTINGS and len(whole(path)) == len(
        SETTINGS
    )
    assert all(
        row["sum"] == row["setting"]["x"] + row["setting"]["seed"] for row in rows
    )
    assert len(SETTINGS) <= len(made) <= len(SETTINGS) + 2 and len(set(made)) == len(
        SETTINGS
    )


def test_two_workers_give_the_same_rows_in_the_same_order(tmp_path):
    settings, run = SETTINGS[:6], functools.partial(noted, log=tmp_path / "log")
    alone = run_study(tmp_path / "one.json", run, settings, progress=False)
    assert (
        run_study(tmp_path / "two.json", run, settings, workers=2, progress=False)
        == alone
    )
    assert sorted(map(str, whole(tmp_path / "two.json"))) == sorted(map(str, alone))


@pytest.mark.parametrize("again", [dict(seed=0, x=1), dict(x=1, seed=0)])
def test_equal_settings_run_once_whatever_the_order_of_keys(tmp_path, again):
    log, path = tmp_path / "log", tmp_path / "study.json"
    run = functools.partial(noted, log=log)
    first = run_study(path, run, [dict(x=1, seed=0), again], progress=False)
    second = run_study(path, run, [again], progress=False)
    assert first == second * 2 and log.read_text() == "1 0\n"


def test_a_failing_run_leaves_the_earlier_rows(tmp_path):
    path, settings = tmp_path / "study.json", [dict(x=x) for x in range(5)]
    with pytest.raises(ZeroDivisionError):
        run_study(path, fails_at_two, settings, progress=False)
    assert [row["setting"]["x"] for row in whole(path)] == [0, 1]
    run_study(path, fails_at_two, settings[3:], progress=False)
    assert [row["setting"]["x"] for row in whole(path)] == [0, 1, 3, 4]
    assert not list(tmp_path.glob("*.part"))


def test_a_failing_worker_ends_the_study_with_its_error(tmp_path):
    with pytest.raises(ZeroDivisionError, match="at two"):
        run_study(
            tmp_path / "s.json",
            fails_at_two,
            [dict(x=2), dict(x=4)],
            workers=2,
            progress=False,
        )


def test_a_result_that_json_cannot_hold_spoils_nothing(tmp_path):
    path = tmp_path / "study.json"

    def run(x):
        return {"x": np.float32(x) if x else 0}

    with pytest.raises(TypeError, match="float32"):
        run_study(path, run, [dict(x=0), dict(x=1)], progress=False)
    assert whole(path) == [{"setting": {"x": 0}, "x": 0}]


def test_what_the_file_says_of_itself_is_kept(tmp_path):
    path = tmp_path / "study.json"
    run_study(
        path, fails_at_two, [dict(x=0)], progress=False, device="cpu", command="a"
    )
    run_study(path, fails_at_two, [dict(x=1)], progress=False, command="b")
    study = json.loads(path.read_text())
    assert (study["device"], study["command"], len(study["rows"])) == ("cpu", "b", 2)


@pytest.mark.parametrize("run", [lambda x: {}, functools.partial(lambda x: {})])
def test_functions_that_cannot_be_sent_are_refused_before_anything_runs(tmp_path, run):
    with pytest.raises(ValueError, match="put it into a module"):
        run_study(tmp_path / "s.json", run, [dict(x=0)], workers=2, progress=False)
    with pytest.raises(ValueError, match="workers must be"):
        run_study(tmp_path / "s.json", run, [dict(x=0)], workers=0, progress=False)
    assert not list(tmp_path.iterdir())


def test_packing_is_exact_and_short():
    rng = np.random.default_rng(0)
    for n in (1, 7, 8, 9, 1000, 9673):
        right = (rng.random(n) < 0.5).astype(float)
        assert (unpack_right(text := pack_right(right), n) == right).all() and len(
            text
        ) <= n / 6 + 4
    for wrong in (n + 8, n - 9):
        with pytest.raises(ValueError, match="does not fit"):
            unpack_right(text, wrong)


def test_a_paired_interval_covers_the_true_difference_and_is_narrower():
    "Coverage of the interval of a difference over seeds and questions, on drawn studies with a known one."
    rng, inside, widths = np.random.default_rng(0), 0, []
    for _ in range(200):
        hard, luck = rng.normal(size=300), rng.normal(size=(12, 1)) * 0.3
        a, b = (
            hard + luck + shift + 0.3 * rng.normal(size=(12, 300)) > 0
            for shift in (0.3, 0.1)
        )
        low, high = interval(a.astype(float) - b, draws=300)
        unpaired = interval(
            a[rng.permutation(12)][:, rng.permutation(300)].astype(float) - b, draws=100
        )
        true = _phi(0.3 / np.sqrt(1.18)) - _phi(0.1 / np.sqrt(1.18))
        inside += low <= true <= high
        widths.append((high - low) / (unpaired[1] - unpaired[0]))
    assert 0.88 <= inside / 200 <= 1 and np.median(widths) < 0.7


def _phi(x):
    from math import erf, sqrt

    return (1 + erf(x / sqrt(2))) / 2
