"""The helper of all exercise checks."""

import numpy as np
import pytest
import torch

from ressa.course.checking import expect, same, shown

ONES = torch.ones(2, 3)


@pytest.mark.parametrize(
    "got, wanted",
    [
        (ONES + 1e-7, ONES),
        (ONES.numpy(), ONES),
        (ONES.double(), ONES),
        (1, 1.0),
        (torch.tensor(1.0), 1.0),
        (3, 3),
        ([1.0, "a"], (1.0, "a")),
        ({"a": ONES}, {"a": ONES}),
    ],
)
def test_equal_answers(got, wanted):
    assert same(got, wanted)


@pytest.mark.parametrize(
    "got, wanted",
    [
        (ONES + 1e-3, ONES),
        (ONES[None], ONES),
        (ONES.bool(), ONES),
        (ONES.tolist(), ONES),
        (1.1, 1.0),
        ("one", 1.0),
        (None, 1.0),
        ([1.0], [1.0, 2.0]),
        ({"a": 1}, {"b": 1}),
        (float("nan"), 1.0),
    ],
)
def test_different_answers(got, wanted):
    assert not same(got, wanted)


def test_the_tolerance_is_relative_for_large_numbers():
    assert same(1001.0, 1000.0, tolerance=0.01)
    assert not same(1011.0, 1000.0, tolerance=0.01)


def test_messages_are_short():
    value = {"x": np.array([1 / 3, 2.0]), "pattern": "2:4", "n": (1, None)}
    assert shown(value) == "{x: [0.3333, 2], pattern: '2:4', n: [1, None]}"


def check(function):
    "A check of addition, with one known mistake."
    expect(function, {"a": 2, "b": 3}, wanted=5, mistakes={"add, not multiply": 6})


def test_the_message_names_the_mistake_the_input_and_both_answers():
    check(lambda a, b: a + b)
    with pytest.raises(AssertionError) as error:
        check(lambda a, b: a * b)
    assert str(error.value) == "add, not multiply\nfor {a: 2, b: 3}\ngot  6\nwant 5"
    with pytest.raises(AssertionError, match="not yet right"):
        check(lambda a, b: 7)


def test_a_function_must_not_change_its_input():
    with pytest.raises(AssertionError, match="changed its input"):
        expect(lambda x: x.add_(1), {"x": torch.zeros(2)}, wanted=torch.ones(2))


def test_the_readers_own_error_is_not_hidden():
    with pytest.raises(ZeroDivisionError):
        check(lambda a, b: a / 0)


def test_what_is_compared_may_be_computed_from_the_answer():
    def check_logits(function):
        expect(
            function,
            {"p": torch.tensor([0.25, 0.75])},
            wanted=torch.tensor([0.25, 0.75]),
            compared=lambda logits: logits.softmax(0),
        )

    check_logits(lambda p: p.log() + 3)
    with pytest.raises(AssertionError) as error:
        check_logits(lambda p: p * 0)
    assert "got  [0, 0]\nso   [0.5, 0.5]\nwant [0.25, 0.75]" in str(error.value)
    with pytest.raises(AssertionError, match="returned None"):
        check_logits(lambda p: None)


def test_a_right_answer_may_be_none():
    expect(lambda limit: None, {"limit": 1}, wanted=None)
    with pytest.raises(AssertionError, match="nothing fits"):
        expect(lambda limit: 1, {"limit": 1}, wanted=None, mistakes={"nothing fits": 1})
