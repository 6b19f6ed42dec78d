"""Explorers: whatever draws, the picture belongs to the state, and errors are seen."""

import base64
import io
import re

import matplotlib.pyplot as plt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ressa.course.explorers import control, explorer, png, small_multiples


def draw(**state):
    "The state as bars."
    fig, ax = plt.subplots(figsize=(2, 1), dpi=50)
    ax.bar(range(len(state)), [float(value) for value in state.values()])
    return fig


def picture_in(box):
    "The bytes of the picture that an explorer shows."
    return base64.b64decode(re.search('base64,([^"]+)', box.children[-1].value)[1])


@settings(max_examples=5, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 1), st.sampled_from([0, 1, 2, 3, 4])),
        min_size=1,
        max_size=5,
    )
)
def test_the_picture_is_that_of_the_state(moves):
    box = explorer(draw, x=(0, 4), y=[4, 3, 2, 1, 0], z=True)
    for which, value in moves:
        box.children[which].value = value
        state = {control.description: control.value for control in box.children[:-1]}
        assert picture_in(box) == png(draw(**state))
    assert not plt.get_fignums()  # every figure is closed


def test_small_multiples_are_the_explorers_pictures():
    states = [dict(x=k, y=0, z=False) for k in range(3)]
    sheet = Image.open(io.BytesIO(small_multiples(draw, states).data))
    assert sheet.size == (200, 100)
    for k, state in enumerate(states):
        alone = Image.open(io.BytesIO(png(draw(**state)))).convert("RGB")
        left, top = k % 2 * 100, k // 2 * 50
        place = sheet.crop((left, top, left + 100, top + 50))
        assert place.tobytes() == alone.tobytes()
    empty = sheet.crop((100, 50, 200, 100))
    assert empty.getcolors() == [(5000, (255, 255, 255))]
    with pytest.raises(ValueError, match="states is empty"):
        small_multiples(draw, [])


def test_errors_take_the_place_of_the_picture_as_text_not_markup():
    def fails(x):
        raise KeyError("<b>&")

    shown = explorer(fails, x=[1, 2]).children[-1].value
    assert 'role="alert"' in shown and "KeyError" in shown
    assert "<b>" not in shown
    returns_nothing = explorer(lambda x: None, x=[1])
    assert "must return a matplotlib figure" in returns_nothing.children[-1].value


def test_the_alternative_text_names_the_state_and_is_no_markup():
    box = explorer(draw, alt='a "<b>"', x=[1])
    assert 'alt="a &quot;&lt;b&gt;&quot;: x = 1"' in box.children[-1].value
    assert 'alt="x = 1"' in explorer(draw, x=[1]).children[-1].value


@pytest.mark.parametrize(
    "choice, start",
    [((0, 4), 5), ((0.0, 0.9, 0.1), -0.1), (["a"], "b"), ([], None), (None, None)],
)
def test_what_cannot_be_controlled_is_refused(choice, start):
    with pytest.raises(ValueError, match="no control for|is not in"):
        control(choice, start)


def test_a_start_belongs_to_a_control():
    with pytest.raises(ValueError, match="start has no control: .*y"):
        explorer(draw, dict(y=1), x=(0, 4))
    assert explorer(draw, dict(z=False), x=(0, 4), z=True).children[1].value is False
    assert explorer(draw, dict(x=0), x=(0, 4)).children[0].value == 0
