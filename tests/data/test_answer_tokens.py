"""A model is trained on the tokens that it has to write: in its chat template, behind its prompt, up to the end of its turn."""

import pytest
import tiny_models
import torch
from chat_templates import CONTENT, TEMPLATES, processor, tokenizer, turns
from torch import nn
from transformers import GenerationConfig, PretrainedConfig

from ressa.data.collate import IGNORED, collate
from ressa.data.prompts import answer_ids, end_token_ids, write_prompt
from ressa.evaluation.answers import answer


def example(reader, reply="red"):
    prompt = write_prompt("What color is the shape?", reader)
    return {"image": tiny_models.picture(16, 16), "prompt": prompt, "answer": reply}


def labelled(batch):
    return batch["labels"][batch["labels"] != IGNORED].tolist()


@pytest.mark.parametrize("kind", ["bytes", "Llama"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_the_labels_are_what_the_model_has_to_write(name, kind):
    reader = processor(name, kind)
    _, written = TEMPLATES[name]
    row = example(reader)
    ids = labelled(collate([row], reader))
    words = reader.tokenizer
    text = row["prompt"] + written
    assert words.decode(
        words(row["prompt"], add_special_tokens=False).input_ids + ids
    ) == (words.decode(words(text, add_special_tokens=False).input_ids))
    if name not in ("ends with a space",):
        # the tokens of the whole conversation, without those of its beginning
        whole = words(text, add_special_tokens=False).input_ids
        prompt = words(row["prompt"], add_special_tokens=False).input_ids
        assert prompt + ids == whole
    assert ids[-1] in end_token_ids(reader)
    assert sum(i in end_token_ids(reader) for i in ids) == 1


@pytest.mark.parametrize(
    "name", sorted(set(TEMPLATES) - {"LLaVA", "no template", "thinks first"})
)
def test_prompt_and_labels_are_the_conversation_of_the_template(name):
    reader = processor(name)
    row = example(reader, "a dark red circle")
    batch = collate([row], reader)
    question = [{"type": "image"}, {"type": "text", "text": ""}]
    question[1]["text"] = (
        "What color is the shape? Answer the question using a single word or phrase."
    )
    reply = [{"type": "text", "text": row["answer"]}]
    whole = reader.apply_chat_template(
        [
            {"role": "user", "content": question},
            {"role": "assistant", "content": reply},
        ]
    )
    read = reader.tokenizer.decode(batch["input_ids"][0]).replace(
        "<image>" * 4, "<image>"
    )
    assert whole.rstrip("\n").removeprefix("<s>") == read.removeprefix("<s>")


def test_a_prompt_outside_of_the_template_has_a_plain_answer():
    reader = processor("ChatML")
    [ids] = answer_ids(["red"], ["<image>Short answer:"], reader)
    assert reader.tokenizer.decode(ids) == " red</s>"


@pytest.mark.parametrize("kind", ["bytes", "Llama"])
@pytest.mark.parametrize("end", ["", " ", "\n"])
def test_there_is_one_space_between_prompt_and_answer(kind, end):
    words = tokenizer(kind)
    prompt = f"Short answer:{end}"
    before = words(prompt, add_special_tokens=False).input_ids
    for reply in ("red", "a dark red circle"):
        [ids] = answer_ids([reply], [prompt], words)
        assert words.decode(before + ids) == f"Short answer:{end or ' '}{reply}</s>"
    assert answer_ids([""], ["Short answer:"], words) == [[words.eos_token_id]]


def test_white_space_that_a_processor_adds_is_a_space():
    "PaliGemma's processor ends each prompt with a new line."
    _, reader = tiny_models.TINY["PaliGemma"]()
    rows = tiny_models.examples("PaliGemma", reader)
    last = collate(rows, reader, answers=False)["input_ids"][:, -1]
    assert reader.tokenizer.decode(last[0]).isspace()
    words = labelled(collate([rows[0]], reader))
    assert reader.tokenizer.decode(words).split() == ["red", "<eos>"]


def test_a_decoder_writes_the_answer_as_a_text_of_its_own():
    words = tokenizer()
    rows = [{"prompt": "Short answer:", "answer": "red"}]
    [labels] = collate(rows, words, causal=False)["labels"]
    assert words.decode(labels) == "red</s>"


@pytest.mark.parametrize("template", [None, TEMPLATES["LLaVA"][0]])
def test_without_an_end_token_there_is_an_error(template):
    reader = processor("no template")
    reader.chat_template = template
    reader.tokenizer.eos_token = None
    for call in (
        lambda: collate([example(reader)], reader),
        lambda: end_token_ids(reader),
        lambda: collate([example(reader)], reader, causal=False),
    ):
        with pytest.raises(ValueError, match="no end token.*set tokenizer.eos_token"):
            call()


@pytest.mark.parametrize("causal", [True, False])
def test_an_answer_that_ends_itself_is_refused(causal):
    reader = processor("no template")
    with pytest.raises(ValueError, match="'red</s>' contains '</s>', which ends"):
        collate([example(reader, "red</s>")], reader, causal=causal)
    reader = processor("ChatML")
    with pytest.raises(ValueError, match="'a<|im_end|>b' contains".replace("|", r"\|")):
        collate([example(reader, "a<|im_end|>b")], reader)


def test_an_end_token_of_the_template_is_enough():
    reader = processor("ChatML")
    reader.tokenizer.eos_token = None
    [ids] = answer_ids(["red"], [example(reader)["prompt"]], reader)
    assert reader.tokenizer.decode(ids) == "red<|im_end|>"
    assert end_token_ids(reader) == ids[-1:]


class Obedient(nn.Module):
    "A model that writes what it was trained on, and then goes on until an end token."

    def __init__(self, written, vocabulary):
        super().__init__()
        self.written = written
        self.embedding = nn.Embedding(vocabulary, 1)
        self.config = PretrainedConfig()
        self.generation_config = GenerationConfig(eos_token_id=[0])
        self.device = torch.device("cpu")

    def get_input_embeddings(self):
        return self.embedding

    def generate(self, input_ids, generation_config, **kwargs):
        new = []
        for token in [*self.written, *[self.written[0]] * 10]:
            new.append(token)
            if token in generation_config.eos_token_id:
                break
        new = torch.tensor([new] * len(input_ids))
        return torch.cat([input_ids, new], 1)


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_was_trained_is_the_answer(name):
    reader = processor(name)
    row = example(reader)
    model = Obedient(labelled(collate([row], reader)), len(reader.tokenizer))
    rows = SimpleRows([row])
    assert answer(model, rows, reader, progress=False) == ["red"]


class SimpleRows(list):
    def __getitem__(self, key):
        return (
            [r[key] for r in self]
            if isinstance(key, str)
            else list.__getitem__(self, key)
        )


STRINGS = turns(
    "<|im_start|>{{ turn.role }}\n", "<|im_end|>\n", "<|im_start|>assistant\n"
)


def test_a_language_model_has_its_chat_template_too():
    words = tokenizer(template=STRINGS.replace(CONTENT, "{{ turn.content }}"))
    prompt = write_prompt("What color is the shape?", words)
    assert prompt.startswith("<|im_start|>user\nWhat color is the shape?")
    assert prompt.endswith("<|im_start|>assistant\n") and "<image>" not in prompt
    batch = collate([{"prompt": prompt, "answer": "red"}], words)
    assert words.decode(labelled(batch)) == "red<|im_end|>"


@pytest.mark.parametrize("question", ["<image>\nWhat?", "What <image> is it?"])
def test_a_question_with_the_place_of_an_image_is_refused(question):
    for reader in (None, processor("ChatML"), tiny_models.TINY["Qwen2-VL"]()[1]):
        with pytest.raises(ValueError, match="contains '<image>'"):
            write_prompt(question, reader)
    assert question in write_prompt(question, tokenizer()), "text to a language model"


@pytest.mark.parametrize("name", tiny_models.GENERATING)
def test_no_question_holds_a_token_of_its_processor(name):
    _, reader = tiny_models.TINY[name]()
    token = getattr(reader, "image_token", "<image>")
    with pytest.raises(ValueError, match="has a meaning of its own"):
        write_prompt(f"What {token} is it?", reader)


@pytest.mark.parametrize("question", [None, 3, float("nan"), ["What?"]])
def test_a_question_is_text(question):
    with pytest.raises(ValueError, match="a question must be text"):
        write_prompt(question)


@pytest.mark.parametrize(
    "template", ["{{ raise_exception('no pictures') }}", "{% if %}", "{{ 1 + turn }}"]
)
def test_a_template_that_fails_is_named(template):
    reader = processor("ChatML")
    reader.chat_template = template
    with pytest.raises(
        ValueError, match="the chat template of LlavaProcessor"
    ) as caught:
        write_prompt("What?", reader)
    assert caught.value.__cause__ is not None
