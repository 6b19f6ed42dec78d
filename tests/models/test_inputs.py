"""Each kind of model gets the inputs that it takes."""

import pytest
import tiny_models
import torch
import transformers
from datasets import Dataset

from ressa.adaptation.teachers import cache_targets
from ressa.adaptation.trainer import RessaArguments, RessaTrainer
from ressa.data.collate import IGNORED, collate
from ressa.data.prompts import write_prompt
from ressa.evaluation.answers import answer
from ressa.models.inputs import (
    evaluation_mode,
    has_towers,
    is_causal,
    is_text,
    model_batch,
    picture_tokens,
    require_matching_batch,
)
from ressa.pruning.engine import prune

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
    for i, reply in enumerate(("red", "a picture of two")):
        prompt = write_prompt("what color is the shape ?", processor)
        image = tiny_models.picture(16, 16, i)
        examples.append({"image": image, "prompt": prompt, "answer": reply})
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


DOORS = {
    "model_batch": lambda model, rows, processor, folder: model_batch(
        model, list(rows), processor
    ),
    "answer": lambda model, rows, processor, folder: answer(model, rows, processor),
    "prune": lambda model, rows, processor, folder: prune(
        model, collate(list(rows), processor), sparsity=0.5, progress=False
    ),
    "cache_targets": lambda model, rows, processor, folder: cache_targets(
        model, rows, processor, folder / "targets.arrow"
    ),
    "train": lambda model, rows, processor, folder: RessaTrainer(
        model,
        RessaArguments(str(folder), distill_weight=0, use_cpu=True),
        processor=processor,
        train_dataset=rows,
    ),
}


@pytest.mark.parametrize("name", ["BLIP-2, OPT", "InstructBLIP, Llama"])
@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("n", [3, 5])
def test_a_processor_with_other_images_is_refused_everywhere(name, door, n, tmp_path):
    "BLIP-2 drops the last vectors of an image for which there is no place."
    model, processor = built(name)
    rows = Dataset.from_list(examples_for(processor))
    processor.num_query_tokens = n
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    expected = f"has {n} places for an image, but the model expects 4 .*tokens = 4"
    with pytest.raises(ValueError, match=expected):
        DOORS[door](model, rows, processor, tmp_path)
    for key, weight in model.state_dict().items():
        assert torch.equal(weight, before[key])


@pytest.mark.parametrize("name", tiny_models.GENERATING)
def test_the_own_processor_of_each_class_fits(name):
    model, processor = built(name)
    require_matching_batch(
        model, collate(tiny_models.examples(name, processor), processor)
    )


MARKED = [name for name in tiny_models.GENERATING if name != "BLIP"]


@pytest.mark.parametrize("name", MARKED)
def test_a_batch_whose_images_have_no_place_is_refused(name):
    "As if the processor had another token for images."
    model, processor = built(name)
    batch = collate(tiny_models.examples(name, processor), processor)
    config = model.config
    is_id = hasattr(config, "image_token_id")
    token = config.image_token_id if is_id else config.image_token_index
    batch["input_ids"][batch["input_ids"] == token] = 3
    with pytest.raises(ValueError, match=f"no place .* knows \\(token {token}\\)"):
        require_matching_batch(model, batch)


def test_a_model_that_has_no_token_for_images_is_refused():
    "As older checkpoints of BLIP-2 are."
    model, processor = built("BLIP-2, OPT")
    batch = collate(tiny_models.examples("BLIP-2, OPT", processor), processor)
    model.config.image_token_index = None
    with pytest.raises(ValueError, match="image_token_index is not set"):
        require_matching_batch(model, batch)


def test_a_token_that_the_model_does_not_know_is_refused():
    model, _ = built("LLaVA")
    known = model.get_input_embeddings().weight.shape[0]
    require_matching_batch(model, {"input_ids": torch.tensor([[known - 1]])})
    require_matching_batch(model, {"pixel_values": torch.zeros(1)})
    with pytest.raises(ValueError, match=f"id {known}, but the model knows {known}"):
        require_matching_batch(model, {"input_ids": torch.tensor([[known]])})


def test_modes_come_back_one_by_one():
    model, _ = built("LLaVA")
    model.train()
    model.model.vision_tower.eval()
    before = [module.training for module in model.modules()]
    with pytest.raises(RuntimeError), evaluation_mode(model):
        assert not any(module.training for module in model.modules())
        raise RuntimeError
    assert [module.training for module in model.modules()] == before


@pytest.mark.parametrize(
    "name", [name for name in tiny_models.TINY if name not in tiny_models.RETRIEVING]
)
def test_text_is_all_but_pictures_and_padding(name):
    config, processor = tiny_models.TINY[name]()
    with torch.device("meta"):
        model = transformers.AutoModelForImageTextToText.from_config(config)
    causal = is_causal(model)
    batch = collate(examples_for(processor), processor, causal=causal)
    pictures = picture_tokens(model)
    text = is_text(batch, pictures, causal=causal)
    is_answer = batch["labels"] != IGNORED
    if not causal:
        assert torch.equal(text, is_answer)
        return
    assert text[is_answer].all()
    ids = batch["input_ids"]
    of_picture = sum((ids == token).sum() for token in pictures)
    assert text.sum() + of_picture == batch["attention_mask"].sum()
    assert (of_picture > 0) == (name != "BLIP")  # its pictures are beside the text
    assert "what color is the shape" in processor.tokenizer.decode(ids[0][text[0]])
    del batch["attention_mask"]  # of a collator that pads nothing
    assert is_text(batch, pictures).sum() == ids.numel() - of_picture
