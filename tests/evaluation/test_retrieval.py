"""Recall at k against sorting, and the vectors of models with two towers."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from tiny_models import picture, tiny

from ressa.evaluation.retrieval import embed, recall_at, retrieval


def sorted_hits(similarity, is_right, k):
    "The share of rows with a right column among the k largest, by sorting."
    hits = []
    for row, values in enumerate(similarity):
        nearest = values.argsort(descending=True)[:k].tolist()
        hits.append(any(is_right(row, column) for column in nearest))
    return np.mean(hits)


@pytest.mark.parametrize("images, texts", [(4, 4), (5, 15), (3, 7)])
def test_recall_is_what_sorting_gives(images, texts):
    similarity = torch.randn(images, texts)
    more = torch.randint(0, images, (texts - images,)).tolist()
    image_of = [*range(images), *more]
    found = recall_at(similarity, image_of, (1, 2, 5))
    for k in (1, 2, 5):
        assert found["image→text"][k] == pytest.approx(
            sorted_hits(similarity, lambda i, t: image_of[t] == i, k)
        )
        assert found["text→image"][k] == pytest.approx(
            sorted_hits(similarity.T, lambda t, i: image_of[t] == i, k)
        )


def test_equal_similarities_find_nothing():
    found = recall_at(torch.zeros(6, 6), range(6), (1, 5))
    assert set(found["image→text"].values()) == {0.0}
    assert set(found["text→image"].values()) == {0.0}


@pytest.mark.parametrize(
    "similarity, image_of, message",
    [
        (torch.ones(3, 2), [0, 1], "an image has no text"),
        (torch.ones(3, 2), [0], "image_of must have 2 entries"),
        (torch.ones(2, 2), [0, 2], "must name images 0 to 1"),
        (torch.ones(2), [0, 1], "finite numbers of shape"),
        (torch.full((2, 2), torch.nan), [0, 1], "finite numbers of shape"),
    ],
)
def test_what_has_no_recall_is_refused(similarity, image_of, message):
    with pytest.raises(ValueError, match=message):
        recall_at(similarity, image_of)


@pytest.mark.parametrize("name", ["CLIP", "SigLIP"])
def test_vectors_are_those_the_model_compares(name, tmp_path):
    model, processor = tiny(name, tmp_path)
    images = [picture(20, 20, seed) for seed in range(3)]
    texts = ["red circle", "blue square", "a picture of two"]
    image_vectors, text_vectors = embed(model, processor, images, texts, batch_size=2)
    batch = processor(
        images=images,
        text=texts,
        padding="max_length" if name == "SigLIP" else True,
        padding_side="right",
        truncation=True,
        max_length=model.config.text_config.max_position_embeddings,
        return_tensors="pt",
    )
    with torch.no_grad():
        output = model(**batch)
    torch.testing.assert_close(image_vectors, output.image_embeds, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(text_vectors, output.text_embeds, atol=1e-5, rtol=1e-5)
    assert embed(model, processor, images)[1].shape[0] == 0  # no texts, no vectors


@pytest.mark.parametrize("name", ["CLIP", "SigLIP"])
def test_neither_stored_padding_nor_training_mode_changes_vectors(name, tmp_path):
    model, processor = tiny(name, tmp_path)
    images = [picture(20, 20, seed) for seed in range(2)]
    texts = ["red circle", "a picture of two blue shape"]
    want = embed(model, processor, images, texts)
    processor.tokenizer.padding_side = "left"
    processor.tokenizer.model_max_length = 3
    processor.text_kwargs = dict(padding="max_length", max_length=3, truncation=True)
    for layer in model.modules():
        if hasattr(layer, "dropout") and isinstance(layer.dropout, float):
            layer.dropout = 0.5
    model.train()
    got = embed(model, processor, images, texts)
    assert all(torch.equal(a, b) for a, b in zip(got, want)) and model.training


def test_examples_of_one_image_are_one_image(tmp_path):
    "Two of four examples show the same image: three images, five captions."
    model, processor = tiny("CLIP", tmp_path)
    ids = ["a", "b", "a", "c"]
    captions = [["red circle"], ["blue square", "two"], ["a picture"], ["red"]]
    examples = [
        dict(image=picture(20, 20, ord(name)), image_id=name, answers=texts)
        for name, texts in zip(ids, captions)
    ]
    found = retrieval(model, Dataset.from_list(examples), processor, (1, 3))
    images = [examples[i]["image"] for i in (0, 1, 3)]
    texts = [text for many in captions for text in many]
    image_vectors, text_vectors = embed(model, processor, images, texts)
    similarity = image_vectors @ text_vectors.T
    assert found == recall_at(similarity, [0, 1, 1, 0, 2], (1, 3))
    assert found["text→image"][3] == 1
