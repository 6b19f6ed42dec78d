"""Encoded examples are those of `collate`; drawn pictures are new; a run of the study, in small."""

import numpy as np
import pytest
import torch

from ressa.course import few_labels
from ressa.course.few_labels import (
    HELD_OUT_PICTURES,
    encode_examples,
    fresh_pictures,
    labelled_pairs,
    pixel_hash,
    stored_logits,
    unlabelled_examples,
)
from ressa.data.collate import collate
from ressa.data.easy_vqa import load_easy_vqa, training_examples
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
