"""A small model of each class is pruned, repaired, merged, used and saved, step by step."""

import json

import pytest
import tiny_models
import walk_any

from ressa import parts
from ressa.data import collate


@pytest.mark.slow
@pytest.mark.parametrize("name", tiny_models.TINY)
def test_walk(name):
    outcome, about = walk_any.walk(name)
    wrong = {step: error for step, error in outcome.items() if error is not None}
    assert not wrong, "\n".join(wrong.values())
    stored = json.loads(walk_any.RESULTS.read_text())["models"][name]
    assert stored == about | {"steps": dict.fromkeys(outcome, True)}


def test_the_stored_table_is_of_these_models_and_steps():
    stored = json.loads(walk_any.RESULTS.read_text())["models"]
    assert list(stored) == list(tiny_models.TINY)
    for model in stored.values():
        assert list(model["steps"]) == list(walk_any.STEPS)


def test_the_walk_notices_an_answer_that_is_seen(monkeypatch, tmp_path):
    monkeypatch.setattr(collate, "ANSWER_TOKEN_TYPE", {})
    walk = walk_any.Walk("PaliGemma", tmp_path)
    walk.wanda()
    walk.adapt()
    with pytest.raises(AssertionError, match="seen before"):
        walk.train()


def no_modules(model, roots, writes):
    return []


def test_the_walk_notices_a_layer_that_nobody_reads(monkeypatch, tmp_path):
    monkeypatch.setattr(parts, "_unread_modules", no_modules)
    with pytest.raises(AssertionError, match="no output depends on it"):
        walk_any.Walk("LLaVA", tmp_path).map()


def test_the_walk_notices_a_filled_zero(tmp_path):
    walk = walk_any.Walk("LLaVA", tmp_path)
    walk.wanda()
    walk.adapt()
    adapters = (
        m for m in walk.student.modules() if isinstance(m, walk_any.SparseLoraLinear)
    )
    weight = next(adapters).base_layer.weight.data
    weight[weight == 0] = 1e-6
    with pytest.raises(ValueError, match="zeros"):
        walk.merge()
