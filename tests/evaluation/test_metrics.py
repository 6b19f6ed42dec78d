"""Metrics against slow references, and against lmms-eval where it is installed."""

import importlib.util
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset

from ressa.evaluation.metrics import (
    METRICS,
    NUMBERS,
    PUNCTUATION,
    RESTORED,
    agreement,
    cider,
    metric_of,
    normalise_answer,
    vqa_accuracy,
)


def leave_one_out(answer, people):
    "VQA accuracy by a loop over the people."
    turns = [people[:i] + people[i + 1 :] for i in range(len(people))]
    return np.mean([min(others.count(answer) / 3, 1) for others in turns])


def test_vqa_accuracy_is_the_mean_over_leaving_one_out():
    generator = random.Random(0)
    for _ in range(300):
        n = generator.randint(2, 10)
        people = generator.choices(["red", "blue", "teal", "gray"], k=n)
        answer = generator.choice(["red", "blue", "pink"])
        expected = leave_one_out(answer, people)
        assert vqa_accuracy(answer, people) == pytest.approx(expected)


def test_agreement_of_ten_people_and_of_one():
    found = [agreement(agreeing, 10) for agreeing in (0, 1, 2, 3, 4, 10)]
    assert found == pytest.approx([0, 0.3, 0.6, 0.9, 1, 1])
    assert (agreement(1, 1), agreement(0, 1)) == (1, 0)
    assert (vqa_accuracy("red", ["red"]), vqa_accuracy("red", ["blue"])) == (1, 0)


@pytest.mark.parametrize("agreeing, people", [(-1, 3), (4, 3), (0, 0)])
def test_impossible_counts_are_refused(agreeing, people):
    with pytest.raises(ValueError, match="agreeing must be between"):
        agreement(agreeing, people)


def test_references_must_be_a_list_that_is_not_empty():
    with pytest.raises(ValueError, match="people is empty"):
        vqa_accuracy("red", [])
    with pytest.raises(TypeError, match="must be a list"):
        vqa_accuracy("red", "red")


@pytest.mark.parametrize(
    "text, expected",
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
def test_normalisation(text, expected):
    assert normalise_answer(text) == expected


def lmms_processor():
    "lmms-eval's own normaliser; skips the test where it is not installed."
    library = importlib.util.find_spec("lmms_eval")
    if library is None:
        pytest.skip("lmms-eval is not installed")
    file = Path(library.origin).parent / "tasks/_task_utils/vqa_eval_metric.py"
    spec = importlib.util.spec_from_file_location("official", file)
    official = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(official)
    return official.EvalAIAnswerProcessor()


def test_normalisation_agrees_with_lmms_eval():
    processor = lmms_processor()
    generator = random.Random(1)
    ordinary = ["a", "an", "the", "The", "dog", "1,000", "2.5", "t-shirt", "no."]
    words = [*RESTORED, *NUMBERS, *ordinary]

    def without_somebodyd(text):
        "The one contraction on which they differ, written alike on both sides."
        return text.replace("somebody'd", "somebodyd")

    for _ in range(5000):
        text = " ".join(generator.choices(words, k=generator.randint(1, 4)))
        for _ in range(generator.randint(0, 3)):
            place = generator.randint(0, len(text))
            mark = generator.choice(PUNCTUATION + ". '\n")
            text = text[:place] + mark + text[place:]
        clean = processor.process_punctuation(text.replace("\n", " ").strip())
        expected = processor.process_digit_article(clean)
        found = normalise_answer(text)
        assert without_somebodyd(found) == without_somebodyd(expected), text


def naive_cider(caption, reference, references):
    "CIDEr-D of a caption against its one reference, by the formula of the paper."

    def sequences(text, n):
        words = text.split()
        return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))

    total = 0.0
    for n in (1, 2, 3, 4):
        containing = Counter(s for text in references for s in sequences(text, n))

        def weighted(text):
            return {
                s: count * np.log(len(references) / max(1, containing[s]))
                for s, count in sequences(text, n).items()
            }

        ours, theirs = weighted(caption), weighted(reference)
        common = ours.keys() & theirs.keys()
        product = sum(min(ours[s], theirs[s]) * theirs[s] for s in common)
        squares = [sum(v * v for v in side.values()) for side in (ours, theirs)]
        if all(squares):
            total += product / np.sqrt(squares[0] * squares[1])
    gap = len(caption.split()) - len(reference.split())
    return 10 / 4 * total * np.exp(-(gap**2) / 72)


def test_cider_is_the_formula_and_ignores_case_and_punctuation(data):
    references = data[2]["answer"][:6]
    captions = [
        "a red circle",
        references[1].replace("light", "dark"),
        references[2],
        f"it is {references[3]}",
        "",
        references[0],
    ]
    expected = [naive_cider(c, r, references) for c, r in zip(captions, references)]
    found = cider(captions, [[text] for text in references])
    assert found == pytest.approx(expected, abs=1e-6)
    shouted = cider([f"{c.upper()}!" for c in captions], [[r] for r in references])
    assert (shouted == found).all()


def test_cider_takes_the_mean_over_the_references_of_an_image():
    captions = ["a red circle", "one blue square", "two dogs"]
    references = [[text, "a red ball here"] for text in captions]
    assert 0 < cider(captions[:1] * 3, references)[0] < 10
    with pytest.raises(ValueError, match="3 answers, but 1 references"):
        cider(captions, references[:1])


def examples(kind="other", **columns):
    "A data set with the given columns, a question type and one answer each."
    n = len(next(iter(columns.values())))
    return Dataset.from_dict(
        columns | dict(question_type=[kind] * n, answer=["red"] * n)
    )


@pytest.mark.parametrize(
    "data, expected",
    [
        (examples(x=[1]), "exact match"),
        (examples(answers=[["red"]]), "exact match"),
        (examples(answers=[["red"], ["red"] * 10]), "VQA accuracy"),
        (examples("caption", answers=[["red"] * 5]), "CIDEr/10"),
    ],
)
def test_the_data_choose_the_metric(data, expected):
    assert metric_of(data) == expected


def test_no_metric_fits_an_empty_data_set():
    with pytest.raises(ValueError, match="the data set is empty"):
        metric_of(examples(x=[1]).select([]))


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_gives_a_value_in_0_1_for_each_answer(name):
    values = METRICS[name](
        ["Red ", "two", ""], [["red"], ["2", "blue"], ["a dog", "the dog"]]
    )
    assert values.shape == (3,)
    assert ((values >= 0) & (values <= 1)).all()
    assert values[2] == 0


def test_an_exact_match_ignores_case_and_outer_spaces_only():
    values = METRICS["exact match"](
        [" Red", "red.", "blue"], [["red"], ["red"], ["red", "BLUE "]]
    )
    assert values.tolist() == [1, 0, 1]
