"""No picture is in training and test; what is in both is counted."""

import io

import PIL.Image
import pytest
from datasets import Dataset, Image
from tiny_models import picture

from ressa.cli import evaluate, repair
from ressa.cli.app import parse
from ressa.cli.read_recipe import read_options
from ressa.cli.run_data import load_tests, load_training, separate
from ressa.data.columns import standard_examples
from ressa.data.held_out import count_seen, hold_out, without_pictures_of


def made(n_pictures, per_picture=3, first=0):
    rows = []
    for i in range(first, first + n_pictures):
        for k in range(per_picture):
            row = {"image": picture(8, 8, i), "question": f"{k}?", "answer": str(i % 3)}
            rows.append(row)
    return Dataset.from_list(rows)


def keys_of(data):
    return {row["image"].tobytes() for row in data}


@pytest.mark.parametrize("n_pictures", [2, 3, 5, 40])
def test_no_picture_is_on_both_sides(n_pictures):
    data = standard_examples(made(n_pictures))
    train, test = hold_out(data)
    assert len(train) and len(test) and len(train) + len(test) == len(data)
    assert not keys_of(train) & keys_of(test)
    assert count_seen(train, test) == 0
    if n_pictures == 40:
        assert 3 <= len(keys_of(test)) <= 14


def test_a_part_of_the_data_holds_out_the_same_pictures():
    data = standard_examples(made(40))
    _, test = hold_out(data)
    _, of_half = hold_out(data.select(range(60)))
    assert keys_of(of_half) <= keys_of(test)


def test_one_picture_cannot_be_split():
    with pytest.raises(ValueError, match="no picture can be held out"):
        hold_out(standard_examples(made(1)))


def test_the_same_picture_in_another_file_is_found():
    data = standard_examples(made(2, 1))
    file = io.BytesIO()
    data[0]["image"].save(file, "BMP")
    copy = [{"image": PIL.Image.open(file), "question": "0?", "answer": "a"}]
    copy = standard_examples(Dataset.from_list(copy))
    assert count_seen(data, copy) == 1
    assert len(without_pictures_of(data, copy)) == 1


def test_another_question_about_a_picture_is_not_the_same_example():
    data = standard_examples(made(1, 2))
    assert count_seen(data.select([0]), data.select([1])) == 0
    assert len(without_pictures_of(data.select([0]), data.select([1]))) == 0


# --- the command


def options(folder, *more):
    parsed = parse(["repair", "--data", str(folder), *more])
    return read_options(parsed, *repair.KEYS)


def evaluation(folder, *more):
    parsed = parse(["evaluate", "--data", str(folder), *more])
    return read_options(parsed, *evaluate.KEYS)


@pytest.fixture
def train_only(tmp_path):
    made(30).to_parquet(tmp_path / "train-00000.parquet")
    return tmp_path


@pytest.mark.parametrize("more", [(), ("--split", "train"), ("--limit", "5")])
def test_data_with_a_training_split_only(train_only, capsys, more):
    args = options(train_only, *more)
    [test] = load_tests(args, None)
    train, seen = separate(args, load_training(args, None), test)
    assert seen == 0 and not keys_of(train) & keys_of(test)
    assert len(test) <= (5 if "--limit" in more else 99) and len(train) > 45
    assert (
        "are kept for the test; their pictures are not in the training"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize("suffix", ["parquet", "file", "saved"])
def test_every_kind_of_source_with_one_split(tmp_path, suffix):
    place = tmp_path / "data"
    if suffix == "saved":
        made(30).save_to_disk(place)
    else:
        place.mkdir()
        made(30).to_parquet(place / "train.parquet")
        place = place / "train.parquet" if suffix == "file" else place
    args = options(place)
    [test] = load_tests(args, None)
    assert not keys_of(test) & keys_of(load_training(args, None))


def test_evaluation_alone_measures_the_held_out_pictures_or_what_was_named(train_only):
    alone = evaluation(train_only)
    [test] = load_tests(alone, None)
    assert not keys_of(test) & keys_of(load_training(options(train_only), None))
    named = evaluation(train_only, "--split", "train")
    assert len(load_tests(named, None)[0]) == 90


def test_slices_of_one_split_share_no_picture(train_only, capsys):
    args = options(train_only, "--split", "train[:10]", "--train-split", "train[4:50]")
    [test] = load_tests(args, None)
    train, _ = separate(args, load_training(args, None), test)
    assert len(test) == 10 and not keys_of(train) & keys_of(test)
    assert "8 training examples show pictures of the test" in capsys.readouterr().err


def test_two_splits_with_the_same_examples(tmp_path, capsys):
    made(6).to_parquet(tmp_path / "train-00000.parquet")
    made(6).to_parquet(tmp_path / "validation-00000.parquet")
    args = options(tmp_path)
    with pytest.raises(ValueError, match="all 18 test examples are training examples"):
        separate(args, load_training(args, None), load_tests(args, None)[0])
    made(6, first=4).to_parquet(tmp_path / "test-00000.parquet")
    args = options(tmp_path, "--split", "test")
    train, seen = separate(args, load_training(args, None), load_tests(args, None)[0])
    assert seen == 6 and len(train) == 18
    assert "6 of 18 test examples" in capsys.readouterr().err


def test_a_picture_that_ends_in_the_middle_is_named_by_its_row():
    "Its header is whole, so that it fails only when its pixels are read."
    whole = io.BytesIO()
    PIL.Image.effect_noise((64, 64), 90).convert("RGB").save(whole, "png")
    files = [whole.getvalue(), whole.getvalue()[: len(whole.getvalue()) // 2]]
    data = Dataset.from_dict(
        {
            "image": [{"bytes": file, "path": None} for file in files],
            "prompt": ["what?"] * 2,
            "answer": ["red"] * 2,
        }
    ).cast_column("image", Image())
    with pytest.raises(
        ValueError, match="picture of row 1 cannot be read: .*truncated"
    ):
        hold_out(data)
