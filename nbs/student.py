"""Write the students' copies: each lesson with its figures and stubs, without solutions and proofs."""

import re
import shutil
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path
from tempfile import TemporaryDirectory

import nbformat

here = Path(__file__).parent
SOLUTION = re.compile(r"\s*<details><summary>Solution</summary>.*?</details>\s*", re.S)


def handed_out(notebook):
    "The notebook as students get it. Changes it in place and returns it."
    module, inside, stub, kept = (
        re.search(r"default_exp (\w+)", notebook.cells[0].source)[1],
        False,
        None,
        [],
    )
    for cell in notebook.cells:
        marks = {
            line[2:].split()[0]
            for line in cell.source.splitlines()
            if line.startswith("#| ")
        }
        if cell.cell_type == "markdown":
            cell.source = SOLUTION.sub("\n\n", cell.source).strip()
            if "## Exercises" in cell.source:
                inside = True
            if "## What you know now" in cell.source:
                inside = False
        elif inside:
            if "hide" in marks:
                continue  # the proof
            cell.outputs = []
            if "raise NotImplementedError" in cell.source:
                stub = re.search(r"^(?:def|class) (\w+)", cell.source, re.M)[1]
            if (
                "export" in marks
            ):  # the check tells the solution, so it is called from the library
                check = re.search(r"^def (check_\w+)", cell.source, re.M)
                if not check:
                    continue
                cell.source = (
                    f"from ressa.{module} import {check[1]}\n\n{check[1]}({stub})"
                )
        if cell.source:
            kept.append(cell)
    notebook.cells = kept
    return notebook


def student(folder):
    "Fill a folder: lessons, the results they draw, the library as a wheel, and a requirements.txt that installs it."
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted(here.glob("[0-5]?_*.ipynb")):
        nbformat.write(handed_out(nbformat.read(path, 4)), folder / path.name)
    shutil.copytree(here / "results", folder / "results", dirs_exist_ok=True)
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
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
            shutil.copy(here.parent / name, clean)
        shutil.copytree(here.parent / "ressa", Path(clean) / "ressa")
        subprocess.run([*build, "--wheel-dir", str(folder), clean], check=True)
    settings = ConfigParser(delimiters=["="])
    settings.read(here.parent / "settings.ini", encoding="utf-8")
    wheel = f"./ressa-{settings['DEFAULT']['version']}-py3-none-any.whl[dev]"
    (folder / "requirements.txt").write_text(wheel + "\n", encoding="utf-8")


if __name__ == "__main__":
    student(here.parent / "student")
