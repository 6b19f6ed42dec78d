"""`ressa data`: what it shows is what the model reads, and nothing is loaded or written."""

import json

import pytest
import shapes_folder
import tiny_models
from chat_templates import processor

from ressa.cli.data import as_read
from ressa.data.collate import collate


@pytest.fixture
def chat_model(tmp_path):
    "A folder with a tiny LLaVA whose processor has a chat template."
    folder = tmp_path / "model"
    model, reader = tiny_models.tiny("LLaVA", folder)
    reader.chat_template = (
        "{% for turn in messages %}{{ turn.role }} : {% for part in turn.content %}"
        "{{ '<image>' if part.type == 'image' else part.text }} {% endfor %}"
        "{% if turn.role == 'assistant' %}<eos>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}assistant : {% endif %}"
    )
    reader.save_pretrained(folder)
    return folder


def test_examples_are_shown_as_the_model_reads_them(tmp_path, chat_model, run):
    data = shapes_folder.make(tmp_path, "llava", rows=12, images=2, size=16)
    recipe = tmp_path / "my.yaml"
    lines = [f"model: {chat_model}", f"data: {data}", "max_steps: 3", "sparsity: 0.5"]
    recipe.write_text("\n".join(lines))
    code, said, _ = run("data", recipe)
    assert code == 0
    assert "conversations in column 'conversations', pictures in column 'image'" in said
    assert said.count("2 pictures of 16 × 16, 16 × 16 pixels") == 3
    assert said.count("<image × 8>") == 3
    assert "«" in said and "<eos>»" in said
    assert "Too long: 0 of" in said and "Metric: exact match" in said
    assert not (tmp_path / "ressa-out").exists()


@pytest.mark.parametrize("kind", ["bytes", "Llama"])
def test_the_pieces_together_are_the_whole_text(kind):
    reader = processor("ChatML", kind)
    row = {
        "image": tiny_models.picture(16, 16),
        "prompt": "<|im_start|>user\n<image>a red circle<|im_end|>\n<|im_start|>assistant\n",
        "answer": "red",
    }
    batch = collate([row], reader)
    place = reader.tokenizer.convert_tokens_to_ids("<image>")
    segments = as_read(batch, reader.tokenizer, [place])
    kinds = ["read", "picture", "read", "learned"]
    assert [segment.kind for segment in segments] == kinds
    assert [str(segments[1]), str(segments[3])] == ["<image × 4>", "«red<|im_end|>»"]
    text = "".join(s.text * (s.tokens if s.kind == "picture" else 1) for s in segments)
    assert text == reader.tokenizer.decode(batch["input_ids"][0])


def test_words_that_the_tokenizer_does_not_know_are_counted(tmp_path, chat_model, run):
    data = shapes_folder.make(tmp_path, "llava", rows=12, images=2, size=16)
    _, said, _ = run("data", "--model", chat_model, "--data", data)
    assert "Unknown words: 10 of 10 examples" in said, "its tokenizer has few words"
    assert "reads each of them as <unk>\n  (first in example 0)" in said
    _, known, _ = run("data", "--train-limit", 64)
    assert "Unknown words" not in known


def test_an_example_that_cannot_be_read_is_named(tmp_path, chat_model, run):
    data = shapes_folder.make(tmp_path, "llava", rows=6, turns=1, size=16)
    rows = json.loads(data.read_text())
    rows[4]["conversations"][0]["value"] = "<image>What <pad> is it?"
    data.write_text(json.dumps(rows))
    line = ["data", "--model", chat_model, "--data", data]
    assert run(*line)[0] == 0
    rows[4]["conversations"][1]["value"] = "red <eos>"
    data.write_text(json.dumps(rows))
    code, _, error = run(*line)
    assert code == 2 and "llava.json: row 4: turn 1 contains '<eos>'" in error
    code, _, error = run(*line, "--data", "easy-vqa", "--turns", "apart")
    assert code == 2 and "--turns is for other data sets than easy-vqa" in error
