"""The study of the real model: its settings, and what can be tested without 100 MB of weights."""

import pytest

from ressa.adaptation.loss_terms import require_positions
from ressa.course.real_study import (
    METHODS_COMPARED,
    REPAIRED,
    REPAIRS,
    TARGETS,
    WRITERS,
    real_run,
    real_settings,
)
from ressa.course.studies import setting_key
from ressa.pruning.methods import method_of


def test_every_setting_is_there_once():
    settings = [s for part in real_settings().values() for s in part]
    keys = [setting_key(setting) for setting in settings]
    assert len(keys) == len(set(keys))
    pruned = [s["sparsity"] for s in settings if s["kind"] == "prune"]
    pruned = [sparsity for sparsity in pruned if set(sparsity) == {"language"}]
    assert len(pruned) == len(METHODS_COMPARED) * len(TARGETS)
    repairs = [s for s in settings if s["kind"] == "repair"]
    assert len(repairs) == len(REPAIRED) * sum(
        len(one.rates) for one in REPAIRS.values()
    )


def test_methods_and_positions_exist():
    for method in METHODS_COMPARED:
        method_of(method)
    for repair in REPAIRS.values():
        require_positions(repair.options.get("positions", "all"))
    for writer in WRITERS:
        assert writer["method"] == "dense" or method_of(writer["method"])
        assert writer["row"] is None or writer["row"] in REPAIRS


def test_equal_sums():
    for setting in real_settings()["equal sums"]:
        total = sum(setting["sparsity"].values())
        assert round(total, 6) in (1.0, 1.2)


def test_another_kind_is_refused():
    with pytest.raises(ValueError, match="kind must be one of"):
        real_run("distil")
