"""Calibration batches without pictures."""

import pytest
import torch

from ressa.course.without_pictures import grey_images, noise_images


@pytest.mark.parametrize("change", [grey_images, noise_images])
def test_only_the_images_are_replaced(change):
    batch = {"pixel_values": torch.ones(2, 3, 4, 4).half(), "input_ids": torch.ones(2)}
    changed = change(batch)
    assert changed["input_ids"] is batch["input_ids"]
    assert changed["pixel_values"].shape == (2, 3, 4, 4)
    assert changed["pixel_values"].dtype == torch.half
    assert (batch["pixel_values"] == 1).all()
    assert (changed["pixel_values"] != 1).all()
    with pytest.raises(KeyError):
        change({})


def test_grey_is_in_the_middle_and_noise_on_either_side():
    batch = {"pixel_values": torch.ones(8, 3, 16, 16)}
    assert not grey_images(batch)["pixel_values"].any()
    noise = noise_images(batch)["pixel_values"]
    assert -1 <= noise.min() < -0.99
    assert 0.99 < noise.max() <= 1
    assert torch.equal(noise, noise_images(batch, seed=0)["pixel_values"])
    assert not torch.equal(noise, noise_images(batch, seed=1)["pixel_values"])
