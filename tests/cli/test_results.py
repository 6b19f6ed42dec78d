"""What a run's results say: plain values, the table, the shares won back, the sentence."""

import json
from pathlib import Path

import pytest

from ressa.cli.results import (
    HEAD,
    ROW_COLORS,
    ROWS,
    measure,
    part_sparsity,
    peak_memory_mb,
    plain_row,
    summary_rows,
    table_head,
    verdict,
    won_back_shares,
)

RESULTS = Path(__file__).parents[2] / "nbs" / "results" / "walk.json"


@pytest.fixture(scope="module")
def stored():
    return json.loads(RESULTS.read_text())["runs"]


def test_an_evaluation_as_plain_values():
    import numpy as np

    from ressa.evaluation.answers import Evaluation

    result = Evaluation(
        answers=["red", "blue", "no"],
        references=[["red"], ["red"], ["no"]],
        values=np.array([1.0, 0.0, 1.0]),
        types=["color", "color", "yes/no"],
        metric="exact match",
    )
    row = json.loads(json.dumps(plain_row(result)))
    assert row["accuracy"] == pytest.approx(2 / 3)
    assert row["accuracy_ci"] == list(result.interval)
    assert row["by_type"]["color"]["n"] == 2
    assert row["by_type"]["color"]["accuracy"] == 0.5
    assert list(row) == ["accuracy", "accuracy_ci", "by_type"]


def test_questions_and_captions_are_measured(bundled, data):
    model, processor = bundled
    tests = [data[1].select(range(12)), data[2].select(range(5))]
    row = measure(model, tests, processor, progress=False)
    assert row["accuracy"] == row["caption_exact"] == 1 and row["cider"] > 9
    assert len(row["answers"]) == 12 and len(row["captions"]) == 5
    assert "metric" not in row


def test_one_data_set_is_measured_by_its_own_metric(bundled, data):
    model, processor = bundled
    row = measure(model, [data[2].select(range(5))], processor, progress=False)
    assert row["metric"] == "CIDEr / 10" or "CIDEr" in row["metric"]
    assert row["captions"] == [] and len(row["answers"]) == 5


def test_zeros_of_each_part(bundled):
    from ressa.parts import modality_map

    model, _ = bundled
    for layer in modality_map(model).linears["vision"].values():
        layer.weight.data[: len(layer.weight) // 2] = 0
    assert part_sparsity(model) == {"vision": 0.5, "interface": 0.0, "language": 0.0}


def test_peak_memory_grows():
    first = peak_memory_mb()
    if first is None:
        pytest.skip("this system does not count it")
    assert 50 < first <= peak_memory_mb() < 10**6


def test_shares_won_back():
    accuracy = dict(dense=0.9, pruned=0.5, plain_lora=0.6, repaired=0.8, blind=0.7)
    results = {row: {"accuracy": value} for row, value in accuracy.items()}
    shares = won_back_shares(results)
    assert shares == {"pruned": pytest.approx(0.75), "blind": pytest.approx(0.5)}
    results["blind"]["accuracy"] = 0.9  # nothing was lost from there
    assert list(won_back_shares(results)) == ["pruned"]


def test_stored_runs_agree_with_themselves(stored):
    for run in stored.values():
        assert won_back_shares(run) == pytest.approx(run["won_back"])


def test_the_table(stored):
    rows = summary_rows(stored["80 %"])
    assert len(rows) == len(ROWS) and {len(row) for row in rows} == {len(HEAD)}
    assert rows[3][:2] == ["RESSA", "98.24%"]
    assert rows[4][3:] == ["–", "–"]  # who never sees an image writes no captions
    assert table_head(stored["80 %"]) == HEAD
    assert table_head({"dense": {"metric": "VQA accuracy"}})[1] == "VQA accuracy"


def test_every_model_has_its_own_colour():
    assert set(ROW_COLORS) == set(ROWS) and len(set(ROW_COLORS.values())) == len(ROWS)


def test_the_sentence_hides_nothing(stored):
    best = stored["80 %"]
    assert verdict(best) == (
        "Pruning lost 62.8 points. Won back: 97.4% counted from the pruned model, "
        "95.0% counted from the blind model. Zeros filled by the repair: 0."
    )
    worse = best | {"repaired": {"accuracy": 0.1}}
    assert "the repaired model is WORSE than the pruned one" in verdict(worse)
    assert "did as well or better" in verdict(worse)
    matched = [name for name, run in stored.items() if "as well or" in verdict(run)]
    assert matched == ["2:4"]
    assert "nothing to win back" in verdict(best | {"won_back": {}})
