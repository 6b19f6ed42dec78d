"""Nothing wrong goes through silently, and the same seed gives the same bits.

tests/tools/reliability/faults.py does the same in many more rounds, with kills and full disks.
"""

import json
import sys
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent / "tools" / "reliability"))

import odd_arguments
import wrong_calls

from ressa.pruning.statistics import Statistics

RESULTS = Path(__file__).parents[1] / "nbs" / "results" / "reliability.json"
METHODS = wrong_calls.METHODS
SPECIAL = [0.0, -0.0, torch.nan, torch.inf, -torch.inf, 1e-45, -1e-38, 3e38, 1.0]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("group", wrong_calls.GROUPS, ids=lambda group: group.__name__)
@pytest.mark.parametrize("seed", [0, 1])
def test_a_wrong_call_is_refused_by_name_or_gives_a_right_result(group, seed):
    torch.manual_seed(seed)
    outcomes = {call.name: wrong_calls.outcome(call) for call in group()}
    wrong = {
        name: found
        for name, found in outcomes.items()
        if found not in ("right", "refused")
    }
    assert wrong == {}


@pytest.mark.filterwarnings("ignore")
def test_an_odd_argument_is_refused_by_name_or_means_something(tmp_path):
    "Every public function that needs no model; faults.py tries the others too."
    trials = odd_arguments.trials(tmp_path, quick=True)
    lost = [row for row in trials if row[3] == "lost"]
    assert not lost, lost[:5]


def test_every_public_function_is_tried(tmp_path):
    untried, unknown = odd_arguments.missing(tmp_path)
    assert not untried, "neither tried nor left out for a reason"
    assert not unknown, "tried, but not public any more"


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.sampled_from(list(METHODS)),
    st.integers(0, 4),
    st.sampled_from([1, 4, 7, 8, 16]),
    st.sampled_from([0.0, 0.5, 0.9, "2:4"]),
    st.lists(
        st.tuples(st.sampled_from(["weight", "x"]), st.sampled_from(SPECIAL)),
        max_size=3,
    ),
    st.integers(0, 2**16),
)
def test_any_numbers_at_all(name, out, width, target, places, seed):
    "A right number of zeros and nothing but finite weights, or a `ValueError`."
    torch.manual_seed(seed)
    parts = dict(zip(("weight", "x"), wrong_calls.example(out, width)))
    for part, value in places:
        if parts[part].numel():
            parts[part] = wrong_calls.spoiled(parts[part], value)
    if isinstance(target, str):
        asked = {"pattern": target}
        fewest = out * width // 2
    else:
        asked = {"sparsity": target}
        fewest = out * int(target * width + 1e-9)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            pruned = METHODS[name](parts["weight"], Statistics.of(parts["x"]), **asked)
        except ValueError:
            return
    assert pruned.shape == parts["weight"].shape and pruned.isfinite().all()
    assert (pruned == 0).sum() >= fewest


@pytest.mark.slow
def test_the_same_seed_gives_the_same_bits(tmp_path):
    from same_repair import repaired

    weights = []
    for name in ("first", "second"):
        model = repaired(tmp_path / name, steps=2, batch_size=4, seed=3)
        weights.append([weight.clone() for weight in model.parameters()])
    assert all(map(torch.equal, *weights))


def test_counted_faults_were_survived():
    "The stored counts of many rounds."
    for kind, row in json.loads(RESULTS.read_text())["faults"].items():
        assert row["tried"] == row["survived"] + len(row["lost"]) > 0, kind
        assert not row["lost"], (kind, row["lost"][:3])
