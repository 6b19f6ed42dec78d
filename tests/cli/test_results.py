"""What a run's results say: plain values, the table, the shares won back, the sentence."""

import json
from pathlib import Path

import pytest

from ressa.cli.results import (
    MEANINGS,
    NAMES,
    ROW_COLORS,
    ROWS,
    device_name,
    measure,
    models_of,
    part_sparsity,
    peak_device_memory_mb,
    peak_memory_mb,
    plain_row,
    show_interval,
    show_score,
    summary_rows,
    summary_table,
    table_head,
    verdict,
    weight_counts,
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
    assert row["n"] == 3 and row["metric"] == "exact match"
    assert list(row) == ["accuracy", "accuracy_ci", "n", "metric", "by_type"]


def test_questions_and_captions_are_measured(bundled, data):
    model, processor = bundled
    tests = [data[1].select(range(12)), data[2].select(range(5))]
    row = measure(model, tests, processor, progress=False)
    assert row["accuracy"] == row["caption_exact"] == 1 and row["cider"] > 9
    assert len(row["answers"]) == row["n"] == 12
    assert len(row["captions"]) == row["captions_n"] == 5
    for key, highest in (("accuracy", 1), ("caption_exact", 1), ("cider", 10)):
        low, high = row[f"{key}_ci"]
        assert 0 <= low < high <= highest  # all right, and yet an interval


def test_one_data_set_is_measured_by_its_own_metric(bundled, data):
    model, processor = bundled
    row = measure(model, [data[2].select(range(5))], processor, progress=False)
    assert row["metric"] == "CIDEr/10" and row["n"] == 5
    assert row["captions"] == [] and len(row["answers"]) == 5
    assert table_head({"dense": row})[2] == "CIDEr"
    assert show_score("CIDEr/10", 0.979) == "9.79"


def test_zeros_of_each_part(bundled):
    from ressa.parts import modality_map

    model, _ = bundled
    for layer in modality_map(model).linears["vision"].values():
        layer.weight.data[: len(layer.weight) // 2] = 0
    assert part_sparsity(model) == {"vision": 0.5, "interface": 0.0, "language": 0.0}
    counts = weight_counts(model)
    vision = counts["vision"]
    assert 2 * vision["linear_zeros"] == vision["linear_weights"] < vision["weights"]
    total = sum(count["weights"] for count in counts.values())
    assert total == sum(weight.numel() for weight in model.parameters())


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
    del results["blind"]
    assert list(won_back_shares(results)) == ["pruned"]


def test_stored_runs_agree_with_themselves(stored):
    for run in stored.values():
        assert won_back_shares(run) == pytest.approx(run["won_back"])


def test_the_table(stored):
    run = stored["80 %"]
    head, rows = table_head(run), summary_rows(run)
    assert head[:4] == ["model", "n", "exact match", "95 % interval"]
    assert len(rows) == len(models_of(run)) == 5
    assert {len(row) for row in rows} == {len(head)}
    assert rows[3][:3] == ["repaired", "9,673", "98.24%"]
    assert rows[4][4:] == ["–", "–", "–"]  # blind answers have no captions
    lines = summary_table(run).splitlines()
    assert len({len(line) for line in lines}) == 1 and lines[0].startswith("model")
    other = {"dense": plain_dense(run) | {"metric": "VQA accuracy"}}
    assert table_head(other) == ["model", "n", "VQA accuracy", "95 % interval"]


def plain_dense(run):
    "The dense model of a stored run, as if it had answered no captions."
    return {key: value for key, value in run["dense"].items() if key != "cider"}


def test_every_model_has_a_name_a_meaning_and_a_colour():
    for table in (NAMES, MEANINGS, ROW_COLORS):
        assert set(table) == set(ROWS) and len(set(table.values())) == len(ROWS)


def test_scores_as_text():
    assert show_score("exact match", 0.98244) == "98.24%"
    assert show_score("VQA accuracy", 0.98244, digits=1) == "98.2%"
    assert show_interval("CIDEr/10", (0.1, 0.25)) == "1.00 to 2.50"


def test_where_a_run_was_made():
    assert device_name("cpu").startswith("CPU (")
    assert peak_device_memory_mb("cpu") is None


def test_the_sentences_hide_nothing(stored):
    best = stored["80 %"]
    assert verdict(best) == (
        "Pruning lost 62.8 points. The repair won back 97.4% counted from the pruned "
        "model, 95.0% counted from the blind answers. Zeros filled by the repair: 0."
    )
    worse = best | {"repaired": best["repaired"] | {"accuracy": 0.1}}
    assert "the repaired model is WORSE than the pruned one" in verdict(worse)
    assert "no better than the blind answers" in verdict(worse)
    assert "plain LoRA, re-masked, 52.53% against 10.00%" in verdict(worse)
    matched = [
        name for name, run in stored.items() if "was as good or better" in verdict(run)
    ]
    assert matched == ["2:4"]
    none = best | {"won_back": {"pruned": -0.2, "blind": -1.3}}
    assert "The repair won back nothing." in verdict(none)
    assert "nothing to win back" in verdict(best | {"won_back": {}})
    better = best | {"pruned": best["dense"]}
    assert "Pruning lost nothing." in verdict(better)
    captions = {
        row: best[row] | {"metric": "CIDEr/10", "accuracy": best[row]["accuracy"] / 5}
        for row in models_of(best)
    }
    assert "Pruning lost 1.26 of CIDEr." in verdict(best | captions)


def test_a_run_without_rivals(stored):
    run = {key: value for key, value in stored["80 %"].items() if key != "plain_lora"}
    assert models_of(run) == ["dense", "pruned", "repaired", "blind"]
    assert len(summary_rows(run)) == 4 and "plain LoRA" not in verdict(run)
