"""easy-VQA's questions and captions, and the processor with its vocabulary."""

import itertools

import pytest

from ressa.data.easy_vqa import (
    CAPTION,
    COLORS,
    SHAPES,
    deduce,
    easy_vqa_processor,
    load_easy_vqa,
    question_type,
    training_examples,
    word_tokenizer,
)
from ressa.data.prompts import QUESTION_PROMPT, SHORT_ANSWER


@pytest.mark.parametrize(
    "question, answer, kind",
    [
        ("what shape is in the image?", "circle", "shape"),
        ("what color is the circle?", "red", "color"),
        ("is there a circle?", "yes", "yes/no shape"),
        ("does the image not contain a red shape?", "no", "yes/no color"),
    ],
)
def test_kinds_of_question(question, answer, kind):
    assert question_type(question, answer) == kind


@pytest.mark.parametrize(
    "question, answer, true_of_it",
    [
        ("is there a circle?", "yes", True),
        ("is there a circle?", "no", False),
        ("is there not a circle?", "no", True),
        ("is no circle present?", "yes", False),
        ("what shape is present?", "circle", True),
    ],
)
def test_what_an_answer_rules_out(question, answer, true_of_it):
    colors, shapes = deduce([(question, answer)])
    assert colors == set(COLORS)
    assert shapes == ({"circle"} if true_of_it else {"rectangle", "triangle"})


def test_every_image_is_deduced_from_complete_questions():
    for color, shape in itertools.product(COLORS, SHAPES):
        questions = [
            (f"is there a {s}?", "yes" if s == shape else "no") for s in SHAPES
        ]
        questions.append((f"what color is the {shape}?", color))
        assert deduce(questions) == ({color}, {shape})


def test_nothing_is_known_without_questions():
    assert deduce([]) == (set(COLORS), set(SHAPES))


def test_numbers_and_columns(data):
    train, test, captions = data
    assert (len(train), len(test), len(captions)) == (38575, 9673, 888)
    columns = {"image", "image_id", "prompt", "answer", "question_type"}
    assert set(train.column_names) == set(captions.column_names) == columns
    assert set(train["question_type"][:]) == {
        "shape",
        "color",
        "yes/no shape",
        "yes/no color",
    }
    assert set(captions["question_type"][:]) == {"caption"}
    assert test[0]["image"].size == (64, 64)


def test_captions_agree_with_the_questions_about_the_same_image(data):
    _, test, captions = data
    caption_of = dict(zip(captions["image_id"][:], captions["answer"][:]))
    for image_id, answer, kind in zip(
        test["image_id"][:], test["answer"][:], test["question_type"][:]
    ):
        if kind in ("shape", "color") and image_id in caption_of:
            assert answer in caption_of[image_id].split()


def test_captions_twice_in_training(data):
    train = data[0]
    kinds = training_examples()["question_type"][:]
    captions = kinds.count("caption")
    assert len(kinds) == len(train) + captions
    assert captions == 2 * len(load_easy_vqa("train", task="caption"))


class Plain:
    "A processor without query tokens and without a chat template."


def test_prompts_for_another_processor():
    questions = load_easy_vqa("test")
    others = load_easy_vqa("test", processor=Plain())
    question = questions[0]["prompt"].removeprefix("Question: ")
    question = question.removesuffix(" Short answer:")
    assert questions[0]["prompt"] == QUESTION_PROMPT.format(question)
    assert others[0]["prompt"] == SHORT_ANSWER.format(question)
    assert others["answer"][:] == questions["answer"][:]


def test_other_splits_and_tasks_are_refused():
    with pytest.raises(ValueError, match=r"split must be one of \('train', 'test'\)"):
        load_easy_vqa("validation")
    with pytest.raises(ValueError, match=r"task must be one of \('vqa', 'caption'\)"):
        load_easy_vqa(task="captions")


def test_every_word_is_a_token(data):
    tokenizer = easy_vqa_processor().tokenizer
    unknown = tokenizer.unk_token_id
    for dataset in data[1:]:
        texts = [*set(dataset["prompt"][:]), *set(dataset["answer"][:])]
        for ids in tokenizer(texts).input_ids:
            assert unknown not in ids
    caption = CAPTION.format("red", "circle")
    assert len(tokenizer(caption, add_special_tokens=False).input_ids) == 7


def test_words_are_numbered_in_alphabetical_order():
    tokenizer = word_tokenizer(["B a", "a c?"])
    assert tokenizer("C a").input_ids == [1, 8, 6]  # <bos>, then ? a b c from 5
    assert tokenizer("d").input_ids == [1, 3]  # <unk>
    assert tokenizer.padding_side == "left"
