"""Many questions share one image without seeing each other, and a training that was stopped goes on."""

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from ressa.course import real_training
from ressa.course.real_training import (
    PictureWithQuestions,
    Recipe,
    add_low_rank,
    bundled_vision,
    kl_to_before,
    load_progress,
    logits_of_answers,
    pack_questions,
    read_docstrings,
    save_progress,
    share_right,
    store_trained,
    teach_answers,
    teach_vision,
    tiny_real,
    trained_tensors,
    without_low_rank,
)
from ressa.data.collate import collate
from ressa.models.real import chat_prompt, merge_trained

PAIRS = [("is it red?", "yes"), ("what shape is it?", "circle"), ("any blue?", "no")]
RECIPE = Recipe(
    vision_steps=2, vision_images=2, steps=4, images=2, rank=2, half_precision=False
)


def pictures(n=3):
    generator = torch.Generator().manual_seed(1)
    return [
        PictureWithQuestions(
            torch.rand(3, 64, 64, generator=generator) * 2 - 1, PAIRS, 5, i % 3
        )
        for i in range(n)
    ]


def changed_model():
    "The tiny model with low-rank changes that are not zero."
    model, processor = tiny_real()
    add_low_rank(model, 2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model, processor


def test_a_question_sees_the_image_and_itself():
    _, processor = tiny_real()
    packed = pack_questions([PAIRS, PAIRS[:1]], processor)
    seen = packed.mask[:, 0] == 0
    numbers = packed.question
    for i in range(2):
        for query in range(numbers.shape[1]):
            if numbers[i, query] == -1:
                continue
            allowed = (numbers[i] == 0) | (numbers[i] == numbers[i, query])
            allowed[query + 1 :] = False
            assert torch.equal(seen[i, query], allowed)
    first = packed.position_ids[0][numbers[0] == 1]
    second = packed.position_ids[0][numbers[0] == 2]
    assert first[0] == second[0] == (numbers[0] == 0).sum()


def test_packed_questions_get_the_logits_that_they_get_alone():
    model, processor = changed_model()
    picture = pictures(1)[0]
    model.config.text_config._attn_implementation = "eager"
    packed = pack_questions([PAIRS], processor)
    logits, _ = logits_of_answers(model, picture.pixels[None], packed)
    alone = []
    for pair in PAIRS:
        one = pack_questions([[pair]], processor)
        alone.append(logits_of_answers(model, picture.pixels[None], one)[0])
    torch.testing.assert_close(logits, torch.cat(alone), rtol=1e-4, atol=1e-5)


def test_a_packed_question_has_the_tokens_of_the_processor():
    _, processor = tiny_real()
    from PIL import Image

    question, reply = PAIRS[0]
    example = {
        "image": Image.new("RGB", (64, 64)),
        "prompt": chat_prompt(processor, question),
        "answer": reply,
    }
    batch = collate([example], processor)
    packed = pack_questions([PAIRS[:1]], processor)
    assert torch.equal(packed.input_ids, batch["input_ids"])
    assert torch.equal(packed.labels, batch["labels"])


def test_the_change_can_be_switched_off():
    model, _ = changed_model()
    ids = torch.arange(20)[None]
    with torch.no_grad():
        changed = model(input_ids=ids).logits
        with without_low_rank(model):
            before = model(input_ids=ids).logits
        again = model(input_ids=ids).logits
    assert torch.equal(before, tiny_real()[0](input_ids=ids).logits)
    assert torch.equal(changed, again) and not torch.equal(changed, before)


def test_kl_is_zero_at_the_start_and_has_a_gradient_later():
    model, processor = tiny_real()
    add_low_rank(model, 2)
    ids = torch.arange(20)[None]
    assert kl_to_before(model, ids).item() == 0
    model, _ = changed_model()
    kl = kl_to_before(model, ids)
    kl.backward()
    assert kl > 0
    layer = model.model.text_model.layers[0].self_attn.q_proj
    assert layer.lora_A.grad.abs().sum() > 0


def test_bundled_vision_fits_the_class():
    model, _ = tiny_real()
    model.model.vision_model.load_state_dict(bundled_vision())


def test_step_one_changes_vision_and_interface_only(monkeypatch):
    model, processor = tiny_real()
    before = {name: p.clone() for name, p in model.named_parameters()}
    monkeypatch.setattr(real_training, "VISION_LOG_STEPS", 1)
    log = teach_vision(model, pictures(), processor.tokenizer, RECIPE)
    assert [line["step"] for line in log] == [1, 2]
    for name, parameter in model.named_parameters():
        if "text_model" in name or "lm_head" in name:
            assert torch.equal(parameter, before[name])
    interface = "model.connector.modality_projection.proj.weight"
    assert not torch.equal(dict(model.named_parameters())[interface], before[interface])


def taught(work, *stops):
    "A tiny model after step two, in one call for each of `stops`."
    for stop in stops:
        torch.manual_seed(3)
        model, processor = tiny_real()
        torch.manual_seed(4)
        add_low_rank(model, RECIPE.rank)
        teach_answers(
            model,
            pictures(),
            processor,
            work,
            held_out=pictures(1),
            texts=torch.arange(40).view(2, 20),
            recipe=RECIPE,
            stop=stop,
        )
    return model


def test_a_stopped_training_goes_on_as_if_it_had_not_stopped(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    whole = taught(tmp_path / "a", None).state_dict()
    parts = taught(tmp_path / "b", 1, 3, None).state_dict()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    start = tiny_real()[0].state_dict()
    embedding = "model.text_model.embed_tokens.weight"
    assert torch.equal(whole[embedding], start[embedding])
    assert len((tmp_path / "b/answers.jsonl").read_text().splitlines()) == 3
    assert not list(tmp_path.rglob("*.part"))


def test_progress_of_another_model_is_refused(tmp_path):
    taught(tmp_path, 1)
    model, _ = tiny_real()
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(ValueError, match="progress of another model"):
        load_progress(model, optimizer, tmp_path / "answers.safetensors")


def test_progress_holds_both_moments_of_the_optimizer(tmp_path):
    layer = torch.nn.Linear(2, 1)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(2)).backward()
    optimizer.step()
    save_progress(layer, optimizer, tmp_path / "p", step=7, seconds=1.5)
    other = torch.nn.Linear(2, 1)
    other_optimizer = torch.optim.AdamW(other.parameters())
    done = load_progress(other, other_optimizer, tmp_path / "p")
    assert done == (7, 1.5)
    assert torch.equal(other.weight, layer.weight)
    for key, value in optimizer.state[layer.weight].items():
        assert torch.equal(other_optimizer.state[other.weight][key], value)


def test_what_is_stored_can_be_merged(tmp_path):
    model, _ = changed_model()
    store_trained(model, tmp_path)
    trained = load_file(tmp_path / "trained.safetensors")
    plain = tiny_real()[0].state_dict()
    merged = merge_trained(dict(plain), trained)
    assert set(merged) == set(plain)
    ids = torch.arange(20)[None]
    loaded, _ = tiny_real()
    loaded.load_state_dict(merged)
    with torch.no_grad():
        difference = loaded(input_ids=ids).logits - model(input_ids=ids).logits
    assert difference.abs().max() < 1e-3  # the factors are stored in 16 bits
    assert set(trained_tensors(model)) >= {
        "model.connector.modality_projection.proj.weight"
    }


def test_share_right_counts_whole_answers(monkeypatch):
    model, processor = tiny_real()
    picture = pictures(1)[0]
    packed = pack_questions([PAIRS], processor)
    is_answer = packed.labels[:, 1:] != -100
    wanted = F.one_hot(packed.labels[:, 1:][is_answer], 300).float()
    wanted[0] = 0  # one token of the first answer is wrong
    monkeypatch.setattr(
        real_training, "logits_of_answers", lambda *_: (wanted, is_answer)
    )
    assert share_right(model, [picture], processor) == 2 / 3


@pytest.mark.slow
def test_docstrings_are_texts_and_chats():
    _, processor = tiny_real()
    rows = read_docstrings(processor.tokenizer, 300)
    assert rows.shape[0] > 100 and rows.shape[1] == 300
    texts = processor.tokenizer.batch_decode(rows[:2])
    assert "What does" not in texts[0] and "What does" in texts[1]
