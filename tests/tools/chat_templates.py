"""Tokenizers with tokens that hold spaces, and a processor for each common chat template."""

import functools

import tiny_models
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlavaProcessor, PreTrainedTokenizerFast

MARKS = [
    "<|endoftext|>",
    "<s>",
    "</s>",
    "<image>",
    "<|im_start|>",
    "<|im_end|>",
    "<end_of_utterance>",
    "<start_of_turn>",
    "<end_of_turn>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
]
CORPUS = [
    "user assistant User Assistant model USER ASSISTANT ANSWER [INST] [/INST]",
    "What color is the shape? Answer the question using a single word or phrase.",
    "red blue dark red light blue Red a red circle Short answer: red a a a",
] * 20


@functools.cache
def trained(kind):
    "A tokenizer with tokens that hold spaces: of GPT-2's kind (bytes) or of Llama's."
    backend = Tokenizer(models.BPE())
    if kind == "bytes":
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
        backend.decoder = decoders.Metaspace(prepend_scheme="always")
        alphabet = list("\n:<>|/[]_?.")
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=MARKS,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend.to_str()


def tokenizer(kind="bytes", template=None):
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(trained(kind)),
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<|endoftext|>",
        chat_template=template,
    )


CONTENT = (
    "{% for part in turn.content %}"
    "{{ '<image>' if part.type == 'image' else part.text }}"
    "{% endfor %}"
)


def turns(before, after, generation):
    "A template that writes the same around each turn."
    return (
        f"{{% for turn in messages %}}{before}{CONTENT}{after}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{generation}{{% endif %}}"
    )


# Name: the template, and the text that the model writes when it answers "red".
TEMPLATES = {
    "ChatML": (
        turns(
            "<|im_start|>{{ turn.role }}\n", "<|im_end|>\n", "<|im_start|>assistant\n"
        ),
        "red<|im_end|>",
    ),
    "Llama 3": (
        "<s>"
        + turns(
            "<|start_header_id|>{{ turn.role }}<|end_header_id|>\n\n",
            "<|eot_id|>",
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
        "red<|eot_id|>",
    ),
    "Gemma": (
        "<s>"
        + turns(
            "<start_of_turn>{{ 'model' if turn.role == 'assistant' else turn.role }}\n",
            "<end_of_turn>\n",
            "<start_of_turn>model\n",
        ),
        "red<end_of_turn>",
    ),
    "Mistral": (
        "<s>{% for turn in messages %}{% if turn.role == 'user' %}[INST] "
        + CONTENT
        + "[/INST]{% else %} "
        + CONTENT
        + "</s>{% endif %}{% endfor %}",
        " red</s>",
    ),
    "Llama 2": (
        "<s>{% for turn in messages %}{% if turn.role == 'user' %}[INST] "
        + CONTENT
        + " [/INST]{% else %} "
        + CONTENT
        + " </s>{% endif %}{% endfor %}",
        " red </s>",
    ),
    "Idefics": (
        turns("{{ turn.role | capitalize }}: ", "<end_of_utterance>\n", "Assistant:"),
        " red<end_of_utterance>",
    ),
    "LLaVA": (  # ends a turn with a space; the model learned the end of a text
        turns("{{ turn.role | upper }}: ", " ", "ASSISTANT:"),
        " red</s>",
    ),
    "ends with a space": (
        turns("{{ turn.role | upper }}: ", "</s>", "ASSISTANT: "),
        "red</s>",
    ),
    "thinks first": (  # what the generation prompt begins is not in the conversation
        turns(
            "<|im_start|>{{ turn.role }}\n",
            "<|im_end|>\n",
            "<|im_start|>assistant\n<think>\n",
        ),
        "red<|im_end|>",
    ),
    "no template": (None, " red</s>"),
}


def processor(name, kind="bytes"):
    return LlavaProcessor(
        tiny_models.images(
            "CLIP", size={"shortest_edge": 16}, crop_size=tiny_models.SQUARE
        ),
        tokenizer(kind),
        patch_size=8,
        chat_template=TEMPLATES[name][0],
    )
