"""Parts begin where each class has them, the rest stays dense for a reason, and settings reach their layers."""

import pytest
import tiny_models
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ressa.parts import (
    CLASSES,
    PARTS,
    ModalityMap,
    modality_map,
    part_roots,
    per_layer,
)

# For each small model of `tiny_models.TINY`: the modules at which vision and language
# begin, and those that hold linear layers of the interface, read off the class's code.
TOWER = ("model.vision_tower", "model.language_model", ["model.multi_modal_projector"])
BLIP_2 = ("vision_model", "language_model", ["qformer", "language_projection"])
IDEFICS = ("model.vision_model", "model.text_model", ["model.connector"])
QWEN = ("model.visual", "model.language_model", ["model.visual.merger"])
QWEN_3 = (
    "model.visual",
    "model.language_model",
    ["model.visual.merger", "model.visual.deepstack_merger_list"],
)
ROOTS = {
    "InstructBLIP, Llama": BLIP_2,
    "InstructBLIP, T5": BLIP_2,
    "InstructBLIP, OPT": BLIP_2,
    "BLIP-2, OPT": BLIP_2,
    "BLIP-2, T5": BLIP_2,
    "BLIP": ("vision_model", "text_decoder", []),
    "LLaVA": TOWER,
    "LLaVA-NeXT": TOWER,
    "LLaVA-OneVision": TOWER,
    "PaliGemma": TOWER,
    "Idefics3": IDEFICS,
    "SmolVLM": IDEFICS,
    "Qwen2-VL": QWEN,
    "Qwen2.5-VL": QWEN,
    "Qwen3-VL": QWEN_3,
    "Qwen3-VL-MoE": QWEN_3,
    "InternVL": TOWER,
    "Mistral3": TOWER,
    "Gemma3": ("model.vision_tower", "model.language_model", []),
    "Mllama": (
        "model.vision_model",
        "model.language_model",
        ["model.multi_modal_projector"],
    ),
    "CLIP": ("vision_model", "text_model", ["visual_projection", "text_projection"]),
    "SigLIP": ("vision_model", "text_model", []),
}


def without_weights(config, name=""):
    "A model of a configuration on the device `meta`: shapes and no values."
    auto = transformers.AutoModelForImageTextToText
    if name in tiny_models.RETRIEVING:
        auto = transformers.AutoModel
    with torch.device("meta"):
        return auto.from_config(config)


def small(name):
    config, _ = tiny_models.TINY[name]()
    return without_weights(config, name)


def below(name, roots):
    return any(f"{name}.".startswith(f"{root}.") for root in roots)


def test_every_small_model_is_in_the_table():
    assert list(ROOTS) == list(tiny_models.TINY)


@pytest.mark.parametrize("name", ROOTS)
def test_parts_begin_where_the_class_has_them(name):
    linears = modality_map(small(name)).linears
    vision, language, interface = ROOTS[name]
    for layer in linears["vision"]:
        assert below(layer, [vision]) and not below(layer, interface)
    for layer in linears["language"]:
        assert below(layer, [language])
    for layer in linears["interface"]:
        assert below(layer, interface)
    for root in interface:
        assert any(below(layer, [root]) for layer in linears["interface"])


@pytest.mark.parametrize("name", ROOTS)
def test_nothing_is_lost_or_counted_twice(name):
    model = small(name)
    mmap = modality_map(model)
    owners = [
        path or type(model).__name__
        for path, module in model.named_modules()
        if list(module.parameters(recurse=False))
    ]
    assert sorted([*mmap.layers, *mmap.left_dense]) == sorted(owners)


@pytest.mark.parametrize(
    "name, reason, module",
    [
        ("LLaVA", "output never read", "model.vision_tower.encoder.layers.2.mlp.fc1"),
        ("Gemma3", "bare parameter", "model.multi_modal_projector"),
        ("Gemma3", "output never read", "model.vision_tower.head.mlp.fc1"),
        ("SigLIP", "fused attention", "vision_model.head.attention.out_proj"),
        ("Qwen3-VL-MoE", "fused experts", "model.language_model.layers.1.mlp.experts"),
        ("Qwen3-VL-MoE", "router", "model.language_model.layers.1.mlp.gate"),
        ("BLIP", "output head", "text_decoder.cls.predictions.decoder"),
        ("InstructBLIP, T5", "output head", "language_model.lm_head"),
    ],
)
def test_what_stays_dense_and_why(name, reason, module):
    assert modality_map(small(name)).left_dense[module] == reason


@pytest.mark.parametrize(
    "chosen, unread", [(-1, set()), (-2, {"2"}), (1, {"1", "2"}), ([-3, -2], {"2"})]
)
def test_blocks_above_the_last_state_that_is_read(chosen, unread):
    config, _ = tiny_models.llava(chosen)
    left_dense = modality_map(without_weights(config)).left_dense
    blocks = {
        name.split("layers.")[1][0]
        for name, reason in left_dense.items()
        if reason == "output never read"
    }
    assert blocks == unread


# --- classes without known names


class Unknown(nn.Module):
    "A model whose names no table has; it can be asked for its parts."

    def __init__(self):
        super().__init__()
        self.sees = nn.Linear(4, 4)
        self.joins = nn.Linear(4, 4)
        self.says = nn.Linear(4, 4)

    def get_encoder(self, modality=None):
        return self.sees

    def get_decoder(self):
        return self.says


# --- language models


LANGUAGE_MODELS = {
    "Llama": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**tiny_models.LLAMA)
    ),
    "OPT": lambda: transformers.OPTForCausalLM(
        transformers.OPTConfig(**tiny_models.OPT)
    ),
    "GPT-2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=64)
    ),
    "Gemma3, text": lambda: transformers.Gemma3ForCausalLM(
        transformers.Gemma3TextConfig(
            **(tiny_models.TEXT | dict(head_dim=8, sliding_window=32))
        )
    ),
    "inside a vision-language model": lambda: small("InstructBLIP, OPT").language_model,
}


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_a_language_model_is_one_part(name):
    with torch.device("meta"):
        model = LANGUAGE_MODELS[name]()
    mmap = modality_map(model)
    assert not mmap.linears["vision"] and not mmap.linears["interface"]
    owners = [
        path or type(model).__name__
        for path, module in model.named_modules()
        if list(module.parameters(recurse=False))
    ]
    assert sorted([*mmap.layers, *mmap.left_dense]) == sorted(owners)
    assert {mmap.part_of(path) for path in owners} == {"language"}
    if name != "GPT-2":  # of which all layers are of the class Conv1D
        assert mmap.linears["language"]


def test_a_model_that_reads_no_text_and_no_image_is_refused():
    with torch.device("meta"):
        bert = transformers.BertForMaskedLM(transformers.BertConfig(hidden_size=48))
    with pytest.raises(ValueError, match="BertForMaskedLM has no vision part"):
        modality_map(bert)


# --- the hint to the table


def test_the_line_in_the_error_works(monkeypatch):
    class Fresh(nn.Module):
        def __init__(self):
            super().__init__()
            self.eyes = nn.Sequential(nn.Linear(4, 4))
            self.mouth = nn.Sequential(nn.Linear(4, 4))

    with pytest.raises(ValueError, match="Its modules are eyes, .*mouth") as caught:
        modality_map(Fresh())
    line = str(caught.value).partition("import ressa.parts; ")[2].partition("}")[0]
    line = line.replace("path.of.the.vision.module", "eyes") + "}"
    line = line.replace("path.of.the.language.module", "mouth")
    import ressa.parts

    try:
        exec(line, {"ressa": ressa})
        linears = modality_map(Fresh()).linears
    finally:
        del CLASSES["Fresh"]
    assert list(linears["vision"]) == ["eyes.0"]
    assert list(linears["language"]) == ["mouth.0"]


@pytest.mark.parametrize(
    "entry, message",
    [
        ({"sight": "vision", "says": "language"}, "'sight', and the model has no such"),
        ({"sees": "visoin", "says": "language"}, "'visoin' is none of vision"),
        ({"sees": "vision", "sees.0": "language"}, "no such module"),
    ],
)
def test_a_wrong_entry_of_the_table_is_named(monkeypatch, entry, message):
    monkeypatch.setitem(CLASSES, "Unknown", entry)
    with pytest.raises(ValueError, match=f"CLASSES.'Unknown'.*{message}"):
        modality_map(Unknown())


def test_an_unknown_class_is_asked():
    with pytest.warns(UserWarning, match="Unknown is new to ressa.*sees.*says"):
        linears = modality_map(Unknown()).linears
    assert {part: list(layers) for part, layers in linears.items()} == {
        "vision": ["sees"],
        "interface": ["joins"],
        "language": ["says"],
    }


def test_answers_that_overlap_are_refused(monkeypatch):
    monkeypatch.setattr(Unknown, "get_decoder", lambda self: self.sees)
    with pytest.raises(ValueError, match="no language part"):
        modality_map(Unknown())


def test_a_class_of_the_table_is_not_asked(monkeypatch, recwarn):
    monkeypatch.setitem(CLASSES, "Unknown", {"joins": "vision", "says": "language"})
    assert part_roots(Unknown()) == {"joins": "vision", "says": "language"}
    assert not recwarn


def test_an_interface_begins_only_inside_a_part():
    inside = nn.Module()
    inside.block = nn.Linear(2, 2)
    inside.merger = nn.Linear(2, 2)
    model = nn.Module()
    model.visual = inside
    model.connector = nn.Linear(2, 2)
    model.language_model = nn.Linear(2, 2)
    assert part_roots(model) == {
        "visual": "vision",
        "visual.merger": "interface",
        "language_model": "language",
    }
    mmap = modality_map(model)
    assert mmap.part_of("visual.block") == "vision"
    assert mmap.part_of("visual.merger") == "interface"
    assert mmap.part_of("connector.weight") == "interface"


# --- one setting per layer


def map_of(*names):
    "A map whose layers have these names; the first word of a name is its part."
    linears = {part: {} for part in PARTS}
    for name in names:
        linears[name.split(".")[0]][name] = nn.Linear(2, 3)
    return ModalityMap(linears, {}, {part: part for part in PARTS})


LAYERS = ("vision.0.fc1", "vision.0.fc2", "interface.0.fc1", "language.0.fc1")


def test_one_value_means_the_default_parts():
    assert per_layer(0.5, map_of(*LAYERS)) == dict.fromkeys(
        ["vision.0.fc1", "vision.0.fc2", "language.0.fc1"], 0.5
    )
    assert list(per_layer(8, map_of(*LAYERS), ("interface",))) == ["interface.0.fc1"]


KEYS = {"vision.0.fc1": 0.1, ".*fc1": 0.2, r".*\.0\.fc.": 0.3, "vision": 0.4}


@given(st.permutations(list(KEYS)))
@settings(max_examples=24, deadline=None)
def test_the_more_exact_key_wins_in_any_order(order):
    values = per_layer({key: KEYS[key] for key in order}, map_of(*LAYERS))
    later = max(".*fc1", r".*\.0\.fc.", key=order.index)
    assert values == {
        "vision.0.fc1": 0.1,  # by name
        "vision.0.fc2": 0.3,  # by the only expression that matches
        "interface.0.fc1": KEYS[later],
        "language.0.fc1": KEYS[later],
    }
    assert list(values) == list(LAYERS)


@pytest.mark.parametrize("key", ["visoin", "fc1", "[", ""])
def test_a_key_that_matches_no_layer_is_refused(key):
    with pytest.raises(ValueError, match="no layer matches"):
        per_layer({key: 0.5}, map_of(*LAYERS))


def test_the_error_offers_similar_names():
    with pytest.raises(ValueError, match="similar names: vision"):
        per_layer({"visoin": 0.5}, map_of(*LAYERS))
