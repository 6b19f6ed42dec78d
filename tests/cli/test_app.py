"""The command, as a user calls it: whole runs, fresh processes, wrong options, full disks."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from ressa.cli.app import COMMANDS

COMMAND = str(Path(sys.executable).parent / "ressa")
QUICK = "--limit 40 --steps 4 --batch-size 8 --calibration 16".split()
TINY_RUN = "--limit 8 --calibration 4 --test-batch 4 --sparsity 0.5".split()


# Help, without anything heavy


@pytest.mark.parametrize("command", [(), *((name,) for name in COMMANDS)])
def test_help_teaches(run, command):
    code, said, _ = run(*command, "--help")
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


def test_version(run):
    import ressa

    code, said, _ = run("--version")
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
def test_help_is_quick(line, run):
    "Half a second, counted in processor time, since other programs run beside the tests."
    resource = pytest.importorskip("resource")  # not on Windows

    def processor_seconds():
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    start = processor_seconds()
    subprocess.run([COMMAND, *line.split()], capture_output=True, check=True)
    assert processor_seconds() - start < 0.5


def test_the_package_runs_as_a_module(run):
    line = [sys.executable, "-m", "ressa"]
    done = subprocess.run([*line, "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("usage: ressa")
    done = subprocess.run([*line, "mend"], capture_output=True, text=True)
    assert done.returncode == 2 and "invalid choice: 'mend'" in done.stderr


def test_a_line_that_cannot_be_read(run):
    for line in ("", "mend", "repair --steps three", "repair --no-such-flag 1"):
        code, _, error = run(*line.split())
        assert code == 2 and "error:" in error
