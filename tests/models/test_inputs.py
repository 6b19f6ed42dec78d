"""Each kind of model gets the inputs that it takes."""

import pytest
import tiny_models
import torch
import transformers

from ressa.data.collate import IGNORED
from ressa.data.prompts import write_prompt
from ressa.models.inputs import has_towers, is_causal, model_batch

ENCODER_DECODERS = ("InstructBLIP, T5", "BLIP-2, T5")


def built(name):
    config, processor = tiny_models.TINY[name]()
    auto = transformers.AutoModelForImageTextToText
    if name in tiny_models.RETRIEVING:
        auto = transformers.AutoModel
    if name == "SigLIP":  # the tokenizer of a checkpoint says how long captions are
        length = config.text_config.max_position_embeddings
        processor.tokenizer.model_max_length = length
    return auto.from_config(config).eval(), processor


def examples_for(processor):
    examples = []
    for i, answer in enumerate(("red", "a picture of two")):
        prompt = write_prompt("what color is the shape ?", processor)
        image = tiny_models.picture(16, 16, i)
        examples.append({"image": image, "prompt": prompt, "answer": answer})
    return examples


@pytest.mark.parametrize("name", tiny_models.TINY)
def test_the_kind_of_each_small_model(name):
    config, _ = tiny_models.TINY[name]()
    with torch.device("meta"):
        auto = transformers.AutoModelForImageTextToText
        if name in tiny_models.RETRIEVING:
            auto = transformers.AutoModel
        model = auto.from_config(config)
    assert has_towers(model) == (name in tiny_models.RETRIEVING)
    if not has_towers(model):
        assert is_causal(model) == (name not in ENCODER_DECODERS)


@pytest.mark.parametrize("name", ["LLaVA", "InstructBLIP, T5", "CLIP", "SigLIP"])
def test_a_model_takes_its_batch(name):
    model, processor = built(name)
    batch = model_batch(model, examples_for(processor), processor)
    with torch.no_grad():
        output = model(**batch)
    if name in tiny_models.RETRIEVING:
        assert "labels" not in batch
        assert output.logits_per_image.shape == (2, 2)
    else:
        assert torch.isfinite(output.loss)
        assert (batch["labels"] != IGNORED).any(1).all()


def test_siglip_pads_captions_to_one_length():
    model, processor = built("SigLIP")
    examples = examples_for(processor)
    length = model_batch(model, examples, processor)["input_ids"].shape[1]
    alone = model_batch(model, examples[:1], processor)["input_ids"].shape[1]
    assert length == alone == processor.tokenizer.model_max_length
