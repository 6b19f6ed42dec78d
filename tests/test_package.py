"""The library is what the notebooks export, and stands on its own."""
import os
import shutil
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TOOLS = ("nbdev", "execnb", "fastcore", "ghapi", "jupyterlab", "nbclient", "nbformat", "pytest", "hypothesis")


def tracked():
    "All files that belong to the project."
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode: pytest.skip("not a git checkout")
    return [ROOT / name for name in listed.stdout.split("\n") if name and (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    "A copy of the project after export and clean."
    copy = tmp_path_factory.mktemp("copy") / "ressa"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".venv", ".git", "_proc", "_docs", "ressa-out*", "*.egg-info"))
    for tool in ("nbdev_export", "nbdev_clean"):
        done = subprocess.run([str(Path(sys.executable).parent / tool)], cwd=copy, capture_output=True, text=True,
                              env=os.environ | {"PYTHONPATH": str(copy)})
        assert done.returncode == 0, done.stderr
    return copy


def test_export_and_clean_change_nothing(exported):
    for folder, ending in (("ressa", "*.py"), ("nbs", "*.ipynb")):
        here, there = ({p.name: p.read_text() for p in (place / folder).glob(ending)} for place in (ROOT, exported))
        assert here.keys() == there.keys()
        for name in here: assert here[name] == there[name], f"{folder}/{name}: run make export"


def test_readme_is_the_index():
    sys.path.insert(0, str(ROOT / "nbs"))
    from readme import readme
    text, pictures = readme()
    assert (ROOT / "README.md").read_text() == text, "run make export"
    assert all((ROOT / "nbs" / name).read_bytes() == data for name, data in pictures.items())


def test_imports_without_development_tools():
    code = f"""
import sys
for name in {TOOLS!r}: sys.modules[name] = None  # importing it fails, as if it were not installed
import ressa.all, ressa.cli
from ressa.all import prune, repair, load_bundled, evaluate, get_peft_model
"""
    done = subprocess.run([sys.executable, "-W", "error::SyntaxWarning", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_model_is_small_and_ordinary():
    assets = ROOT / "ressa" / "assets"
    files = [p for p in assets.rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) <= 4 * 2 ** 20
    assert {p.suffix for p in files} == {".json", ".safetensors"}


def test_top_level_holds_the_house_only():
    allowed = {"nbs", "ressa", "tests", "settings.ini", "setup.py", "README.md", "Makefile", "LICENSE",
               "CHANGELOG.md", "MANIFEST.in", "pyproject.toml", ".gitignore", ".ci", ".github"}
    assert {p.relative_to(ROOT).parts[0] for p in tracked()} <= allowed


def test_settings():
    settings = ConfigParser(delimiters=["="])
    settings.read(ROOT / "settings.ini")
    assert settings["DEFAULT"]["author"] == "The ressa authors"
    assert settings["DEFAULT"]["version"] in (ROOT / "CHANGELOG.md").read_text()


def test_no_paths_of_a_machine_and_no_pickles():
    for path in tracked():
        if path.suffix in (".safetensors", ".png") or path == Path(__file__): continue
        text = path.read_text(encoding="utf-8", errors="ignore")
        for word in ("/root/", "/home/", "torch.load(", "pickle.load", "trust_remote_code=True"):
            assert word not in text, f"{word} in {path.relative_to(ROOT)}"


def test_everything_public_is_in_all():
    import ressa.all as everything
    for name in ("prune", "repair", "wanda", "magnitude", "select", "evaluate", "SparseLoraConfig", "RessaTrainer",
                 "RessaArguments", "Statistics", "modality_map", "distillation_loss", "calibration_batch"):
        assert name in everything.__all__
