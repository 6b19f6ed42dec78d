"""The field's data sets in the columns of their hub copies, made of small drawn images."""

from datasets import Dataset
from tiny_models import picture

TEN = ["red"] * 6 + ["blue"] * 4
CAPTIONS = ["a red circle", "there is a circle"]
SCHEMAS = {  # columns as in the hub's copies, without the image
    "VQAv2": dict(
        question="what color?",
        question_type="what color",
        answer_type="other",
        question_id=7,
        image_id=1,
        multiple_choice_answer="red",
        answers=[
            dict(answer=text, answer_confidence="yes", answer_id=i)
            for i, text in enumerate(TEN)
        ],
    ),
    "OK-VQA": dict(
        question="what color?",
        question_type="one",
        answer_type="other",
        question_id=7,
        answers=TEN,
    ),
    "TextVQA": dict(
        question="what color?",
        question_id=7,
        image_id="a1",
        answers=TEN,
        ocr_tokens=["x"],
        image_classes=["y"],
        set_name="val",
        image_width=8,
        image_height=8,
    ),
    "COCO": dict(
        question="Please describe.",
        question_id="7",
        answer=CAPTIONS,
        id=7,
        file_name="a.jpg",
        license=1,
    ),
    "Flickr30k": dict(
        caption=CAPTIONS, sentids=["1", "2"], img_id="3", filename="a.jpg"
    ),
    "NoCaps": dict(
        annotations_ids=[1, 2],
        annotations_captions=CAPTIONS,
        image_id=1,
        image_open_images_id="x",
    ),
    "plain": dict(question="what color?", answer="red"),
}
CAPTIONING = ("COCO", "Flickr30k", "NoCaps")
STANDARD_COLUMNS = [
    "image",
    "prompt",
    "answer",
    "answers",
    "question_type",
    "image_id",
]


def made(name, n=4):
    "A data set with `n` images of different sizes."
    examples = []
    for i in range(n):
        examples.append(SCHEMAS[name] | {"image": picture(12, 10 + i, i)})
    return Dataset.from_list(examples)


def references(name):
    "What counts as right in each example of a data set."
    if name in CAPTIONING:
        return CAPTIONS
    return ["red"] if name == "plain" else TEN
