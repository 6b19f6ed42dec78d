"""Data sets from folders, files and easy-VQA, and what goes wrong."""

import json

import datasets
import pytest
from data_sets import SCHEMAS, STANDARD_COLUMNS, made, references
from datasets import Dataset
from tiny_models import picture

from ressa.data import load_data as load_data_module
from ressa.data.easy_vqa import load_easy_vqa
from ressa.data.load_data import load_data


@pytest.mark.parametrize("name", SCHEMAS)
def test_every_schema_is_read_whole_in_part_and_in_slices(name, tmp_path):
    made(name).to_parquet(tmp_path / "validation-00000-of-00001.parquet")
    whole = load_data(tmp_path)
    part = load_data(tmp_path, "validation", limit=3)
    piece = load_data(tmp_path, "validation[1:4]")
    assert (len(whole), len(part), len(piece)) == (4, 3, 3)
    for data in (whole, part, piece):
        assert data.column_names == STANDARD_COLUMNS
        assert data[0]["answers"] == references(name)
    assert piece[0]["image"].size == whole[1]["image"].size
    assert len(load_data(tmp_path, limit=99)) == 4
    assert len(load_data(tmp_path, "validation[1:4]", limit=2)) == 2


@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv"])
def test_files_with_images_beside_them(tmp_path, suffix):
    (tmp_path / "images").mkdir()
    picture(12, 14).save(tmp_path / "images" / "a.png")
    example = {"image": "images/a.png", "question": "what color?", "answer": "red"}
    file = tmp_path / f"mine.{suffix}"
    data = Dataset.from_list([example] * 3)
    if suffix == "csv":
        data.to_csv(file)
    else:
        data.to_json(file)
    assert load_data(file)[1]["image"].size == (14, 12)
    assert len(load_data(file, "train[:2]")) == 2


@pytest.mark.parametrize(
    "asked, said",
    [
        ({"split": "train[3:]"}, "is empty: choose rows between 0 and 3"),
        ({"split": "train[7:]"}, "is empty: choose rows between 0 and 3"),
        ({"split": "train+train"}, "name one split"),
        ({"split": ""}, "split must be a name"),
        ({"split": 3}, "split must be a name"),
        ({"limit": 0}, "limit must be a whole number, 1 or more"),
        ({"limit": 1.5}, "limit must be a whole number"),
        ({"limit": True}, "limit must be a whole number"),
    ],
)
def test_parts_that_a_file_does_not_have(tmp_path, asked, said):
    picture(12, 14).save(tmp_path / "a.png")
    row = {"image": "a.png", "question": "what?", "answer": "red"}
    (tmp_path / "mine.json").write_text(json.dumps([row] * 3))
    with pytest.raises(ValueError, match=said):
        load_data(tmp_path / "mine.json", **asked)


def test_a_file_with_columns_of_its_own(tmp_path):
    picture(12, 14).save(tmp_path / "a.png")
    example = {"image": "a.png", "frage": "was?", "antwort": "rot"}
    file = tmp_path / "mine.json"
    file.write_text(json.dumps([example]))
    columns = {"question": "frage", "answers": "antwort"}
    assert load_data(file, columns=columns)[0]["answer"] == "rot"


def write_gqa(folder):
    "GQA's two parts, as the hub keeps them."
    parts = {
        "val_images": [{"id": str(i), "image": picture(12, 10 + i)} for i in range(4)],
        "val_instructions": [
            {"id": f"q{i}", "imageId": str(i), "question": "what?", "answer": "red"}
            for i in (3, 1, 1, 0)
        ],
    }
    readme = ["---", "configs:"]
    for name, examples in parts.items():
        (folder / name).mkdir()
        Dataset.from_list(examples).to_parquet(folder / name / "val-00000.parquet")
        readme.append(f"- config_name: {name}")
        readme.append(f"  data_files: [{{split: val, path: {name}/*}}]")
    (folder / "README.md").write_text("\n".join([*readme, "---"]))


@pytest.mark.parametrize("limit", [None, 3])
def test_gqa_in_two_parts(tmp_path, limit):
    write_gqa(tmp_path)
    data = load_data(tmp_path, config="val_instructions", limit=limit)
    widths = [example["image"].size[0] for example in data]
    assert widths == [13, 11, 11, 10][:limit]
    assert data["image_id"][:3] == ["3", "1", "1"]


def test_a_data_set_in_several_parts_needs_a_config(tmp_path):
    write_gqa(tmp_path)
    message = "(?s)Config name is missing.*val_images.*say which part"
    with pytest.raises(ValueError, match=message):
        load_data(tmp_path)


def test_a_limit_reads_no_further(tmp_path):
    for i in range(2):
        made("plain").to_parquet(tmp_path / f"validation-0000{i}-of-00003.parquet")
    (tmp_path / "validation-00002-of-00003.parquet").write_bytes(b"not parquet at all")
    assert len(load_data(tmp_path, "validation", limit=3)) == 3
    with pytest.raises(ValueError, match="data .*"):
        load_data(tmp_path, "validation")


def test_the_default_split_is_validation_where_there_is_one(tmp_path):
    for split, n in {"train": 4, "test": 3, "validation": 2}.items():
        made("plain", n).to_parquet(tmp_path / f"{split}-00000-of-00001.parquet")
    assert len(load_data(tmp_path)) == 2


# --- easy-VQA


@pytest.mark.parametrize("task", ["vqa", "caption"])
def test_easy_vqa_has_the_standard_columns(task):
    data = load_data("easy-vqa", "test", task=task, limit=50)
    own = load_easy_vqa("test", task=task).select(range(50))
    assert data.column_names == STANDARD_COLUMNS
    for column in ("prompt", "answer", "question_type"):
        assert data[column][:] == own[column][:]
    assert data["answers"][:] == [[answer] for answer in own["answer"][:]]
    assert data["image_id"][:] == [str(image_id) for image_id in own["image_id"][:]]
    assert data[7]["image"].tobytes() == own[7]["image"].tobytes()


def test_splits_of_easy_vqa():
    whole = load_data("easy-vqa")
    assert len(whole) == 9673  # the test split
    assert load_data("easy-vqa", "test[5:8]")["prompt"][:] == whole["prompt"][5:8]
    assert len(load_data("easy-vqa", "test[:1%]")) == 97


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: load_data("easy-vqa", "validation"), "split must be one of"),
        (lambda: load_data("easy-vqa", task="sing"), "task must be one of"),
        (lambda: load_data("easy-vqa", config="x"), "are for other data sets"),
        (lambda: load_data("easy-vqa", turns="apart"), "are for other data sets"),
        (lambda: load_data("easy-vqa", choices="texts"), "are for other data sets"),
        (lambda: load_data("easy-vqa", image_folder="."), "are for other data sets"),
        (lambda: load_data("easy-vqa", turns="x"), "turns must be 'together' or"),
        (lambda: load_data("easy-vqa", choices="x"), "choices must be 'letters' or"),
        (lambda: load_data("easy-vqa", limit=0), "limit must be .*1 or more, not 0"),
    ],
)
def test_what_easy_vqa_does_not_have(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# --- what goes wrong


def test_errors_name_the_data_set_and_say_what_to_do(tmp_path):
    with pytest.raises(ValueError, match="data .*none: .*check the path"):
        load_data(tmp_path / "none")
    with pytest.raises(ValueError, match="limit must be .*1 or more, not 0"):
        load_data(tmp_path, limit=0)
    with pytest.raises(ValueError, match="data no/such-data: .*What to do"):
        load_data("no/such-data")


def test_images_that_are_missing_are_counted(tmp_path):
    example = {"image": "b.png", "question": "?", "answer": "no"}
    (tmp_path / "lost.json").write_text(json.dumps([example]))
    message = "1 of 1 image files are missing, such as b.png"
    with pytest.raises(ValueError, match=message):
        load_data(tmp_path / "lost.json")


@pytest.mark.parametrize(
    "error, what_to_do",
    [
        (
            datasets.exceptions.DatasetNotFoundError(
                "Dataset 'x/y' is a gated dataset on the Hub. Visit the page"
            ),
            "ask for access",
        ),
        (
            datasets.exceptions.DatasetNotFoundError(
                "Dataset 'x/y' doesn't exist on the Hub or cannot be accessed."
            ),
            "check the spelling",
        ),
        (
            ConnectionError("Couldn't reach 'x/y' on the Hub (OfflineModeIsEnabled)"),
            "go online, or give a folder",
        ),
        (
            RuntimeError("Dataset scripts are no longer supported, but found y.py"),
            "code of its own",
        ),
    ],
)
def test_errors_of_the_hub_are_one_line(monkeypatch, error, what_to_do):
    def fail(*args, **options):
        raise error

    monkeypatch.setattr(load_data_module, "load_dataset_builder", fail)
    with pytest.raises(ValueError, match=what_to_do) as caught:
        load_data("x/y", "validation")
    assert len(str(caught.value).splitlines()) == 1
    assert "x/y" in str(caught.value)


# --- CSV files of the hub


def test_csv_files_elsewhere_are_read_without_guessing(tmp_path, monkeypatch):
    "As on the hub: the builder names addresses, and the files are fetched as needed."
    from datasets.packaged_modules.csv.csv import Csv

    picture(12, 14).save(tmp_path / "a.png")
    image = tmp_path / "a.png"
    for number in range(2):
        lines = f"image;question;answer\n{image};how many?;00{number}\n"
        (tmp_path / f"part{number}.csv").write_text(lines)
    (tmp_path / "part2.csv").write_text("no table at all;\na\n")  # is never read
    addresses = [f"file://{tmp_path}/part{number}.csv" for number in range(3)]
    builder = Csv(data_files={"train": addresses}, sep=";", cache_dir=tmp_path / "c")
    monkeypatch.setattr(load_data_module, "load_dataset_builder", lambda *_: builder)
    data = load_data_module._read_named("x/y", None, "train", 2)
    assert data["answer"][:] == ["000", "001"]
    with pytest.raises(ValueError, match="line 2: has 1 cells"):
        load_data_module._read_named("x/y", None, "train", None)
