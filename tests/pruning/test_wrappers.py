"""Wrapped, adapted, compiled and quantised models are refused before any weight changes."""

import copy

import pytest
import torch
from odd_models import odd
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils import prune as torch_prune

from ressa import devices
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


def third_fails(error):
    "A method that prunes two layers to nothing, and then fails."
    calls = []

    def method(weight, stats, *, sparsity, pattern):
        calls.append(weight)
        if len(calls) == 3:
            raise error
        return torch.zeros_like(weight)

    return method


@pytest.mark.parametrize("options", [{}, {"micro_batch": 1}])
@pytest.mark.parametrize("error", [torch.OutOfMemoryError("full"), KeyboardInterrupt()])
def test_an_error_half_way_changes_nothing(dense, options, error):
    model, batch = copy.deepcopy(dense[0]), dense[1]
    with pytest.raises(type(error)):
        prune(model, batch, third_fails(error), sparsity=0.5, progress=False, **options)
    for weight, old in zip(model.parameters(), dense[0].parameters()):
        assert torch.equal(weight, old)


def test_without_copies_an_error_half_way_says_what_is_pruned(dense, monkeypatch):
    "Copies of the weights are kept where they are small beside the free memory."
    model, batch = copy.deepcopy(dense[0]), dense[1]
    monkeypatch.setattr(devices, "KEPT_SHARE", 0.0)
    method = third_fails(torch.OutOfMemoryError("no memory"))
    with pytest.raises(HalfPrunedError, match="after 2 of 33 layers.*no memory") as it:
        prune(model, batch, method, sparsity=0.5, progress=False)
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


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
@pytest.mark.parametrize("micro_batch", [None, 1])
def test_gpt2s_layers_are_pruned_by_output_row(method, micro_batch):
    model, batch = odd("ViT and GPT-2")
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
    model, batch = odd("ViT and GPT-2")
    layer = model.decoder.transformer.h[0].attn.c_attn
    dense = layer.weight.detach().t().clone()
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


# --- odd models and batches


class InnerCall(nn.Module):
    "Calls its layer with the input by name."

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(input=x)


class Around(nn.Module):
    "A module of a user's own around a model."

    def __init__(self, model):
        super().__init__()
        self.inner = model


def quantised_mlp(model, batch):
    block = model.model.language_model.layers[0]
    block.mlp = torch.ao.quantization.quantize_dynamic(block.mlp, {nn.Linear})
    return model, batch


def around(model, batch):
    return Around(model), batch


def without_rows(model, batch):
    return model, {name: value[:0] for name, value in batch.items()}


def expanded(model, batch):
    weight = model.model.language_model.layers[0].mlp.up_proj.weight
    weight.data = weight.data[:1].expand(weight.shape)
    return model, batch


ODD = {
    "quantised, and no nn.Linear": (quantised_mlp, "mlp.gate_proj is quantised"),
    "a module around it": (around, "model of transformers.*prune_layers"),
    "no rows": (without_rows, "no examples"),
    "an expanded weight": (expanded, "up_proj.*expanded tensor"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("micro_batch", [None, 1])
def test_an_odd_model_or_batch_is_refused_by_name(kind, micro_batch):
    make, message = ODD[kind]
    model, batch = make(*odd("DeepseekVL"))
    before = [weight.clone() for weight in model.parameters()]
    with pytest.raises(ValueError, match=message):
        prune(model, batch, sparsity=0.5, progress=False, micro_batch=micro_batch)
    assert all(map(torch.equal, model.parameters(), before))


@pytest.mark.parametrize("micro_batch", [None, 1])
def test_a_layer_that_is_called_by_name_is_pruned(micro_batch):
    model, batch = odd("DeepseekVL")
    mlp = model.model.language_model.layers[0].mlp
    layer = mlp.up_proj
    mlp.up_proj = InnerCall(layer)
    prune(model, batch, sparsity=0.5, progress=False, micro_batch=micro_batch)
    assert (layer.weight == 0).float().mean() == 0.5


def test_two_layers_that_share_memory_stay_dense():
    "Else the second would be pruned on what the first has left."
    model, batch = odd("DeepseekVL")
    first, second = (block.mlp for block in model.model.language_model.layers)
    second.up_proj.weight.data = first.up_proj.weight.data
    left_dense = modality_map(model).left_dense
    for i in (0, 1):
        name = f"model.language_model.layers.{i}.mlp.up_proj"
        assert left_dense[name] == "tied weight"
    prune(model, batch, "sparsegpt", sparsity=0.5, progress=False)
    assert first.up_proj.weight.all()


@pytest.mark.parametrize("micro_batch", [None, 1])
def test_a_block_that_is_called_twice_is_pruned_once(micro_batch):
    model, batch = odd("DeepseekVL")
    blocks = model.model.language_model.layers
    blocks[1] = blocks[0]
    report = prune(model, batch, sparsity=0.5, progress=False, micro_batch=micro_batch)
    assert len(report.layers) == 12 + 7
    for line in report.layers:
        assert line.sparsity == 0.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_any_format_of_numbers_has_its_share_of_zeros(dtype, method):
    model, batch = odd("DeepseekVL")
    batch["pixel_values"] = batch["pixel_values"].to(dtype)
    report = prune(model.to(dtype), batch, method, sparsity=0.5, progress=False)
    for part in report.parts().values():  # SparseGPT has one threshold for several rows
        assert abs(part["sparsity"] - 0.5) < 2e-3
    assert all(weight.dtype == dtype for weight in model.parameters())


@pytest.mark.parametrize("layer", [nn.Conv2d(3, 4, 2), nn.Embedding(4, 4)])
def test_what_is_no_linear_layer_is_refused(dense, layer):
    with pytest.raises(ValueError, match="mine .* is no linear layer"):
        prune_layers(*dense, {"mine": layer}, {"mine": 0.5}, progress=False)
    with pytest.raises(ValueError, match="targets: 'other' must be one"):
        prune_layers(*dense, {"mine": layer}, {"other": 0.5}, progress=False)
