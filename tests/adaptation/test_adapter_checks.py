"""Every option of PEFT's config is obeyed or refused."""

import copy
import dataclasses

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import config as peft_configs
from torch import nn

from ressa.adaptation.adapter_checks import OBEYED_OPTIONS
from ressa.adaptation.adapters import zero_masks, zeros_filled
from ressa.adaptation.sparse_lora import (
    SparseLoraConfig,
    SparseLoraLinear,
    sparse_lora_linear,
)
from ressa.pruning.scores import magnitude

# A value that is not the default, for each option that is refused.
REFUSED = {
    "fan_in_fan_out": True,
    "use_rslora": True,
    "megatron_config": {"transformer_impl": "local"},
    "megatron_core": "other.core",
    "trainable_token_indices": [0, 1],
    "loftq_config": {"loftq_bits": 4},
    "eva_config": peft_configs.EvaConfig(),
    "corda_config": peft_configs.CordaConfig(),
    "lora_ga_config": peft_configs.LoraGAConfig(),
    "use_dora": True,
    "velora_config": peft_configs.VeloraConfig(),
    "alora_invocation_tokens": [1],
    "use_qalora": True,
    "qalora_group_size": 8,
    "monteclora_config": peft_configs.MontecloraConfig(),
    "layer_replication": [(0, 1), (0, 1)],
    "runtime_config": peft_configs.LoraRuntimeConfig(ephemeral_gpu_offload=True),
    "lora_bias": True,
    "target_parameters": ["q_proj.weight"],
    "use_bdlora": peft_configs.BdLoraConfig(),
    "arrow_config": peft_configs.ArrowConfig(),
    "kasa_config": peft_configs.KasaConfig(),
    "ensure_weight_tying": True,
}


def test_every_option_of_peft_is_obeyed_or_refused():
    options = {option.name for option in dataclasses.fields(LoraConfig)}
    assert options == OBEYED_OPTIONS | set(REFUSED)
    assert not OBEYED_OPTIONS & set(REFUSED)


@pytest.mark.parametrize("name", REFUSED)
def test_an_option_that_is_not_obeyed_is_refused_by_name(name):
    with pytest.raises(ValueError, match=name):
        SparseLoraConfig(**{name: REFUSED[name]})
    config = SparseLoraConfig(r=1, target_modules=["0"])
    setattr(config, name, REFUSED[name])  # after the check
    model = nn.Sequential(nn.Linear(4, 4))
    before = model[0].weight.clone()
    with pytest.raises(ValueError, match=name):
        get_peft_model(model, config)
    assert type(model[0]) is nn.Linear
    assert torch.equal(model[0].weight, before)


def test_an_option_of_a_later_peft_is_refused(monkeypatch):
    later = dataclasses.make_dataclass(
        "Later", [("new_trick", int, 0)], bases=(LoraConfig,)
    )
    monkeypatch.setattr("ressa.adaptation.adapter_checks.LoraConfig", later)
    config = SparseLoraConfig.__new__(SparseLoraConfig)
    config.__dict__.update(later(new_trick=1).__dict__)
    with pytest.raises(ValueError, match="new_trick"):
        config.__post_init__()


@pytest.mark.parametrize(
    "start",
    "eva olora pissa pissa_niter_4 corda loftq orthogonal mica lora_ga other".split(),
)
def test_initialisations_that_change_the_base_are_refused(start):
    with pytest.raises(ValueError, match="init_lora_weights"):
        SparseLoraConfig(init_lora_weights=start)


@pytest.mark.parametrize(
    "options",
    [
        dict(r=0),
        dict(r=2.5),
        dict(r=True),
        dict(r={}),
        dict(r={"vision": -1}),
        dict(lora_alpha=0),
        dict(lora_alpha=float("nan")),
        dict(lora_alpha={"vision": float("inf")}),
        dict(lora_dropout=1.0),
        dict(lora_dropout=-0.1),
        dict(rank_pattern={"q_proj": 0}),
        dict(alpha_pattern={"q_proj": -1}),
        dict(bias="some"),
        dict(target_modules=[]),
    ],
)
def test_values_out_of_range_are_refused_by_name(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        SparseLoraConfig(**options)


def adapted(model, **options):
    "The adapted layers of a copy of the model: name → layer."
    student = get_peft_model(copy.deepcopy(model), SparseLoraConfig(**options))
    modules = student.base_model.model.named_modules()
    return {name: m for name, m in modules if isinstance(m, SparseLoraLinear)}


def test_chosen_layers_are_those_of_peft_whether_ranks_are_by_part_or_not(case):
    q_proj = adapted(case.pruned, target_modules=["q_proj"])
    assert q_proj
    assert all(name.endswith("q_proj") for name in q_proj)
    language = {n: m for n, m in q_proj.items() if n.startswith("language_model")}
    assert {m.r["default"] for m in language.values()} == {8}
    only = adapted(case.pruned, target_modules=["q_proj"], r={"language": 3})
    assert set(only) == set(language)
    everything = set(adapted(case.pruned))
    assert everything == set(adapted(case.pruned, target_modules="all-linear"))
    some = dict(target_modules=r"language_model.*\.(q|k)_proj")
    assert set(adapted(case.pruned, **some)) == set(adapted(case.pruned, r=4, **some))
    without = adapted(case.pruned, exclude_modules=["q_proj"])
    assert set(without) == everything - set(q_proj)
    for options, block in (
        (dict(layers_to_transform=[0]), ".0."),
        (dict(layers_to_transform=0, layers_pattern="layers"), "layers.0."),
    ):
        first = {name for name in everything if block in name}
        assert set(adapted(case.pruned, **options)) == first
        options |= dict(target_modules=["q_proj"])
        assert set(adapted(case.pruned, **options)) == first & set(q_proj)


def test_patterns_go_before_ranks_by_part(case):
    options = dict(rank_pattern={"q_proj": 5}, alpha_pattern={"q_proj": 3})
    for r in ({"vision": 2, "language": 2}, 2):
        for name, layer in adapted(case.pruned, r=r, **options).items():
            is_query = name.endswith("q_proj")
            assert layer.r["default"] == (5 if is_query else 2)
            assert layer.lora_alpha["default"] == (3 if is_query else 16)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(rank_pattern={"q_porj": 5}), "rank_pattern: 'q_porj'"),
        (dict(r=2, rank_pattern={"q_porj": 5}), "rank_pattern: 'q_porj'"),
        (
            dict(r=2, target_modules=["q_proj"], alpha_pattern={"k_proj": 5}),
            "alpha_pattern: 'k_proj'",
        ),
        (dict(target_modules=["q_proj", "q_porj"]), "no layer 'q_porj'"),
        (dict(target_modules=["lm_head", "q_proj"]), "lm_head stays dense"),
        (dict(layers_to_transform=[77]), "choose no layer"),
        (dict(exclude_modules=".*"), "choose no layer"),
    ],
)
def test_a_choice_that_fits_no_layer_is_refused(case, options, message):
    with pytest.raises(ValueError, match=message):
        get_peft_model(case.pruned, SparseLoraConfig(**options))
    assert not any(isinstance(m, SparseLoraLinear) for m in case.pruned.modules())


def test_a_pruned_module_is_not_trained_whole(case):
    name = next(iter(zero_masks(case.pruned)))
    for path in (name, name.rpartition(".")[0]):
        config = SparseLoraConfig(modules_to_save=[path])
        with pytest.raises(ValueError, match=f"modules_to_save: .*{path}"):
            get_peft_model(case.pruned, config)
    dense = next(
        path
        for path, module in case.pruned.named_modules()
        if "norm" in type(module).__name__.lower()
    )
    masks = zero_masks(case.pruned)
    student = get_peft_model(case.pruned, SparseLoraConfig(modules_to_save=[dense]))
    trained = [n for n, p in student.named_parameters() if p.requires_grad]
    assert any("modules_to_save" in n for n in trained)
    assert zeros_filled(masks, student.merge_and_unload()) == 0


@pytest.mark.parametrize("start", [True, False, "gaussian"])
def test_initialisations_that_are_obeyed_keep_every_zero(case, start):
    masks = zero_masks(case.pruned)
    config = SparseLoraConfig(init_lora_weights=start)
    merged = get_peft_model(case.pruned, config).merge_and_unload()
    assert zeros_filled(masks, merged) == 0


def test_bias_and_inference_mode_are_obeyed(case):
    for bias in ("all", "lora_only"):
        student = get_peft_model(
            copy.deepcopy(case.pruned), SparseLoraConfig(bias=bias)
        )
        trained = [n for n, p in student.named_parameters() if p.requires_grad]
        assert any(n.endswith("base_layer.bias") for n in trained)
    frozen = get_peft_model(case.pruned, SparseLoraConfig(inference_mode=True))
    assert not any(p.requires_grad for p in frozen.parameters())


def test_a_second_adapter_by_part_is_refused_clearly(case):
    student = get_peft_model(case.pruned, SparseLoraConfig())
    with pytest.raises(ValueError, match="has an adapter already"):
        student.add_adapter("other", SparseLoraConfig())


# In place ------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(12,), (5, 12), (2, 5, 12), (2, 3, 5, 12)])
@pytest.mark.parametrize("bias", [True, False])
def test_the_output_can_be_changed_in_place(shape, bias):
    weight = magnitude(torch.randn(8, 12), sparsity=0.5)
    b = torch.randn(8) if bias else None
    A = torch.randn(2, 12, requires_grad=True)
    B = torch.randn(8, 2, requires_grad=True)
    x = torch.randn(shape, requires_grad=True)

    def loss(in_place):
        y = sparse_lora_linear(x, weight, b, A, B)
        if in_place:
            y += 1
            y.mul_(2)
            return y.square().sum()
        return ((y + 1) * 2).square().sum()

    assert not sparse_lora_linear(x, weight, b, A, B)._is_view()
    for got, want in zip(
        torch.autograd.grad(loss(True), (x, A, B)),
        torch.autograd.grad(loss(False), (x, A, B)),
        strict=True,
    ):
        assert torch.equal(got, want)
