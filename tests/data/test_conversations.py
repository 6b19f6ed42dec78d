"""Conversations of every format are read alike, and a model learns exactly what the assistant says."""

import json
from types import SimpleNamespace

import pytest
import shapes_folder
import tiny_models
from chat_templates import TEMPLATES, processor
from datasets import Dataset, Image
from tiny_models import picture, token_id

from ressa.data.collate import IGNORED, collate
from ressa.data.conversations import (
    ConversationWriter,
    read_conversation,
    standard_conversations,
)
from ressa.data.encoding import ExampleError
from ressa.data.held_out import count_seen, hold_out, without_pictures_of
from ressa.data.load_data import load_data

# --- formats


def shown(example):
    "The pictures of an example as a list."
    image = example["image"]
    return image if isinstance(image, list) else [image]


@pytest.mark.parametrize("turns", [1, 3])
@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("kind", ["messages", "llava", "saved", "parquet"])
def test_every_format_gives_the_same_examples(kind, images, turns, tmp_path):
    path = shapes_folder.make(
        tmp_path, kind, rows=3, images=images, turns=turns, size=16
    )
    reader = processor("ChatML")
    data = load_data(path, processor=reader)
    pictures = shapes_folder.draw_pictures(tmp_path / "again", 3 * images, 16, 0)
    rows = shapes_folder.rows_of(pictures, images, turns)
    assert len(data) == 3 and "conversations in column" in data.info.description
    for example, (files, asked) in zip(data, rows):
        assert [p.size for p in shown(example)] == [(16, 16)] * images
        first_file = tmp_path / "again" / files[0]
        assert shown(example)[0].tobytes() == picture_in(first_file).tobytes()
        assert example["answer"] == asked[-1][1] == example["answers"][0]
        told = [
            example["prompt"][start:end] for start, end in example["earlier_answers"]
        ]
        assert told == [f"{answer}<|im_end|>" for _, answer in asked[:-1]]
        assert example["prompt"].count("<image>") == images
        assert example["prompt"].startswith("<|im_start|>user\n<image>")
    batch = collate(list(data), reader)
    assert runs_of(batch, 0, reader.tokenizer) == [
        f"{answer}<|im_end|>" for _, answer in rows[0][1]
    ]


def picture_in(file):
    from PIL import Image as PILImage

    return PILImage.open(file).convert("RGB")


def runs_of(batch, row, tokenizer):
    "The text of each run of labelled tokens."
    runs = [[]]
    for label in batch["labels"][row].tolist():
        if label != IGNORED:
            runs[-1].append(label)
        elif runs[-1]:
            runs.append([])
    return [tokenizer.decode(run) for run in runs if run]


def test_a_folder_of_pictures_with_a_table_or_one_file(tmp_path):
    table = shapes_folder.make(tmp_path / "csv", "csv", rows=3, size=16)
    assert load_data(table)["answer"][:] == [
        color
        for _, color, _ in shapes_folder.draw_pictures(tmp_path / "again", 3, 16, 0)
    ]
    shapes_folder.make(tmp_path / "one", "llava", rows=3, turns=1, size=16)
    alone = load_data(tmp_path / "one", limit=2)
    assert len(alone) == 2 and isinstance(alone.features["image"], Image)


def test_a_stream_of_parquet_is_read_to_its_limit(tmp_path):
    path = shapes_folder.make(tmp_path, "parquet", rows=3, images=2, size=16)
    data = load_data(path, limit=2)
    assert [len(example["image"]) for example in data] == [2, 2]


def test_pictures_may_lie_in_another_folder(tmp_path):
    path = shapes_folder.make(tmp_path, "llava", rows=2, size=16)
    moved = path.rename(tmp_path / "pictures" / "talks.json")
    message = r"2 of 2 image files are missing, such as 0000.png \(row 0\)"
    with pytest.raises(ValueError, match=f"talks.json: {message}.*or to image_folder"):
        load_data(moved)
    assert len(load_data(moved, image_folder=tmp_path)) == 2


def test_parts_may_hold_their_pictures(tmp_path):
    picture(8, 8).save(tmp_path / "a.png")
    parts = [
        {"type": "text", "text": "First"},
        {"type": "image", "image": "a.png"},
        {"type": "image_url", "image_url": {"url": "a.png"}},
    ]
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": parts},
        {"role": "assistant", "content": "two"},
    ]
    (tmp_path / "chat.json").write_text(json.dumps([{"messages": chat}]))
    [example] = load_data(tmp_path / "chat.json", processor=processor("ChatML"))
    assert len(example["image"]) == 2
    assert "system\nBe brief.<|im_end|>" in example["prompt"]
    assert "First<image><image>" in example["prompt"]


def test_the_cauldron_has_two_turns_in_one():
    talks = [[{"user": "What is it?", "assistant": "a circle", "source": "x"}]]
    data = Dataset.from_dict({"texts": talks, "images": [[picture(8, 8)]]})
    [example] = standard_conversations(data.cast_column("images", [Image()]))
    assert example["prompt"] == "Question: What is it? Short answer:"
    assert example["answer"] == "a circle" and example["image"].size == (8, 8)


def test_rows_without_a_picture_stand_beside_others(tmp_path):
    path = shapes_folder.make(tmp_path, "llava", rows=2, turns=1, size=16)
    rows = json.loads(path.read_text())
    del rows[0]["image"]
    rows[0]["conversations"][0]["value"] = "Is it text alone?"
    path.write_text(json.dumps(rows))
    data = load_data(path, processor=processor("ChatML"))
    assert [len(example["image"]) for example in data] == [0, 1]
    batch = collate(list(data), processor("ChatML"))
    assert batch["pixel_values"].shape[0] == 1


# --- labels


QUESTIONS = ("what color is the shape ?", "what shape is a picture ?")
ANSWERS = ("red", "blue circle")
END = "<end_of_utterance>"


def marked(name, reader):
    "What marks the place of a picture in a prompt of a class."
    mark = getattr(reader, "image_token", "")
    if name == "Gemma3":
        return reader.boi_token
    return f"<|vision_start|>{mark}<|vision_end|>" if "Qwen" in name else mark


CHAT_CLASSES = [
    name
    for name in tiny_models.GENERATING
    if name not in tiny_models.ONE_IMAGE and name != "PaliGemma"
]


@pytest.mark.parametrize("name", CHAT_CLASSES)
def test_exactly_the_words_of_the_assistant_are_labelled(name):
    _, reader = tiny_models.TINY[name]()
    if name == "SmolVLM":  # its template asks for the frames of videos
        reader.video_processor = SimpleNamespace(num_frames=1, fps=1)
    reader.chat_template = (
        "{% for turn in messages %}{{ turn.role }} : {% for part in turn.content %}"
        "{{ '" + marked(name, reader) + "' if part.type == 'image' else part.text }} "
        "{% endfor %}" + END + "{% endfor %}"
        "{% if add_generation_prompt %}assistant : {% endif %}"
    )
    turns = []
    for question, reply in zip(QUESTIONS, ANSWERS):
        parts = [{"type": "image"}, {"type": "text", "text": question}]
        turns.append({"role": "user", "content": parts})
        turns.append({"role": "assistant", "content": reply})
    talk = read_conversation(turns, pictures=2)
    written = ConversationWriter(reader)(talk.turns)
    row = {
        "image": [picture(20, 24), picture(40, 16, 1)],
        "prompt": written.prompt,
        "answer": written.answer,
        "earlier_answers": written.earlier,
    }
    short = {"image": [], "prompt": "what ?", "answer": "green"}
    alone = name in tiny_models.SAME_NUMBER
    batch = collate([row] if alone else [row, short], reader)
    ids = batch["input_ids"][0].tolist()
    words = {token_id(word) for word in " ".join(ANSWERS).split()}
    expected = [IGNORED] * len(ids)
    for place, token in enumerate(ids):
        ends_answer = token == token_id(END) and ids[place - 1] in words
        if token in words or ends_answer:
            expected[place] = token
    assert batch["labels"][0].tolist() == expected
    assert sum(token != IGNORED for token in expected) == 5


@pytest.mark.parametrize("kind", ["bytes", "Llama"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_each_answer_is_labelled_as_the_last_one_is(name, kind):
    reader = processor(name, kind)
    talk = read_conversation(
        [
            {"from": "human", "value": "What color? <image>"},
            {"from": "gpt", "value": "red"},
            {"from": "human", "value": "Is it red?"},
            {"from": "gpt", "value": "red"},
        ],
        pictures=1,
    )
    written = ConversationWriter(reader)(talk.turns)
    row = written._asdict() | {"earlier_answers": written.earlier}
    batch = collate([row | {"image": picture(16, 16)}], reader)
    first, last = runs_of(batch, 0, reader.tokenizer)
    _, form = TEMPLATES[name]
    # a template without a token that ends a turn ends no turn inside of a conversation
    ends_turns = name not in ("LLaVA", "no template")
    assert first.strip() == (form if ends_turns else "red").strip()
    assert last.strip() == form.strip()


def test_a_template_that_changes_answers_is_refused():
    reader = processor("ChatML")
    reader.chat_template = reader.chat_template.replace("part.text", "part.text[:2]")
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "red"}]
    talk = read_conversation(turns * 2)
    with pytest.raises(ValueError, match="does not write each earlier answer as it is"):
        ConversationWriter(reader)(talk.turns)


@pytest.mark.parametrize("name", ["PaliGemma", "InstructBLIP, T5"])
def test_a_model_that_reads_its_whole_prompt_first_learns_answers_apart(name, tmp_path):
    _, reader = tiny_models.TINY[name]()
    causal = "T5" not in name
    path = shapes_folder.make(tmp_path, "llava", rows=2, size=16)
    data = load_data(path, processor=reader)
    with pytest.raises(ExampleError, match="load the data with turns='apart'"):
        collate(list(data), reader, causal=causal)
    apart = load_data(path, processor=reader, turns="apart")
    assert len(apart) == 4
    assert apart["prompt"][1] == data["prompt"][0]
    assert (collate(list(apart), reader, causal=causal)["labels"] >= 0).any()


# --- errors


WRONG = {
    "turn 1 is of the user, and must be of the assistant": [0, 0, 1],
    "its last turn must be an answer": [0, 1, 0],
    "turn 0 is of the assistant": [1],
    "it has no turns": [],
}


@pytest.mark.parametrize("message", WRONG)
def test_an_order_that_is_none_is_named(message):
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    with pytest.raises(ValueError, match=message):
        read_conversation([turns[i] for i in WRONG[message]])


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"image": None}, "it marks 1 places for pictures, and has 0"),
        ({"image": ["a.png", "b.png"]}, "it marks 1 places for pictures, and has 2"),
        ({"image": 7}, "its picture '7' is no file name"),
        ({"conversations": [{"from": "tool", "value": "x"}]}, "turn 0 is of 'tool'"),
        ({"conversations": [{"say": "x"}]}, r"turn 0 has the keys \['say'\]"),
        ({"conversations": "Hello"}, "it has no turns"),
        ({"conversations": None}, "it has no turns"),
        (
            {"conversations": [{"from": "human", "value": 7}]},
            "turn 0: its content must be a text or a list of parts, not 7",
        ),
    ],
)
def test_errors_name_file_and_row(tmp_path, changes, message):
    path = shapes_folder.make(tmp_path, "llava", rows=3, size=16)
    rows = json.loads(path.read_text())
    rows[1] |= changes
    path.write_text(json.dumps(rows))
    with pytest.raises(ValueError, match=rf"llava.json: row 1: {message}"):
        load_data(path)


@pytest.mark.parametrize("token", ["<image>", "<|im_end|>"])
def test_an_answer_with_a_token_of_its_own_meaning_is_refused(token, tmp_path):
    path = shapes_folder.make(tmp_path, "llava", rows=2, size=16)
    rows = json.loads(path.read_text())
    rows[1]["conversations"][1]["value"] = f"red {token}"
    path.write_text(json.dumps(rows))
    with pytest.raises(ValueError, match="row 1: turn 1"):
        load_data(path, processor=processor("ChatML"))


def test_a_broken_picture_of_a_list_names_its_row(tmp_path):
    path = shapes_folder.make(tmp_path, "messages", rows=2, images=2, size=16)
    (tmp_path / "pictures" / "0003.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="row 1: its image cannot be read"):
        load_data(path)


# --- held out


def test_no_picture_of_a_list_is_on_both_sides(tmp_path):
    path = shapes_folder.make(tmp_path, "messages", rows=12, images=2, size=16)
    data = load_data(path)
    train, test = hold_out(data)
    assert len(train) + len(test) == 12 and len(test) >= 1
    assert len(without_pictures_of(data, test)) == len(train)
    assert count_seen(data, test) == len(test) and count_seen(train, test) == 0


def test_examples_that_share_a_picture_stay_together(tmp_path):
    path = shapes_folder.make(tmp_path, "messages", rows=6, images=2, size=16)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row, following in zip(rows, rows[1:]):
        row["images"][1] = following["images"][0]  # a chain: each shares with the next
    shapes_folder.write_lines(path, rows)
    with pytest.raises(ValueError, match="its examples all share pictures"):
        hold_out(load_data(path))
