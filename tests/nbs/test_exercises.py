"""Each exercise of each chapter: its solution passes its check, its stub does not, and its proof plants mistakes.

The solution is the text that a reader unfolds, run with what the page imports.
"""

import ast
import re
import sys
from types import SimpleNamespace
from zipfile import ZipFile

import nbformat
import pytest
import torch
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from notebooks import NBS, flags, name_of
from warm_kernels import WarmKernelManager

sys.path.insert(0, str(NBS / "site"))
from pages import COURSE  # noqa: E402
from student_copies import handed_out, student  # noqa: E402

HEADING = re.compile(r"^\*\*(\d) · (.+?)\*\* \(difficulty [123], \d+ minutes\)", re.M)
SOLUTION = re.compile(r"<details>\s*<summary>Solution</summary>(.*?)</details>", re.S)
COMMENTED_CHECK = re.compile(r"^# (check_\w+)\((\w+)\)", re.M)
TIMES = 5  # checks draw new inputs each time

chapters = pytest.mark.parametrize("path", COURSE, ids=name_of)


def exercises(path):
    "The exercises of a chapter in order: title, cells until the next heading."
    cells, found = nbformat.read(path, 4).cells, []
    for cell in cells:
        is_prose = cell.cell_type == "markdown"
        if is_prose and "## What you know now" in cell.source:
            break
        for number, title in HEADING.findall(cell.source) if is_prose else []:
            found.append(SimpleNamespace(title=f"{number} · {title}", cells=[]))
        if found:
            found[-1].cells.append(cell)
    return found


def code_of(folded):
    "The code of a solution: what is fenced, or a definition in one line between backticks."
    fenced = re.findall(r"```python\n(.*?)```", folded, re.S)
    return "\n".join(fenced or re.findall(r"`(def .+?)`(?!`)", folded, re.S))


def planted(source):
    "How many `test_fail(… contains=…)` a cell makes; in a loop over a tuple, one for each entry."

    def count(node, times=1):
        if isinstance(node, ast.For) and isinstance(node.iter, ast.Tuple):
            times *= len(node.iter.elts)
        here = (
            isinstance(node, ast.Call) and getattr(node.func, "id", "") == "test_fail"
        )
        here = here and any(keyword.arg == "contains" for keyword in node.keywords)
        inside = sum(count(child, times) for child in ast.iter_child_nodes(node))
        return times * here + inside

    return count(ast.parse(source))


def parts(exercise):
    "Stub, name of the check, folded solution and proof, found in this order."
    places = {}
    for i, cell in enumerate(exercise.cells):
        if cell.cell_type != "code":
            if SOLUTION.search(cell.source):
                places.setdefault("solution", i)
        elif "hide" in flags(cell):
            places.setdefault("proof", i)
        elif "raise NotImplementedError" in cell.source:
            places.setdefault("stub", i)
    assert list(places) == ["stub", "solution", "proof"], f"cells: {list(places)}"
    assert list(places.values()) == sorted(places.values())
    found = {part: exercise.cells[i].source for part, i in places.items()}
    call = COMMENTED_CHECK.search(found["stub"])
    assert call, "the stub's cell does not end with a commented call of the check"
    return SimpleNamespace(
        stub=found["stub"],
        check=call[1],
        name=call[2],
        solution=code_of(SOLUTION.search(found["solution"])[1]),
        proof=found["proof"],
    )


def names_of(path):
    "What a chapter has at hand: the imports of its cells, and all that its exported cells define."
    names = {}
    for cell in nbformat.read(path, 4).cells:
        if cell.cell_type != "code" or "gpu" in flags(cell):
            continue
        if "export" in flags(cell):
            exec(cell.source, names)
        elif "import" in cell.source:
            for node in ast.parse(cell.source).body:
                if isinstance(node, ast.Import | ast.ImportFrom):
                    exec(ast.unparse(node), names)
    return names


ALL = [(path, exercise) for path in COURSE for exercise in exercises(path)]


@pytest.mark.parametrize(
    "path, exercise", ALL, ids=[f"{p.stem}-{e.title[0]}" for p, e in ALL]
)
def test_exercise(path, exercise):
    found, names = parts(exercise), names_of(path)
    check = names[found.check]
    exec(found.stub, names)
    with pytest.raises(NotImplementedError):
        check(names[found.name])
    assert found.solution, "the solution holds no code"
    exec(found.solution, names)
    for seed in range(TIMES):
        torch.manual_seed(seed)
        check(names[found.name])
    assert planted(found.proof) >= 2, "fewer than two planted mistakes with a message"


@chapters
def test_two_exercises_or_more(path):
    assert len(exercises(path)) >= 2


LENGTH = re.compile(r"^\*\*(\d) · .+?\*\* \(difficulty ([123]), (\d+) minutes\)", re.M)
STARRED = ("06_sparsegpt", "08_which_layer")  # these chapters can be left out


def test_the_syllabus_places_each_exercise_and_counts_the_points():
    syllabus = (NBS / "course" / "syllabus.md").read_text()
    points = {}
    for path in COURSE:
        found = [
            exercise
            for cell in nbformat.read(path, 4).cells
            if cell.cell_type == "markdown"
            for exercise in LENGTH.findall(cell.source)
        ]
        names = f"({path.name})", f"of chapter {path.name[:2]}"
        lines = [
            line for line in syllabus.splitlines() if any(n in line for n in names)
        ]
        placed = re.findall(r"\b(\d) \((\d+)\)", " ".join(lines))
        wanted = [(number, minutes) for number, _, minutes in found]
        assert sorted(placed) == wanted, path.stem
        points[path.stem] = sum(int(difficulty) for _, difficulty, _ in found)
    total = sum(points.values())
    without = total - sum(points[name] for name in STARRED)
    assert f"{total} points for all exercises, {without} without" in syllabus


def test_the_proof_itself_can_fail():
    assert planted("test_fail(lambda: check(stub))") == 0
    loop = "for a, b in ((1, 'x'), (2, 'y')): test_fail(lambda: check(a), contains=b)"
    assert planted(loop) == 2
    assert code_of("`def f(x): return x`: so it is") == "def f(x): return x"
    assert code_of("Language.") == ""


# --- students' copies


def copy_of(path):
    return handed_out(nbformat.read(path, 4))


@chapters
def test_a_copy_is_whole_and_holds_no_solution(path):
    copy = copy_of(path)
    nbformat.validate(copy)
    text = "\n".join(cell.source for cell in copy.cells)
    text = text[text.index("## Exercises") :]
    assert "<summary>Solution" not in text and "test_fail(lambda: check_" not in text
    for exercise in exercises(path):
        found = parts(exercise)
        called = re.search(rf"^{found.check}\({found.name}\)$", text, re.M)
        assert called, f"{exercise.title}: no check"
        for line in found.solution.splitlines():
            if line.strip() and line not in found.stub:
                assert line not in text, (
                    f"{exercise.title}: a line of the solution is left"
                )


@chapters
def test_a_copy_keeps_figures_and_no_output_of_an_exercise(path):
    def outputs(cells):
        code = [cell for cell in cells if cell.cell_type == "code"]
        return [output for cell in code for output in cell.outputs]

    chapter, copy = nbformat.read(path, 4).cells, copy_of(path).cells
    first, start = (
        next(i for i, cell in enumerate(cells) if "## Exercises" in cell.source)
        for cells in (chapter, copy)
    )
    assert outputs(copy[:start]) == outputs(chapter[:first])


@pytest.mark.notebook
def test_a_copy_runs_up_to_its_first_stub():
    path = NBS / "course" / "03_masks.ipynb"
    copy = copy_of(path)
    stub = next(
        i
        for i, cell in enumerate(copy.cells)
        if "raise NotImplementedError" in cell.source
    )
    copy.cells = [cell for cell in copy.cells[: stub + 1] if "gpu" not in flags(cell)]
    client = NotebookClient(
        copy,
        timeout=300,
        kernel_name="python3",
        kernel_manager_class=WarmKernelManager,
        resources={"metadata": {"path": str(path.parent)}},
    )
    with pytest.raises(CellExecutionError, match="NotImplementedError"):
        client.execute()
    assert re.search(r"^check_\w+\(\w+\)$", copy.cells[-1].source, re.M)
    for cell in copy.cells[:-1]:
        errors = [o for o in cell.get("outputs", []) if o.output_type == "error"]
        assert not errors


@pytest.mark.slow
def test_the_folder_installs_its_own_library(tmp_path):
    student(tmp_path)
    wheel = (tmp_path / "requirements.txt").read_text().strip().removesuffix("[dev]")
    with ZipFile(tmp_path / wheel) as files:
        inside = files.namelist()
    assert "ressa/pruning/masks.py" in inside
    assert any(name.endswith(".safetensors") for name in inside)
    handed = {path.name for path in (tmp_path / "course").glob("*.ipynb")}
    assert handed == {path.name for path in COURSE}
    assert list((tmp_path / "results").glob("*.json"))
