"""Drawn images are what their labels say, and the training of the bundled model runs, resumes and repeats."""

import shutil

import pytest
import torch
from safetensors.torch import load_file

from ressa.course import bundled_training
from ressa.course.bundled_training import (
    HALF_SIDES,
    RGB,
    _vision_and_rest,
    bundled_config,
    draw_shapes,
    mirror,
    new_bundled,
    pretrain_vision,
    signed_distances,
    train_bundled,
)
from ressa.data.easy_vqa import COLORS, SHAPES


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# --- drawing


def test_distances_to_edges_of_known_shapes():
    # the centre, a point on the right edge, and a corner of the box
    x = torch.tensor([[[0.0, 3.0, 3.0]]])
    y = torch.tensor([[[0.0, 0.0, 2.0]]])
    half = torch.tensor([[[3.0]]]), torch.tensor([[[2.0]]])
    circle, rectangle, triangle = signed_distances(x, y, *half)[0, :, 0]
    torch.testing.assert_close(circle, torch.tensor([-3.0, 0.0, 13**0.5 - 3]))
    torch.testing.assert_close(rectangle, torch.tensor([-2.0, 0.0, 0.0]))
    assert triangle[0] < 0 < triangle[1]  # its right side is left of the box here
    torch.testing.assert_close(triangle[2], torch.tensor(0.0))  # its lower corner


def test_an_image_has_its_shape_in_its_color():
    images, shapes, colors = draw_shapes(60, generator())
    assert images.shape == (60, 3, 64, 64)
    assert -1 <= images.min() and images.max() <= 1
    assert set(shapes.tolist()) == set(range(len(SHAPES)))
    assert set(colors.tolist()) == set(range(len(COLORS)))
    for image, color in zip((images + 1) / 2, colors):
        exact = (image - RGB[color][:, None, None]).abs().amax(0) < 1e-5
        share = exact.float().mean().item()
        smallest = HALF_SIDES[0] ** 2 / 64**2  # a triangle covers half of its box
        assert share > smallest
        assert image.amax(0).max() > 0.9, "no light background"


def test_the_same_generator_draws_the_same_images():
    first = draw_shapes(4, generator(1))
    assert all(torch.equal(a, b) for a, b in zip(first, draw_shapes(4, generator(1))))
    assert not torch.equal(first[0], draw_shapes(4, generator(2))[0])


@pytest.mark.parametrize("n, size", [(-1, 64), (4, -1)])
def test_negative_numbers_are_refused(n, size):
    with pytest.raises(ValueError, match="n and size must be 0 or more"):
        draw_shapes(n, generator(), size)


def test_mirroring():
    batch = {
        "pixel_values": torch.randn(200, 3, 2, 4),
        "input_ids": torch.zeros(200, 2),
    }
    mirrored = mirror(batch)
    flipped = batch["pixel_values"].flip(-1)
    is_flipped = (mirrored["pixel_values"] == flipped).flatten(1).all(1)
    is_same = (mirrored["pixel_values"] == batch["pixel_values"]).flatten(1).all(1)
    assert (is_flipped ^ is_same).all()
    assert 0.3 < is_flipped.float().mean() < 0.7
    assert mirrored["input_ids"] is batch["input_ids"]
    for share in (-0.1, 1.1):
        with pytest.raises(ValueError, match="share must be in"):
            mirror(batch, share)


# --- training


def test_the_architecture_is_that_of_the_bundled_model(bundled):
    model, processor = bundled
    vocabulary = processor.tokenizer.get_vocab()
    config = bundled_config(len(vocabulary), vocabulary["<image>"])
    for part in ("vision_config", "qformer_config", "text_config"):
        made, stored = getattr(config, part), getattr(model.config, part)
        assert made.hidden_size == stored.hidden_size == 64
        assert made.num_hidden_layers == stored.num_hidden_layers
    made, _ = new_bundled()
    shapes = {name: weight.shape for name, weight in made.state_dict().items()}
    assert shapes == {name: w.shape for name, w in model.state_dict().items()}


def test_query_tokens_differ_from_each_other():
    queries = new_bundled()[0].query_tokens[0]
    assert len(queries.unique(dim=0)) == len(queries) == 8


def test_each_parameter_is_in_one_group():
    model, _ = new_bundled()
    vision, rest = (group["params"] for group in _vision_and_rest(model))
    assert len(vision) + len(rest) == len(list(model.parameters()))
    assert {id(p) for p in vision} == {id(p) for p in model.vision_model.parameters()}


@pytest.mark.slow
def test_step_one_learns_something():
    vision = new_bundled()[0].vision_model
    log = pretrain_vision(vision, steps=100, batch_size=8)
    assert [line["step"] for line in log] == [100]
    assert log[0]["loss"] < 3.2  # guessing costs ln 3 + ln 8


@pytest.mark.slow
def test_training_repeats_and_goes_on(tmp_path, monkeypatch):
    def train(name):
        work = tmp_path / name
        log = train_bundled(work / "model", work, vision_steps=1, steps=1, device="cpu")
        return log, load_file(work / "model/model.safetensors")

    log, first = train("a")
    assert (log["vision_steps"], log["steps"], log["seed"]) == (1, 1, 0)
    _, again = train("b")
    assert all(torch.equal(first[name], again[name]) for name in first)
    # with the weights of step one in its folder, a run trains step two alone
    shutil.rmtree(tmp_path / "a/answers")
    monkeypatch.setattr(bundled_training, "pretrain_vision", None)
    _, resumed = train("a")
    assert all(torch.equal(first[name], resumed[name]) for name in first)
