"""Every class of the table walks the whole way; the map finds its parts where the class has them."""

import json
from pathlib import Path

import pytest
import tiny_models
import torch
import transformers
import walk_any
from torch import nn

from ressa import data, modality
from ressa.parts import modality_map


@pytest.mark.parametrize("step", walk_any.STEPS)
@pytest.mark.parametrize("name", tiny_models.TINY)
def test_walk(name, step):
    wrong = walk_any.walk(name)[0][step]
    assert wrong is None, wrong


def test_the_stored_table_is_of_these_models_and_steps():
    stored = json.loads(
        (Path(__file__).parent.parent / "nbs/results/any_vlm.json").read_text()
    )["models"]
    assert list(stored) == list(tiny_models.TINY)
    for name, about in stored.items():
        done, now = walk_any.walk(name)
        assert about == now | {
            "steps": {step: wrong is None for step, wrong in done.items()}
        }, name


TOWER = ("model.vision_tower", "model.language_model", ["model.multi_modal_projector"])
BLIP_2 = ("vision_model", "language_model", ["qformer", "language_projection"])
QWEN = ("model.visual", "model.language_model", ["model.visual.merger"])
IDEFICS = ("model.vision_model", "model.text_model", ["model.connector"])
BEGIN = {  # written down from the classes' own code: vision, language, and where the interface has linear layers
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
    "Qwen3-VL": (*QWEN[:2], [*QWEN[2], "model.visual.deepstack_merger_list"]),
    "Qwen3-VL-MoE": (*QWEN[:2], [*QWEN[2], "model.visual.deepstack_merger_list"]),
    "InternVL": TOWER,
    "Mistral3": TOWER,
    "Gemma3": (*TOWER[:2], []),
    "Mllama": (
        "model.vision_model",
        "model.language_model",
        ["model.multi_modal_projector"],
    ),
    "CLIP": ("vision_model", "text_model", ["visual_projection", "text_projection"]),
    "SigLIP": ("vision_model", "text_model", []),
}


def built(name):
    config, _ = tiny_models.TINY[name]()
    auto = (
        transformers.AutoModel
        if name in tiny_models.RETRIEVING
        else transformers.AutoModelForImageTextToText
    )
    with torch.device("meta"):
        return auto.from_config(config)


def below(name, roots):
    return any(f"{name}.".startswith(f"{root}.") for root in roots)


@pytest.mark.parametrize("name", tiny_models.TINY)
def test_parts_begin_where_the_class_has_them(name):
    linears = modality_map(built(name)).linears
    vision, language, interface = BEGIN[name]
    assert all(
        below(layer, [vision]) and not below(layer, interface)
        for layer in linears["vision"]
    )
    assert all(below(layer, [language]) for layer in linears["language"])
    assert all(below(layer, interface) for layer in linears["interface"])
    assert all(
        any(below(layer, [root]) for layer in linears["interface"])
        for root in interface
    )


@pytest.mark.parametrize(
    "name, why, what",
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
def test_what_stays_dense_and_why(name, why, what):
    assert modality_map(built(name)).left_dense[what] == why


@pytest.mark.parametrize(
    "chosen, unread", [(-1, set()), (-2, {"2"}), (1, {"1", "2"}), ([-3, -2], {"2"})]
)
def test_blocks_above_the_last_state_that_is_read(chosen, unread):
    config, _ = tiny_models.llava(chosen)
    with torch.device("meta"):
        model = transformers.AutoModelForImageTextToText.from_config(config)
    left = modality_map(model).left_dense
    assert {
        name.split("layers.")[1][0]
        for name, why in left.items()
        if why == "output never read"
    } == unread


def test_the_walk_notices_an_answer_that_is_seen(monkeypatch, tmp_path):
    monkeypatch.setattr(data, "ANSWER_KIND", {})
    walk = walk_any.Walk("PaliGemma", tmp_path)
    walk.wanda()
    walk.adapt()
    with pytest.raises(AssertionError, match="seen before"):
        walk.train()


def test_the_walk_notices_a_layer_that_nobody_reads(monkeypatch, tmp_path):
    monkeypatch.setattr(modality, "_unread", lambda *_: ())
    with pytest.raises(AssertionError, match="no output depends on it"):
        walk_any.Walk("LLaVA", tmp_path).map()


def test_the_walk_notices_a_filled_zero(tmp_path):
    walk = walk_any.Walk("LLaVA", tmp_path)
    walk.wanda()
    walk.adapt()
    layer = next(
        m for m in walk.student.modules() if isinstance(m, walk_any.SparseLoraLinear)
    )
    layer.base_layer.weight.data[layer.base_layer.weight == 0] = 1e-6
    with pytest.raises(AssertionError):
        walk.merge()


def test_text_alone_is_refused():
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(**tiny_models.LLAMA)
        )
    with pytest.raises(ValueError, match="LlamaForCausalLM has no vision part"):
        modality_map(model)


class Unheard(nn.Module):
    def __init__(self):
        super().__init__()
        self.sees, self.joins, self.says = (
            nn.Linear(4, 4),
            nn.Linear(4, 4),
            nn.Linear(4, 4),
        )

    def get_encoder(self, modality=None):
        return self.sees

    def get_decoder(self):
        return self.says


def test_a_class_nobody_heard_of_is_asked():
    with pytest.warns(UserWarning, match="Unheard is new to ressa.*sees.*says"):
        mmap = modality_map(Unheard())
    assert {part: list(layers) for part, layers in mmap.linears.items()} == {
        "vision": ["sees"],
        "interface": ["joins"],
        "language": ["says"],
    }


def test_answers_that_overlap_are_refused(monkeypatch):
    monkeypatch.setattr(Unheard, "get_decoder", lambda self: self.sees)
    with pytest.raises(ValueError, match="no language part"):
        modality_map(Unheard())
