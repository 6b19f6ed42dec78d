"""A question in the form that each kind of model was trained on."""

import pytest
import tiny_models

from ressa.data.easy_vqa import easy_vqa_processor
from ressa.data.prompts import (
    CAPTION_PROMPT,
    QUESTION_PROMPT,
    SHORT_ANSWER,
    SHORT_CAPTION,
    write_prompt,
)


class WithTemplate:
    "A processor whose chat template begins with the token that begins a text."

    tokenizer = easy_vqa_processor().tokenizer
    chat_template = "yes"
    image_token = "<image>"

    def apply_chat_template(self, conversation, **options):
        assert options == {"add_generation_prompt": True, "tokenize": False}
        [turn] = conversation
        image, text = turn["content"]
        return f"<bos>{turn['role']}: <{image['type']}>{text['text']}"


class WithoutTemplate(WithTemplate):
    chat_template = None


@pytest.mark.parametrize("processor", [None, easy_vqa_processor()])
def test_instructblip_has_its_own_phrases(processor):
    assert write_prompt("what?", processor) == QUESTION_PROMPT.format("what?")
    assert write_prompt("", processor) == CAPTION_PROMPT


def test_a_template_is_used_and_its_beginning_not_doubled():
    prompt = write_prompt("what?", WithTemplate())
    assert prompt == f"user: <image>{SHORT_ANSWER.format('what?')}"
    assert write_prompt("", WithTemplate()) == f"user: <image>{SHORT_CAPTION}"


def test_without_a_template_the_image_has_its_place():
    prompt = write_prompt("what?", WithoutTemplate())
    assert prompt == f"<image>{SHORT_ANSWER.format('what?')}"


@pytest.mark.parametrize("name", tiny_models.TINY)
def test_every_small_processor_writes_a_prompt(name):
    _, processor = tiny_models.TINY[name]()
    prompt = write_prompt("what color?", processor)
    assert "what color?" in prompt
    ids = processor.tokenizer(prompt).input_ids
    assert ids.count(processor.tokenizer.bos_token_id) <= 1
