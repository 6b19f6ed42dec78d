"""Everything that works on a model's tensors, on one pretended card and on two.

On two cards the layers of one block lie apart, so that nothing can rely on its neighbours' device.
"""

import copy
import functools

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from pretended_device import (
    PretendedCards,
    PretendedTensor,
    card,
    move,
    spread,
    values_of,
)
from tiny_models import examples, tiny
from torch import nn

from ressa.adaptation import fast_mask
from ressa.adaptation.adapters import remask, zero_masks, zeros_filled
from ressa.adaptation.distillation import distillation_loss
from ressa.adaptation.loss_terms import Targets, answer_logits, top_targets
from ressa.adaptation.masked_update import sparse_lora_linear
from ressa.adaptation.repair import repair
from ressa.adaptation.sparse_lora import SparseLoraConfig
from ressa.adaptation.teachers import ModelTeacher, SelfTeacher, cache_targets
from ressa.allocation.rules import ecoflap, owl
from ressa.allocation.search import search
from ressa.checkpoints.packing import pack_tensor
from ressa.checkpoints.sparse import load_sparse, save_sparse
from ressa.data.collate import calibration_batch
from ressa.devices import input_device, to_device
from ressa.evaluation.answers import evaluate, exact_match
from ressa.parts import modality_map
from ressa.pruning.dsnot import dsnot, dsnot_as_published
from ressa.pruning.engine import input_statistics, prune
from ressa.pruning.methods import METHODS, Method
from ressa.pruning.scores import wanda
from ressa.pruning.sparsegpt import sparsegpt
from ressa.pruning.statistics import Statistics

NAME = "InstructBLIP, Llama"
# Layers of one block on both cards, some that share an input among them, and a whole block.
ON_THE_SECOND = [
    "vision_model.encoder.layers.0.mlp.fc2",
    "vision_model.encoder.layers.1.self_attn.qkv",
    "qformer.encoder.layer.0.attention.attention.key",
    "language_model.model.layers.0.self_attn.k_proj",
    "language_model.model.layers.0.mlp.up_proj",
    "language_model.model.layers.1",
]
WAYS = {
    "whole": {},
    "micro-batch": {"micro_batch": 3},
    "block": {"micro_batch": 3, "recompute": "block"},
    "dense statistics": {"dense_statistics": True},
}


def few_swaps(name):
    "A method of `METHODS`; where it swaps weights, the third swap is the last."
    method = METHODS.get(name, name)
    if isinstance(method, Method) and method.function in (dsnot, dsnot_as_published):
        swaps = functools.partial(method.function, max_cycles=3)
        method = method._replace(function=swaps)
    return method


class Case:
    "A tiny model on the CPU, and what is asked of it."

    def __init__(self, folder):
        self.model, self.processor = tiny(NAME, folder)
        # other kernels of attention are rounded in another way on a card
        self.model.set_attn_implementation("eager")
        rows = examples(NAME, self.processor) * 2
        rows = [row | {"question_type": "color"} for row in rows]
        self.rows = Dataset.from_list(rows)
        self.batch = calibration_batch(self.rows, self.processor, n=4)
        self.pruned_in = functools.cache(self._pruned_in)

    def fresh(self):
        return copy.deepcopy(self.model)

    def _pruned_in(self, method, way):
        "The model that was pruned on the CPU; not to be changed."
        model = self.fresh()
        prune(
            model,
            self.batch,
            few_swaps(method),
            sparsity=0.5,
            progress=False,
            **WAYS[way],
        )
        return model

    def pruned(self):
        return copy.deepcopy(self.pruned_in("wanda", "whole"))


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return Case(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def cards(monkeypatch):
    # torch.compile cannot see through pretended tensors
    monkeypatch.setattr(fast_mask, "_compiled_devices", set())
    with PretendedCards() as opened:
        yield opened


def on_one(model):
    return move(model, 0)


def on_two(model):
    return spread(model, ON_THE_SECOND)


both_placements = pytest.mark.parametrize("put", [on_one, on_two])


def assert_same_model(found, wanted):
    wanted = wanted.state_dict()
    for name, tensor in values_of(found).items():
        assert torch.equal(tensor, wanted[name]), name


# The pretended cards themselves


def test_pretended_tensors_say_where_they_lie(cards):
    x = torch.randn(3, 4)
    y = x.to("cuda:1")
    assert isinstance(y, PretendedTensor)
    assert y.device == card(1) and y.is_cuda and not y.is_cpu and not y.is_meta
    for made in (y + 1, y.T, y[0], torch.zeros_like(y), y.new_zeros(2), y.to(y)):
        assert made.device == card(1)
    assert torch.zeros(2, device="cuda").device == card(0)
    assert torch.tensor([1.0], device=y.device).device == card(1)
    assert torch.equal(y.cpu(), x)


def test_mixed_devices_raise_what_cuda_raises(cards):
    x = torch.randn(3, 4)
    here, there = x.to("cuda:0"), x.to("cuda:1")
    chosen = torch.tensor([0, 2])
    mixed = [
        lambda: here + there,
        lambda: here + x,
        lambda: here @ there.T,
        lambda: torch.cat([here, x]),
        lambda: here + there.sum(),
        lambda: here.add_(there),
        lambda: here[chosen.to("cuda:1")],
        lambda: x[chosen.to("cuda:1")],
        lambda: torch.where(here > 0, there, 0),
    ]
    for operation in mixed:
        with pytest.raises(RuntimeError, match="same device"):
            operation()
    here + torch.tensor(2.0)  # a number
    here[chosen]  # indices may lie on the CPU
    here.copy_(there)


@pytest.mark.parametrize(
    "operation, waits",
    [
        (lambda x: x.sum().item(), 1),
        (lambda x: bool(x.any()), 1),
        (lambda x: x.nonzero(), 1),
        (lambda x: x[x > 0], 1),
        (lambda x: x.cpu(), 1),
        (lambda x: x.tolist(), 1),
        (lambda x: torch.equal(x, x), 1),
        (lambda x: x.masked_fill(x > 0, 0), 0),
        (lambda x: torch.where(x > 0, x, 0) @ x.T, 0),
        (lambda x: x[torch.tensor([0])], 0),
        (lambda x: x.to("cuda:1"), 0),
    ],
)
def test_waiting_for_a_card_is_counted(cards, operation, waits):
    x = torch.randn(3, 4).to("cuda:0")
    operation(x)
    assert cards.waits == waits, cards.synchronisations


def test_gradients_and_replaced_data_are_real(cards):
    x, weight = torch.randn(5, 4), torch.randn(3, 4)
    layer = nn.Linear(4, 3, bias=False)
    layer.weight.data = weight.clone()
    move(layer, 1)
    layer(x.to("cuda:1")).square().sum().backward()
    assert layer.weight.grad.device == card(1)
    torch.testing.assert_close(layer.weight.grad.cpu(), 2 * (x @ weight.T).T @ x)
    layer.weight.data = layer.weight.data * 0
    assert not layer(x.to("cuda:1")).any()


# Pruning


def assert_pruned_as_on_the_cpu(case, put, method, way):
    model = put(case.fresh())
    options = dict(sparsity=0.5, progress=False)
    prune(model, case.batch, few_swaps(method), **options, **WAYS[way])
    assert_same_model(model, case.pruned_in(method, way))


# A method sees one layer, and on two cards layers of both; of the passes it sees nothing.
@pytest.mark.slow
@pytest.mark.parametrize("method", [*METHODS, "ria+dsnot"])
def test_every_method_prunes_on_cards_as_on_the_cpu(case, cards, method):
    assert_pruned_as_on_the_cpu(case, on_two, method, "whole")


# One method for each kind of statistics: norms, XᵀX, means, variances inside examples.
@pytest.mark.slow
@pytest.mark.parametrize("way", [way for way in WAYS if way != "whole"])
@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "dsnot", "dsnot-published"])
def test_every_way_measures_on_cards_as_on_the_cpu(case, cards, method, way):
    assert_pruned_as_on_the_cpu(case, on_two, method, way)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_every_way_on_one_card(case, cards, way):
    "Where no hook of accelerate moves anything."
    assert_pruned_as_on_the_cpu(case, on_one, "sparsegpt", way)


def test_patterns_on_cards(case, cards):
    wanted, model = case.fresh(), on_two(case.fresh())
    for each in (wanted, model):
        prune(each, case.batch, "sparsegpt", pattern="2:4", progress=False)
    assert_same_model(model, wanted)


@both_placements
def test_statistics_lie_where_the_inputs_do(case, cards, put):
    wanted = input_statistics(case.model, case.batch, "dsnot")
    found = input_statistics(put(case.fresh()), case.batch, "dsnot")
    assert found.keys() == wanted.keys()
    for name, stats in found.items():
        assert stats.square_sum.is_cuda
        assert torch.equal(stats.square_sum.cpu(), wanted[name].square_sum)
        assert torch.equal(stats.spread.cpu(), wanted[name].spread)


@pytest.mark.slow
@both_placements
@pytest.mark.parametrize(
    "rule, options",
    [(owl, {}), (ecoflap, {"pieces": 2}), (search, {"by": "part", "steps": 4})],
)
def test_allocation_rules_on_cards(case, cards, put, rule, options):
    model = put(case.fresh())
    wanted = rule(case.fresh(), case.batch, 0.5, **options)
    assert rule(model, case.batch, 0.5, **options) == pytest.approx(wanted, abs=0.02)
    assert_same_model(model, case.model)  # weights come back to the bit


# SparseLoRA


def gradients(model):
    return {
        name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None
    }


@both_placements
def test_sparse_lora_is_trained_and_merged_on_cards(case, cards, put):
    pruned = case.pruned()
    found = []
    for model in (copy.deepcopy(pruned), put(copy.deepcopy(pruned))):
        torch.manual_seed(0)
        student = get_peft_model(model, SparseLoraConfig(init_lora_weights=False))
        batch = to_device(case.batch, input_device(model))
        loss = student(**batch).loss
        loss.backward()
        grads = gradients(student)
        masks = zero_masks(model)
        merged = student.merge_and_unload()
        found.append((loss.detach().cpu(), grads, merged, masks))
    (loss, grads, merged, masks), (card_loss, card_grads, card_merged, card_masks) = (
        found
    )
    torch.testing.assert_close(card_loss, loss)
    assert grads and grads.keys() == card_grads.keys()
    for name, gradient in grads.items():
        torch.testing.assert_close(card_grads[name], gradient, rtol=1e-3, atol=1e-6)
    wanted = merged.state_dict()
    for name, tensor in values_of(card_merged).items():
        torch.testing.assert_close(tensor, wanted[name])
    assert masks.keys() == card_masks.keys()
    assert zeros_filled(card_masks, card_merged) == 0


def test_a_layer_on_another_card_than_its_input(case, cards):
    model = spread(case.pruned(), ON_THE_SECOND)
    student = get_peft_model(model, SparseLoraConfig())
    name = ON_THE_SECOND[0]
    adapted = student.get_base_model().get_submodule(name)
    x = torch.randn(2, adapted.in_features, device="cuda:0")
    assert adapted.base_layer.weight.device == card(1)
    assert adapted(x).device == card(0)


# The loss and its teachers


def loss_inputs(device="cpu"):
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(2, 5, 11, generator=generator)
    teacher = torch.randn(2, 5, 11, generator=generator)
    labels = torch.tensor([[-100, -100, 3, 4, 5], [-100, -100, -100, 7, 8]])
    return student.to(device).requires_grad_(), teacher.to(device), labels.to(device)


def said(kind, teacher, labels):
    "What a teacher of some kind says."
    if kind == "nothing":
        return None
    if kind == "logits":
        return teacher
    logits, _ = answer_logits(teacher, labels)
    return Targets(logits) if kind == "answers" else top_targets(logits, 4)


@pytest.mark.parametrize(
    "kind, positions",
    [
        ("nothing", "answer"),
        ("logits", "answer"),
        ("logits", "all"),
        ("answers", "answer"),
        ("listed", "answer"),
    ],
)
def test_the_loss_on_a_card(cards, kind, positions):
    found = []
    for device in ("cpu", "cuda:1"):
        student, teacher, labels = loss_inputs(device)
        targets = said(kind, teacher, labels)
        loss = distillation_loss(student, targets, labels, positions=positions)
        loss.backward()
        found.append((loss.detach().cpu(), student.grad.cpu()))
    torch.testing.assert_close(*found)


@both_placements
def test_teachers_answer_where_the_student_is(case, cards, put, tmp_path):
    dense = put(case.fresh())
    pruned = put(case.pruned().requires_grad_(False))
    with torch.no_grad():
        wanted = case.model(**case.batch).logits
    batch = to_device(case.batch, card(0))
    for teacher in (ModelTeacher(move(case.fresh(), 1)), SelfTeacher(dense, pruned)):
        logits = teacher(pruned, batch)
        assert logits.device == card(0)
        torch.testing.assert_close(logits.cpu(), wanted)
    file = tmp_path / "targets.arrow"
    cached = cache_targets(dense, case.rows, case.processor, file)
    assert cache_targets(case.model, case.rows, case.processor, file)  # the same key
    assert "teacher_words" in cached[0]


def test_a_self_teacher_copies_its_values_once(case, cards):
    "Made on the CPU, before the trainer moves the student to the card."
    pruned = case.pruned().requires_grad_(False)
    teacher = SelfTeacher(case.model, pruned)
    weights = dict(pruned.named_parameters())
    move(pruned, 0)
    moved = dict(pruned.named_parameters())
    # a real card keeps the parameters and exchanges what is in them
    teacher.weights = list(moved.values())
    teacher.removed = {
        moved[name]: teacher.removed[weight]
        for name, weight in weights.items()
        if weight in teacher.removed
    }
    batch = to_device(case.batch, card(0))
    cards.reset()
    teacher(pruned, batch)
    assert cards.uploads >= len(teacher.removed)
    cards.reset()
    pruned(**batch)
    plain_uploads, plain_waits = cards.uploads, cards.waits
    cards.reset()
    teacher(pruned, batch)
    assert cards.uploads == plain_uploads
    assert cards.waits <= plain_waits + 1  # all layers are checked at once


@pytest.mark.slow
def test_a_repair_over_two_cards(case, cards):
    pruned = on_two(case.pruned())
    report = repair(
        pruned,
        case.rows,
        case.processor,
        teacher=on_two(case.fresh()),
        steps=2,
        batch_size=4,
        disable_tqdm=True,
    )
    assert report.zeros_filled == 0
    devices = {weight.device for weight in report.model.parameters()}
    assert devices == {card(0), card(1)}


# Masks, storage, answers


@both_placements
def test_masks_on_cards(case, cards, put):
    pruned = case.pruned()
    model = put(copy.deepcopy(pruned))
    masks, wanted = zero_masks(model), zero_masks(pruned)
    assert masks.keys() == wanted.keys()
    for name, mask in masks.items():
        assert torch.equal(mask.cpu(), wanted[name])
    with torch.no_grad():
        for name in masks:
            model.get_parameter(f"{name}.weight").add_(1)
    for some_masks in (masks, wanted):  # of a card, and of the CPU
        assert zeros_filled(some_masks, model) == sum(
            int((~mask).sum()) for mask in wanted.values()
        )
    remask(model, wanted)
    assert zeros_filled(masks, model) == 0


@both_placements
def test_storage_from_cards_is_the_same_to_the_byte(case, cards, put, tmp_path):
    pruned = case.pruned()
    save_sparse(pruned, None, tmp_path / "cpu")
    save_sparse(put(copy.deepcopy(pruned)), None, tmp_path / "cards")
    for path in (tmp_path / "cpu").iterdir():
        assert (tmp_path / "cards" / path.name).read_bytes() == path.read_bytes()
    loaded, _ = load_sparse(tmp_path / "cards")
    assert_same_model(loaded, pruned)
    weight = pruned.language_model.model.layers[0].mlp.up_proj.weight
    assert pack_tensor(weight.to("cuda:0")).how == pack_tensor(weight).how


@both_placements
def test_answers_from_cards(case, cards, put):
    model = put(case.fresh())
    rows = case.rows.select(range(3))  # with one picture, two, and none
    options = dict(max_new_tokens=4, progress=False)
    wanted = evaluate(case.model, rows, case.processor, **options)
    found = evaluate(model, rows, case.processor, **options)
    assert found.answers == wanted.answers
    assert torch.equal(
        torch.as_tensor(exact_match(model, [case.batch])),
        torch.as_tensor(exact_match(case.model, [case.batch])),
    )


# How often the CPU waits for a card. More is allowed only for a reason.


def test_a_step_of_sparse_lora_never_waits(cards):
    weight = torch.randn(6, 8)
    weight[weight.abs() < 0.5] = 0
    tensors = [torch.randn(3, 8), torch.randn(2, 8), torch.randn(6, 2)]
    x, A, B = (tensor.to("cuda:0").requires_grad_() for tensor in tensors)
    weight = weight.to("cuda:0")
    cards.reset()
    sparse_lora_linear(x, weight, None, A, B, 2.0).sum().backward()
    assert cards.waits == 0, cards.synchronisations


@pytest.mark.parametrize("positions", ["answer", "all"])
def test_the_loss_waits_for_places_and_one_check(cards, positions):
    student, teacher, labels = loss_inputs("cuda:0")
    cards.reset()
    distillation_loss(student, teacher, labels, positions=positions).backward()
    assert cards.waits <= 2, cards.synchronisations


def test_a_training_step_waits_no_oftener_than_its_model(case, cards):
    "Adapters in all layers and the loss: those two of the loss, and none for a layer."
    student = get_peft_model(move(case.pruned()), SparseLoraConfig())
    batch = to_device(case.batch, card(0))
    teacher = torch.zeros(1)
    cards.reset()
    with student.disable_adapter(), torch.no_grad():
        teacher = student(**batch).logits
    of_the_model = cards.waits
    cards.reset()
    logits = student(**batch).logits
    distillation_loss(logits, teacher, batch["labels"]).backward()
    assert cards.waits <= of_the_model + 2, cards.synchronisations


@pytest.mark.parametrize(
    "method, waits",
    [(wanda, 2), (sparsegpt, 6)],  # in `select`; and four for the Hessian
)
def test_a_weight_is_pruned_with_few_waits(cards, method, waits):
    weight = torch.randn(16, 32).to("cuda:0")
    stats = Statistics.of(torch.randn(64, 32).to("cuda:0"))
    cards.reset()
    method(weight, stats, sparsity=0.5)
    assert cards.waits <= waits, cards.synchronisations


def test_a_layer_of_a_model_is_pruned_with_few_waits(case, cards):
    "Two in the method; four: finite weight, finite inputs, sparsity and error of the report."
    model = move(case.fresh())
    layers = len(modality_map(model).layers)
    batch = to_device(case.batch, card(0))
    cards.reset()
    with torch.no_grad():
        model(**batch)
    of_the_model = cards.waits
    cards.reset()
    prune(model, batch, "wanda", sparsity=0.5, progress=False)
    padding = cards.synchronisations.pop("aten::index by a mask")
    assert padding <= layers  # once for each input of a language layer
    assert cards.waits <= of_the_model + 6 * layers, cards.synchronisations
