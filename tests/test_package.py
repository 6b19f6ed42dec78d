"""The package as others install it: generated files, imports, the declared API, types, releases."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest

import ressa

ROOT = Path(__file__).parent.parent
LIBRARY = ROOT / "ressa"
DEVELOPMENT_TOOLS = (
    "nbdev",
    "execnb",
    "fastcore",
    "ghapi",
    "jupyterlab",
    "nbclient",
    "nbformat",
    "pytest",
    "hypothesis",
    "ruff",
)
# A module imports from packages to its left, or from its own.
LAYERS = (
    "palette",
    "files",
    "progress",
    "devices",
    "parts",
    "data",
    "models",
    "evaluation",
    "pruning",
    "allocation",
    "adaptation",
    "checkpoints",
    "cli",
    "course",
)


def modules():
    "All modules of the library but those that hold no code of their own."
    skipped = ("__init__.py", "__main__.py", "_modidx.py")
    return [p for p in sorted(LIBRARY.rglob("*.py")) if p.name not in skipped]


def python(code, *options):
    "What a fresh interpreter prints; its warnings are errors."
    done = subprocess.run(
        [sys.executable, "-W", "error", *options, "-c", code],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def tracked():
    "All files that belong to the project."
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    paths = [ROOT / name for name in listed.stdout.split("\n") if name]
    return [path for path in paths if path.is_file()]


def settings():
    found = ConfigParser(delimiters=["="])
    found.read(ROOT / "settings.ini")
    return found["DEFAULT"]


# --- the files are those that the notebooks make


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    "A copy of the project after export and clean."
    copy = tmp_path_factory.mktemp("copy") / "ressa"
    left_out = (".venv", ".git", "_proc", "_docs", "ressa-out*", "*.egg-info")
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*left_out))
    for tool in ("nbdev_export", "nbdev_clean"):
        done = subprocess.run(
            [str(Path(sys.executable).parent / tool)],
            cwd=copy,
            capture_output=True,
            text=True,
            env=os.environ | {"PYTHONPATH": str(copy)},
        )
        assert done.returncode == 0, done.stderr
    return copy


@pytest.mark.slow
def test_export_and_clean_change_nothing(exported):
    def texts(place, folder, ending):
        files = (place / folder).rglob(ending)
        return {str(p.relative_to(place)): p.read_text() for p in files}

    for folder, ending in (("ressa", "*.py"), ("nbs", "*.ipynb")):
        here, there = texts(ROOT, folder, ending), texts(exported, folder, ending)
        assert here.keys() == there.keys()
        for name in here:
            assert here[name] == there[name], f"{name}: run make export"


def test_readme_is_the_index():
    sys.path.insert(0, str(ROOT / "nbs" / "site"))
    from readme import readme

    text, pictures = readme()
    assert (ROOT / "README.md").read_text() == text, "run make export"
    for name, data in pictures.items():
        assert (ROOT / "nbs" / name).read_bytes() == data


def test_top_level_holds_the_house_only():
    allowed = {
        "nbs",
        "ressa",
        "tests",
        "settings.ini",
        "setup.py",
        "README.md",
        "Makefile",
        "LICENSE",
        "CHANGELOG.md",
        "CONTRIBUTING.md",
        "MANIFEST.in",
        "pyproject.toml",
        ".gitignore",
        ".pre-commit-config.yaml",
        ".ci",
        ".github",
    }
    assert {p.relative_to(ROOT).parts[0] for p in tracked()} <= allowed


def test_every_module_has_a_test_that_its_name_finds():
    for path in modules():
        inside = path.relative_to(LIBRARY)
        if inside.parts[:2] == ("course", "checks"):
            continue  # proven by the chapters' exercises: tests/nbs/test_exercises.py
        test = ROOT / "tests" / inside.with_name(f"test_{inside.name}")
        assert test.exists(), f"{inside} has no {test.relative_to(ROOT)}"


# --- imports


def imported_layers(path):
    "The first part of the name of each module of ours that a module imports."
    inside = path.relative_to(LIBRARY).parts
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ImportFrom):
            continue
        if node.level:
            package = inside[: len(inside) - node.level]
            module = (*package, *(node.module or "").split("."))[0]
            if module:  # `from .. import __version__` is of no layer
                yield module
        elif (node.module or "").startswith("ressa."):
            yield node.module.split(".")[1]


def test_imports_run_one_way():
    for path in modules():
        own = path.relative_to(LIBRARY).with_suffix("").parts[0]
        for layer in imported_layers(path):
            fits = LAYERS.index(layer) <= LAYERS.index(own)
            assert fits, f"{path.relative_to(LIBRARY)} imports ressa.{layer}"


def test_nothing_in_the_library_serves_the_lessons_alone():
    for path in modules():
        if path.relative_to(LIBRARY).parts[0] == "course":
            continue
        text = path.read_text()
        assert not re.search(r"^def check_", text, re.M), path
        assert "ipywidgets" not in text, path


def test_importing_ressa_is_quick_and_loads_no_torch():
    code = """
import sys, time
start = time.perf_counter()
import ressa
seconds = time.perf_counter() - start
print([m for m in ("torch", "numpy", "transformers") if m in sys.modules], seconds)
"""
    loaded, seconds = python(code).rsplit(" ", 1)
    assert loaded == "[]"
    assert float(seconds) < 0.1


def test_the_public_names_are_those_that_are_declared():
    assert set(ressa.__all__) <= set(dir(ressa))
    for name in ressa.__all__:
        value = getattr(ressa, name)
        assert callable(value) and value.__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'prun'"):
        _ = ressa.prun


def test_type_checkers_see_the_public_names():
    tree = ast.parse((LIBRARY / "__init__.py").read_text())
    hinted = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            hinted |= {alias.name: node.module for alias in node.names}
    assert hinted == ressa._HOME


@pytest.mark.slow
def test_imports_without_development_tools_and_without_warnings():
    names = [
        ".".join(("ressa", *p.relative_to(LIBRARY).with_suffix("").parts))
        for p in modules()
        if p.relative_to(LIBRARY).parts[0] != "course"
    ]
    code = f"""
import sys
for name in {DEVELOPMENT_TOOLS!r}:
    sys.modules[name] = None  # importing it fails, as if it were not installed
from ressa import *
given = sorted(name for name in globals() if not name.startswith("_"))
import {", ".join(names)}
heavy = ("matplotlib", "ipywidgets", "IPython", "pycocoevalcap")
print(given, [name for name in heavy if name in sys.modules], sep="|")
"""
    given, heavy = python(code).split("|")
    assert given == str(sorted([*ressa.__all__, "name", "sys"]))
    assert heavy == "[]", "heavy, and not always needed"


@pytest.mark.slow
def test_types():
    "Every hint agrees with what the code does; `py.typed` tells other checkers that they may rely on it."
    pytest.importorskip("mypy")
    done = subprocess.run(
        [sys.executable, "-m", "mypy"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert (LIBRARY / "py.typed").exists()
    assert "py.typed" in (ROOT / "setup.py").read_text()


def test_lint():
    ruff = shutil.which("ruff", path=str(Path(sys.executable).parent))
    if ruff is None:
        pytest.skip("ruff is not installed")
    done = subprocess.run(
        [ruff, "check", "ressa", "tests", "nbs"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:]


# --- releases


def requirements():
    return settings()["version"], settings()["requirements"].split()


def test_the_oldest_releases_are_those_that_are_allowed():
    lines = (ROOT / ".ci" / "oldest.txt").read_text().split("\n")
    pinned = dict(line.split("==") for line in lines if "==" in line)
    lowest = dict(entry.split(">=") for entry in requirements()[1] if ">=" in entry)

    def padded(version):
        return version + ".0" * (2 - version.count("."))

    assert {name: padded(v) for name, v in pinned.items()} == {
        name: padded(v) for name, v in lowest.items()
    }


def test_the_release_was_installed_and_run_in_empty_environments():
    "The stored story of each row of the matrix: tests/tools/release.py."
    path = ROOT / "nbs" / "results" / "release.json"
    stored = json.loads(path.read_text())
    if stored["version"] != requirements()[0]:
        pytest.skip("not released yet: python tests/tools/release.py")
    matrix = json.loads((ROOT / ".ci/matrix.json").read_text())
    assert {row["name"] for row in stored["rows"]} <= {row["name"] for row in matrix}
    for row in stored["rows"]:
        assert [step["exit"] for step in row["story"]] == [0] * len(row["story"])
        assert any("ressa repair" in step["command"] for step in row["story"])
        assert any(re.match(r"\d+ passed", step["said"]) for step in row["story"])


def test_the_assets_are_small_and_ordinary():
    files = [p for p in (LIBRARY / "assets").rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) <= 14 * 2**20
    kinds = {".json", ".safetensors", ".jinja", ".yaml"}
    assert {p.suffix for p in files} <= kinds


def test_settings():
    assert settings()["author"] == "The ressa authors"
    assert settings()["version"] == ressa.__version__
    assert settings()["version"] in (ROOT / "CHANGELOG.md").read_text()


def test_no_paths_of_a_machine_and_no_pickles():
    forbidden = (
        "/root/",
        "/home/",
        "torch.load(",
        "pickle.load(",
        "trust_remote_code=True",
    )
    for path in tracked():
        if path.suffix in (".safetensors", ".png") or path == Path(__file__):
            continue
        text = path.read_text(encoding="utf-8", errors="ignore")
        for word in forbidden:
            assert word not in text, f"{word} in {path.relative_to(ROOT)}"
