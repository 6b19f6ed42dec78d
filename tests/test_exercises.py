"""Each exercise of each lesson: its solution passes its check, its stub does not, and its proof plants mistakes.

The solution is the text that a reader unfolds, run with what the page imports and its module exports.
"""

import ast
import importlib
import re
import sys
from types import SimpleNamespace
from zipfile import ZipFile

import nbformat
import pytest
import torch
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from notebooks import NBS, flags
from test_style import LESSONS, lessons

sys.path.insert(0, str(NBS))
from student import handed_out, student  # noqa: E402

HEADING = re.compile(
    r"^\*\*(\d) · (.+?)\*\* \(difficulty [123], \d+ minutes\)\. \*Predict first\*", re.M
)
SOLUTION = re.compile(r"<details><summary>Solution</summary>(.*?)</details>", re.S)
TIMES = 5  # checks draw new inputs each time


def exercises(path):
    "The exercises of a lesson in order: title, cells until the next heading."
    cells, found = nbformat.read(path, 4).cells, []
    for cell in cells:
        titles = HEADING.findall(cell.source) if cell.cell_type == "markdown" else []
        if cell.cell_type == "markdown" and "## What you know now" in cell.source:
            break
        found += [
            SimpleNamespace(title=f"{number} · {title}", cells=[])
            for number, title in titles
        ]
        if found:
            found[-1].cells.append(cell)
    return found


def code_of(folded):
    "The code of a solution: what is fenced, or a definition in one line between backticks."
    return "\n".join(
        re.findall(r"```python\n(.*?)```", folded, re.S)
        or re.findall(r"`(def .+?)`(?!`)", folded, re.S)
    )


def planted(source):
    "How many `test_fail(… contains=…)` a cell makes; in a loop over a tuple, one for each entry."

    def count(node, times=1):
        if isinstance(node, ast.For) and isinstance(node.iter, ast.Tuple):
            times *= len(node.iter.elts)
        here = (
            isinstance(node, ast.Call) and getattr(node.func, "id", "") == "test_fail"
        )
        here = here and any(keyword.arg == "contains" for keyword in node.keywords)
        return times * here + sum(
            count(child, times) for child in ast.iter_child_nodes(node)
        )

    return count(ast.parse(source))


def parts(exercise):
    "Stub, name of the check, folded solution and proof, found in this order."
    places = {}
    for i, cell in enumerate(exercise.cells):
        is_code = cell.cell_type == "code"
        if not is_code and SOLUTION.search(cell.source):
            places.setdefault("solution", i)
        if not is_code:
            continue
        if "export" in flags(cell) and "def check_" in cell.source:
            places.setdefault("check", i)
        elif "hide" in flags(cell):
            places.setdefault("proof", i)
        elif "raise NotImplementedError" in cell.source:
            places.setdefault("stub", i)
    assert list(places) == ["stub", "check", "solution", "proof"], (
        f"cells: {list(places)}"
    )
    assert list(places.values()) == sorted(places.values())
    found = {part: exercise.cells[i].source for part, i in places.items()}
    return SimpleNamespace(
        stub=found["stub"],
        check=re.search(r"def (check_\w+)", found["check"])[1],
        solution=code_of(SOLUTION.search(found["solution"])[1]),
        proof=found["proof"],
    )


def names_of(path):
    "What a lesson has at hand: the imports of its cells, and all that its module defines."
    cells, names = (
        [c for c in nbformat.read(path, 4).cells if c.cell_type == "code"],
        {},
    )
    for cell in cells:
        for node in (
            ast.parse(cell.source).body
            if "import" in cell.source and "gpu" not in flags(cell)
            else []
        ):
            if isinstance(node, ast.Import | ast.ImportFrom):
                exec(ast.unparse(node), names)
    module = re.search(r"default_exp (\w+)", cells[0].source)[1]
    return names | vars(importlib.import_module(f"ressa.{module}"))


ALL = [(path, exercise) for path in LESSONS for exercise in exercises(path)]


@pytest.mark.parametrize(
    "path, exercise", ALL, ids=[f"{p.stem}-{e.title[0]}" for p, e in ALL]
)
def test_exercise(path, exercise):
    found, names = parts(exercise), names_of(path)
    check = names[found.check]
    exec(found.stub, names)
    name = next(
        n.name
        for n in ast.parse(found.stub).body
        if isinstance(n, ast.FunctionDef | ast.ClassDef)
    )
    with pytest.raises(NotImplementedError):
        check(names[name])
    assert found.solution, "the solution holds no code"
    exec(found.solution, names)
    for seed in range(TIMES):
        torch.manual_seed(seed)
        check(names[name])
    assert planted(found.proof) >= 2, (
        f"{planted(found.proof)} planted mistakes with a message of their own"
    )


@lessons
def test_three_exercises_or_more(path):
    assert len(exercises(path)) >= 3


def test_thirty_exercises_or_more():
    assert len(ALL) >= 30


def test_the_proof_itself_can_fail():
    assert planted("test_fail(lambda: check(stub))") == 0
    assert (
        planted(
            "for a, b in ((1, 'x'), (2, 'y')): test_fail(lambda: check(a), contains=b)"
        )
        == 2
    )
    assert code_of("`def f(x): return x`: so it is") == "def f(x): return x"
    assert code_of("Language.") == ""


# --- students' copies


def copy_of(path):
    return handed_out(nbformat.read(path, 4))


@lessons
def test_a_copy_is_whole_and_holds_no_solution(path):
    copy = copy_of(path)
    nbformat.validate(copy)
    text = "\n".join(cell.source for cell in copy.cells)
    text = text[text.index("## Exercises") :]
    assert "<summary>Solution" not in text and "test_fail(lambda: check_" not in text
    for exercise in exercises(path):
        found = parts(exercise)
        assert found.stub in text, f"{exercise.title}: no stub"
        assert re.search(rf"^{found.check}\(\w+\)$", text, re.M), (
            f"{exercise.title}: no check"
        )
        told = [
            line
            for line in found.solution.splitlines()
            if line.strip() and line not in found.stub
        ]
        assert not any(line in text for line in told), (
            f"{exercise.title}: a line of the solution is left"
        )


@lessons
def test_a_copy_keeps_figures_and_no_output_of_an_exercise(path):
    def outputs(cells):
        return [
            output
            for cell in cells
            if cell.cell_type == "code"
            for output in cell.outputs
        ]

    lesson, copy = nbformat.read(path, 4).cells, copy_of(path).cells
    first, start = (
        next(i for i, cell in enumerate(cells) if "## Exercises" in cell.source)
        for cells in (lesson, copy)
    )
    assert outputs(copy[:start]) == outputs(lesson[:first])
    assert not outputs(copy[start:])


def test_a_copy_runs_up_to_its_first_stub():
    copy = copy_of(NBS / "10_masks.ipynb")
    stub = next(
        i
        for i, cell in enumerate(copy.cells)
        if "raise NotImplementedError" in cell.source
    )
    copy.cells = [cell for cell in copy.cells[: stub + 2] if "gpu" not in flags(cell)]
    client = NotebookClient(
        copy,
        timeout=300,
        kernel_name="python3",
        resources={"metadata": {"path": str(NBS)}},
    )
    with pytest.raises(CellExecutionError, match="NotImplementedError"):
        client.execute()
    assert "check_select_columns(select_columns)" in copy.cells[-1].source
    assert not any(
        output.output_type == "error"
        for cell in copy.cells[:-1]
        if cell.cell_type == "code"
        for output in cell.outputs
    )


def test_the_folder_installs_its_own_library(tmp_path):
    student(tmp_path)
    wheel = (tmp_path / "requirements.txt").read_text().strip().removesuffix("[dev]")
    with ZipFile(tmp_path / wheel) as files:
        inside = files.namelist()
    assert "ressa/masks.py" in inside and any(
        name.endswith(".safetensors") for name in inside
    )
    assert {path.name for path in LESSONS} == {
        path.name for path in tmp_path.glob("*.ipynb")
    }
    assert list((tmp_path / "results").glob("*.json"))
