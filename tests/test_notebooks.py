"""Every notebook runs, and shows what it showed when it was written."""

import json
import re

import nbformat
import pytest
from notebooks import NBS, PATHS, STATE, run, text_outputs, widget_views

NUMBER = re.compile(r"-?\d+\.?\d*(?:e-?\d+)?")


def same(new, old):
    "Equal words, and numbers within 5 % or 0.02: other processors round otherwise."
    if NUMBER.sub("#", new) != NUMBER.sub("#", old):
        return False
    pairs = zip(map(float, NUMBER.findall(new)), map(float, NUMBER.findall(old)))
    return all(abs(a - b) <= max(0.02, 0.05 * abs(b)) for a, b in pairs)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_runs_and_shows_the_same(path):
    new = run(path)
    for cell, now, stored in zip(
        [c for c in new.cells if c.cell_type == "code"],
        text_outputs(new),
        text_outputs(nbformat.read(path, 4)),
    ):
        if re.search(r"^#\|\s*(gpu|slow)", cell.source, re.M):
            continue
        assert same(now, stored), (
            f"{path.stem}: {cell.source[:200]}\nstored: {stored[:500]}\nnow:    {now[:500]}"
        )


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_widgets_keep_their_state(path):
    "A page shows a widget's picture without a kernel; what it shows is no error."
    notebook = nbformat.read(path, 4)
    models = notebook.metadata.get("widgets", {STATE: {"state": {}}})[STATE]["state"]
    assert list(models) == [f"{i:032x}" for i in range(len(models))], (
        "numbered as they appear"
    )
    reached = [view["model_id"] for view in widget_views(notebook)]
    assert len(reached) == len(set(reached)), "one widget, shown twice"
    for name in reached:
        reached += set(re.findall(r"IPY_MODEL_(\w+)", json.dumps(models[name]))) - set(
            reached
        )
    assert set(models) == set(reached)
    assert 'role=\\"alert\\"' not in json.dumps(models)


def test_the_syllabus_has_every_lesson_with_its_minutes():
    "The name and minutes of every lesson, and of every exercise that the syllabus names."
    text = (NBS / "syllabus.md").read_text()
    told = dict(re.findall(r"\]\((\w+)\.ipynb\)\s*(?:\||\()\s*(\d+)", text))
    exercises = re.findall(r"(\d\d\w*) · (\d) \((\d+)\)", text)
    for path in PATHS:
        if not re.match(r"[0-5]\d_", path.name):
            continue
        words = "\n".join(
            c.source for c in nbformat.read(path, 4).cells if c.cell_type == "markdown"
        )
        assert (
            told.get(path.stem) == re.search(r"\*\*Time\*\*: (\d+) minutes", words)[1]
        ), path.stem
        for _, number, minutes in (e for e in exercises if path.stem.startswith(e[0])):
            found = re.search(rf"^\*\*{number} · .+?, (\d+) minutes\)", words, re.M)
            assert found and found[1] == minutes, f"{path.stem}: exercise {number}"
