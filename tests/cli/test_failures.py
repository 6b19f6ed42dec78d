"""Failures: every kind of exception has one line and a code; Ctrl-C is always Ctrl-C."""

import errno
import io
import os
import re
import signal
import sys

import jinja2
import PIL
import pytest
import torch
from safetensors import SafetensorError

from ressa.cli.failures import Interrupts, explained, failure_of, print_safely
from ressa.files import SystemRefused
from ressa.pruning.engine import HalfPrunedError


def caused(error, cause):
    error.__cause__ = cause
    return error


FULL = OSError(errno.ENOSPC, "No space left on device", "there/file")


@pytest.mark.parametrize(
    "error, code, said",
    [
        (ValueError("two\nlines"), 2, "two lines"),
        (SystemRefused("out: cannot be written"), 1, "out: cannot be written"),
        (FULL, 1, "there/file: No space left on device"),
        (OSError("transformers says"), 1, "transformers says"),
        (SafetensorError("header"), 1, "header"),
        (jinja2.UndefinedError("no 'x'"), 2, "chat template.*no 'x'"),
        (PIL.Image.DecompressionBombError("5 pixels"), 2, "too large.*5 pixels"),
        (PIL.UnidentifiedImageError("no image"), 2, "cannot be read: no image"),
        (ModuleNotFoundError("No module named 'gguf'"), 2, "missing.*'gguf'"),
        (
            torch.OutOfMemoryError("CUDA out of memory"),
            1,
            "What helps: --teacher cached",
        ),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 1, "What helps"),
        (MemoryError(), 1, "out of memory: MemoryError. What helps"),
        (HalfPrunedError("stopped after 3"), 1, "stopped after 3"),
        (
            caused(HalfPrunedError("stopped"), torch.OutOfMemoryError("CUDA")),
            1,
            "out of memory",
        ),
        (KeyError("x"), 1, "KeyError: 'x' .this was not expected: RESSA_DEBUG=1"),
    ],
)
def test_each_kind_has_one_line_and_a_code(capsys, error, code, said):
    def fail(argv):
        raise error

    assert explained(fail, ["prune"]) == code
    line = capsys.readouterr().err
    assert len(line.splitlines()) == 1 and line.startswith("ressa: error: ")
    assert re.search(said, line)
    assert failure_of(error).code == code


def test_what_is_kept_is_said(capsys):
    def fail(argv):
        raise FULL

    explained(fail, ["repair"])
    assert "the same command goes on from there" in capsys.readouterr().err
    explained(fail, ["prune"])
    assert "Nothing half-written is left" in capsys.readouterr().err


def test_ctrl_c_in_the_middle_of_an_import(capsys):
    "Extension modules turn it into other errors."

    def importing(argv):
        try:
            os.kill(os.getpid(), signal.SIGINT)
        except KeyboardInterrupt as stop:
            raise ImportError("numpy.core.multiarray failed to import") from stop

    before = signal.getsignal(signal.SIGINT)
    assert explained(importing, ["repair"]) == 130
    assert "stopped" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_is_noted():
    with Interrupts() as interrupts:
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        assert interrupts.came


def test_a_terminal_without_the_letters(monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    print_safely()
    print("· λ = 0.5 → done")
    terminal.flush()
    assert terminal.buffer.getvalue() == b"? ? = 0.5 ? done\n"


def test_the_cause_is_kept_for_those_who_ask(capsys, monkeypatch):
    def fail(argv):
        raise ValueError("the row 3") from KeyError("image")

    monkeypatch.setenv("RESSA_DEBUG", "1")
    explained(fail, ["prune"])
    shown = capsys.readouterr().err
    assert "KeyError: 'image'" in shown and "ValueError: the row 3" in shown
