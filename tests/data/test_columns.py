"""Any data set with known columns, or with columns that are named, becomes standard examples."""

import pytest
from data_sets import CAPTIONING, CAPTIONS, SCHEMAS, STANDARD_COLUMNS, made, references
from datasets import Dataset
from tiny_models import picture

from ressa.data.collate import collate
from ressa.data.columns import as_texts, find_columns, standard_examples
from ressa.data.easy_vqa import easy_vqa_processor


@pytest.mark.parametrize("name", SCHEMAS)
def test_every_schema_becomes_standard_examples(name):
    data = standard_examples(made(name))
    assert data.column_names == STANDARD_COLUMNS
    example = data[0]
    is_caption = name in CAPTIONING
    assert example["answers"] == references(name)
    assert example["answer"] == (CAPTIONS[0] if is_caption else "red")
    assert example["image"].mode == "RGB"
    assert (example["question_type"] == "caption") == is_caption
    assert ("what color?" in example["prompt"]) == (not is_caption)
    batch = collate([data[0], data[1]], easy_vqa_processor())
    assert len(batch["labels"]) == 2


def sizes(data):
    return [example["image"].size for example in data]


def test_images_stay_with_their_texts():
    data = made("plain", 6).shuffle(seed=1)
    assert sizes(standard_examples(data)) == sizes(data)
    again = standard_examples(data).rename_column("prompt", "question")
    assert sizes(standard_examples(again)) == sizes(data)


def test_the_first_known_name_is_taken_unless_another_is_named():
    names = ["image", "answer", "answers", "question", "query", "label"]
    assert find_columns(names)["answers"] == "answers"
    assert find_columns(names)["question"] == "question"
    chosen = {"answers": "label", "question": "query"}
    assert find_columns(names, chosen) == {"image": "image"} | chosen


@pytest.mark.parametrize(
    "names, columns, message",
    [
        (["image"], {"question": "frage"}, "no column 'frage'"),
        (["image"], {"frage": "image"}, "'frage' is none of"),
        (["image", "frage"], None, "no column for answers or captions"),
        (["answer"], None, "no column for image"),
    ],
)
def test_columns_that_are_not_there(names, columns, message):
    with pytest.raises(ValueError, match=message):
        find_columns(names, columns)


@pytest.mark.parametrize(
    "cell, texts",
    [
        (None, []),
        ("red", ["red"]),
        (7, ["7"]),
        ({"raw": ["a", "b"]}, ["a", "b"]),
        ([{"answer": "a"}, ["b", None]], ["a", "b"]),
        ({"caption": "c", "text": "t"}, ["c"]),
    ],
)
def test_texts_of_a_cell(cell, texts):
    assert as_texts(cell) == texts


def without(name, column):
    return made(name).remove_columns(column)


def hidden_answers():
    data = without("OK-VQA", "answers")
    return data.add_column("answers", [[]] * len(data))


def no_image():
    return Dataset.from_list([{"image": None, "question": "?", "answer": "red"}])


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: made("OK-VQA").select([]), "the data set is empty"),
        (lambda: without("OK-VQA", "image"), "no column for image"),
        (lambda: without("OK-VQA", "question"), "no column for question"),
        (lambda: without("OK-VQA", "answers"), "no column for answers or captions"),
        (hidden_answers, "4 of 4 examples have nothing in 'answers'.*another split"),
        (no_image, "column 'image' holds no images"),
    ],
)
def test_what_cannot_be_read_says_what_to_do(make, message):
    with pytest.raises(ValueError, match=message):
        standard_examples(make())


def test_the_task_decides_where_both_are_possible():
    example = {"image": picture(8, 8), "question": "what?"}
    both = Dataset.from_list([example | {"captions": ["c"], "answer": "a"}])
    assert standard_examples(both)[0]["answer"] == "a"
    assert standard_examples(both, task="caption")[0]["answer"] == "c"
    captions = Dataset.from_list([example | {"captions": ["c"]}])
    with pytest.raises(ValueError, match="no column for answers"):
        standard_examples(captions, task="vqa")
    with pytest.raises(ValueError, match="task must be 'vqa' or 'caption', not 'sing'"):
        standard_examples(both, task="sing")


def test_the_commonest_answer_is_trained_on():
    example = {"image": picture(8, 8), "question": "?", "answers": ["a", "b", "b"]}
    assert standard_examples(Dataset.from_list([example]))[0]["answer"] == "b"
