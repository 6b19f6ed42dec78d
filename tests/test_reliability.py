"""Nothing wrong goes through silently; the same seed gives the same bits. Many more rounds: tests/reliability/faults.py."""

import json
import sys
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent / "reliability"))

import odd_arguments  # noqa: E402
import wrong_calls  # noqa: E402

from ressa.pruning.statistics import Statistics

METHODS = wrong_calls.METHODS
SPECIAL = [0.0, -0.0, torch.nan, torch.inf, -torch.inf, 1e-45, -1e-38, 3e38, 1.0]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("group", wrong_calls.GROUPS, ids=lambda group: group.__name__)
@pytest.mark.parametrize("seed", [0, 1])
def test_a_wrong_call_is_refused_by_name_or_gives_a_right_result(group, seed):
    torch.manual_seed(seed)
    outcomes = {call.name: wrong_calls.outcome(call) for call in group()}
    assert {
        name: found
        for name, found in outcomes.items()
        if found not in ("right", "refused")
    } == {}


@pytest.mark.filterwarnings("ignore")
def test_an_odd_argument_is_refused_by_name_or_means_something(tmp_path):
    "Every public function that needs no model; the others too in tests/reliability/faults.py."
    lost = [
        row for row in odd_arguments.trials(tmp_path, quick=True) if row[3] == "lost"
    ]
    assert not lost, lost[:5]


def test_every_public_function_is_tried(tmp_path):
    assert odd_arguments.missing(tmp_path) == ([], [])


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
    target = dict(pattern=target) if isinstance(target, str) else dict(sparsity=target)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            pruned = METHODS[name](parts["weight"], Statistics.of(parts["x"]), **target)
        except ValueError:
            return
    assert pruned.shape == parts["weight"].shape and pruned.isfinite().all()
    fewest = (
        pruned.numel() // 2
        if "pattern" in target
        else out * int(target["sparsity"] * width + 1e-9)
    )
    assert (pruned == 0).sum() >= fewest


def test_the_same_seed_gives_the_same_bits(tmp_path):
    from same_repair import repaired

    first, second = (
        [
            w.clone()
            for w in repaired(
                tmp_path / str(i), steps=2, batch_size=4, seed=3
            ).parameters()
        ]
        for i in (1, 2)
    )
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("name", ["run.json", "results.json"])
def test_a_broken_file_of_a_run_is_named(tmp_path, name):
    from ressa.cli.walk import open_out

    open_out(tmp_path / "out", {"seed": 0})
    (tmp_path / "out" / name).write_text('{"seed"')
    with pytest.raises(ValueError, match=name):
        open_out(tmp_path / "out", {"seed": 0})


@pytest.mark.parametrize("flag", ["--lr", "--temperature"])
@pytest.mark.parametrize("value", ["nan", "inf", "-1"])
def test_the_command_refuses_numbers_that_are_none(tmp_path, capsys, flag, value):
    from ressa.cli.app import main

    assert main(["repair", "--out", str(tmp_path / "out"), flag, value]) == 2
    assert (
        f"{flag} must be above 0" in capsys.readouterr().err
        and not (tmp_path / "out").exists()
    )


def test_counted_faults_were_survived():
    "The stored counts of many rounds."
    stored = json.loads(
        (
            Path(__file__).parent.parent / "nbs" / "results" / "reliability.json"
        ).read_text()
    )
    for kind, row in stored["faults"].items():
        assert (
            row["tried"] == row["survived"] + len(row["lost"]) and row["tried"] > 0
        ), kind
        assert not row["lost"], (kind, row["lost"][:3])


# What mutation testing found untested (tests/mutants.py)


def test_no_file_holds_more_than_the_limit(tmp_path):
    from ressa import storage

    tensors = {str(i): torch.ones(10) for i in range(7)}
    for limit, files in ((40, 7), (80, 4), (120, 3), (1e9, 1)):
        assert len(storage._cut(tensors, limit)) == files


def test_cached_targets_know_every_part_of_the_images(data):
    from ressa.adaptation.teachers import _about

    rows = data[0].select(range(64))
    for i in (0, 16, 60):
        other = data[0].select([*range(i), 3000 + i, *range(i + 1, 64)])
        texts = {name: rows[name] for name in ("prompt", "answer")}

        class Mixed:  # the same texts, one other image
            def __len__(self):
                return 64

            def __getitem__(self, key):
                return texts[key] if isinstance(key, str) else other[key]

        assert _about(Mixed(), None, 4, 1.0) != _about(rows, None, 4, 1.0), i


def test_default_alpha_is_the_papers(bundled):
    from ressa.adaptation.sparse_lora import peft_targets

    assert peft_targets(bundled[0], 4)["lora_alpha"] == 16


def test_gain_is_a_ratio_of_times_of_all_tokens(monkeypatch):
    from ressa import packing

    seen, linear = [], packing.F.linear
    monkeypatch.setattr(
        packing.F, "linear", lambda x, w: seen.append(tuple(x.shape)) or linear(x, w)
    )
    weight = torch.randn(8, 6)
    clock = iter(range(10**4))
    monkeypatch.setattr(packing.time, "perf_counter", lambda: next(clock))
    assert packing.measured_gain(weight, torch.clone, tokens=5, rounds=3) == 1
    assert set(seen) == {(5, 6)} and len(seen) == 8
