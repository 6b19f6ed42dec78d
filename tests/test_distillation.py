"""Distillation: the loss against its definition, in chunks and in few words; the three homes of a teacher."""

import copy
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from torch.nn import functional as F

from ressa.adaptation.distillation import (
    Targets,
    answer_logits,
    distillation_loss,
    in_chunks,
    kl_sum,
    loss_terms,
    top_targets,
)
from ressa.adaptation.sparse_lora import SparseLoraConfig
from ressa.adaptation.teachers import (
    CachedTeacher,
    ModelTeacher,
    SelfTeacher,
    cache_targets,
    collate_targets,
    model_inputs,
)
from ressa.data.collate import calibration_batch, collate
from ressa.models.inputs import is_causal
from ressa.parts import modality_map
from ressa.pruning.engine import prune


def kl(student, teacher, temperature=1.0):
    "The definition, summed."
    p, q = ((z / temperature).softmax(-1) for z in (teacher, student))
    return (p * (p.log() - q.log())).sum()


def logits_and_labels(rows=3, tokens=7, vocabulary=11, dtype=torch.float64):
    student, teacher = (
        torch.randn(rows, tokens, vocabulary, dtype=dtype) * 2 for _ in range(2)
    )
    labels = torch.randint(vocabulary, (rows, tokens))
    labels[:, :4] = labels[0, 5:] = -100
    return student, teacher, labels


# The loss


@pytest.mark.parametrize("k", [None, 1, 3, 99])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_gradcheck_in_chunks(k, temperature):
    z, t = torch.randn(2, 5, 4, dtype=torch.float64).unbind()
    values, words = Targets(t) if k is None else top_targets(t, k, temperature)
    rows = torch.tensor([4, 0, 3])

    def f(some, piece):
        listed = None if words is None else words[rows[piece]]
        return torch.stack(
            [
                F.cross_entropy(some, rows[piece] % 4, reduction="sum"),
                kl_sum(some, values[rows[piece]], listed, temperature),
            ]
        )

    whole = f(z[rows], slice(None))
    for size in (1, 2, 3, 50, None):
        assert torch.autograd.gradcheck(
            lambda z: in_chunks(f, z, rows, size), z.clone().requires_grad_()
        )
        torch.testing.assert_close(in_chunks(f, z, rows, size), whole)


@pytest.mark.parametrize("shift", [True, False])
def test_value_and_gradient_are_those_of_the_definition(shift):
    student, teacher, labels = logits_and_labels()
    student.requires_grad_()
    (z, words), (t, _) = (
        answer_logits(student, labels, shift),
        answer_logits(teacher, labels, shift),
    )
    want = 0.7 * F.nll_loss(z.log_softmax(-1), words) + 0.3 * 4 * kl(z, t, 2.0) / len(
        words
    )
    got = distillation_loss(student, teacher, labels, 0.3, 2.0, shift=shift)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(
        *(torch.autograd.grad(loss, student)[0] for loss in (got, want))
    )


def test_options_of_the_terms():
    student, teacher, labels = logits_and_labels()
    task, divergence = loss_terms(student, teacher, labels)
    count = int((labels[:, 1:] != -100).sum())
    for got, want in zip(
        loss_terms(student, teacher, labels, tokens=2 * count),
        (task / 2, divergence / 2),
    ):
        torch.testing.assert_close(got, want)
    everywhere = loss_terms(student, teacher, labels, positions="all")[1]
    torch.testing.assert_close(everywhere, kl(student, teacher) / len(labels))
    alone, nothing = loss_terms(student, None, labels)
    assert alone == task and nothing == 0


@pytest.mark.parametrize("seed", range(4))
def test_few_words_give_a_lower_bound_that_grows_to_the_full_divergence(seed):
    torch.manual_seed(seed)
    student, teacher = (
        torch.randn(2, 20, 9, dtype=torch.float64).mul(1 + 2 * seed).unbind()
    )
    for temperature in (0.5, 1.0, 4.0):
        full = kl_sum(student, teacher, None, temperature)
        torch.testing.assert_close(full, kl(student, teacher, temperature))
        found = torch.stack(
            [
                kl_sum(student, *top_targets(teacher, k, temperature), temperature)
                for k in range(1, 12)
            ]
        )
        assert (
            (found >= 0).all()
            and (found <= full * (1 + 1e-12)).all()
            and (found.diff() >= -1e-9 * full).all()
        )
        assert found[0] < 0.999 * full
        torch.testing.assert_close(
            found[7:], full.expand(4)
        )  # eight words, and the ninth is the rest


def test_gradient_of_few_words_is_that_of_the_coarse_distribution():
    "On a listed word q - p; the rest shares its own difference as the student has it."
    student, teacher = torch.randn(2, 6, 9, dtype=torch.float64).unbind()
    student = student.clone().requires_grad_()
    log_p, words = top_targets(teacher, 3)
    (got,) = torch.autograd.grad(kl_sum(student, log_p, words), student)
    q = student.detach().softmax(-1)
    rest = torch.ones_like(q).scatter(1, words, 0.0).bool()
    q_rest = q.masked_fill(~rest, 0).sum(1, keepdim=True)
    want = torch.where(rest, q - q / q_rest * log_p[:, 3:].exp(), 0.0)
    want = want.scatter(1, words, q.gather(1, words) - log_p[:, :3].exp())
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(
        kl_sum(teacher, log_p, words), torch.zeros((), dtype=torch.float64)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("k", [1, 3, 10])
def test_finite_when_the_listed_words_hold_all(dtype, k):
    "Huge logits: the rest has no probability that float32 could hold, by teacher, student or both."
    small, huge = (
        torch.randn(8, 11),
        torch.randn(8, 11) * (1e4 if dtype is torch.float16 else 1e6),
    )
    for student, teacher in (
        (small, huge),
        (huge, small),
        (huge, huge.roll(1, 1)),
        (huge, huge),
    ):
        z = student.to(dtype).requires_grad_()
        values, words = top_targets(teacher.to(dtype), k)
        assert values.isfinite().all() and values.dtype == torch.float32
        for loss in (kl_sum(z, values, words), kl_sum(z, teacher.to(dtype))):
            (gradient,) = torch.autograd.grad(loss, z)
            assert (
                loss.isfinite()
                and gradient.isfinite().all()
                and gradient.dtype == dtype
            )


def test_low_precision_is_computed_in_float32():
    student, teacher, labels = logits_and_labels(dtype=torch.float32)
    low = [t.bfloat16().requires_grad_() for t in (student, teacher)]
    losses = [distillation_loss(*z, labels) for z in (low, [t.float() for t in low])]
    assert losses[0] == losses[1] and losses[0].dtype == torch.float32
    targets = top_targets(answer_logits(low[1].detach(), labels)[0], 4)
    assert distillation_loss(low[0], targets, labels) == distillation_loss(
        low[0].float(), targets, labels
    )


def test_refusals():
    student, teacher, labels = logits_and_labels()
    n = len(answer_logits(student, labels)[1])
    targets = top_targets(answer_logits(teacher, labels)[0], 2)
    cases = [
        ("no answer token", dict(labels=torch.full_like(labels, -100))),
        ("do not fit", dict(labels=labels[:, 1:])),
        ("share a vocabulary", dict(teacher=teacher[..., 1:])),
        ("rows and tokens", dict(teacher=teacher[:, 1:])),
        (
            f"targets are of {n - 1}",
            dict(teacher=Targets(targets.values[1:], targets.words[1:])),
        ),
        ("positions='all' needs", dict(teacher=targets, positions="all")),
        ("must be 'answer' or", dict(positions="some")),
        ("temperature", dict(temperature=-1.0)),
        ("weight", dict(weight=-0.1)),
    ]
    for message, wrong in cases:
        with pytest.raises(ValueError, match=message):
            distillation_loss(
                **dict(student_logits=student, teacher=teacher, labels=labels) | wrong
            )
    with pytest.raises(ValueError, match="at least 1, not 0"):
        top_targets(teacher[0], 0)


def test_nothing_is_kept_between_forward_and_backward_but_what_there_was():
    "No copy of the logits, whole or in pieces."
    student, teacher, labels = logits_and_labels(vocabulary=500)
    student.requires_grad_()
    held = []

    def pack(t):
        held.append(t.untyped_storage())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        distillation_loss(student, teacher, labels)
    known = {student.untyped_storage().data_ptr()}
    assert known <= {s.data_ptr() for s in held}
    assert (
        sum(s.nbytes() for s in held if s.data_ptr() not in known)
        < 1000
        < student.nbytes
    )


# The teachers


@pytest.fixture
def patient(bundled, data):
    "A pruned model, its dense past, a batch, the processor and rows."
    model, processor = bundled
    dense = copy.deepcopy(model)
    prune(
        model, calibration_batch(data[0], processor, n=8), sparsity=0.7, progress=False
    )
    rows = data[0].select(range(8))
    return (
        model.requires_grad_(False),
        dense,
        collate(list(rows), processor),
        processor,
        rows,
    )


def adapted(model):
    "A SparseLoRA student that has learnt something, in training, with dropout."
    student = get_peft_model(model, SparseLoraConfig(r=2, lora_dropout=0.3)).train()
    for name, weight in student.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    return student


def state(student):
    "Modes, what is trained, and every weight's bits."
    return (
        [m.training for m in student.modules()],
        [p.requires_grad for p in student.parameters()],
        [p.detach().clone().view(torch.int32) for p in student.parameters()],
    )


def same(a, b):
    return a[:2] == b[:2] and all(map(torch.equal, a[2], b[2]))


def test_the_student_itself_is_the_dense_model(patient):
    model, dense, batch, *_ = patient
    zeros = {
        name: layer.weight == 0 for name, layer in modality_map(model).layers.items()
    }
    teacher = SelfTeacher(dense, model)
    gone = sum(int(where.sum()) for where in zeros.values())
    assert teacher.nbytes == 4 * gone
    want = ModelTeacher(dense)(None, batch)
    assert torch.equal(teacher(model, batch), want)
    student = adapted(model)
    before = state(student)
    with torch.no_grad():
        assert (student.eval()(**batch).logits - want).abs().max() > 0.1
    student.train()
    for _ in range(2):
        assert torch.equal(teacher(student, batch), want)
    assert same(state(student), before)
    merged = student.merge_and_unload()
    for name, layer in modality_map(merged).layers.items():
        assert torch.equal(layer.weight == 0, zeros[name])
        assert not torch.signbit(layer.weight[zeros[name]]).any()


def test_all_is_put_back_when_the_forward_raises(patient):
    model, dense, batch, *_ = patient
    layers = list(modality_map(model).layers.values())
    teacher, student = SelfTeacher(dense, model), adapted(model)
    before = state(student)

    def fail(*_):
        raise RuntimeError("stop")

    for layer in (layers[0], layers[len(layers) // 2], layers[-1]):
        for register in (layer.register_forward_pre_hook, layer.register_forward_hook):
            hook = register(fail)
            with pytest.raises(RuntimeError, match="stop"):
                teacher(student, batch)
            hook.remove()
            assert same(state(student), before)
    assert torch.equal(teacher(student, batch), ModelTeacher(dense)(None, batch))


def test_the_student_itself_refuses(patient):
    model, dense, batch, processor, _ = patient
    teacher = SelfTeacher(dense, model)
    with pytest.raises(ValueError, match="does not hold the weights"):
        teacher(copy.deepcopy(model), batch)
    bias = next(
        weight for name, weight in model.named_parameters() if name.endswith("bias")
    )
    bias.requires_grad_()
    with pytest.raises(ValueError, match="own weights are trained"):
        teacher(model, batch)
    bias.requires_grad_(False)
    layer = next(iter(modality_map(model).layers.values()))
    layer.weight.data[layer.weight == 0] = 1.0
    with pytest.raises(ValueError, match="zeros have changed"):
        teacher(model, batch)
    changed = copy.deepcopy(dense)
    prune(
        changed,
        calibration_batch(patient[4], processor, n=8),
        "sparsegpt",
        sparsity=0.5,
        progress=False,
    )
    with pytest.raises(ValueError, match="pruning changed kept weights"):
        SelfTeacher(dense, changed)


def test_the_student_itself_in_another_precision(patient):
    model, dense, batch, *_ = patient
    teacher, student = SelfTeacher(dense, model), adapted(model)
    student.double(), dense.double()
    batch = {
        name: t.double() if t.is_floating_point() else t for name, t in batch.items()
    }
    torch.testing.assert_close(
        teacher(student, batch), ModelTeacher(dense)(None, batch)
    )


def test_file_of_other_things_is_refused(patient, data, tmp_path):
    model, dense, _, processor, rows = patient
    file = tmp_path / "sub" / "said.arrow"
    with pytest.raises(ValueError, match="said.arrow does not exist, and no teacher"):
        cache_targets(rows, None, processor, file)
    cached = cache_targets(rows, dense, processor, file, batch_size=3)
    made = file.stat().st_mtime_ns
    assert cached.column_names[: len(rows.column_names)] == rows.column_names
    for again in (dense, None):
        assert cache_targets(rows, again, processor, file)[5] == cached[5]
    red = rows.map(lambda row: {"image": np.zeros_like(row["image"])})
    renamed = rows.map(
        lambda row, i: {"answer": "red" if i == 7 else row["answer"]}, with_indices=True
    )
    wrong = [
        dict(data=data[0].select(range(1, 9))),
        dict(data=rows.select(range(7))),
        dict(data=red),
        dict(data=renamed),
        dict(teacher=model),
        dict(k=15),
        dict(temperature=2.0),
        dict(teacher=None, temperature=2.0),
    ]
    for other in wrong:
        with pytest.raises(ValueError, match="said.arrow holds targets of"):
            cache_targets(
                **dict(data=rows, teacher=dense, processor=processor, file=file) | other
            )
    assert file.stat().st_mtime_ns == made


KILLED = """
import os, signal, sys
from ressa.bundled import load_bundled
from ressa.data import load_easy_vqa
from ressa.distillation import cache_targets
dense, processor = load_bundled("cpu")
forward, calls = dense.forward, []
def dying(**batch):
    calls.append(1)
    if len(calls) == 3: os.kill(os.getpid(), signal.SIGKILL)
    return forward(**batch)
dense.forward = dying
cache_targets(load_easy_vqa("train").select(range(8)), dense, processor, sys.argv[1], batch_size=2)
"""


def test_a_killed_run_leaves_no_half_file(patient, tmp_path):
    model, dense, _, processor, rows = patient
    file = tmp_path / "said.arrow"
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, str(file)], capture_output=True, text=True
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not file.exists()
    assert (
        len(cache_targets(rows, dense, processor, file))
        == len(Dataset.from_file(str(file)))
        == 8
    )


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_cached_targets_are_those_of_the_model(patient, tmp_path, temperature):
    "In any batches, in any order; with all words listed the loss is that of the model."
    model, dense, _, processor, rows = patient
    cached = cache_targets(
        rows,
        dense,
        processor,
        tmp_path / "said.arrow",
        k=10**6,
        temperature=temperature,
        batch_size=3,
    )
    order = [6, 1, 3, 0, 7]
    batch = collate_targets([cached[i] for i in order], processor)
    assert (
        model_inputs(batch).keys()
        == collate([rows[i] for i in order], processor).keys()
    )
    with torch.no_grad():
        logits = model(**model_inputs(batch)).logits
    losses = [
        loss_terms(logits, teacher(model, batch), batch["labels"], temperature)[1]
        for teacher in (CachedTeacher(), ModelTeacher(dense))
    ]
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-5)
    assert losses[1] > 0.1
    assert set(cached["teacher_temperature"]) == {temperature}
    with pytest.raises(ValueError, match="hold no targets"):
        CachedTeacher()(model, collate_targets([rows[0]], processor))


def test_encoder_decoder(bundled, data, tmp_path):
    "Logits at i predict the label at i; the labels reach the model, which makes its inputs of them, and no answer stands in the prompt."
    from transformers import (
        InstructBlipConfig,
        InstructBlipForConditionalGeneration,
        T5Config,
    )

    model, processor = bundled
    config = model.config
    text = T5Config(
        vocab_size=config.text_config.vocab_size,
        d_model=32,
        d_kv=8,
        d_ff=32,
        num_layers=1,
        num_heads=4,
        decoder_start_token_id=0,
        pad_token_id=processor.tokenizer.pad_token_id,
    )
    config = InstructBlipConfig(
        vision_config=config.vision_config.to_dict(),
        qformer_config=config.qformer_config.to_dict(),
        text_config=text.to_dict(),
        num_query_tokens=config.num_query_tokens,
        image_token_index=config.image_token_index,
    )
    dense, student = (
        InstructBlipForConditionalGeneration(config).eval() for _ in range(2)
    )
    assert is_causal(model) and not is_causal(dense)
    cached = cache_targets(
        data[0].select(range(6)),
        dense,
        processor,
        tmp_path / "said.arrow",
        k=10**6,
        batch_size=4,
    )
    batch = collate_targets(list(cached), processor, causal=False)
    assert batch["labels"].shape[1] < batch["input_ids"].shape[1]
    with torch.no_grad():
        logits = student(**model_inputs(batch)).logits
    losses = [
        loss_terms(logits, teacher(student, batch), batch["labels"], shift=False)[1]
        for teacher in (CachedTeacher(), ModelTeacher(dense))
    ]
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-6)
    assert losses[1] > 1e-4
