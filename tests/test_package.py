"""The library is what the notebooks export, and stands on its own."""

import json
import os
import re
import shutil
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TOOLS = (
    "nbdev",
    "execnb",
    "fastcore",
    "ghapi",
    "jupyterlab",
    "nbclient",
    "nbformat",
    "pytest",
    "hypothesis",
)


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
    return [
        ROOT / name
        for name in listed.stdout.split("\n")
        if name and (ROOT / name).is_file()
    ]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    "A copy of the project after export and clean."
    copy = tmp_path_factory.mktemp("copy") / "ressa"
    shutil.copytree(
        ROOT,
        copy,
        ignore=shutil.ignore_patterns(
            ".venv", ".git", "_proc", "_docs", "ressa-out*", "*.egg-info"
        ),
    )
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


def test_export_and_clean_change_nothing(exported):
    for folder, ending in (("ressa", "*.py"), ("nbs", "*.ipynb")):
        here, there = (
            {p.name: p.read_text() for p in (place / folder).glob(ending)}
            for place in (ROOT, exported)
        )
        assert here.keys() == there.keys()
        for name in here:
            assert here[name] == there[name], f"{folder}/{name}: run make export"


def test_readme_is_the_index():
    sys.path.insert(0, str(ROOT / "nbs"))
    from readme import readme

    text, pictures = readme()
    assert (ROOT / "README.md").read_text() == text, "run make export"
    assert all(
        (ROOT / "nbs" / name).read_bytes() == data for name, data in pictures.items()
    )


def test_imports_without_development_tools():
    code = f"""
import sys
for name in {TOOLS!r}: sys.modules[name] = None  # importing it fails, as if it were not installed
import ressa.all, ressa.cli
from ressa.all import prune, repair, load_bundled, evaluate, get_peft_model
"""
    done = subprocess.run(
        [sys.executable, "-W", "error::SyntaxWarning", "-c", code],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_import_warns_of_nothing_and_draws_nothing():
    "What is heavy and not always needed is imported by the function that needs it; its time is in nbs/results/release.json."
    code = """
import sys, ressa.all, ressa.cli
print([m for m in ("matplotlib", "ipywidgets", "IPython", "pycocoevalcap") if m in sys.modules])"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_types():
    "Every hint agrees with what the code does; `py.typed` tells other people's checkers that they may rely on it."
    pytest.importorskip("mypy")
    done = subprocess.run(
        [sys.executable, "-m", "mypy"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert (ROOT / "ressa" / "py.typed").exists() and "py.typed" in (
        ROOT / "setup.py"
    ).read_text()


def requirements():
    settings = ConfigParser(delimiters=["="])
    settings.read(ROOT / "settings.ini")
    return settings["DEFAULT"]["version"], settings["DEFAULT"]["requirements"].split()


def test_the_oldest_releases_are_those_that_are_allowed():
    pinned = dict(
        line.split("==")
        for line in (ROOT / ".ci" / "oldest.txt").read_text().split("\n")
        if "==" in line
    )
    assert pinned == {
        name: lowest + ".0" * (2 - lowest.count("."))
        if name in pinned and pinned[name].count(".") == 2
        else lowest
        for name, lowest in (
            entry.split(">=") for entry in requirements()[1] if ">=" in entry
        )
    }


def test_the_release_was_installed_and_run_in_empty_environments():
    "The stored story of each row of the matrix: tests/release.py."
    path = ROOT / "nbs" / "results" / "release.json"
    if not path.exists():
        pytest.skip("no story is stored: python tests/release.py")
    stored = json.loads(path.read_text())
    assert stored["version"] == requirements()[0], "run python tests/release.py"
    assert {row["name"] for row in stored["rows"]} <= {
        row["name"] for row in json.loads((ROOT / ".ci/matrix.json").read_text())
    }
    for row in stored["rows"]:
        assert [step["exit"] for step in row["story"]] == [0] * len(row["story"]), row[
            "name"
        ]
        assert any("ressa repair" in step["command"] for step in row["story"])
        assert any(re.match(r"\d+ passed", step["said"]) for step in row["story"])
        assert row["import"]["own_seconds"] < 0.2, (
            "what importing costs beyond what others' packages cost"
        )


def test_the_model_is_small_and_ordinary():
    assets = ROOT / "ressa" / "assets"
    files = [p for p in assets.rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) <= 4 * 2**20
    assert {p.suffix for p in files} == {".json", ".safetensors"}


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
        "MANIFEST.in",
        "pyproject.toml",
        ".gitignore",
        ".ci",
        ".github",
    }
    assert {p.relative_to(ROOT).parts[0] for p in tracked()} <= allowed


def test_settings():
    settings = ConfigParser(delimiters=["="])
    settings.read(ROOT / "settings.ini")
    assert settings["DEFAULT"]["author"] == "The ressa authors"
    assert settings["DEFAULT"]["version"] in (ROOT / "CHANGELOG.md").read_text()


def test_no_paths_of_a_machine_and_no_pickles():
    for path in tracked():
        if path.suffix in (".safetensors", ".png") or path == Path(__file__):
            continue
        text = path.read_text(encoding="utf-8", errors="ignore")
        for word in (
            "/root/",
            "/home/",
            "torch.load(",
            "pickle.load",
            "trust_remote_code=True",
        ):
            assert word not in text, f"{word} in {path.relative_to(ROOT)}"


def test_everything_public_is_in_all():
    import ressa.all as everything

    for name in (
        "prune",
        "repair",
        "wanda",
        "magnitude",
        "select",
        "evaluate",
        "SparseLoraConfig",
        "RessaTrainer",
        "RessaArguments",
        "Statistics",
        "modality_map",
        "distillation_loss",
        "calibration_batch",
    ):
        assert name in everything.__all__
