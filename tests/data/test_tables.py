"""Values of files and data sets are not changed on entry; what is no text is named."""

import datetime
import json

import pytest
from datasets import ClassLabel, Dataset, DatasetDict, List
from tiny_models import picture

from ressa.data.columns import standard_examples
from ressa.data.load_data import load_data
from ressa.data.tables import read_csv, read_json_rows

# texts that some reader takes for something else
TEXTS = [
    "007",
    "NA",
    "null",
    "nan",
    "None",
    "1e5",
    "True",
    "2020-01-01",
    "-",
    " a ",
    "3.0",
]


def rows_of(texts, image="a.png"):
    return [
        {"image": image, "question": f"{text} or {i}?", "answer": text}
        for i, text in enumerate(texts)
    ]


def as_csv(rows, file):
    lines = [",".join(rows[0]), *(",".join(row.values()) for row in rows)]
    file.write_text("\n".join(lines))


def as_json(rows, file):
    file.write_text(json.dumps(rows))


def as_jsonl(rows, file):
    file.write_text("\n".join(map(json.dumps, rows)))


def as_parquet(rows, file):
    Dataset.from_list(rows).to_parquet(file)


WRITERS = {"csv": as_csv, "json": as_json, "jsonl": as_jsonl, "parquet": as_parquet}


@pytest.mark.parametrize("limit", [None, 4])
@pytest.mark.parametrize("suffix", WRITERS)
def test_texts_of_files_stay_as_they_are(tmp_path, suffix, limit):
    picture(8, 8).save(tmp_path / "a.png")
    WRITERS[suffix](rows_of(TEXTS), tmp_path / f"mine.{suffix}")
    data = load_data(tmp_path / f"mine.{suffix}", limit=limit)
    assert data["answer"][:] == TEXTS[:limit]
    assert "007 or 0?" in data["prompt"][0]
    part = load_data(tmp_path / f"mine.{suffix}", "train[1:3]", limit=limit)
    assert part["answer"][:] == TEXTS[1:3]


@pytest.mark.parametrize("limit", [None, 4])
@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_texts_of_folders_stay_as_they_are(tmp_path, suffix, limit):
    picture(8, 8).save(tmp_path / "a.png")
    rows = rows_of(TEXTS, image=str(tmp_path / "a.png"))
    (tmp_path / "data").mkdir()
    WRITERS[suffix](rows, tmp_path / "data" / f"train.{suffix}")
    WRITERS[suffix](rows[:3], tmp_path / "data" / f"test.{suffix}")
    data = load_data(tmp_path / "data", "train", limit=limit)
    assert data["answer"][:] == TEXTS[:limit]
    assert load_data(tmp_path / "data")["answer"][:] == TEXTS[:3]  # test


@pytest.mark.parametrize("split", [None, "train"])
def test_a_folder_of_images_with_metadata(tmp_path, split):
    folder = tmp_path / "train" if split else tmp_path
    folder.mkdir(exist_ok=True)
    picture(8, 8).save(folder / "a.png")
    rows = [
        {
            "file_name": row["image"],
            "question": row["question"],
            "answer": row["answer"],
        }
        for row in rows_of(TEXTS)
    ]
    as_csv(rows, folder / "metadata.csv")
    assert load_data(tmp_path, split)["answer"][:] == TEXTS


@pytest.mark.parametrize("limit", [None, 3])
def test_what_save_to_disk_wrote(tmp_path, limit):
    rows = [row | {"image": picture(8, 8)} for row in rows_of(TEXTS)]
    data = Dataset.from_list(rows)
    data.save_to_disk(tmp_path / "one")
    assert load_data(tmp_path / "one", limit=limit)["answer"][:] == TEXTS[:limit]
    splits = DatasetDict(train=data, validation=data.select(range(2)))
    splits.save_to_disk(tmp_path / "two")
    assert len(load_data(tmp_path / "two")) == 2
    assert load_data(tmp_path / "two", "train[2:4]")["answer"][:] == TEXTS[2:4]
    with pytest.raises(ValueError, match="say which split"):
        load_data(tmp_path / "two", "test")


def test_numbers_among_texts_of_json(tmp_path):
    as_json([{"answer": "red"}, {"answer": 7}, {"other": 1}], tmp_path / "a.json")
    assert read_json_rows(tmp_path / "a.json")["answer"][:] == ["red", "7", None]


@pytest.mark.parametrize(
    "text, message",
    [
        ("a,b\n1,2\n1,2,3\n", "line 3: has 3 cells, and the header has 2"),
        ("a,b\n1\n", "line 2: has 1 cells"),
        ("a,a\n1,2\n", "names a column twice"),
        ("", "the file is empty"),
        ('a,b\n"1,2\n', "line 2: unexpected end"),
        ("a;b\n1;2\n", "cells are separated by ';', and ',' is expected"),
        ("a\tb\n1\t2\n", "cells are separated by"),
    ],
)
def test_lines_of_csv_that_do_not_fit(tmp_path, text, message):
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_csv(tmp_path / "a.csv")
    with pytest.raises(ValueError, match=f"data .*a.csv: .*{message}"):
        load_data(tmp_path / "a.csv")


def test_a_mark_at_the_beginning_and_lines_in_quotes(tmp_path):
    text = '\ufeffa,b\r\n"1, and\n2",\u00e9\r\n\r\n'
    (tmp_path / "a.csv").write_bytes(text.encode())
    assert read_csv(tmp_path / "a.csv")[0] == {"a": "1, and\n2", "b": "\u00e9"}


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"a": 1}\n{"a": \n', "line 2: "),
        ("[1, 2]", "row 1: expected an object"),
        ('[{"a": 1}, {"a": [2]}]', "column 'a' holds values of several kinds"),
        ("", "data set is empty"),
        ('[{"a": "x", "a": "y"}]', "an object has the key 'a' twice"),
        ('{"b": {"a": 1, "c": 0, "a": 2}}', "line 1: an object has the key 'a' twice"),
    ],
)
def test_json_that_cannot_be_read(tmp_path, text, message):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=f"data .*a.json: .*{message}"):
        load_data(tmp_path / "a.json")


@pytest.mark.parametrize("suffix", ["csv", "json"])
@pytest.mark.parametrize("encoding", ["utf-16", "latin-1"])
def test_other_encodings_are_named(tmp_path, suffix, encoding):
    WRITERS[suffix](rows_of(["é"]), tmp_path / f"a.{suffix}")
    text = (tmp_path / f"a.{suffix}").read_text().replace("\\u00e9", "é")
    (tmp_path / f"a.{suffix}").write_text(text, encoding=encoding)
    with pytest.raises(ValueError, match="save the file as UTF-8"):
        load_data(tmp_path / f"a.{suffix}")


def test_other_files_are_refused_with_the_formats(tmp_path):
    (tmp_path / "a.xlsx").write_text("a")
    with pytest.raises(ValueError, match="must end in one of .parquet.*not '.xlsx'"):
        load_data(tmp_path / "a.xlsx")


# --- what is no text


def with_cells(**columns):
    n = max(map(len, columns.values()))
    rows = {
        "image": [picture(8, 8)] * n,
        "question": ["what?"] * n,
        "answer": ["a"] * n,
    }
    return Dataset.from_dict(rows | columns)


NAN = float("nan")
NO_TEXT = {
    "None": (["a", None], "1 of 2 examples have nothing in 'answer'.*row 1"),
    "NaN": ([1.0, NAN], "row 0, column 'answer': 1.0 is no text"),
    "NaN alone": ([NAN, NAN], "2 of 2 examples have nothing"),
    "empty": (["a", ""], "row 1"),
    "blank": (["a", " \n"], "row 1"),
    "empty lists": ([["a"], []], "row 1"),
    "lists of nothing": ([["a"], [None]], "row 1"),
    "a fraction": ([1.5, 2.0], "1.5 is no text"),
    "a truth value": ([True, False], "True is no text"),
    "a date": ([datetime.datetime(2020, 1, 1)] * 2, "no text"),
    "bytes": ([b"a", b"b"], "no text"),
}


@pytest.mark.parametrize("name", NO_TEXT)
def test_answers_that_are_no_text(name):
    cells, message = NO_TEXT[name]
    with pytest.raises(ValueError, match=message):
        standard_examples(with_cells(answer=cells))


@pytest.mark.parametrize("column", ["question", "answer_type", "caption"])
@pytest.mark.parametrize("name", NO_TEXT)
def test_other_columns_that_are_no_text(name, column):
    cells, _ = NO_TEXT[name]
    data = with_cells(**{column: cells})
    if column == "caption":
        data = data.remove_columns(["question", "answer"])
    unfilled = name in ("None", "NaN alone", "empty", "blank") or "lists" in name
    if column == "answer_type" and unfilled:
        assert standard_examples(data)["question_type"][1] == "question"
        return
    row = "examples have nothing" if column == "caption" and unfilled else "row [01]"
    with pytest.raises(ValueError, match=row):
        standard_examples(data)


def test_an_empty_question_is_no_caption_prompt():
    with pytest.raises(ValueError, match="row 1: its question .* is empty"):
        standard_examples(with_cells(question=["what?", ""]))


def test_two_questions_in_one_row():
    with pytest.raises(ValueError, match="row 0: column 'question' holds 2 texts"):
        standard_examples(with_cells(question=[["what?", "why?"]]))


def test_a_list_of_answers_to_a_question_is_no_list_of_captions():
    data = standard_examples(with_cells(question=["a?", "b?"], answer=[["x", "y"]] * 2))
    assert data["answers"][:] == [["x", "y"]] * 2
    assert "b?" in data[1]["prompt"]
    one = standard_examples(with_cells(question=["a?"], answer=[["x"]]))
    assert "a?" in one[0]["prompt"]


def test_class_labels_have_their_names():
    labels = ClassLabel(names=["red", "blue"])
    data = with_cells(label=[1, 0]).remove_columns("answer")
    data = data.cast_column("label", labels)
    assert standard_examples(data)["answer"][:] == ["blue", "red"]
    several = with_cells(answers=[[1, 1, 0], [0]]).remove_columns("answer")
    several = several.cast_column("answers", List(labels))
    assert standard_examples(several)["answers"][0] == ["blue", "blue", "red"]
    kinds = with_cells(question_type=[1, 0]).cast_column("question_type", labels)
    assert standard_examples(kinds)["question_type"][:] == ["blue", "red"]
    hidden = with_cells(label=[1, -1]).remove_columns("answer")
    with pytest.raises(ValueError, match="nothing in 'label'.*row 1"):
        standard_examples(hidden.cast_column("label", labels))


def test_whole_numbers_are_their_digits():
    assert standard_examples(with_cells(answer=[7, 12]))["answer"][:] == ["7", "12"]


def test_rows_without_an_id_are_not_one_image():
    data = standard_examples(
        with_cells(image_id=[None, None, "a"], question=["q?"] * 3)
    )
    assert len(set(data["image_id"][:])) == 3


def test_an_empty_text_among_answers_is_not_trained_on():
    data = standard_examples(with_cells(answers=[["", "", "red"]]))
    assert data[0]["answer"] == "red"


def test_a_reserved_token_names_its_row():
    with pytest.raises(ValueError, match="row 1: .*<image>"):
        standard_examples(with_cells(question=["a?", "<image> b?"]))
