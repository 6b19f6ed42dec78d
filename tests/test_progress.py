"""Progress: bars that obey TQDM_DISABLE and say which model; lines where no terminal is."""

import io
import sys

import pytest
from tqdm import std
from tqdm.auto import tqdm

from ressa.progress import lines_off_a_terminal, progress_bar, quiet_libraries


def test_a_bar_says_which_model_and_what():
    bar = progress_bar(
        [1, 2], show="dense", doing="answer", file=io.StringIO(), disable=False
    )
    assert list(bar) == [1, 2] and bar.desc == "dense: answer"
    assert progress_bar([1], show=False, doing="answer").disable


@pytest.mark.parametrize("value, off", [("1", True), ("", False)])
def test_the_environment_switches_bars_off(value, off):
    "tqdm reads it when it is imported, so another process is asked."
    import os
    import subprocess

    code = (
        "from ressa.progress import progress_bar\n"
        "print(progress_bar([1], doing='x', show='dense').disable)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | {"TQDM_DISABLE": value},
    )
    assert done.stdout.strip() == str(off)


def test_lines_off_a_terminal(monkeypatch, capsys):
    for name in ("status_printer", "close", "moveto"):
        monkeypatch.setattr(std.tqdm, name, vars(std.tqdm)[name])
    monkeypatch.setenv("TQDM_MININTERVAL", "0")
    lines_off_a_terminal()
    for _ in range(3):
        for _ in tqdm(range(50), desc="work", mininterval=0, disable=False):
            pass
    shown = capsys.readouterr().err
    assert len(shown.splitlines()) == 1 and "work" in shown and "\r" not in shown


def test_quiet_libraries():
    import transformers

    before = transformers.logging.get_verbosity()
    quiet_libraries()
    assert transformers.logging.get_verbosity() == transformers.logging.ERROR
    transformers.logging.set_verbosity(before)
