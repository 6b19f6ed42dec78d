"""Metrics against slow references, the field's library where it is installed, and models with two towers."""

import importlib.util
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from tiny_models import picture, tiny

from ressa.evaluation.answers import score
from ressa.evaluation.lmms_eval import lmms_command
from ressa.evaluation.metrics import (
    NUMBERS,
    PUNCTUATION,
    RESTORED,
    agreement,
    metric_of,
    normalise_answer,
    vqa_accuracy,
)
from ressa.evaluation.retrieval import embed, recall_at, retrieval
from ressa.models.bundled import BUNDLED


def leave_one_out(said, people):
    kept = [people[:i] + people[i + 1 :] for i in range(len(people))]
    return np.mean([min(others.count(said) / 3, 1) for others in kept])


def test_vqa_accuracy_is_the_mean_over_leaving_one_out():
    rng = random.Random(0)
    for _ in range(300):
        people = rng.choices(["red", "blue", "teal", "gray"], k=rng.randint(2, 10))
        said = rng.choice(["red", "blue", "pink"])
        assert vqa_accuracy(said, people) == pytest.approx(leave_one_out(said, people))
    assert [agreement(c, 10) for c in (0, 1, 2, 3, 4, 10)] == pytest.approx(
        [0, 0.3, 0.6, 0.9, 1, 1]
    )
    assert (vqa_accuracy("red", ["red"]), vqa_accuracy("red", ["blue"])) == (1, 0)


@pytest.mark.parametrize(
    "text, want",
    [
        ("A dog.", "dog"),
        ("an apple, a pear", "apple pear"),
        ("TWO dogs", "2 dogs"),
        ("none", "0"),
        ("1,000", "1000"),
        ("2.5", "2.5"),
        ("5.", "5"),
        ("t-shirt", "t shirt"),
        ("t- shirt", "t shirt"),
        ("dont", "don't"),
        ("couldntve", "couldntve"),
        ("couldnt've", "couldn't've"),
        ("yes\n", "yes"),
        ("yes\tno", "yes no"),
        ("", ""),
        ("the", ""),
        ("theatre", "theatre"),
        ("1,5 t-shirt", "15 tshirt"),
        ("why?", "why"),
        ("a/b", "b"),
        ("Let's go", "let's go"),
    ],
)
def test_normalisation(text, want):
    assert normalise_answer(text) == want


def test_normalisation_agrees_with_lmms_eval():
    library = importlib.util.find_spec("lmms_eval")
    if library is None:
        pytest.skip("lmms-eval is not installed")
    file = Path(library.origin).parent / "tasks/_task_utils/vqa_eval_metric.py"
    spec = importlib.util.spec_from_file_location("official", file)
    spec.loader.exec_module(official := importlib.util.module_from_spec(spec))
    theirs, rng = official.EvalAIAnswerProcessor(), random.Random(1)
    words = [
        *RESTORED,
        *NUMBERS,
        "a",
        "an",
        "the",
        "The",
        "dog",
        "1,000",
        "2.5",
        "t-shirt",
        "no.",
    ]

    def apart(text):
        return text.replace(
            "somebody'd", "somebodyd"
        )  # the one that differs, alike on both sides

    for _ in range(5000):
        text = " ".join(rng.choices(words, k=rng.randint(1, 4)))
        for _ in range(rng.randint(0, 3)):
            place = rng.randint(0, len(text))
            text = text[:place] + rng.choice(PUNCTUATION + ". '\n") + text[place:]
        clean = text.replace("\n", " ").strip()
        their = theirs.process_digit_article(theirs.process_punctuation(clean))
        assert apart(normalise_answer(text)) == apart(their), text


def test_recall_is_what_sorting_gives():
    for images, texts in ((4, 4), (5, 15), (3, 7)):
        similarity = torch.randn(images, texts)
        image_of = [
            *range(images),
            *torch.randint(0, images, (texts - images,)).tolist(),
        ]
        found = recall_at(similarity, image_of, (1, 2, 5))
        for k in (1, 2, 5):
            hits = [
                any(image_of[t] == i for t in row.argsort(descending=True)[:k].tolist())
                for i, row in enumerate(similarity)
            ]
            assert found["image→text"][k] == pytest.approx(np.mean(hits))
            hits = [
                image_of[t] in column.argsort(descending=True)[:k].tolist()
                for t, column in enumerate(similarity.T)
            ]
            assert found["text→image"][k] == pytest.approx(np.mean(hits))


def test_equal_similarities_earn_nothing_and_holes_are_refused():
    found = recall_at(torch.zeros(6, 6), range(6), (1, 5))
    assert set(found["image→text"].values()) | set(found["text→image"].values()) == {
        0.0
    }
    with pytest.raises(ValueError, match="some image has no text"):
        recall_at(torch.randn(3, 2), [0, 1])
    with pytest.raises(ValueError, match="image_of has 1"):
        recall_at(torch.randn(3, 2), [0])


def rows_of(kind="other", **columns):
    n = len(next(iter(columns.values())))
    return Dataset.from_dict(
        columns | dict(question_type=[kind] * n, answer=["red"] * n)
    )


def test_the_rows_choose_the_metric():
    assert metric_of(rows_of(x=[1])) == "exact match"
    assert metric_of(rows_of(answers=[["red"]])) == "exact match"
    assert metric_of(rows_of(answers=[["red"], ["red"] * 10])) == "VQA accuracy"
    assert metric_of(rows_of("caption", answers=[["red"] * 5])) == "CIDEr/10"


def test_scores_by_type_and_their_interval():
    data = rows_of(answers=[["red"] * 10, ["red"] * 3 + ["blue"] * 7, ["blue"] * 10])
    result = score(["Red.", "red", "red"], data)
    assert result.values.tolist() == pytest.approx([1, 0.9, 0])
    low, high = result.interval
    assert low <= result.score <= high and result.by_type()["other"].n == 3


@pytest.mark.parametrize("name", ["CLIP", "SigLIP"])
def test_vectors_are_those_the_model_compares(name, tmp_path):
    model, processor = tiny(name, tmp_path)
    images, texts = (
        [picture(20, 20, seed) for seed in range(3)],
        ["red circle", "blue square", "a picture of two"],
    )
    processor.tokenizer.model_max_length = 12
    seen, read = embed(model, processor, images, texts, batch_size=2)
    padding = "max_length" if name == "SigLIP" else True
    both = processor(
        images=images,
        text=texts,
        padding=padding,
        padding_side="right",
        truncation=True,
        return_tensors="pt",
    )
    with torch.no_grad():
        theirs = model(**both)
    torch.testing.assert_close(seen, theirs.image_embeds, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(read, theirs.text_embeds, atol=1e-5, rtol=1e-5)
    data = Dataset.from_list(
        [
            dict(
                image=images[i],
                image_id=str(i),
                answers=[text, text + " red"],
                answer=text,
            )
            for i, text in enumerate(texts)
        ]
    )
    found = retrieval(model, data, processor, (1, 3))
    assert found["text→image"][3] == 1 and 0 <= found["image→text"][1] <= 1


def test_the_line_for_lmms_eval(tmp_path):
    line = lmms_command(BUNDLED, "vqav2_val,gqa", limit=8)
    assert line[1:5] == ["-m", "lmms_eval", "--model", "instructblip"] and line[
        -2:
    ] == ["--limit", "8"]
    (tmp_path / "config.json").write_text('{"model_type": "llava"}')
    assert lmms_command(tmp_path)[4] == "huggingface"
    with pytest.raises(ValueError, match="none is saved there"):
        lmms_command(tmp_path / "no")
