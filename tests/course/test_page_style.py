"""A page is quiet, and its figures have one style."""

import warnings

import datasets
import matplotlib.pyplot as plt
import pytest
import transformers

from ressa.course.page_style import FIGURE_STYLE, start_page


@pytest.fixture
def settings_restored():
    "What a page sets is set for the whole process."
    before = transformers.logging.get_verbosity()
    with warnings.catch_warnings(), plt.rc_context(), pytest.MonkeyPatch.context() as p:
        p.setenv("TRANSFORMERS_VERBOSITY", "error")
        yield
    transformers.logging.set_verbosity(before)
    transformers.logging.enable_progress_bar()
    datasets.enable_progress_bars()


def test_style_and_silence(settings_restored, capsys):
    start_page()
    for name, value in FIGURE_STYLE.items():
        actual = plt.rcParams[name]
        assert actual == value or tuple(actual) == tuple(value), name
    warnings.warn("about this machine", stacklevel=1)
    transformers.logging.get_logger("transformers").warning("about this model")
    assert capsys.readouterr().err == ""
    assert datasets.are_progress_bars_disabled()
