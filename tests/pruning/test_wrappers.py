"""Wrapped, adapted, compiled and quantised models are refused before any weight changes."""

import copy

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils import prune as torch_prune

from ressa.data.collate import calibration_batch
from ressa.models.bundled import load_bundled
from ressa.parts import WRAPPERS, modality_map, require_bare, require_unwrapped
from ressa.pruning.engine import (
    HalfPrunedError,
    input_statistics,
    layer_targets,
    prune,
    prune_layers,
)
from ressa.pruning.scores import wanda


@pytest.fixture(scope="module")
def dense():
    "The bundled model and a batch; tests that change the model copy it."
    from ressa.data.easy_vqa import load_easy_vqa

    model, processor = load_bundled("cpu")
    return model, calibration_batch(load_easy_vqa("train"), processor, n=2)


def lora(model):
    return get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"]))


def added(model):
    "What `add_adapter` of transformers does; it asks for a newer PEFT than ours."
    return inject_adapter_in_model(LoraConfig(target_modules=["q_proj"]), model)


def compiled_part(model):
    model.language_model = torch.compile(model.language_model)
    return model


def compiled_in_place(model):
    model.compile()
    return model


WAYS = {
    "PeftModel": (lora, "PeftModel.*merge_and_unload"),
    "add_adapter": (added, "without adapters.*q_proj"),
    "LoraModel": (lambda model: lora(model).base_model, "merge_and_unload"),
    "DataParallel": (nn.DataParallel, "DataParallel.*model.module"),
    "compiled": (torch.compile, "OptimizedModule.*_orig_mod"),
    "compiled part": (compiled_part, "language_model is wrapped"),
    "compiled in place": (compiled_in_place, "compile it later"),
}


@pytest.mark.parametrize("way", WAYS)
def test_wrapped_models_are_refused(dense, way):
    model, batch = dense
    wrap, message = WAYS[way]
    wrapped = wrap(copy.deepcopy(model))
    before = [weight.clone() for weight in wrapped.parameters()]
    with pytest.raises(ValueError, match=message):
        prune(wrapped, batch, sparsity=0.5, progress=False)
    with pytest.raises(ValueError, match=message):
        prune_layers(wrapped, batch, {}, {}, progress=False)
    with pytest.raises(ValueError, match=message):
        input_statistics(wrapped, batch)
    for weight, old in zip(wrapped.parameters(), before):
        assert torch.equal(weight, old)


@pytest.mark.parametrize("name", WRAPPERS)
def test_every_wrapper_of_the_table_is_known_by_its_class(name):
    wrapper = type("Mine", (type(name, (nn.Module,), {}),), {})()
    with pytest.raises(ValueError, match="is wrapped"):
        require_unwrapped(nn.Sequential(wrapper))
    with pytest.raises(ValueError, match="is wrapped"):
        require_bare(wrapper, "pruning")


def test_the_map_lists_adapted_layers_by_their_own_names(dense):
    model = dense[0]
    before = modality_map(model)
    after = modality_map(lora(copy.deepcopy(model)).get_base_model())
    assert list(after.layers) == list(before.layers)
    assert all(type(layer) is nn.Linear for layer in after.layers.values())
    adapters = [name for name, why in after.left_dense.items() if why == "adapter"]
    assert adapters and all("lora_" in name for name in adapters)


# --- weights that cannot be replaced


class Linear4bit(nn.Linear):
    "What bitsandbytes makes: two weights in each byte."

    def __init__(self, old):
        super().__init__(old.in_features, old.out_features)
        packed = torch.zeros(old.weight.numel() // 2, 1, dtype=torch.uint8)
        self.weight = nn.Parameter(packed, requires_grad=False)


class Int8(nn.Linear):
    def __init__(self, old):
        super().__init__(old.in_features, old.out_features)
        weight = torch.zeros_like(old.weight, dtype=torch.int8)
        self.weight = nn.Parameter(weight, requires_grad=False)


class Float8(nn.Linear):
    def __init__(self, old):
        super().__init__(old.in_features, old.out_features)
        weight = old.weight.detach().to(torch.float8_e4m3fn)
        self.weight = nn.Parameter(weight, requires_grad=False)


def claiming(old):
    "A float of the right shape, as torchao's, whose copy_ would do something else."
    cls = type("AffineQuantizedTensor", (torch.Tensor,), {"__module__": "torchao.x"})
    layer = copy.deepcopy(old)
    data = old.weight.detach().as_subclass(cls)
    layer._parameters["weight"] = nn.Parameter(data, requires_grad=False)
    return layer


def pruned_by_torch(old):
    torch_prune.random_unstructured(old, "weight", amount=0.5)
    return old


UNFIT = {
    "4 bits": (Linear4bit, "holds .* of torch.uint8.*without quantization"),
    "8 bits": (Int8, "torch.int8"),
    "8-bit floats": (Float8, "float8"),
    "torchao": (claiming, "AffineQuantizedTensor"),
    "weight norm": (parametrizations.weight_norm, "computes its weight"),
    "torch's own pruning": (pruned_by_torch, "computes its weight"),
}


@pytest.mark.parametrize("kind", UNFIT)
def test_a_weight_that_cannot_be_replaced_is_refused_before_any_layer_is_pruned(
    dense, kind
):
    model, batch = copy.deepcopy(dense[0]), dense[1]
    make, message = UNFIT[kind]
    mlp = model.language_model.model.layers[-1].mlp  # the last that a pass would reach
    mlp.down_proj = make(mlp.down_proj)
    with pytest.raises(ValueError, match=f"layers.2.mlp.down_proj.*{message}"):
        prune_layers_of(model, batch)
    first = model.vision_model.encoder.layers[0].mlp.fc1.weight
    assert (first != 0).all()


def prune_layers_of(model, batch):
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    layers.pop("language_model.lm_head")
    targets = dict.fromkeys(layers, 0.5)
    return prune_layers(model, batch, layers, targets, progress=False)


# --- what fails half-way


@pytest.mark.parametrize("options", [{}, {"micro_batch": 1}])
def test_an_error_half_way_says_what_is_pruned(dense, options):
    model, batch = copy.deepcopy(dense[0]), dense[1]
    calls = []

    def third_fails(weight, stats, *, sparsity, pattern):
        calls.append(weight)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("no memory")
        return torch.zeros_like(weight)

    with pytest.raises(HalfPrunedError, match="after 2 of 33 layers.*no memory") as it:
        prune(model, batch, third_fails, sparsity=0.5, progress=False, **options)
    assert isinstance(it.value.__cause__, torch.OutOfMemoryError)
    zero = [
        n for n, layer in modality_map(model).layers.items() if not layer.weight.any()
    ]
    assert len(zero) == 2


def test_an_error_before_the_first_layer_is_raised_as_it_is(dense):
    model, batch = dense
    with pytest.raises(TypeError, match="blocksize"):
        prune(model, batch, sparsity=0.5, progress=False, blocksize=3)
    assert all(
        (layer.weight != 0).all() for layer in modality_map(model).layers.values()
    )


# --- parts and layers


def gpt2_captioner():
    "A ViT and a GPT-2, whose linear layers are stored as (in, out)."
    vit = transformers.ViTConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
    )
    gpt2 = transformers.GPT2Config(
        vocab_size=64,
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=32,
        add_cross_attention=True,
        is_decoder=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        vit, gpt2
    )
    config.decoder_start_token_id, config.pad_token_id = 1, 0
    return transformers.VisionEncoderDecoderModel(config).eval()


def caption_batch():
    return {
        "pixel_values": torch.randn(3, 3, 16, 16),
        "labels": torch.randint(3, 64, (3, 5)),
    }


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
@pytest.mark.parametrize("micro_batch", [None, 1])
def test_gpt2s_layers_are_pruned_by_output_row(method, micro_batch):
    model = gpt2_captioner()
    batch = caption_batch()
    layers = modality_map(model).linears["language"]
    assert len(layers) == 2 * 7  # c_attn, c_proj, c_fc, c_proj; q_attn and two of cross
    report = prune(
        model, batch, method, pattern="2:4", progress=False, micro_batch=micro_batch
    )
    assert not report.left_dense
    for name, layer in layers.items():
        groups = layer.weight.t().reshape(layer.nf, -1, 4)
        assert ((groups != 0).sum(-1) == 2).all(), name
    shapes = {line.name: line.shape for line in report.layers}
    assert shapes["decoder.transformer.h.0.mlp.c_fc"] == (64, 16)


def test_gpt2s_layers_are_pruned_as_the_same_linear_layers():
    model = gpt2_captioner()
    layer = model.decoder.transformer.h[0].attn.c_attn
    dense, batch = layer.weight.detach().t().clone(), caption_batch()
    name = "decoder.transformer.h.0.attn.c_attn"
    stats = input_statistics(model, batch)[name]
    prune(model, batch, sparsity={name: 0.5}, progress=False)
    assert torch.equal(layer.weight.t(), wanda(dense, stats, sparsity=0.5))


@pytest.mark.parametrize("part", ["vision", "interface", "language"])
def test_a_wanted_part_without_layers_is_an_error(dense, part):
    parts = modality_map(dense[0])
    parts.linears[part].clear()
    message = f"the {part} part has no linear layer"
    with pytest.raises(ValueError, match=message):
        layer_targets(parts, {part: 0.5})
    others = {"vision": 0.5, "interface": 0.5, "language": 0.5, part: 0}
    assert layer_targets(parts, others)
    if part != "interface":  # one value means vision and language
        with pytest.raises(ValueError, match=message):
            layer_targets(parts, 0.5)
