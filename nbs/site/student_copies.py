"""Write the students' copies: each chapter with its figures and stubs, without solutions and proofs."""

import re
import shutil
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path
from tempfile import TemporaryDirectory

import nbformat
from pages import COURSE, NBS, ROOT

SOLUTION = re.compile(
    r"\s*<details>\s*<summary>Solution</summary>.*?</details>\s*", re.S
)
COMMENTED_CHECK = re.compile(r"^# (check_\w+\(\w+\)).*$", re.M)


def handed_out(notebook):
    "The notebook as students get it: no solutions, no proofs, and checks that are called. Changes it in place."
    is_inside, kept = False, []
    for cell in notebook.cells:
        marks = {
            line[2:].split()[0]
            for line in cell.source.splitlines()
            if line[:3] == "#| "
        }
        if cell.cell_type == "markdown":
            cell.source = SOLUTION.sub("\n\n", cell.source).strip()
            if "## Exercises" in cell.source:
                is_inside = True
            if "## What you know now" in cell.source:
                is_inside = False
        elif is_inside and "hide" in marks:
            continue  # the proof
        elif "raise NotImplementedError" in cell.source:
            cell.outputs = []
            cell.source = COMMENTED_CHECK.sub(r"\1", cell.source)
        if cell.source:
            kept.append(cell)
    notebook.cells = kept
    return notebook


def student(folder):
    "Fill a folder: chapters, the results they draw, the library as a wheel, and a requirements.txt that installs it."
    (folder / "course").mkdir(parents=True, exist_ok=True)
    for path in COURSE:
        nbformat.write(
            handed_out(nbformat.read(path, 4)), folder / "course" / path.name
        )
    shutil.copytree(NBS / "results", folder / "results", dirs_exist_ok=True)
    options = [
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        str(folder),
    ]
    with (
        TemporaryDirectory() as clean
    ):  # no build folder of earlier days, whose modules would come along
        for name in (
            "setup.py",
            "settings.ini",
            "pyproject.toml",
            "MANIFEST.in",
            "README.md",
            "LICENSE",
        ):
            shutil.copy(ROOT / name, clean)
        shutil.copytree(ROOT / "ressa", Path(clean) / "ressa")
        subprocess.run(
            [sys.executable, "-m", "pip", "wheel", *options, clean], check=True
        )
    settings = ConfigParser(delimiters=["="])
    settings.read(ROOT / "settings.ini", encoding="utf-8")
    wheel = f"./ressa-{settings['DEFAULT']['version']}-py3-none-any.whl[dev]"
    (folder / "requirements.txt").write_text(wheel + "\n", encoding="utf-8")


if __name__ == "__main__":
    student(ROOT / "student")
