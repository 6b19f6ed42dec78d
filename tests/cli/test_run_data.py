"""The data of a run: splits, limits, calibration, broken pictures."""

from argparse import Namespace

import pytest
import torch

from ressa.cli.run_data import (
    calibration_of,
    columns_of,
    draw_calibration,
    load_tests,
    load_training,
    require_pictures,
)

EASY = dict(data="easy-vqa", split=None, limit=None, train_split="train")
EASY |= dict(train_limit=None, config=None, columns=None)


@pytest.mark.slow
def test_tests_and_training_of_easy_vqa(bundled):
    _, processor = bundled
    args = Namespace(**EASY | {"limit": 7})
    questions, captions = load_tests(args, processor)
    assert len(questions) == len(captions) == 7
    assert set(captions["question_type"]) == {"caption"}
    args.limit = None
    assert [len(test) for test in load_tests(args, processor)] == [9673, 888]
    prompt = load_training(args, processor)["prompt"][0]
    assert prompt.startswith("Question: ") and prompt.endswith(" Short answer:")


@pytest.mark.slow
def test_parts_of_easy_vqa_are_obeyed(bundled):
    _, processor = bundled
    args = Namespace(**EASY | {"split": "test[:50]", "train_split": "train[:90]"})
    assert [len(test) for test in load_tests(args, processor)] == [50, 50]
    assert len(load_training(args, processor)) == 90
    args.train_limit = 20
    assert len(load_training(args, processor)) == 20


def test_columns():
    assert columns_of(None) is None and columns_of('{"image": "i"}') == {"image": "i"}
    for wrong in ("image", "[1]"):
        with pytest.raises(ValueError, match="--columns must be JSON"):
            columns_of(wrong)


def test_calibration_is_drawn_by_the_seed(bundled, data):
    model, processor = bundled

    def drawn(seed):
        args = Namespace(calibration=5, seed=seed)
        return draw_calibration(args, model, data[0], processor)["input_ids"]

    assert torch.equal(drawn(0), drawn(0)) and not torch.equal(drawn(0), drawn(1))
    default = Namespace(calibration=None, seed=0)
    sizes = [calibration_of(default, data[0].select(range(n))) for n in (3, 200)]
    assert sizes == [3, 128], "all that there are, 128 at most"
    with pytest.raises(ValueError, match="--calibration 9: only 3 examples"):
        args = Namespace(calibration=9, seed=0)
        draw_calibration(args, model, data[0].select(range(3)), processor)


@pytest.mark.parametrize("kind", ["cut", "bomb", "text", "missing"])
def test_a_broken_picture_is_named_with_its_row(tmp_path, monkeypatch, kind):
    import PIL.Image
    from datasets import Dataset, Image
    from tiny_models import picture

    files = [tmp_path / f"{i}.png" for i in range(3)]
    for i, file in enumerate(files):
        picture(40, 40, i).save(file)
    if kind == "cut":
        files[2].write_bytes(files[2].read_bytes()[:300])
    if kind == "text":
        files[2].write_text("no picture")
    if kind == "bomb":
        picture(90, 90).save(files[2])
        monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 2000)
    if kind == "missing":
        files[2].unlink()
    rows = Dataset.from_dict({"image": [str(file) for file in files]})
    rows = rows.cast_column("image", Image())
    require_pictures(rows.select(range(2)), "mine")
    with pytest.raises(ValueError, match="data mine: the picture of row 2 cannot"):
        require_pictures(rows, "mine")
