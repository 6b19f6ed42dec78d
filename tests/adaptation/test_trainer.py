"""The trainer: exact means over batches and processes, its log, its teachers, its refusals."""

import copy
import gc
import json

import psutil
import pytest
import torch
import two_processes
from safetensors.torch import load_file
from same_repair import long_answers
from transformers import TrainerCallback
from warm_processes import together

from ressa.adaptation.adapters import adapt
from ressa.adaptation.loss_terms import loss_terms
from ressa.adaptation.teachers import CachedTeacher, SelfTeacher, cache_targets
from ressa.adaptation.trainer import RessaArguments, RessaTrainer
from ressa.data.collate import collate
from ressa.models.inputs import is_text, picture_tokens

TERMS = ("loss", "task_loss", "distillation_loss")


def gradients(model):
    found = [p.grad.flatten() for p in model.parameters() if p.requires_grad]
    return torch.cat(found)


# One step of several batches


@pytest.mark.parametrize("positions", ["answer", "text", "all"])
def test_gradient_accumulation_is_one_large_batch(case, trainer_of, positions):
    "Accumulated gradients are the mean over all answer tokens, though batches have different numbers of them."
    if positions != "answer":  # means over examples: equal batches of equal examples
        examples = [case.train[0]] * 4
    else:
        examples = [case.train[i] for i in range(4)]
        examples[0] = examples[0] | {"answer": "red red red red red"}
    trainer = trainer_of(positions=positions)
    model = trainer.model.train()
    whole, *halves = (
        collate(part, case.processor) for part in (examples, examples[:2], examples[2:])
    )
    tokens = (whole["labels"] != -100).sum()
    found = []
    for batches in ([whole], halves):
        model.zero_grad()
        trainer.current_gradient_accumulation_steps = len(batches)
        for batch in batches:
            loss = trainer.compute_loss(model, batch, num_items_in_batch=tokens)
            loss.backward()
        found.append(gradients(model))
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("positions", ["answer", "text", "all"])
def test_every_factor_of_the_loss(case, trainer_of, positions, monkeypatch):
    "Two processes and three accumulated batches, as the formula says."
    trainer = trainer_of(positions=positions, distill_weight=0.25)
    trainer.current_gradient_accumulation_steps = 3
    state = trainer.accelerator.state._shared_state
    monkeypatch.setitem(state, "num_processes", 2)
    batch = collate([case.train[i] for i in range(4)], case.processor)
    model = trainer.model.train()
    text = is_text(batch, picture_tokens(case.dense))
    where = {"answer": "answer", "all": "all", "text": text}
    loss = trainer.compute_loss(model, dict(batch), num_items_in_batch=100)
    with torch.no_grad():
        task, divergence = loss_terms(
            model(**batch).logits,
            case.dense(**batch).logits,
            batch["labels"],
            positions=where[positions],
        )
    answers = int((batch["labels"][:, 1:] != -100).sum())
    task_share = task * answers / 100
    divergence_share = divergence * answers / 100
    if positions != "answer":
        divergence_share = divergence / 6
    want = 2 * (0.75 * task_share + 0.25 * divergence_share)
    torch.testing.assert_close(loss.detach(), want)
    torch.testing.assert_close(trainer._noted["task_loss"][0], 6 * task_share)
    noted = trainer._noted["distillation_loss"]
    torch.testing.assert_close(noted[0], 6 * divergence_share)
    assert noted[1] == 1


@pytest.mark.slow
def test_two_processes_are_one_with_the_double_batch(tmp_path):
    "Two processes with batches of 4 do what one does with batches of 8."
    together(2, two_processes.main, tmp_path / "two", 4)
    two_processes.main(tmp_path / "one", 8)
    one = json.loads((tmp_path / "one" / "found.json").read_text())
    two = json.loads((tmp_path / "two" / "found.json").read_text())
    assert (one["processes"], two["processes"]) == (1, 2)
    assert one["zeros_filled"] == two["zeros_filled"] == 0
    start = load_file(tmp_path / "one" / "start.safetensors")
    alone = load_file(tmp_path / "one" / "weights.safetensors")
    shared = load_file(tmp_path / "two" / "weights.safetensors")
    assert alone.keys() == shared.keys()
    moved = max(float((alone[name] - start[name]).abs().max()) for name in start)
    for name, weight in alone.items():
        torch.testing.assert_close(
            shared[name], weight, rtol=0, atol=moved / 100, msg=name
        )
    for a, b in zip(one["log"], two["log"], strict=True):
        for key in (*TERMS, "grad_norm"):
            assert a[key] == pytest.approx(b[key], rel=1e-3), key


# Training


def test_only_adapters_are_trained_and_the_teacher_stays(case, trainer_of):
    before = copy.deepcopy(case.dense)
    trainer = trainer_of(max_steps=2, per_device_train_batch_size=4, learning_rate=1e-2)
    trained = [name for name, p in trainer.model.named_parameters() if p.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)
    trainer.train()
    for p, unchanged in zip(case.dense.parameters(), before.parameters(), strict=True):
        assert torch.equal(p, unchanged)


@pytest.mark.parametrize("teacher", ["dense", "self"])
def test_gradient_checkpointing_gives_the_same_weights(case, trainer_of, teacher):
    found = []
    for checkpointing in (False, True):
        student = copy.deepcopy(case.pruned)
        trainer = trainer_of(
            SelfTeacher(case.dense, student) if teacher == "self" else case.dense,
            student,
            gradient_checkpointing=checkpointing,
            max_steps=1,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
        )
        trainer.train()
        trained = [p.detach() for p in trainer.model.parameters() if p.requires_grad]
        found.append(trained)
        modules = trainer.model.modules()
        is_on = any(getattr(m, "gradient_checkpointing", False) for m in modules)
        assert is_on == checkpointing
    for plain, checkpointed in zip(*found, strict=True):
        torch.testing.assert_close(plain, checkpointed)


def test_logged_terms_add_up_to_the_logged_loss(case, trainer_of):
    "Also with accumulation; the terms of an evaluation are kept apart, and use the teacher."
    examples = long_answers(case.train.select(range(24)))
    trainer = trainer_of(
        train=examples,
        held_out=examples.select(range(5)),
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
    trained = [line for line in log if "loss" in line]
    evaluated = [line for line in log if "eval_loss" in line]
    assert len(trained) == 3
    assert len(evaluated) >= 1
    for line in trained:
        assert not any(name.startswith("eval_") for name in line)
        want = 0.75 * line["task_loss"] + 0.25 * line["distillation_loss"]
        assert line["loss"] == pytest.approx(want, rel=1e-4)
    for line in evaluated:
        assert "task_loss" not in line
        want = 0.75 * line["eval_task_loss"] + 0.25 * line["eval_distillation_loss"]
        assert line["eval_loss"] == pytest.approx(want, rel=1e-4)
        assert line["eval_distillation_loss"] > 0


class MemoryWatch(TrainerCallback):
    "Tensors alive, and MiB of the process, after the 20th and the 100th step."

    def __init__(self):
        self.found = []

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step not in (20, 100):
            return
        gc.collect()
        tensors = [x for x in gc.get_objects() if issubclass(type(x), torch.Tensor)]
        memory = psutil.Process().memory_info().rss / 2**20
        self.found.append((len(tensors), memory))


@pytest.mark.slow
def test_memory_does_not_grow(case, trainer_of):
    trainer = trainer_of(
        train=case.train.select(range(8)),
        max_steps=100,
        per_device_train_batch_size=1,
        logging_steps=1000,
    )
    watch = MemoryWatch()
    trainer.add_callback(watch)
    trainer.train()
    (tensors, memory), (tensors_later, memory_later) = watch.found
    assert tensors_later <= tensors + 5, watch.found
    assert memory_later - memory < 16, watch.found


# Teachers


def test_three_teachers_say_the_same(case, trainer_of, tmp_path):
    "A second model and the student itself exactly; cached targets of all words to 1e-5."
    examples = cache_targets(
        case.dense,
        case.train.select(range(8)),
        case.processor,
        tmp_path / "targets.arrow",
        k=10**6,
        positions="text",  # "all" would leave out padding, unlike the other two
    )
    students = [copy.deepcopy(case.pruned) for _ in range(3)]
    teachers = case.dense, SelfTeacher(case.dense, students[1]), CachedTeacher()
    found = []
    for student, teacher in zip(students, teachers):
        trainer = trainer_of(teacher, student, train=examples, positions="text")
        batch = trainer.data_collator(list(examples))
        loss = trainer.compute_loss(trainer.model.train(), dict(batch))
        loss.backward()
        found.append((loss.detach(), gradients(trainer.model)))
    dense, itself, cached = found
    for a, b in zip(itself, dense):
        assert torch.equal(a, b)
    for a, b in zip(cached, dense):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_teachers_that_do_not_fit_are_refused(case, trainer_of, tmp_path):
    train = case.train.select(range(8))
    file = tmp_path / "targets.arrow"
    cached = cache_targets(case.dense, train, case.processor, file)
    teacher = CachedTeacher()
    wrong = [
        ("needs a teacher", dict(teacher=None)),
        ("training examples hold no targets", dict(train=train)),
        ("held-out examples hold no targets", dict(held_out=train)),
        ("targets were cached at 1.0", dict(temperature=2.0)),
        ("targets were cached for 'text'", dict(positions="all")),
        ("no training examples", dict(train=train.select([]))),
    ]
    for message, settings in wrong:
        student = copy.deepcopy(case.pruned)
        with pytest.raises(ValueError, match=message):
            trainer_of(**dict(teacher=teacher, model=student, train=cached) | settings)


@pytest.mark.parametrize("adapter", ["full", "bias"])
def test_the_student_cannot_teach_itself_while_its_own_weights_are_trained(
    case, tmp_path, adapter
):
    teacher = SelfTeacher(case.dense, case.pruned)
    args = RessaArguments(str(tmp_path), disable_tqdm=True, use_cpu=True)
    student = adapt(case.pruned, adapter)
    with pytest.raises(ValueError, match="SelfTeacher needs adapters"):
        RessaTrainer(student, args, teacher, case.processor, train_dataset=case.train)


@pytest.mark.parametrize(
    "message, wrong",
    [
        ("distill_weight must be in", dict(distill_weight=1.5)),
        ("temperature must be above 0", dict(temperature=0.0)),
        ("positions must be one of", dict(positions="some")),
        ("preset must be one of", dict(preset="pape")),
    ],
)
def test_arguments_out_of_range_are_refused(tmp_path, message, wrong):
    with pytest.raises(ValueError, match=message):
        RessaArguments(str(tmp_path), **wrong)


def test_a_preset_takes_the_place_of_defaults_only(tmp_path):
    args = RessaArguments(str(tmp_path), preset="paper", temperature=2.0)
    assert (args.positions, args.distill_weight, args.temperature) == ("all", 0.1, 2.0)
    assert (args.max_grad_norm, args.weight_decay) == (0.0, 0.0)
    assert args.lr_scheduler_type == "constant"
    assert args.per_device_train_batch_size == 32


# Every batch, streams too


@pytest.mark.parametrize("streamed", [False, True])
def test_a_batch_for_another_model_is_refused_where_rows_become_it(
    case, trainer_of, streamed
):
    "The first example fits, the second has a token that the model does not know."
    reader = copy.deepcopy(case.processor)
    reader.tokenizer.add_tokens(["zebra"])
    answers = [case.train[0]["answer"], "zebra"]
    rows = case.train.select(range(2)).remove_columns("answer")
    rows = rows.add_column("answer", answers)
    made = trainer_of(
        per_device_train_batch_size=1,
        max_steps=2,
        train_sampling_strategy="sequential",
    )
    trainer = RessaTrainer(
        made.model,
        made.args,
        teacher=case.dense,
        processor=reader,
        train_dataset=rows.to_iterable_dataset() if streamed else rows,
    )
    with pytest.raises(ValueError, match="a token with the id 42, but .* 42 tokens"):
        trainer.train()
