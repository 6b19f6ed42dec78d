"""The loss and the trainer: exact means, exact resuming, several processes, honest refusals."""

import copy
import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from same_repair import long_answers, repaired, weights_of
from torch.nn import functional as F
from transformers import TrainerCallback

from ressa.adaptation.adapters import (
    ADAPTERS,
    adapt,
    remask,
    trainable_weights,
    zero_masks,
    zeros_filled,
)
from ressa.adaptation.distillation import distillation_loss, loss_terms
from ressa.adaptation.repair import repair
from ressa.adaptation.sparse_lora import SparseLoraConfig
from ressa.adaptation.teachers import CachedTeacher, SelfTeacher, cache_targets
from ressa.adaptation.trainer import RessaArguments, RessaTrainer
from ressa.data.collate import calibration_batch, collate
from ressa.pruning.engine import prune


def logits_and_labels(rows=3, tokens=7, vocabulary=11):
    labels = torch.randint(0, vocabulary, (rows, tokens))
    labels[torch.rand(rows, tokens) < 0.5] = -100
    labels[0, -1] = 0
    return (
        torch.randn(rows, tokens, vocabulary),
        torch.randn(rows, tokens, vocabulary),
        labels,
    )


@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_loss_against_plain_loops(shift, temperature):
    student, teacher, labels = logits_and_labels()
    task, divergence, n = 0.0, 0.0, 0
    for row in range(3):
        for t in range(7):
            at = t - 1 if shift else t
            if labels[row, t] == -100 or at < 0:
                continue
            p = (teacher[row, at].double() / temperature).softmax(0)
            q = (student[row, at].double() / temperature).softmax(0)
            task -= student[row, at].double().log_softmax(0)[labels[row, t]]
            divergence, n = divergence + (p * (p.log() - q.log())).sum(), n + 1
    got = loss_terms(student, teacher, labels, temperature, shift)
    torch.testing.assert_close(got[0].double(), task / n, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        got[1].double(), temperature**2 * divergence / n, rtol=1e-4, atol=1e-6
    )


def test_the_papers_variant_sums_over_every_position():
    student, teacher, labels = logits_and_labels()
    p, q = teacher.log_softmax(-1), student.log_softmax(-1)
    got = loss_terms(student, teacher, labels, positions="all")[1]
    torch.testing.assert_close(got, (p.exp() * (p - q)).sum() / 3)


def test_prompt_and_padding_get_no_gradient():
    student, teacher, labels = logits_and_labels()
    student.requires_grad_()
    distillation_loss(student, teacher, labels).backward()
    predicts = F.pad(labels[:, 1:] != -100, (0, 1))
    assert (student.grad[~predicts] == 0).all() and (student.grad[predicts] != 0).any()


def test_huge_logits_stay_finite():
    student, teacher, labels = (
        t * 1e4 if t.is_floating_point() else t for t in logits_and_labels()
    )
    assert distillation_loss(student, teacher, labels).isfinite()


@pytest.fixture
def patient(bundled, data):
    "A pruned model, its teacher, its processor and the training rows."
    from ressa.models.bundled import load_bundled

    model, processor = bundled
    prune(
        model, calibration_batch(data[0], processor, n=8), sparsity=0.7, progress=False
    )
    return model, load_bundled("cpu")[0], processor, data[0]


def trainer_of(
    patient, tmp_path, teacher="dense", rows=None, held_out=None, **arguments
):
    model, dense, processor, train = patient
    torch.manual_seed(0)
    student = get_peft_model(model, SparseLoraConfig(r=2))
    args = RessaArguments(
        str(tmp_path), disable_tqdm=True, use_cpu=True, save_strategy="no", **arguments
    )
    return RessaTrainer(
        student,
        args,
        teacher=dense if teacher == "dense" else teacher,
        processor=processor,
        train_dataset=train.select(range(16)) if rows is None else rows,
        eval_dataset=held_out,
    )


def gradients(model):
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


def equal(a, b):
    return all(
        torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True)
    )


@pytest.mark.parametrize("positions", ["answer", "all"])
def test_gradient_accumulation_is_one_large_batch(patient, tmp_path, data, positions):
    "Accumulated gradients are the mean over all answer tokens, though batches have different numbers of them."
    rows = [data[0][i] for i in (0, 0, 0, 0) if positions == "all"] or [
        data[0][i] for i in range(4)
    ]
    if positions == "answer":
        rows[0] = rows[0] | {"answer": "red red red red red"}
    trainer = trainer_of(patient, tmp_path, positions=positions)
    batches = [collate(part, patient[2]) for part in (rows, rows[:2], rows[2:])]
    tokens = [(batch["labels"] != -100).sum() for batch in batches]
    model, grads = trainer.model.train(), []
    for part in (batches[:1], batches[1:]):
        model.zero_grad()
        trainer.current_gradient_accumulation_steps = len(part)
        for batch in part:
            trainer.compute_loss(model, batch, num_items_in_batch=tokens[0]).backward()
        grads.append(gradients(model))
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-6)


def test_only_adapters_are_trained_and_the_teacher_stays(patient, tmp_path):
    dense_before = {name: p.clone() for name, p in patient[1].named_parameters()}
    trainer = trainer_of(
        patient,
        tmp_path,
        max_steps=2,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
    )
    trained = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    trainer.train()
    for name, p in patient[1].named_parameters():
        assert torch.equal(p, dense_before[name])


SMALL = dict(
    steps=4, batch_size=4, save_steps=1, save_total_limit=9, disable_tqdm=True, r=2
)


@pytest.mark.parametrize(
    "adapter,patience",
    [("sparselora", None), ("bias", None), ("sparselora", 9), ("full", 9)],
)
def test_resumed_at_any_step_equals_uninterrupted(patient, tmp_path, adapter, patience):
    "What a kill after each step would have left is gone on with, to the same bits and the same log."
    model, dense, processor, train = patient
    options = SMALL | dict(adapter=adapter)
    if patience:
        options |= dict(
            patience=patience, held_out=train.select(range(20, 26)), learning_rate=0.05
        )
    whole, log = repair(
        copy.deepcopy(model), dense, train, processor, tmp_path / "run", **options
    )
    assert (tmp_path / "run").rename(tmp_path / "kept")
    for k in (1, 3, 4):
        for step in range(1, k + 1):
            shutil.copytree(
                tmp_path / "kept" / f"checkpoint-{step}",
                tmp_path / "run" / f"checkpoint-{step}",
            )
        resumed, again = repair(
            copy.deepcopy(model), dense, train, processor, tmp_path / "run", **options
        )
        assert equal(resumed, whole), f"after step {k}"

        def said(log):
            return [
                (row["step"], row.get("loss"), row.get("eval_loss"))
                for row in log
                if "loss" in row or "eval_loss" in row
            ]

        assert said(again) == said(log), f"after step {k}"
        shutil.rmtree(tmp_path / "run")
    assert all(
        {"task_loss", "distillation_loss"} <= set(row) for row in log if "loss" in row
    )


@pytest.mark.parametrize(
    "options", [dict(adapter="sparselora"), dict(adapter="full", patience=9)]
)
def test_killed_at_a_random_moment_equals_uninterrupted(tmp_path, options):
    "SIGKILL, wherever it hits, and the same call again."
    options = dict(
        steps=5, batch_size=4, disable_tqdm=True, r=2, save_steps=1, **options
    )
    code = (
        "import sys, json; sys.path.insert(0, sys.argv[1]); from same_repair import repaired\n"
        "repaired(sys.argv[2], **json.loads(sys.argv[3]))"
    )
    here = str(Path(__file__).parent)
    child = subprocess.Popen(
        [
            sys.executable,
            "-c",
            code,
            here,
            str(tmp_path / "killed"),
            json.dumps(options),
        ]
    )
    while (
        not list((tmp_path / "killed").glob("checkpoint-2*")) and child.poll() is None
    ):
        time.sleep(0.005)
    time.sleep(
        float(
            torch.rand(
                1, generator=torch.Generator().manual_seed(time.time_ns() % 2**31)
            )
        )
        * 0.5
    )
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL, "the child was to be killed while it ran"
    assert equal(
        repaired(tmp_path / "killed", **options),
        repaired(tmp_path / "whole", **options),
    )


@pytest.mark.parametrize("adapter", ["sparselora", "full"])
def test_early_stopping_stops_and_keeps_the_best(patient, tmp_path, adapter):
    "With an absurd learning rate the first evaluation is the best; gone on with, it stays stopped."
    model, dense, processor, train = patient
    held_out = train.select(range(20, 28))
    options = dict(
        steps=12,
        batch_size=4,
        r=2,
        learning_rate=0.3 if adapter == "sparselora" else 100.0,
        patience=2,
        held_out=held_out,
        disable_tqdm=True,
        adapter=adapter,
        save_total_limit=20,
        lr_scheduler_type="linear",
        warmup_steps=3,
    )
    best_model, log = repair(
        copy.deepcopy(model), dense, train, processor, tmp_path, **options
    )
    watched = {row["step"]: row["eval_loss"] for row in log if "eval_loss" in row}
    best = min(watched, key=watched.get)
    assert max(watched) == best + 2 < 12, watched
    assert all(
        {"eval_task_loss", "eval_distillation_loss"} <= set(row)
        for row in log
        if "eval_loss" in row
    )
    again, _ = repair(
        copy.deepcopy(model), dense, train, processor, tmp_path, **options
    )
    assert equal(again, best_model)
    state = json.loads(
        (tmp_path / f"checkpoint-{max(watched)}" / "trainer_state.json").read_text()
    )
    assert state["best_global_step"] == best
    for step in watched:  # only the checkpoint of the best step holds what was returned
        found = weights_of(
            copy.deepcopy(model), tmp_path / f"checkpoint-{step}", adapter
        )
        assert equal(found, best_model) == (step == best)
    shutil.rmtree(
        tmp_path / f"checkpoint-{max(watched)}"
    )  # stopped in its waiting, it waits no longer than it would have
    again, log = repair(
        copy.deepcopy(model), dense, train, processor, tmp_path, **options
    )
    assert equal(again, best_model) and max(
        row["step"] for row in log if "eval_loss" in row
    ) == max(watched)
    loss = _loss_on(best_model, dense, processor, held_out)
    assert abs(loss - watched[best]) < 2e-4 * watched[best] + 1e-5


def _loss_on(model, dense, processor, rows):
    "The mean loss over answer tokens of a few rows, without a trainer."
    batches = [
        collate([rows[i] for i in range(k, k + 4)], processor)
        for k in range(0, len(rows), 4)
    ]
    with torch.no_grad():
        losses = [
            distillation_loss(
                model(**batch).logits, dense(**batch).logits, batch["labels"]
            )
            for batch in batches
        ]
    return float(sum(losses) / len(losses))


@pytest.mark.parametrize("adapter", list(ADAPTERS))
def test_repair_returns_a_plain_model_with_every_zero(patient, tmp_path, adapter):
    model, dense, processor, train = patient
    masks, name, before = zero_masks(model), type(model).__name__, copy.deepcopy(model)
    repaired, _ = repair(
        model,
        dense,
        train,
        processor,
        tmp_path,
        steps=2,
        batch_size=4,
        adapter=adapter,
        r=2,
        learning_rate=1e-2,
        disable_tqdm=True,
        weight_decay=0.1,
    )
    assert (
        type(repaired).__name__ == name
        and repaired.state_dict().keys() == before.state_dict().keys()
    )
    assert zeros_filled(masks, repaired) == 0 and not equal(repaired, before)
    for name, mask in masks.items():
        assert not torch.signbit(repaired.get_submodule(name).weight[~mask]).any(), name


def test_what_each_adapter_trains(patient):
    model = patient[0]
    counts = {
        name: trainable_weights(adapt(copy.deepcopy(model), name)) for name in ADAPTERS
    }
    assert all(trained > 0 for row in counts.values() for trained, _ in row.values())
    assert all(
        counts["sparselora"][part] == counts["lora"][part] for part in counts["lora"]
    )
    total = sum(p.numel() for p in model.parameters())
    for name in ("full", "bias"):
        assert sum(whole for _, whole in counts[name].values()) == total
    only = trainable_weights(adapt(copy.deepcopy(model), "full", r={"language": 8}))
    assert only["vision"][0] == only["interface"][0] == 0 < only["language"][0]


def test_bf16_on_a_cpu_trains_and_keeps_zeros(patient, tmp_path):
    model, dense, processor, train = patient
    masks, before = zero_masks(model), copy.deepcopy(model)
    repaired, log = repair(
        model,
        dense,
        train,
        processor,
        tmp_path,
        steps=3,
        batch_size=4,
        r=2,
        bf16=True,
        learning_rate=1e-2,
        disable_tqdm=True,
    )
    assert zeros_filled(masks, repaired) == 0 and not equal(repaired, before)
    assert all(torch.tensor(row["loss"]).isfinite() for row in log if "loss" in row)
    assert repaired.dtype == torch.float32


@pytest.mark.parametrize("teacher", ["dense", "self"])
def test_gradient_checkpointing_gives_the_same_gradients(patient, tmp_path, teacher):
    model, dense, processor, train = patient
    found = []
    for on in (False, True):
        student = copy.deepcopy(model)
        said = SelfTeacher(dense, student) if teacher == "self" else dense
        trainer = trainer_of(
            (student, *patient[1:]),
            tmp_path,
            teacher=said,
            gradient_checkpointing=on,
            max_steps=1,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
        )
        trainer.train()
        found.append(
            [p.detach() for p in trainer.model.parameters() if p.requires_grad]
        )
        layers = [
            m
            for m in trainer.model.modules()
            if getattr(m, "gradient_checkpointing", False)
        ]
        assert bool(layers) == on
    for plain, checkpointed in zip(*found, strict=True):
        torch.testing.assert_close(plain, checkpointed)


def test_three_teachers_say_the_same(patient, tmp_path):
    "A second model and the student itself exactly; cached targets of all words to 1e-5."
    model, dense, processor, train = patient
    rows = cache_targets(
        train.select(range(8)), dense, processor, tmp_path / "targets.arrow", k=10**6
    )
    losses = {}
    for name in ("dense", "self", "cached"):
        student = copy.deepcopy(model)
        teacher = {
            "dense": dense,
            "self": SelfTeacher(dense, student),
            "cached": CachedTeacher(),
        }[name]
        trainer = trainer_of(
            (student, *patient[1:]), tmp_path, teacher=teacher, rows=rows
        )
        batch = trainer.data_collator([rows[i] for i in range(8)])
        loss = trainer.compute_loss(trainer.model.train(), dict(batch))
        loss.backward()
        losses[name] = loss.detach(), gradients(trainer.model)
    for mine, theirs in zip(losses["self"], losses["dense"]):
        assert torch.equal(mine, theirs)
    for mine, theirs in zip(losses["cached"], losses["dense"]):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_logged_terms_add_up_to_the_logged_loss(patient, tmp_path):
    "Also with accumulation; and the evaluation's terms are kept apart, and use the teacher."
    rows = long_answers(patient[3].select(range(24)))
    trainer = trainer_of(
        patient,
        tmp_path,
        rows=rows,
        held_out=rows.select(range(5)),
        max_steps=3,
        logging_steps=1,
        per_device_train_batch_size=3,
        gradient_accumulation_steps=2,
        distill_weight=0.25,
        eval_strategy="steps",
        eval_steps=2,
        per_device_eval_batch_size=5,
    )
    trainer.train()
    log = trainer.state.log_history
    trained, tested = (
        [row for row in log if name in row] for name in ("loss", "eval_loss")
    )
    assert len(trained) == 3 and len(tested) >= 1
    for row in trained:
        assert not any(name.startswith("eval_") for name in row)
        assert row["loss"] == pytest.approx(
            0.75 * row["task_loss"] + 0.25 * row["distillation_loss"], rel=1e-4
        )
    for row in tested:
        assert "task_loss" not in row
        want = 0.75 * row["eval_task_loss"] + 0.25 * row["eval_distillation_loss"]
        assert (
            row["eval_loss"] == pytest.approx(want, rel=1e-4)
            and row["eval_distillation_loss"] > 0
        )


def test_two_processes_are_one_with_the_double_batch(tmp_path):
    "`torchrun` on a CPU: 2 processes with batches of 4 do what one does with batches of 8."
    script, env = (
        Path(__file__).parent / "two_processes.py",
        os.environ | {"OMP_NUM_THREADS": "1"},
    )
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    done = subprocess.run(
        [*launch, script, tmp_path / "two", "4"],
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    import two_processes

    two_processes.main(tmp_path / "one", 8)
    one, two = (
        json.loads((tmp_path / name / "found.json").read_text())
        for name in ("one", "two")
    )
    assert (one["processes"], two["processes"]) == (1, 2) and one[
        "zeros_filled"
    ] == two["zeros_filled"] == 0
    start, alone, shared = (
        load_file(tmp_path / file)
        for file in (
            "one/start.safetensors",
            "one/weights.safetensors",
            "two/weights.safetensors",
        )
    )
    moved = max((alone[name] - start[name]).abs().max() for name in start)
    for name, weight in alone.items():
        torch.testing.assert_close(
            shared[name], weight, rtol=0, atol=float(moved) / 100, msg=name
        )
    assert alone.keys() == shared.keys()
    for a, b in zip(one["log"], two["log"], strict=True):
        for key in ("loss", "task_loss", "distillation_loss", "grad_norm"):
            assert a[key] == pytest.approx(b[key], rel=1e-3), key


def test_memory_does_not_grow(patient, tmp_path):
    "200 steps: the number of tensors alive, and the memory of the process."
    trainer = trainer_of(
        patient,
        tmp_path,
        rows=patient[3].select(range(8)),
        max_steps=200,
        per_device_train_batch_size=1,
        logging_steps=1000,
    )
    held = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step not in (50, 200):
                return
            gc.collect()
            tensors = sum(
                issubclass(type(thing), torch.Tensor) for thing in gc.get_objects()
            )
            held.append((tensors, psutil.Process().memory_info().rss / 2**20))

    trainer.add_callback(Watch())
    trainer.train()
    (tensors, before), (later, after) = held
    assert later <= tensors + 5 and after - before < 30, held


def test_streamed_rows_are_trained_on(patient, tmp_path):
    model, dense, processor, train = patient
    stream = train.select(range(16)).to_iterable_dataset()
    _, log = repair(
        model,
        dense,
        stream,
        processor,
        tmp_path,
        steps=3,
        batch_size=4,
        r=2,
        disable_tqdm=True,
    )
    assert [row["step"] for row in log if "loss" in row] == [1, 2, 3]


def test_a_harmful_repair_is_said_aloud(patient, tmp_path):
    model, dense, processor, train = patient
    fine, (dense_before, held_out) = (
        copy.deepcopy(dense),
        (copy.deepcopy(dense), train.select(range(20, 40))),
    )
    with pytest.warns(UserWarning, match="repair lowered held-out accuracy from"):
        _, log = repair(
            fine,
            dense,
            train,
            processor,
            tmp_path,
            steps=3,
            batch_size=4,
            learning_rate=1.0,
            held_out=held_out,
            disable_tqdm=True,
        )
    assert log[-1]["held_out_after"] < log[-1]["held_out_before"] and equal(
        dense, dense_before
    )


def test_a_half_written_checkpoint_is_not_taken(patient, tmp_path):
    model, dense, processor, train = patient
    small = SMALL | dict(save_steps=2, save_total_limit=2)
    whole, _ = repair(copy.deepcopy(model), dense, train, processor, tmp_path, **small)
    for broken in ("", '{"glo'):
        (tmp_path / "checkpoint-4" / "trainer_state.json").write_text(broken)
        (tmp_path / "checkpoint-4" / "optimizer.pt").unlink()
        again, _ = repair(
            copy.deepcopy(model), dense, train, processor, tmp_path, **small
        )
        for a, b in zip(whole.parameters(), again.parameters()):
            assert torch.equal(a, b)


def test_a_checkpoint_that_cannot_be_written_is_an_error_of_the_system(
    patient, tmp_path, monkeypatch
):
    def full(*args, **kwargs):
        raise RuntimeError(
            "[enforce fail at inline_container.cc:672] . unexpected pos 128 vs 16"
        )

    monkeypatch.setattr(torch, "save", full)
    model, dense, processor, train = patient
    with pytest.raises(OSError, match="checkpoint could not be written"):
        repair(
            model,
            dense,
            train,
            processor,
            tmp_path,
            steps=2,
            batch_size=4,
            save_steps=1,
        )


def test_remask_restores_zeros_and_nothing_else(patient):
    model, masks = patient[0], zero_masks(patient[0])
    name, mask = next(iter(masks.items()))
    torch.nn.init.ones_(model.get_submodule(name).weight)
    remask(model, masks)
    assert torch.equal(model.get_submodule(name).weight, mask.float())


def test_refusals(patient, tmp_path):
    "By name, and before the model is changed."
    model, dense, processor, train = patient
    before = copy.deepcopy(model)
    wishes = [
        ("adapter", dict(adapter="dora")),
        ("train_dataset is empty", dict(train_dataset=train.select([]))),
        ("patience needs held_out", dict(patience=1)),
        ("held_out is empty", dict(held_out=train.select([]))),
        ("steps", dict(steps=0)),
        ("temperature", dict(temperature=0.0)),
        ("positions", dict(positions="some")),
        ("distill_weight", dict(distill_weight=1.5)),
        ("needs a teacher", dict(teacher=None)),
        ("train_dataset holds no targets", dict(teacher=CachedTeacher())),
        ("visoin", dict(r={"visoin": 2})),
    ]
    for name, wish in wishes:
        with pytest.raises(ValueError, match=name):
            repair(
                **dict(
                    model=model,
                    teacher=dense,
                    train_dataset=train,
                    processor=processor,
                    folder=tmp_path,
                )
                | wish
            )
        assert model.state_dict().keys() == before.state_dict().keys() and equal(
            model, before
        ), name


def test_teachers_that_do_not_fit_are_refused(patient, tmp_path):
    model, dense, processor, train = patient
    rows = cache_targets(
        train.select(range(8)), dense, processor, tmp_path / "targets.arrow"
    )

    def fails(match, teacher, rows=rows, held_out=None, **arguments):
        with pytest.raises(ValueError, match=match):
            trainer_of(
                (copy.deepcopy(model), *patient[1:]),
                tmp_path,
                teacher,
                rows,
                held_out,
                **arguments,
            )

    fails("needs a teacher", None)
    fails("train_dataset holds no targets", CachedTeacher(), rows=train)
    fails("eval_dataset holds no targets", CachedTeacher(), held_out=train)
    fails("targets were cached at 1.0", CachedTeacher(), temperature=2.0)
    fails("positions='all' needs a teacher model", CachedTeacher(), positions="all")
    student, args = (
        copy.deepcopy(model),
        RessaArguments(str(tmp_path), disable_tqdm=True, use_cpu=True),
    )
    said = SelfTeacher(dense, student)
    for adapter in ("full", "bias"):
        with pytest.raises(ValueError, match="SelfTeacher needs adapters"):
            RessaTrainer(
                adapt(student, adapter), args, said, processor, train_dataset=train
            )
