"""The quick bench: no short cut changes an answer."""

import pytest
import torch
from torch import nn

from ressa.course.bench import bench, one_look_per_image
from ressa.evaluation.answers import evaluate, exact_match


class Tower(nn.Module):
    "A tower that counts the images it is given, and returns a nested output."

    def __init__(self):
        super().__init__()
        self.images = 0

    def forward(self, pixel_values, scale=1):
        self.images += len(pixel_values)
        total = scale * pixel_values.flatten(1).sum(1)
        return {"pooled": total, "layers": (total + 1, [total + 2])}


@pytest.mark.parametrize("by_name", [False, True])
def test_neighbouring_equal_images_are_computed_once(by_name):
    images = torch.randn(3, 2, 4, 4)
    pixels = images[[0, 0, 1, 1, 1, 0, 2]]  # four runs of equal images
    tower = Tower()
    expected = tower(pixels, scale=2)
    tower.images = 0
    with one_look_per_image(tower):
        if by_name:
            found = tower(pixel_values=pixels, scale=2)
        else:
            found = tower(pixels, scale=2)
    assert tower.images == 4
    assert found["pooled"].equal(expected["pooled"])
    assert found["layers"][1][0].equal(expected["layers"][1][0])
    tower(pixels)
    assert tower.images == 4 + 7  # the hooks are gone


def test_the_hooks_go_when_the_block_fails():
    tower = Tower()
    with pytest.raises(RuntimeError, match="stop"):
        with one_look_per_image(tower):
            raise RuntimeError("stop")
    tower(torch.zeros(2, 1))
    assert tower.images == 2


@pytest.mark.slow
def test_the_short_cuts_change_no_answer(bundled, data):
    model, processor = bundled
    quick = bench(100)
    assert bench(100) is quick
    right = quick.right(model)
    assert right.shape == (100,)
    assert (exact_match(model, quick.questions) == right).all()
    generated = evaluate(model, data[1].select(quick.chosen[:60]), processor)
    assert (generated.values == right[:60]).all()
    captions = sum(len(batch["labels"]) for batch in quick.captions)
    assert captions == len(data[2])
    assert len(quick.train) == len(data[0])


def test_few_questions_are_about_many_pictures(data):
    chosen = bench(100).chosen
    assert len(set(chosen)) == 100
    assert len(set(data[1].select(chosen)["image_id"])) == 100


@pytest.mark.parametrize("questions", [0, -1, 9674])
def test_as_many_questions_as_there_are(questions):
    with pytest.raises(ValueError, match="questions must be 1 to 9673"):
        bench(questions)
