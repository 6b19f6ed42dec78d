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
    "The state as bars, one colour for each boolean."
    fig, ax = plt.subplots(figsize=(2, 1), dpi=50)
    ax.bar(range(len(state)), [float(value) for value in state.values()])
    return fig


def shown(box):
    return base64.b64decode(re.search('base64,([^"]+)', box.children[-1].value)[1])


@settings(max_examples=10, deadline=None)
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
        assert shown(box) == png(draw(**state))
    assert not plt.get_fignums()


def test_small_multiples_are_the_explorers_pictures():
    states = [dict(x=k, y=0, z=False) for k in range(3)]
    sheet = Image.open(io.BytesIO(small_multiples(draw, states).data))
    assert sheet.size == (200, 100)
    for k, state in enumerate(states):
        alone = Image.open(io.BytesIO(png(draw(**state)))).convert("RGB")
        place = sheet.crop(
            (k % 2 * 100, k // 2 * 50, k % 2 * 100 + 100, k // 2 * 50 + 50)
        )
        assert place.tobytes() == alone.tobytes()
    assert sheet.crop((100, 50, 200, 100)).getcolors() == [(5000, (255, 255, 255))]


def test_words_and_errors_are_text_not_markup():
    def fails(x):
        raise KeyError("<b>&")

    box = explorer(fails, x=[1, 2])
    assert (
        'role="alert"' in box.children[-1].value
        and "KeyError" in box.children[-1].value
    )
    assert "<b>" not in box.children[-1].value
    box = explorer(draw, alt='a "<b>"', x=[1])
    assert 'alt="a &quot;&lt;b&gt;&quot;: x = 1"' in box.children[-1].value
    assert (
        'role="alert"' in explorer(lambda x: None, x=[1]).children[-1].value
    )  # no figure returned


@pytest.mark.parametrize(
    "choice, start",
    [((0, 4), 5), ((0.0, 0.9, 0.1), -0.1), (["a"], "b"), ([], None), (None, None)],
)
def test_what_cannot_be_controlled_is_refused(choice, start):
    with pytest.raises(ValueError):
        control(choice, start)


def test_a_start_without_control_is_refused():
    with pytest.raises(ValueError, match="y"):
        explorer(draw, dict(y=1), x=(0, 4))
    assert explorer(draw, dict(z=False), x=(0, 4), z=True).children[1].value is False
    assert explorer(draw, dict(x=0), x=(0, 4)).children[0].value == 0
