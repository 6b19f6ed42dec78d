"""Answers and their evaluation: order, batches, question types, and every error."""

import numpy as np
import pytest
import torch
from datasets import Dataset

from ressa.data.collate import collate
from ressa.evaluation.answers import (
    Evaluation,
    answer,
    blind,
    evaluate,
    exact_match,
    score,
    without_prompt,
)
from ressa.evaluation.intervals import interval


@pytest.fixture(scope="module")
def model_and_processor():
    from ressa.models.bundled import load_bundled

    return load_bundled("cpu")


@pytest.fixture(scope="module")
def damaged(model_and_processor):
    "The bundled model without the smaller 70 % of each language matrix: often wrong."
    import copy

    model = copy.deepcopy(model_and_processor[0])
    for parameter in model.language_model.parameters():
        if parameter.dim() == 2:
            size = parameter.data.abs()
            parameter.data[size < size.quantile(0.7)] = 0
    return model


def examples(answer, types=None, **columns):
    types = types or ["other"] * len(answer)
    return Dataset.from_dict(dict(answer=answer, question_type=types) | columns)


def test_only_a_prompt_is_cut_off():
    prompt = torch.tensor([[1, 2, 3]])
    for generated, expected in (
        ([[1, 2, 3, 9]], [[9]]),
        ([[1, 2, 3]], [[]]),
        ([[0, 9]], [[0, 9]]),
        ([[1, 2, 4, 9]], [[1, 2, 4, 9]]),
    ):
        assert without_prompt(torch.tensor(generated), prompt).tolist() == expected


def test_answers_do_not_depend_on_batches_or_order(data, damaged, model_and_processor):
    _, processor = model_and_processor
    some = data[1].shuffle(seed=1).select(range(24))
    together = answer(damaged, some, processor)
    assert answer(damaged, some, processor, batch_size=5) == together
    backwards = some.select(range(23, -1, -1))
    assert answer(damaged, backwards, processor, batch_size=7) == together[::-1]
    assert all(text == text.strip().lower() for text in together)


def test_evaluate_answers_and_judges(data, damaged, model_and_processor):
    _, processor = model_and_processor
    some = data[1].shuffle(seed=0).select(range(60))
    result = evaluate(damaged, some, processor, batch_size=16)
    assert result.answers == answer(damaged, some, processor)
    right = [given == wanted for given, wanted in zip(result.answers, some["answer"])]
    assert result.values.tolist() == right and result.metric == "exact match"
    assert 0 < result.score == np.mean(right) < 1 and result.n == 60
    assert result.interval == interval(result.values)
    batches = [collate([some[i] for i in range(60)], processor)]
    assert exact_match(damaged, batches).tolist() == right


def test_captions_are_judged_by_cider_or_word_for_word(data, model_and_processor):
    model, processor = model_and_processor
    captions = data[2].select(range(20))
    result = evaluate(model, captions, processor, metric="exact match")
    assert result.score > 0.9 and "CIDEr" in repr(result)
    by_cider = score(result.answers, captions)
    assert by_cider.metric == "CIDEr/10"
    assert by_cider.values == pytest.approx(result.cider() / 10)


def test_an_evaluation_by_type_is_made_of_evaluations():
    data = examples(
        ["red"] * 4,
        ["b", "a", "b", "a"],
        answers=[["red"] * 10, ["red"] * 3 + ["blue"] * 7, ["blue"] * 10, ["red"] * 10],
    )
    result = score(["Red.", "red", "red", "blue"], data)
    assert result.metric == "VQA accuracy"
    assert result.values.tolist() == pytest.approx([1, 0.9, 0, 0])
    parts = result.by_type()
    assert list(parts) == ["a", "b"]
    assert parts["a"].answers == ["red", "blue"]
    assert parts["a"].references == [data["answers"][1], data["answers"][3]]
    assert parts["b"].values.tolist() == pytest.approx([1, 0])
    assert sum(part.n for part in parts.values()) == result.n
    assert list(parts["b"].by_type()) == ["b"]
    low, high = result.interval
    assert low <= result.score <= high


def test_an_evaluation_prints_as_a_table():
    data = examples(["red", "red", "two"], ["color", "color", "number"])
    lines = repr(score(["red", "blue", "two"], data)).splitlines()
    assert lines[0].split() == ["exact", "match", "n", "score", "95", "%", "interval"]
    assert [line.split()[:3] for line in lines[1:]] == [
        ["color", "2", "0.500"],
        ["number", "1", "1.000"],
        ["all", "3", "0.667"],
    ]


@pytest.mark.parametrize(
    "change",
    [
        dict(answers=["a"]),
        dict(types=["x"]),
        dict(values=np.ones(1)),
        dict(references=[]),
    ],
)
def test_fields_of_different_length_are_refused(change):
    fields = dict(
        answers=["a", "b"],
        references=[["a"], ["b"]],
        values=np.ones(2),
        types=["x", "x"],
        metric="exact match",
    )
    with pytest.raises(ValueError, match=next(iter(change))):
        Evaluation(**fields | change)


def test_what_cannot_be_judged_or_answered_is_refused(data, model_and_processor):
    model, processor = model_and_processor
    some = data[1].select(range(3))
    with pytest.raises(ValueError, match="1 answers to 3 examples"):
        score(["yes"], some)
    with pytest.raises(ValueError, match="metric must be one of"):
        score(["yes"] * 3, some, "BLEU")
    with pytest.raises(ValueError, match="the data set is empty"):
        score([], some.select([]))
    with pytest.raises(ValueError, match="the data set is empty"):
        evaluate(model, some.select([]), processor)
    with pytest.raises(ValueError, match="batch_size must be 1"):
        answer(model, some, processor, batch_size=0)
    with pytest.raises(ValueError, match="batches is empty"):
        exact_match(model, [])


def test_blind_gives_the_most_frequent_answer_to_each_prompt():
    train = examples(
        ["red", "red", "blue", "two", "blue", "blue"],
        prompt=["color?", "color?", "color?", "number?", "shape?", "shape?"],
    )
    test = examples(
        ["red", "two", "round", "blue"],
        prompt=["color?", "number?", "shape?", "unknown?"],
    )
    result = blind(train, test)
    assert result.answers == ["red", "two", "blue", "blue"]
    assert result.score == 0.75
    assert blind(train, test, metric="VQA accuracy").metric == "VQA accuracy"
    with pytest.raises(ValueError, match="train is empty"):
        blind(train.select([]), test)


def test_the_blind_baseline_of_easy_vqa(data):
    train, test, _ = data
    assert blind(train, test).score == pytest.approx(0.670, abs=5e-4)
