"""Answers follow their prompts directly, labels stand on answers alone, and the Q-Former sees no answer."""

import pytest
import tiny_models
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ressa.data.collate import IGNORED, calibration_batch, collate, draw_examples
from ressa.data.easy_vqa import easy_vqa_processor
from ressa.data.prompts import write_prompt


@pytest.fixture(scope="module")
def processor():
    return easy_vqa_processor()


@pytest.fixture(scope="module")
def examples(data):
    return [data[1][i] for i in range(12)]


def tokens(values, mask):
    return values[mask.bool()].tolist()


@given(
    chosen=st.lists(st.integers(0, 11), min_size=1, max_size=5), causal=st.booleans()
)
@settings(max_examples=20, deadline=None)
def test_each_example_is_the_same_alone_and_in_a_batch(
    examples, processor, chosen, causal
):
    batch = collate([examples[i] for i in chosen], processor, causal=causal)
    for row, i in enumerate(chosen):
        alone = collate([examples[i]], processor, causal=causal)
        for name in ("input_ids", "qformer_input_ids"):
            mask = name.replace("input_ids", "attention_mask")
            in_batch = tokens(batch[name][row], batch[mask][row])
            assert in_batch == tokens(alone[name][0], alone[mask][0])
        labels = batch["labels"][row]
        assert labels[labels != IGNORED].tolist() == [
            label for label in alone["labels"][0].tolist() if label != IGNORED
        ]


def test_the_answer_follows_its_prompt_and_is_labelled(examples, processor):
    batch = collate(examples, processor)
    prompts = collate(examples, processor, answers=False)
    for row, example in enumerate(examples):
        prompt = tokens(prompts["input_ids"][row], prompts["attention_mask"][row])
        text = f"{example['answer']} <eos>"
        answer = processor.tokenizer(text, add_special_tokens=False).input_ids
        whole = tokens(batch["input_ids"][row], batch["attention_mask"][row])
        assert whole == prompt + answer
        n = len(whole)
        expected = [IGNORED] * len(prompt) + answer
        assert batch["labels"][row, :n].tolist() == expected
        assert set(batch["labels"][row, n:].tolist()) <= {IGNORED}


def test_the_qformer_sees_no_answer_and_is_padded_on_the_right(examples, processor):
    batch = collate(examples, processor)
    prompts = collate(examples, processor, answers=False)
    assert torch.equal(batch["qformer_input_ids"], prompts["qformer_input_ids"])
    mask = batch["qformer_attention_mask"]
    assert torch.equal(mask, mask.sort(dim=1, descending=True).values)
    assert (mask.sum(1) < mask.shape[1]).any(), "prompts of one length show nothing"


def test_an_encoder_reads_no_answer(examples, processor):
    batch = collate(examples, processor, causal=False)
    prompts = collate(examples, processor, answers=False)
    assert torch.equal(batch["attention_mask"].sum(1), prompts["attention_mask"].sum(1))
    for example, labels in zip(examples, batch["labels"]):
        text = processor.tokenizer.decode(labels[labels != IGNORED])
        assert text == f"<bos> {example['answer']} <eos>", "a text of its own"


@pytest.mark.parametrize("name", tiny_models.TINY)
def test_every_small_processor_gets_inputs_of_one_length(name):
    if name in tiny_models.RETRIEVING:
        pytest.skip("has no prompts")
    _, processor = tiny_models.TINY[name]()
    made = [
        {
            "image": tiny_models.picture(16, 16, i),
            "prompt": write_prompt(question, processor),
            "answer": answer,
        }
        for i, (question, answer) in enumerate(
            [("what color is the shape ?", "red"), ("what shape ?", "a picture of two")]
        )
    ]
    batch = collate(made, processor)
    shape = batch["input_ids"].shape
    assert batch["labels"].shape == batch["attention_mask"].shape == shape
    labelled = batch["labels"] != IGNORED
    assert torch.equal(batch["input_ids"][labelled], batch["labels"][labelled])
    assert batch["attention_mask"][labelled].all()
    if "token_type_ids" in batch:
        is_answer = 1 if name == "PaliGemma" else 0
        assert (batch["token_type_ids"][labelled] == is_answer).all()
    if "cross_attention_mask" in batch:
        per_token = batch["cross_attention_mask"]
        assert per_token.shape[:2] == shape
        assert per_token[labelled].any(), "an answer token sees the image"


def test_no_image_one_and_several():
    _, processor = tiny_models.TINY["LLaVA"]()
    image = tiny_models.picture(16, 16)
    for images in ([], [image], [image, image]):
        prompt = "<image> " * len(images) + "what color ?"
        row = {"image": images or None, "prompt": prompt, "answer": "red"}
        batch = collate([row], processor)
        assert len(batch.get("pixel_values", [])) == len(images)
        del row["image"]
        if not images:
            assert collate([row], processor).keys() == batch.keys()


def test_no_examples_are_refused(processor):
    with pytest.raises(ValueError, match="no examples to collate"):
        collate([], processor)


def test_draws_repeat_with_the_seed_and_never_repeat_an_example():
    data = list(range(50))
    assert draw_examples(data, 10) == draw_examples(data, 10, seed=0)
    assert draw_examples(data, 10) != draw_examples(data, 10, seed=1)
    assert sorted(draw_examples(data, 50)) == data


@pytest.mark.parametrize("n", [0, -1, 51])
def test_no_more_examples_than_there_are(n):
    with pytest.raises(ValueError, match=f"between 1 and 50, .* not {n}"):
        draw_examples(list(range(50)), n)


def test_a_calibration_batch_is_the_batch_of_a_draw(data, processor):
    batch = calibration_batch(data[1], processor, n=6, seed=3)
    again = collate(draw_examples(data[1], 6, seed=3), processor)
    assert all(torch.equal(batch[name], again[name]) for name in again)
    assert (batch["labels"] != IGNORED).any(1).all()
