"""The table of claims: differences from stored runs, and verdicts from their intervals."""

import json
from pathlib import Path

import numpy as np
import pytest

from ressa.course.claims import (
    FAILS,
    HOLDS,
    OPEN,
    UNTESTED,
    Difference,
    StoredRuns,
    claims,
    difference,
    verdict,
)
from ressa.course.studies import pack_right

RESULTS = Path(__file__).parents[2] / "nbs/results"


@pytest.mark.parametrize(
    ("intervals", "limit", "wanted"),
    [
        ([(0.1, 0.2)], 0.0, HOLDS),
        ([(0.1, 0.2), (-0.1, 0.1)], 0.0, OPEN),
        ([(0.1, 0.2), (-0.2, -0.1)], 0.0, FAILS),
        ([(-0.005, 0.0)], -0.01, HOLDS),
        ([], 0.0, UNTESTED),
    ],
)
def test_verdicts(intervals, limit, wanted):
    found = [Difference(sum(ends) / 2, ends, 3) for ends in intervals]
    assert verdict(found, limit) == wanted


def test_runs_are_compared_on_the_seeds_that_both_have(tmp_path):
    right = {
        ("a", 0): [1, 1, 0, 1],
        ("a", 1): [1, 0, 0, 1],
        ("b", 1): [0, 0, 0, 1],
        ("b", 2): [1, 1, 1, 1],
    }
    rows = [
        {"setting": {"row": row, "seed": seed}, "right": pack_right(np.array(answers))}
        for (row, seed), answers in right.items()
    ]
    file = tmp_path / "study.json"
    file.write_text(json.dumps({"rows": rows, "questions": 4}))
    runs = StoredRuns(file, "right")
    (found,) = runs.compare({"row": "a"}, {"row": "b"})
    assert found == difference(np.array([[1.0, 0, 0, 1]]), np.array([[0.0, 0, 0, 1]]))
    assert found.value == 0.25 and found.seeds == 1
    assert runs.compare({"row": "a"}, {"row": "c"}) == []


def test_each_claim_is_measured_on_the_bundled_model_and_says_what_was_compared():
    found = claims(RESULTS)
    assert len({claim.claim for claim in found}) == len(found)
    for claim in found:
        assert claim.bundled and claim.why, claim.claim
        assert set(claim.verdicts) == {"bundled", "real"}
        if not claim.real:
            assert claim.verdicts["real"] == UNTESTED
