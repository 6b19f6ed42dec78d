"""What became of each answer."""

from itertools import product

import matplotlib.pyplot as plt
import numpy as np
import pytest
from notebooks import NBS

from ressa.course.before_after import (
    FATES,
    draw_answers,
    draw_stored_answers,
    fates,
    nth_question,
)

EVERY = np.array(list(product((0, 1), repeat=3)))  # dense, pruned, repaired


def test_each_question_has_one_fate():
    named = {tuple(case): fate for case, fate in zip(EVERY.tolist(), fates(*EVERY.T))}
    assert named[1, 1, 1] == "kept"
    assert named[1, 0, 1] == "repaired"
    assert named[1, 0, 0] == "lost"
    assert named[1, 1, 0] == "broken by repair"
    assert {named[0, p, r] for p in (0, 1) for r in (0, 1)} == {"dense was wrong"}
    assert set(named.values()) == set(FATES)


def test_other_numbers_of_answers_are_refused():
    with pytest.raises(ValueError, match="not 2, 2 and 1"):
        fates([1, 0], [1, 0], [1])


def test_questions_of_a_fate_are_numbered_and_begin_again():
    fate = np.array(["kept", "lost", "kept", "lost", "lost"])
    assert [nth_question(fate, "lost", k) for k in (1, 2, 3, 4)] == [1, 3, 4, 1]
    with pytest.raises(ValueError, match="no question has the fate 'repaired'"):
        nth_question(fate, "repaired", 1)


def test_a_drawing_marks_right_and_wrong_answers(data):
    example = data[1][0]
    figure = draw_answers(example, {"dense": example["answer"], "pruned": "purple"})
    texts = [text.get_text() for text in figure.axes[1].texts]
    assert texts[1] == f"dense: {example['answer']} ✓"
    assert texts[2] == "pruned: purple ✗"
    assert "Question" not in texts[0]
    plt.close(figure)


def test_the_stored_answers_of_the_front_page_are_those_of_its_questions():
    figure = draw_stored_answers(NBS / "results" / "before_after.json")
    told = [[text.get_text() for text in ax.texts] for ax in figure.axes]
    plt.close(figure)
    assert len(told) == 4
    for dense, pruned, repaired in told:
        assert dense.startswith("dense: ") and dense.endswith("✓")
        assert pruned.startswith("pruned: ") and pruned.endswith("✗")
        assert repaired.startswith("repaired: ") and repaired.endswith("✓")
