"""Nothing that a checkpoint, a processor or a mode stores changes an answer, and everything is as before afterwards."""

import functools
import tempfile

import pytest
import tiny_models
import torch
from datasets import Dataset
from torch import nn
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    WatermarkingConfig,
)

from ressa.evaluation.answers import (
    TOKEN_IDS,
    answer,
    evaluate,
    exact_match,
    greedy_config,
    stored_settings_aside,
)


@functools.cache
def tiny(name):
    "A model that writes words alone, so that its answers say what it generated."
    with tempfile.TemporaryDirectory() as folder:
        model, processor = tiny_models.tiny(name, folder)
    if name in tiny_models.GENERATING:
        words = [tiny_models.token_id(word) for word in tiny_models.WORDS.split()]
        writer = model.text_decoder if name == "BLIP" else model
        weight = writer.get_output_embeddings().weight
        is_word = torch.zeros(len(weight), 1)
        is_word[words] = 1.0
        weight.data *= is_word
    return model, processor


class Rows(list):
    "Examples with images of any number, which `datasets` cannot hold in one column."

    def __getitem__(self, key):
        return (
            [row[key] for row in self]
            if isinstance(key, str)
            else list.__getitem__(self, key)
        )


def answers(name, processor=None, **options):
    model, own_processor = tiny(name)
    rows = Rows(tiny_models.examples(name, own_processor))
    options = dict(max_new_tokens=5, progress=False) | options
    return answer(model, rows, processor or own_processor, **options)


def stored_configs(model):
    modules = [m for m in model.modules() if "generation_config" in vars(m)]
    return [module.generation_config for module in modules]


# For each field of a generation configuration, a value that changes what is generated,
# what is returned, or how long it takes.
STORED = {
    "max_length": 1,
    "max_new_tokens": 1,
    "min_length": 30,
    "min_new_tokens": 30,
    "early_stopping": True,
    "max_time": 1e-9,
    "stop_strings": ["a"],
    "do_sample": True,
    "num_beams": 4,
    "use_mtp": True,
    "use_cache": False,
    "cache_implementation": "static",
    "cache_config": {"backend": "quanto"},
    "max_cache_len": 1,
    "temperature": 9.0,
    "top_k": 3,
    "top_p": 0.2,
    "min_p": 0.5,
    "top_h": 0.5,
    "typical_p": 0.2,
    "epsilon_cutoff": 0.5,
    "eta_cutoff": 0.5,
    "repetition_penalty": 50.0,
    "encoder_repetition_penalty": 50.0,
    "length_penalty": -5.0,
    "no_repeat_ngram_size": 1,
    "bad_words_ids": [[i] for i in range(60, 75)],
    "renormalize_logits": True,
    "forced_bos_token_id": 70,
    "forced_eos_token_id": 70,
    "remove_invalid_values": True,
    "exponential_decay_length_penalty": (0, 50.0),
    "suppress_tokens": list(range(60, 75)),
    "begin_suppress_tokens": list(range(60, 75)),
    "sequence_bias": [[[70], 50.0]],
    "token_healing": True,
    "guidance_scale": 5.0,
    "watermarking_config": WatermarkingConfig(bias=50.0),
    "num_return_sequences": 3,
    "output_attentions": True,
    "output_hidden_states": True,
    "output_scores": True,
    "output_logits": True,
    "return_dict_in_generate": True,
    "encoder_no_repeat_ngram_size": 1,
    "is_assistant": True,
    "num_assistant_tokens": 3,
    "num_assistant_tokens_schedule": "heuristic",
    "assistant_confidence_threshold": 0.1,
    "prompt_lookup_num_tokens": 3,
    "max_matching_ngram_size": 2,
    "assistant_early_exit": 1,
    "assistant_lookbehind": 3,
    "target_lookbehind": 3,
    "assistant_ensemble_weight": 0.9,
    "speculation_type": "anything",
    "compile_config": {"fullgraph": True},
    "disable_compile": True,
    "continuous_batching_config": {"block_size": 2},
    "low_memory": True,
    "penalty_alpha": 0.9,
    "dola_layers": "high",
    "diversity_penalty": 5.0,
    "num_beam_groups": 2,
    "constraints": [[70]],
    "force_words_ids": [[70]],
    "prefill_chunk_size": 1,
    "a field of another version": True,
}
NO_SETTINGS = {"transformers_version", "_from_model_config"}


def test_every_field_is_stored_in_the_test():
    fields = set(vars(GenerationConfig())) - set(TOKEN_IDS) - NO_SETTINGS
    assert fields <= set(STORED), "a new field of transformers: give it a value above"


WRITERS = ["LLaVA", "BLIP-2, OPT", "BLIP-2, T5", "InstructBLIP, Llama", "BLIP"]


@pytest.mark.parametrize("name", WRITERS)
def test_no_stored_field_changes_an_answer(name):
    plain = answers(name)
    configs = stored_configs(tiny(name)[0])
    assert configs
    for field, value in STORED.items():
        for config in configs:
            setattr(config, field, value)
        try:
            assert answers(name) == plain, field
            assert all(getattr(config, field) == value for config in configs), field
        finally:
            for config in configs:
                setattr(config, field, getattr(GenerationConfig(), field, None))


@pytest.mark.parametrize("name", tiny_models.GENERATING)
def test_several_stored_fields_change_no_answer_of_any_class(name):
    plain = answers(name)
    assert len(plain) == 3 and any(plain)
    model, _ = tiny(name)
    configs = stored_configs(model)
    for config in configs:
        config.num_beams = 3
        config.num_return_sequences = 2
        config.repetition_penalty = 5.0
        config.min_new_tokens = 5
    try:
        assert answers(name) == plain
        assert stored_configs(model) == configs
    finally:
        for config in configs:
            for field in ("num_beams", "num_return_sequences", "repetition_penalty"):
                setattr(config, field, None)
            config.min_new_tokens = None


@pytest.mark.parametrize("name", tiny_models.GENERATING)
def test_no_padding_default_changes_an_answer(name):
    plain = answers(name)
    _, processor = tiny_models.TINY[name]()
    for tokenizer in (
        processor.tokenizer,
        getattr(processor, "qformer_tokenizer", None),
    ):
        if tokenizer is not None:
            tokenizer.padding_side = "right"
            tokenizer.pad_token = None
    processor.text_kwargs = dict(
        padding="max_length", max_length=200, padding_side="right"
    )
    assert answers(name, processor) == plain
    if name != "PaliGemma":  # its processor reads no example without an image alone
        assert answers(name, processor, batch_size=1) == plain


def test_the_answers_of_the_bundled_model_do_not_depend_on_padding(data):
    from ressa.models.bundled import load_bundled

    model, processor = load_bundled("cpu")
    questions = data[1].shuffle(seed=2).select(range(100))
    for tokenizer in (processor.tokenizer, processor.qformer_tokenizer):
        tokenizer.padding_side = "right"
    assert evaluate(model, questions, processor, progress=False).score > 0.95


class Dropping(nn.Module):
    "A layer behind dropout that changes every output in training mode."

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(nn.functional.dropout(x, 0.5, self.training))


@pytest.fixture
def dropping(data):
    from ressa.models.bundled import load_bundled

    model, processor = load_bundled("cpu")
    model.language_model.lm_head = Dropping(model.language_model.lm_head)
    return model, processor


def modes(model):
    return [module.training for module in model.modules()]


def test_dropout_is_off_and_every_mode_comes_back(data, dropping):
    model, processor = dropping
    questions = data[1].select(range(10))
    want = answer(model.eval(), questions, processor, progress=False)
    model.train()
    model.vision_model.eval()
    before = modes(model)
    assert len(set(before)) == 2
    assert answer(model, questions, processor, progress=False) == want
    assert modes(model) == before

    from ressa.data.collate import collate

    batches = [collate([questions[i] for i in range(10)], processor)]
    first = exact_match(model, batches)
    assert (first == exact_match(model, batches)).all() and modes(model) == before


def test_modes_and_settings_come_back_after_an_error(data, dropping):
    model, processor = dropping
    model.train()
    before = modes(model), stored_configs(model)

    def fails(*args, **kwargs):
        raise RuntimeError("out of memory")

    model.generate = fails
    with pytest.raises(RuntimeError, match="out of memory"):
        answer(model, data[1].select(range(3)), processor, progress=False)
    assert (modes(model), stored_configs(model)) == before
    model.language_model.forward = fails
    with pytest.raises(RuntimeError, match="out of memory"):
        from ressa.data.collate import collate

        exact_match(model, [collate([data[1][0]], processor)])
    assert modes(model) == before[0]


def test_a_configuration_that_is_passed_is_obeyed():
    name = "LLaVA"
    plain = answers(name)
    long = answers(name, generation_config=GenerationConfig(max_new_tokens=9))
    assert all(text.startswith(start) for text, start in zip(long, plain))
    forced = GenerationConfig(forced_eos_token_id=70, max_new_tokens=2)
    assert answers(name, generation_config=forced) != plain
    as_object = GenerationConfig(return_dict_in_generate=True, output_scores=True)
    assert answers(name, generation_config=as_object) == plain
    assert as_object.return_dict_in_generate, "the caller's object is not changed"
    several = GenerationConfig(num_beams=2, num_return_sequences=2)
    with pytest.raises(ValueError, match="num_return_sequences is 2"):
        answers(name, generation_config=several)


def test_end_tokens_are_those_of_tokenizer_and_checkpoint():
    model, processor = tiny("BLIP-2, OPT")
    config = stored_configs(model)[-1]
    before = config.eos_token_id
    config.eos_token_id = [2, 70]
    try:
        assert set(greedy_config(model, processor).eos_token_id) == {2, 70}
        with stored_settings_aside(model):
            assert stored_configs(model)[-1].eos_token_id == [2, 70]
    finally:
        config.eos_token_id = before


def test_a_model_that_writes_nothing_is_refused():
    model, processor = tiny("CLIP")
    rows = Dataset.from_dict({"prompt": ["what?"]})
    with pytest.raises(ValueError, match="CLIPModel cannot generate answers"):
        answer(model, rows, processor)


def test_the_processor_of_another_model_is_refused():
    model, _ = tiny("BLIP-2, OPT")
    _, other = tiny_models.TINY["BLIP-2, OPT"]()
    for n in (3, 5):
        other.num_query_tokens = n
        with pytest.raises(
            ValueError, match=f"has {n} places .* expects 4 .*num_query_tokens = 4"
        ):
            answers("BLIP-2, OPT", other)
    large = tiny_models.TINY["LLaVA"]()[1]
    vocabulary = model.get_input_embeddings().weight.shape[0]
    large.tokenizer.add_tokens([f"word{i}" for i in range(vocabulary)])
    rows = Rows([{"prompt": f"word{vocabulary - 1}", "image": None}])
    with pytest.raises(ValueError, match="the processor is that of another model"):
        answer(tiny("LLaVA")[0], rows, large)


def test_an_error_has_the_number_of_its_example_in_the_data_set():
    model, processor = tiny("LLaVA")
    rows = Rows([{"prompt": f"{'red ' * n}", "image": None} for n in (5, 4, 3, 2, 1)])
    rows[1]["image"] = tiny_models.picture(9, 9)
    with pytest.raises(ValueError, match="example 1: .*'red red red red '"):
        answer(model, rows, processor, batch_size=2, progress=False)


def test_a_language_model_answers_texts():
    config = LlamaConfig(**tiny_models.LLAMA)
    model = LlamaForCausalLM(config).eval()
    words = tiny_models.tokenizer()
    rows = Dataset.from_dict(
        {
            "prompt": ["what color ?", "what is the shape of the circle ?"],
            "answer": ["red", "square"],
            "question_type": ["color", "shape"],
        }
    )
    words.padding_side = "right"
    result = evaluate(model, rows, words, max_new_tokens=3, progress=False)
    alone = answer(model, rows, words, max_new_tokens=3, batch_size=1, progress=False)
    assert result.answers == alone and result.n == 2


def test_an_answer_of_blip_is_without_its_prompt():
    "Its `generate` takes the last token off the prompt, and changes the first."
    model, processor = tiny("BLIP")
    rows = Rows(tiny_models.examples("BLIP", processor))
    for text in answer(model, rows, processor, max_new_tokens=2, progress=False):
        assert len(text.split()) <= 2


def test_exact_match_is_for_causal_models():
    with pytest.raises(ValueError, match="is an encoder-decoder"):
        exact_match(tiny("BLIP-2, T5")[0], [{"labels": torch.zeros(1, 2)}])
