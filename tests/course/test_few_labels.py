"""Encoded examples are those of `collate`; drawn pictures are new; a run of the study, in small."""

import numpy as np
import pytest
import torch

from ressa.course import few_labels
from ressa.course.few_labels import (
    HELD_OUT_PICTURES,
    LABELS,
    MEASURES,
    TEXT,
    Runs,
    encode_examples,
    fresh_pictures,
    labelled_pairs,
    pixel_hash,
    planned_runs,
    setting_of,
    stored_logits,
    unlabelled_examples,
)
from ressa.course.studies import pack_right
from ressa.data.collate import collate
from ressa.data.easy_vqa import load_easy_vqa, training_examples
from ressa.files import write_json
from ressa.models.bundled import load_bundled


@pytest.fixture(scope="module")
def bundled():
    return load_bundled("cpu")


@pytest.fixture(scope="module")
def examples():
    data = training_examples()
    return data.select([*range(6), *range(len(data) - 6, len(data))])


@pytest.fixture(scope="module")
def encoded(examples, bundled):
    return encode_examples(examples, *bundled, size=5)


def test_a_batch_is_that_of_collate(examples, encoded, bundled):
    "Whatever pieces were encoded together; the teacher's logits are those of the model."
    model, processor = bundled
    order = [11, 3, 0, 7]
    batch = encoded.batch(order)
    said = batch.pop("teacher_logits")
    wanted = collate([examples[i] for i in order], processor)
    assert batch.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(batch[name], value), name
    del wanted["labels"]
    with torch.no_grad():
        logits = model(**wanted).logits
    torch.testing.assert_close(said, logits, rtol=1e-4, atol=1e-4)
    assert stored_logits(None, {"teacher_logits": said}) is said


def test_joined_examples_keep_their_pictures(encoded):
    both = encoded.joined(encoded)
    first, second = both.batch([2]), both.batch([2 + 12])
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_pairs_stay_away_from_held_out_pictures():
    pictures = np.array(training_examples()["image_id"][:])
    drawn = labelled_pairs(256, seed=3)
    assert len(set(drawn)) == 256
    assert pictures[drawn].min() >= HELD_OUT_PICTURES
    assert drawn == labelled_pairs(256, seed=3)
    assert drawn != labelled_pairs(256, seed=4)
    assert drawn[:64] == labelled_pairs(64, seed=3)


def test_drawn_pictures_are_new_and_the_teacher_answers():
    pictures = fresh_pictures(24)
    named = {pixel_hash(picture) for picture in pictures}
    assert len(named) == 24
    assert named == {pixel_hash(picture) for picture in fresh_pictures(24)}
    known = load_easy_vqa("train").select(range(0, 2000, 10))
    assert not named & {pixel_hash(picture) for picture in known["image"]}
    data = unlabelled_examples(pictures)
    assert pixel_hash(data[5]["image"]) == pixel_hash(pictures[5])
    assert all(data["answer"])


@pytest.mark.slow
def test_a_run_in_small(encoded, monkeypatch):
    monkeypatch.setattr(few_labels, "training_pairs", lambda: encoded)
    monkeypatch.setattr(few_labels, "labelled_pairs", lambda pairs, seed: [1, 4, 7])
    monkeypatch.setattr(few_labels, "JUDGED", {"test": 4, "captions": 4})
    few_labels.judged_batches.cache_clear()
    found = few_labels.few_labels_run(steps=2, positions="text", learning_rate=1e-3)
    few_labels.judged_batches.cache_clear()
    assert found["zeros_filled"] == 0
    assert 0 <= found["accuracy"] <= 1
    assert {"captions", "accuracy_right", "captions_right", "seconds"} < found.keys()


# What is stored


def stored_row(loss, seed, share):
    "A run that answers this share of the questions and captions right."
    found = {"setting": setting_of(loss, pairs=64, seed=seed)}
    for measure, n in MEASURES.items():
        found[f"{measure}_right"] = pack_right(np.arange(n) < share * n)
    return found


def test_stored_runs_are_found_and_compared(tmp_path):
    rows = [stored_row(TEXT, seed, 0.9) for seed in (2, 0)]
    rows += [stored_row(LABELS, seed, 0.5) for seed in (0, 1)]
    write_json(tmp_path / "runs.json", {"device": "cpu", "rows": rows})
    runs = Runs(tmp_path / "runs.json")
    assert runs.about == {"device": "cpu"}
    text, labels = setting_of(TEXT, pairs=64), setting_of(LABELS, pairs=64)
    assert list(runs.find(text)) == [0, 2]
    assert runs.find(setting_of(TEXT, pairs=65)) == {}
    level = runs.level(text)
    assert level.mean == pytest.approx(0.9)
    assert 0.87 < level.low < 0.9 < level.high < 0.93
    gap = runs.gap(text, labels, "captions")  # of the one seed that both have
    assert gap.mean == pytest.approx(0.4)
    assert 0.35 < gap.low < gap.high < 0.45
    with pytest.raises(ValueError, match="no run is stored with"):
        runs.right(setting_of(TEXT, pairs=65))


def test_no_run_is_planned_twice():
    planned = [str(sorted(setting.items(), key=str)) for setting in planned_runs()]
    assert len(set(planned)) == len(planned)
