"""Concepts that meet in one figure can be told apart by their colours."""

import itertools
import re

import matplotlib
import matplotlib.colors
import pytest

from ressa.palette import PALETTE, SIGNED

TOGETHER = {
    "models": ["dense", "pruned", "plain_lora", "ressa", "labels", "hira", "blind"],
    "parts": ["vision", "interface", "language"],
    "mask": ["kept_weight", "pruned_weight"],
    "answers": ["dense", "pruned", "ressa", "teacher"],
}


def test_every_colour_is_six_hexadecimal_digits():
    for colour in PALETTE.values():
        assert re.fullmatch("#[0-9A-F]{6}", colour)


@pytest.mark.parametrize("figure", TOGETHER)
def test_concepts_of_one_figure_differ(figure):
    colours = [matplotlib.colors.to_rgb(PALETTE[name]) for name in TOGETHER[figure]]
    for first, second in itertools.combinations(colours, 2):
        assert sum(abs(a - b) for a, b in zip(first, second)) > 0.3


def test_signed_values_have_a_map_that_is_light_in_the_middle():
    colours = matplotlib.colormaps[SIGNED]([0.0, 0.5, 1.0])[:, :3].sum(1)
    assert colours[1] > max(colours[0], colours[2])
