"""A repair in one call: every zero stays, it stops early, reports, and refuses before it begins."""

import copy
import json
import shutil

import matplotlib.pyplot as plt
import pytest
import torch
from same_repair import equal, weights_of

from ressa.adaptation.adapters import ADAPTERS, adapt, zero_masks, zeros_filled
from ressa.adaptation.distillation import distillation_loss
from ressa.adaptation.repair import (
    PAPER_RANKS,
    RepairReport,
    repair,
)
from ressa.adaptation.teachers import CachedTeacher
from ressa.data.collate import collate

SHORT = dict(steps=2, batch_size=4, r=2, disable_tqdm=True)


# The paper's arguments


def trained_by_a_plain_loop(model, dense, batches, start):
    """The paper's description, line by line: weight name → W + s·(BA)⊙M.

    `start` holds A and B of each layer, and its scale α/r.
    """
    trained = {
        name: (A.clone().requires_grad_(), B.clone().requires_grad_(), scale)
        for name, (A, B, scale) in start.items()
    }
    pruned = {name: model.get_parameter(f"{name}.weight").detach() for name in trained}

    def weights():
        return {
            f"{name}.weight": pruned[name] + scale * (B @ A) * (pruned[name] != 0)
            for name, (A, B, scale) in trained.items()
        }

    parameters = [part for A, B, _ in trained.values() for part in (A, B)]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0)
    for batch in batches:
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        student = torch.func.functional_call(model, weights(), kwargs=inputs).logits
        with torch.no_grad():
            teacher = dense(**inputs).logits
        task = torch.nn.functional.cross_entropy(
            student[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()
        )
        log_p, log_q = teacher.log_softmax(-1), student.log_softmax(-1)
        divergence = (log_p.exp() * (log_p - log_q)).sum() / len(student)
        optimizer.zero_grad()
        (0.9 * task + 0.1 * divergence).backward()
        optimizer.step()
    return {name: value.detach() for name, value in weights().items()}


def test_the_paper_in_six_steps_is_a_plain_loop(case):
    data = case.train.select(range(24))
    batches = [
        collate([data[i] for i in range(k, k + 4)], case.processor)
        for k in range(0, 24, 4)
    ]
    torch.manual_seed(0)
    student = adapt(copy.deepcopy(case.pruned), r=PAPER_RANKS, lora_alpha=16)
    start = {
        name: (
            layer.lora_A["default"].weight.detach(),
            layer.lora_B["default"].weight.detach(),
            16 / layer.r["default"],
        )
        for name, layer in student.get_base_model().named_modules()
        if hasattr(layer, "lora_A")
    }
    assert {scale for _, _, scale in start.values()} == {4.0, 2.0, 8.0}
    wanted = trained_by_a_plain_loop(case.pruned, case.dense, batches, start)
    before = {name: case.pruned.get_parameter(name).clone() for name in wanted}
    report = repair(
        case.pruned,
        data,
        case.processor,
        teacher=case.dense,
        preset="paper",
        batch_size=4,  # one pass over 24 examples: six steps
        train_sampling_strategy="sequential",
        disable_tqdm=True,
    )
    assert report.log[-1]["step"] == 6
    for name, weight in wanted.items():
        found = report.model.get_parameter(name)
        assert (found - weight).norm() < 1e-5 * weight.norm(), name
        moved = (weight - before[name]).norm()
        assert (found - weight).norm() <= 0.01 * moved, name  # not by standing still


def test_the_paper_needs_a_length_or_steps(case):
    stream = case.train.to_iterable_dataset()
    with pytest.raises(ValueError, match="a stream has no length"):
        repair(case.pruned, stream, case.processor, teacher=case.dense, preset="paper")


# What comes back


@pytest.mark.parametrize("adapter", list(ADAPTERS))
def test_a_plain_model_with_every_zero(case, repaired_copy, adapter):
    masks = zero_masks(case.pruned)
    report = repaired_copy(
        **SHORT, adapter=adapter, learning_rate=1e-2, weight_decay=0.1
    )
    assert type(report.model) is type(case.pruned)
    assert report.model.state_dict().keys() == case.pruned.state_dict().keys()
    assert not report.model.training
    assert not equal(report.model, case.pruned)
    assert report.zeros_filled == zeros_filled(masks, report.model) == 0
    for name, mask in masks.items():
        weight = report.model.get_submodule(name).weight
        assert not torch.signbit(weight[~mask]).any(), name


def test_the_report(case, repaired_copy):
    held_out = case.train.select(range(20, 30))
    report = repaired_copy(**SHORT, held_out=held_out)
    assert isinstance(report, RepairReport)
    assert list(report.losses) == [1, 2]
    for step, loss in report.losses.items():
        terms = (
            report.logged("task_loss")[step],
            report.logged("distillation_loss")[step],
        )
        assert loss == pytest.approx(0.9 * terms[0] + 0.1 * terms[1], rel=1e-4)
    before, after = report.held_out
    assert 0 <= before <= 1
    assert 0 <= after <= 1
    assert report.seconds > 0
    for trained, weights in report.trained.values():
        assert 0 < trained < weights
    text = repr(report)
    for word in ("vision", "interface", "language", "training loss", "held-out score"):
        assert word in text
    assert "zeros filled 0" in text
    ax = report.plot()
    assert {line.get_label() for line in ax.lines} == {"task", "distillation"}
    assert ax.get_xlabel() and ax.get_ylabel()
    plt.close(ax.figure)


def test_without_a_folder_nothing_is_left(repaired_copy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with_folder = repaired_copy(**SHORT, folder=tmp_path / "checkpoints")
    without = repaired_copy(**SHORT)
    assert equal(with_folder.model, without.model)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]


def test_labels_alone_need_no_teacher(repaired_copy):
    report = repaired_copy(**SHORT, teacher=None, distill_weight=0)
    assert set(report.logged("distillation_loss").values()) == {0}
    assert report.losses == report.logged("task_loss")


def test_bf16_on_a_cpu_trains_and_keeps_zeros(case, repaired_copy):
    report = repaired_copy(**SHORT, bf16=True, learning_rate=1e-2)
    assert report.zeros_filled == 0
    assert not equal(report.model, case.pruned)
    assert report.model.dtype == torch.float32
    assert all(torch.tensor(loss).isfinite() for loss in report.losses.values())


def test_streamed_examples_are_trained_on(case):
    stream = case.train.select(range(16)).to_iterable_dataset()
    report = repair(case.pruned, stream, case.processor, teacher=case.dense, **SHORT)
    assert list(report.losses) == [1, 2]


def test_a_harmful_repair_warns(case):
    model = copy.deepcopy(case.dense)
    before = copy.deepcopy(case.dense)
    held_out = case.train.select(range(20, 40))
    with pytest.warns(UserWarning, match="repair lowered the held-out score from"):
        report = repair(
            model,
            case.train,
            case.processor,
            teacher=case.dense,
            held_out=held_out,
            **SHORT | dict(steps=3, learning_rate=1.0),
        )
    assert report.held_out[1] < report.held_out[0]
    assert equal(case.dense, before)


# Early stopping


def loss_on(case, model, examples):
    "The mean loss over answer tokens of a few examples, without a trainer."
    losses = []
    for start in range(0, len(examples), 4):
        some = [examples[i] for i in range(start, start + 4)]
        batch = collate(some, case.processor)
        with torch.no_grad():
            logits, dense_logits = model(**batch).logits, case.dense(**batch).logits
        losses.append(distillation_loss(logits, dense_logits, batch["labels"]))
    return float(sum(losses) / len(losses))


@pytest.mark.slow
@pytest.mark.parametrize("adapter, absurd_rate", [("sparselora", 0.3), ("full", 100.0)])
def test_early_stopping_stops_and_keeps_the_best(
    case, repaired_copy, tmp_path, adapter, absurd_rate
):
    "At an absurd learning rate the first evaluation is the best; gone on with, it stays stopped."
    held_out = case.train.select(range(20, 28))
    options = dict(
        steps=12,
        batch_size=4,
        r=2,
        learning_rate=absurd_rate,
        patience=2,
        held_out=held_out,
        disable_tqdm=True,
        adapter=adapter,
        save_total_limit=20,
        lr_scheduler_type="linear",
        warmup_steps=3,
        folder=tmp_path,
        distill_weight=0.5,  # the loss of `loss_on`
        positions="answer",
    )
    report = repaired_copy(**options)
    watched = report.logged("eval_loss")
    best, last = min(watched, key=watched.get), max(watched)
    assert last == best + 2 < 12, watched
    for term in ("eval_task_loss", "eval_distillation_loss"):
        assert report.logged(term).keys() == watched.keys()
    again = repaired_copy(**options)
    assert equal(again.model, report.model)
    last_checkpoint = tmp_path / f"checkpoint-{last}"
    state = json.loads((last_checkpoint / "trainer_state.json").read_text())
    assert state["best_global_step"] == best
    for step in watched:  # the checkpoint of the best step alone holds what came back
        checkpoint = tmp_path / f"checkpoint-{step}"
        found = weights_of(copy.deepcopy(case.pruned), checkpoint, adapter)
        assert equal(found, report.model) == (step == best)
    # Stopped while it waits for a better loss, it waits no longer than it would have.
    shutil.rmtree(last_checkpoint)
    again = repaired_copy(**options)
    assert equal(again.model, report.model)
    assert max(again.logged("eval_loss")) == last
    loss = loss_on(case, report.model, held_out)
    assert loss == pytest.approx(watched[best], rel=2e-4, abs=1e-5)


@pytest.mark.slow
def test_without_a_folder_the_best_is_kept_too(case, repaired_copy, tmp_path):
    options = SHORT | dict(
        steps=6,
        learning_rate=0.3,
        patience=1,
        held_out=case.train.select(range(20, 26)),
    )
    without = repaired_copy(**options)
    assert equal(without.model, repaired_copy(folder=tmp_path, **options).model)


# What belongs to the caller


def test_the_same_weights_can_be_trained_afterwards(case):
    case.dense.requires_grad_(True)  # a trainer of another test may have frozen it
    case.pruned.get_input_embeddings().requires_grad_(False)
    models = case.pruned, case.dense
    wanted = [[p.requires_grad for p in model.parameters()] for model in models]
    assert all(wanted[1]) and not all(wanted[0])
    options = dict(teacher=case.dense, **SHORT)
    report = repair(case.pruned, case.train, case.processor, **options)
    models = report.model, case.dense
    assert [[p.requires_grad for p in model.parameters()] for model in models] == wanted


def test_held_out_examples_that_are_trained_on_are_counted(case):
    options = dict(teacher=case.dense, held_out=case.train.select([0, 1, 2]), **SHORT)
    train = case.train.select(range(1, 9))
    with pytest.warns(UserWarning, match="2 of 3 held-out examples are training"):
        repair(case.pruned, train, case.processor, **options)


# Refusals


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
def test_without_gradients_there_is_no_repair(repaired_copy, off):
    with off(), pytest.raises(ValueError, match="gradients are switched off"):
        repaired_copy(**SHORT)


def test_settings_that_do_not_fit_are_refused_before_the_model_is_changed(case):
    before = copy.deepcopy(case.pruned)
    nothing = case.train.select([])
    wrong = [
        ("adapter must be one of", dict(adapter="dora")),
        ("no training examples", dict(data=nothing)),
        ("patience needs held_out", dict(patience=1)),
        ("held_out is empty", dict(held_out=nothing)),
        ("steps must be 1 or more", dict(steps=0)),
        ("temperature must be above 0", dict(temperature=0.0)),
        ("positions must be", dict(positions="some")),
        ("distill_weight must be in", dict(distill_weight=1.5)),
        ("needs a teacher", dict(teacher=None)),
        ("training examples hold no targets", dict(teacher=CachedTeacher())),
        ("visoin", dict(r={"visoin": 2})),
        ("steps must be 1 or more, a whole number", dict(steps=1.5)),
        ("batch_size must be 1 or more", dict(batch_size=0)),
        ("learning_rate must be above 0", dict(learning_rate=0.0)),
        ("learning_rate must be above 0", dict(learning_rate=float("nan"))),
        ("patience must be 1 or more", dict(patience=0)),
        ("teacher is the model that learns", dict(teacher=case.pruned)),
        ("teacher must be the dense model", dict(teacher="self")),
        (
            "teaching needs all weights in memory",
            dict(teacher=copy.deepcopy(case.dense).to("meta")),
        ),
    ]
    right = dict(
        model=case.pruned,
        data=case.train,
        processor=case.processor,
        teacher=case.dense,
    )
    for message, settings in wrong:
        with pytest.raises(ValueError, match=message):
            repair(**right | settings)
        assert case.pruned.state_dict().keys() == before.state_dict().keys()
        assert equal(case.pruned, before), message
