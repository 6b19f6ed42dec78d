"""Concepts that meet in one figure can be told apart by their colours."""

import itertools
import re

import matplotlib
import matplotlib.colors
import numpy as np
import pytest

from ressa.palette import METHOD_MARKS, PALETTE, SIGNED

TOGETHER = {
    "models": ["dense", "pruned", "plain_lora", "ressa", "labels", "hira", "blind"],
    "repairs": [
        *["dense", "pruned", "plain_lora", "ressa", "labels", "blind"],
        *["teacher", "teacher_at_answers"],
    ],
    "parts": ["vision", "interface", "language"],
    "mask": ["kept_weight", "pruned_weight"],
    "answers": ["dense", "pruned", "ressa", "teacher"],
    "one layer": ["wanda", "sparsegpt", "exact"],
}
METHODS = ["magnitude", "wanda", "ria", "sparsegpt", "dsnot"]
# What a reader with one kind of colour blindness sees of linear red, green and blue
# (Machado, Oliveira & Fernandes 2009, severity 1).
SEEN_BY = {
    "most people": np.eye(3),
    "deuteranopia": np.array(
        [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]]
    ),
    "protanopia": np.array(
        [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]]
    ),
    "tritanopia": np.array(
        [[1.256, -0.077, -0.179], [-0.078, 0.931, 0.148], [0.005, 0.691, 0.304]]
    ),
}
TO_XYZ = np.array(  # of sRGB, each row divided by that of white
    [[0.434, 0.376, 0.190], [0.213, 0.715, 0.072], [0.018, 0.109, 0.873]]
)


def linear(colour):
    "Linear red, green and blue of a colour."
    rgb = np.array(matplotlib.colors.to_rgb(colour))
    return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)


def lab(linear_rgb):
    "CIELAB, in which distances are about what an eye sees."
    x, y, z = np.cbrt(TO_XYZ @ linear_rgb.clip(0, 1))
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


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


@pytest.mark.parametrize("eyes", SEEN_BY)
def test_methods_differ_for_all_eyes(eyes):
    seen = {name: lab(SEEN_BY[eyes] @ linear(PALETTE[name])) for name in METHODS}
    for first, second in itertools.combinations(METHODS, 2):
        distance = np.linalg.norm(seen[first] - seen[second])
        assert distance > 25, f"{first} and {second}: {distance:.0f}"


def test_methods_differ_from_every_other_concept_and_show_on_light_and_dark():
    for method in METHODS:
        colour = linear(PALETTE[method])
        for name in PALETTE.keys() - set(METHODS) - {"wanda+dsnot"}:
            assert np.linalg.norm(lab(colour) - lab(linear(PALETTE[name]))) > 20
        luminance = TO_XYZ[1] @ colour
        on_white = 1.05 / (luminance + 0.05)
        on_dark = (luminance + 0.05) / (0.006 + 0.05)  # #121212
        assert min(on_white, on_dark) > 2.2, method
    assert PALETTE["dsnot"] == PALETTE["wanda+dsnot"]
    assert METHOD_MARKS.keys() == {*METHODS, "wanda+dsnot"}
