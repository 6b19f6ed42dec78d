"""A processor is not trusted: whatever it stores about padding, a batch is the same, and what does not fit is named."""

import pickle
import re

import pytest
import tiny_models
import torch
from tokenizers.processors import TemplateProcessing
from transformers import Blip2Processor

from ressa.data.collate import collate
from ressa.data.easy_vqa import easy_vqa_processor
from ressa.data.encoding import LENGTHS, ExampleError, encode, ends_each_text
from ressa.data.prompts import tokenizer_of


def tokenizers_of(processor):
    found = [processor.tokenizer]
    if hasattr(processor, "qformer_tokenizer"):
        found.append(processor.qformer_tokenizer)
    return found


def store_in_processor(processor, **options):
    processor.text_kwargs = getattr(processor, "text_kwargs", {}) | options


def store_in_tokenizers(processor, **options):
    for tokenizer in tokenizers_of(processor):
        tokenizer.init_kwargs.update(options)
        for name, value in options.items():
            setattr(tokenizer, name, value)


def store_in_backends(processor):
    "As a tokenizer.json stores it."
    for tokenizer in tokenizers_of(processor):
        tokenizer.backend_tokenizer.enable_truncation(max_length=3)
        tokenizer.backend_tokenizer.enable_padding(direction="right", length=40)


STORED = {
    "padding on the right": lambda p: store_in_tokenizers(p, padding_side="right"),
    "padding on the left": lambda p: store_in_tokenizers(p, padding_side="left"),
    "right, as the class's default": lambda p: store_in_processor(
        p, padding_side="right"
    ),
    "no padding": lambda p: store_in_processor(p, padding=False),
    "padding to a length": lambda p: store_in_processor(
        p, padding="max_length", max_length=300
    ),
    "padding to a multiple": lambda p: store_in_processor(p, pad_to_multiple_of=64),
    "truncation": lambda p: store_in_processor(p, truncation=True, max_length=3),
    "a short model": lambda p: store_in_tokenizers(p, model_max_length=3),
    "truncation of the left": lambda p: store_in_tokenizers(
        p, truncation_side="left", max_length=3
    ),
    "a tokenizer.json that cuts and pads": store_in_backends,
    "no padding token": lambda p: store_in_tokenizers(p, pad_token=None),
    "no attention mask": lambda p: store_in_processor(p, return_attention_mask=False),
    "types of tokens": lambda p: store_in_processor(p, return_token_type_ids=True),
    "types of tokens, as a tokenizer's default": lambda p: store_in_tokenizers(
        p, model_input_names=["input_ids", "token_type_ids", "attention_mask"]
    ),
    "arrays": lambda p: store_in_processor(p, return_tensors="np"),
}
READING = [name for name in tiny_models.TINY if name not in tiny_models.RETRIEVING]


def kept(batch):
    "A batch without the ids at padded places, which no model reads."
    visible = dict(batch)
    for name in ("input_ids", "qformer_input_ids"):
        if name in batch:
            mask = batch[name.replace("input_ids", "attention_mask")]
            visible[name] = batch[name] * mask
    return visible


def assert_equal(batch, other, what=""):
    assert batch.keys() == other.keys(), what
    for name, value in kept(other).items():
        assert torch.equal(kept(batch)[name], value), f"{what}: {name}"


@pytest.mark.parametrize("name", READING)
def test_nothing_that_a_processor_stores_changes_a_batch(name):
    _, processor = tiny_models.TINY[name]()
    examples = tiny_models.examples(name, processor)
    for causal in (True, False):
        for answers in (True, False):
            want = collate(examples, processor, answers=answers, causal=causal)
            for what, store in STORED.items():
                _, other = tiny_models.TINY[name]()
                store(other)
                got = collate(examples, other, answers=answers, causal=causal)
                assert_equal(got, want, what)


@pytest.mark.parametrize("name", READING)
def test_prompts_end_where_the_answer_begins(name):
    _, processor = tiny_models.TINY[name]()
    store_in_tokenizers(processor, padding_side="right")
    examples = tiny_models.examples(name, processor)
    mask = collate(examples, processor, answers=False)["attention_mask"]
    assert mask[:, -1].all() and not mask.all(), "padded on the left"
    mask = collate(examples, processor, answers=False, causal=False)["attention_mask"]
    assert mask[:, 0].all() and not mask.all(), "an encoder is padded on the right"


def stored_state(processor):
    return [
        (tokenizer.padding_side, tokenizer.pad_token)
        for tokenizer in tokenizers_of(processor)
    ]


@pytest.mark.parametrize("pad_token", ["<pad>", None])
def test_the_processor_is_as_before_also_after_an_error(data, pad_token):
    processor = easy_vqa_processor()
    store_in_tokenizers(processor, padding_side="right", pad_token=pad_token)
    before = stored_state(processor)
    encode([data[0][0]], processor)
    assert stored_state(processor) == before
    with pytest.raises(ValueError, match="example 1: .*Processor cannot read it"):
        encode([data[0][0], data[0][1] | {"image": "no image"}], processor)
    assert stored_state(processor) == before


ONE_IMAGE_ITSELF = [
    "InstructBLIP, Llama",
    "InstructBLIP, T5",
    "BLIP-2, OPT",
    "BLIP",
]


@pytest.mark.parametrize("name", ONE_IMAGE_ITSELF)
@pytest.mark.parametrize("n", [0, 2])
def test_the_blip_family_takes_one_image(name, n):
    _, processor = tiny_models.TINY[name]()
    rows = tiny_models.examples(name, processor)
    rows[1]["image"] = [rows[1]["image"]] * n
    expected = f"example 1: it has {n} images, but .*Processor takes exactly one"
    with pytest.raises(ValueError, match=expected):
        collate(rows, processor)


@pytest.mark.parametrize("name", ["InstructBLIP, Llama", "BLIP-2, OPT"])
def test_a_place_beside_that_of_the_processor_is_refused(name):
    _, processor = tiny_models.TINY[name]()
    rows = tiny_models.examples(name, processor)
    rows[2]["prompt"] = "<image> " + rows[2]["prompt"]
    with pytest.raises(ValueError, match="example 2: its prompt contains '<image>'"):
        collate(rows, processor)


MARKED = [
    name
    for name in READING
    if getattr(tiny_models.TINY[name]()[1], "image_token", None) and "BLIP" not in name
]


@pytest.mark.parametrize("name", MARKED)
def test_images_and_places_are_counted_in_each_example(name):
    if name in tiny_models.SAME_NUMBER:
        pytest.skip("all its examples have the same number of images")
    _, processor = tiny_models.TINY[name]()
    rows = tiny_models.examples(name, processor)
    # as many images as places in the batch, but not in each example
    rows[0]["image"], rows[1]["image"] = rows[1]["image"], rows[0]["image"]
    expected = "example 0: it has 2 images, but its prompt has 1 place"
    with pytest.raises(ValueError, match=expected):
        collate(rows, processor)
    rows[0]["image"] = [None]
    with pytest.raises(ValueError, match="example 0: one of its 1 images is None"):
        collate(rows, processor)


@pytest.mark.parametrize("name", MARKED)
def test_a_prompt_without_a_place_is_refused(name):
    if name == "PaliGemma":
        pytest.skip("its processor writes the place itself")
    _, processor = tiny_models.TINY[name]()
    row = tiny_models.examples(name, processor)[2] | {
        "image": tiny_models.picture(9, 9),
        "prompt": "what shape is two ?",
    }
    with pytest.raises(ValueError, match="example 0"):
        collate([row], processor)


@pytest.mark.parametrize("name", READING)
def test_a_missing_length_is_named(name):
    "Either the processor does without, or the error says what is missing."
    _, processor = tiny_models.TINY[name]()
    rows = tiny_models.examples(name, processor)
    want = collate(rows, processor)
    for length in LENGTHS:
        if not hasattr(processor, length):
            continue
        value = getattr(processor, length)
        setattr(processor, length, None)
        try:
            assert_equal(collate(rows, processor), want)
        except ValueError as error:
            assert re.search(f"has no {length}: set processor.{length} to", str(error))
        setattr(processor, length, value)


def test_blip_2_without_query_tokens_does_not_answer_blindly():
    _, processor = tiny_models.TINY["BLIP-2, OPT"]()
    rows = tiny_models.examples("BLIP-2, OPT", processor)
    blind = Blip2Processor(processor.image_processor, processor.tokenizer)
    expected = (
        "example 0: it has 1 image, but its prompt has no place.*num_query_tokens"
    )
    with pytest.raises(ValueError, match=expected):
        collate(rows, blind)


def test_what_the_processor_says_is_kept_as_the_cause():
    _, processor = tiny_models.TINY["LLaVA"]()
    processor.patch_size = None
    rows = tiny_models.examples("LLaVA", processor)
    with pytest.raises(ValueError, match="LlavaProcessor has no patch_size") as caught:
        collate(rows, processor)
    assert isinstance(caught.value.__cause__, TypeError)


@pytest.mark.parametrize("wrong", [None, 7, float("nan"), ["red"]])
@pytest.mark.parametrize("name", ["prompt", "answer"])
def test_texts_are_texts(data, name, wrong):
    processor = easy_vqa_processor()
    rows = [data[0][0], data[0][1] | {name: wrong}]
    with pytest.raises(ValueError, match=f"example 1: {name} must be text, not"):
        collate(rows, processor)
    del rows[1][name]
    with pytest.raises(ValueError, match=f"example 1: {name} must be text, not None"):
        collate(rows, processor)


def test_an_answer_without_reserved_tokens(data):
    row = data[0][0] | {"answer": "a red <image>"}
    with pytest.raises(ValueError, match="example 0: the answer .* contains '<image>'"):
        collate([row], easy_vqa_processor())


def test_a_prompt_without_tokens_is_refused():
    tokenizer = tokenizer_of(easy_vqa_processor())
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing("$A")
    with pytest.raises(ValueError, match="example 1: its prompt is empty"):
        collate([{"prompt": "red"}, {"prompt": " "}], tokenizer, answers=False)


def test_a_token_that_ends_a_text_does_not_end_a_prompt():
    tokenizer = tiny_models.tokenizer()
    assert not ends_each_text(tokenizer)
    rows = [
        {"prompt": "what color", "answer": "red"},
        {"prompt": "what", "answer": "a"},
    ]
    want = [collate(rows, tokenizer), collate(rows, tokenizer, answers=False)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        "<bos> $A <eos>", special_tokens=[("<bos>", 1), ("<eos>", 2)]
    )
    assert ends_each_text(tokenizer)
    assert_equal(collate(rows, tokenizer), want[0])
    assert_equal(collate(rows, tokenizer, answers=False), want[1])
    read = collate(rows, tokenizer, answers=False, causal=False)["input_ids"]
    assert (read == 2).sum(1).tolist() == [1, 1], "an encoder reads the end token"


def test_an_error_can_be_sent_to_another_process():
    error = ExampleError(3, "it has 2 images", "what?")
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == str(error) and again.index == 3


class NoTokens:
    "A processor of images alone, as Donut's may be."

    tokenizer = tiny_models.tokenizer()

    def __call__(self, **options):
        return {"pixel_values": torch.zeros(1)}


def test_a_processor_that_returns_no_tokens_is_refused():
    with pytest.raises(ValueError, match="NoTokens returns no tokens .* pixel_values"):
        collate([{"prompt": "red", "answer": "red"}], NoTokens())


def test_a_language_model_has_a_tokenizer_and_no_image(data):
    tokenizer = easy_vqa_processor().tokenizer
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    rows = [
        {"prompt": "what color is the shape?", "answer": "blue"},
        {"prompt": "color?", "answer": "red", "image": None},
    ]
    batch = collate(rows, tokenizer)
    assert batch.keys() == {"input_ids", "attention_mask", "labels"}
    texts = [
        tokenizer.decode(ids[mask.bool()])
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"])
    ]
    assert texts == [
        "<bos> what color is the shape ? blue <eos>",
        "<bos> color ? red <eos>",
    ]
    with pytest.raises(
        ValueError, match="example 1: it has an image, but .* is a tokenizer"
    ):
        collate([rows[0], data[0][0]], tokenizer)


def test_a_processor_without_tokenizer_is_refused(data):
    processor = easy_vqa_processor()
    with pytest.raises(ValueError, match="BlipImageProcessorPil has no tokenizer"):
        collate([data[0][0]], processor.image_processor)


def test_mllama_reads_each_row_as_if_it_were_alone(tmp_path):
    "Its cross-attention would mix images into a text without any."
    model, processor = tiny_models.tiny("Mllama", tmp_path)
    rows = tiny_models.examples("Mllama", processor)
    text_alone = {"image": None, "prompt": "what shape is two ?", "answer": "green"}
    with pytest.raises(ExampleError, match="example 3: it has 0 images, and another"):
        encode([*rows, text_alone], processor)
    together = encode(rows, processor)
    with torch.no_grad():
        logits = model(**together).logits
        for row, mask, own in zip(rows, together["attention_mask"], logits):
            alone = model(**encode([row], processor)).logits[0]
            torch.testing.assert_close(own[mask.bool()], alone)
