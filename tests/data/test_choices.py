"""Multiple choice: options are written below the question, and the right one is found however it is stored."""

import pytest
import shapes_folder

from ressa.data.choices import chosen, options_of, with_options
from ressa.data.load_data import load_data
from ressa.evaluation.metrics import metric_of


def test_a_data_set_of_multiple_choice(tmp_path):
    path = shapes_folder.make(tmp_path, "choices", rows=3, size=16)
    pictures = shapes_folder.draw_pictures(tmp_path / "again", 3, 16, 0)
    colors = [color for _, color, _ in pictures]
    letters = load_data(path)
    assert letters["answer"][:] == [
        "ABCDEF"[shapes_folder.COLORS.index(c)] for c in colors
    ]
    assert "?\nA. red\nB. green\nC. blue" in letters["prompt"][0]
    assert set(letters["question_type"][:]) == {"multiple choice"}
    assert metric_of(letters) == "exact match"
    assert load_data(path, choices="texts")["answer"][:] == colors
    with pytest.raises(ValueError, match="choices must be 'letters' or 'texts'"):
        load_data(path, choices="numbers")


@pytest.mark.parametrize(
    "answers", [["blue", "red"], ["B", "A"], ["(b)", "a."], [1, 0], ["1", "0"]]
)
def test_the_right_option_is_stored_in_three_ways(answers):
    assert chosen(answers, options_of([["red", "blue"]] * 2)) == [1, 0]


def test_options_may_be_a_text_or_missing():
    options = options_of(["['one', 'two']", None, []])
    assert options == [["one", "two"], [], []]
    assert chosen(["two", "any", "any"], options) == [1, None, None]
    assert with_options("Which?", options[0]) == "Which?\nA. one\nB. two"


@pytest.mark.parametrize(
    "answers, options, message",
    [
        (["red", "green"], [["red", "blue"]] * 2, "row 1: the answer 'green' is none"),
        ([0, 2], [["red", "blue"]] * 2, "row 1: the answer 2 is none"),
        (["A"], [["B", "A"]], "row 0: the answer 'A' can be a text and a letter"),
        (["1"], [["2", "1", "0"]], None),
        (["2"], [["2", "1", "0"]], "can be a text and a number"),
    ],
)
def test_nothing_is_guessed(answers, options, message):
    if message is None:
        assert chosen(answers, options) == [1]
        return
    with pytest.raises(ValueError, match=message):
        chosen(answers, options)


@pytest.mark.parametrize("cell", ["red or blue", ["red"], [["a"], ["b"]], 7, ["a", ""]])
def test_choices_that_are_no_list_name_their_row(cell):
    with pytest.raises(ValueError, match="row 1: "):
        options_of([["a", "b"], cell])
