"""What the distillation loss costs, forward and backward, in several forms; and what each kind of teacher costs.

    python tests/tools/benchmarks/distillation.py [--rounds 3] [--out FILE.json]

Loss: 1,024 answer tokens in 1,280 positions, λ = 0.5, one CPU thread. All forms take turns in one process; `time` is the
median of the ratios to the plain form of the same round, by the clock of the process, which other work on the machine
does not move. `peak` is the highest resident memory during the loss beyond that before it, the gradient of the logits
included, in units of the student's logits; each in a process of its own (Linux: VmHWM, reset through clear_refs, with
freed memory returned at once). The forms that should be equal are compared in value and gradient before they are timed.

Teachers: batches of 64 rows of the bundled model, pruned at 80 %; milliseconds of a cached teacher are those of reading
the file and joining the rows.
"""

import argparse
import ctypes
import json
import multiprocessing
import platform
import re
import statistics
import tempfile
import time
from pathlib import Path

import torch
from datasets import Dataset
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ressa.adaptation.distillation import distillation_loss
from ressa.adaptation.loss_terms import (
    CHUNK_NUMBERS,
    Targets,
    answer_logits,
    answer_places,
    flat_logits,
    kl_sum,
    loss_terms,
    top_targets,
)
from ressa.adaptation.teachers import (
    CachedTeacher,
    ModelTeacher,
    SelfTeacher,
    cache_targets,
    collate_targets,
    model_inputs,
)
from ressa.data.collate import calibration_batch
from ressa.data.easy_vqa import load_easy_vqa
from ressa.models.bundled import load_bundled
from ressa.pruning.engine import prune

WEIGHT = 0.5  # λ
WORDS = 16  # listed by `top_targets`
M_MMAP_THRESHOLD = -3  # glibc's malloc.h


def plain(logits, teacher, labels):
    "The formula as one writes it down."
    z, answers = answer_logits(logits, labels)
    t, _ = answer_logits(teacher, labels)
    log_q = F.log_softmax(z.float(), -1)
    log_p = F.log_softmax(t.float(), -1)
    divergence = F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
    return (1 - WEIGHT) * F.cross_entropy(z.float(), answers) + WEIGHT * divergence


def cross_entropy(logits, teacher, labels):
    "No teacher, on all tokens at once."
    z, answers = answer_logits(logits, labels)
    return F.cross_entropy(z.float(), answers)


def ours(logits, teacher, labels):
    return distillation_loss(logits, teacher, labels, WEIGHT)


def mixture(z, answers, t):
    "The loss summed over some tokens."
    task = F.cross_entropy(z.float(), answers, reduction="sum")
    return (1 - WEIGHT) * task + WEIGHT * kl_sum(z, Targets(t))


def size(logits):
    "Positions in a chunk, as in `sum_in_chunks`."
    return max(1, CHUNK_NUMBERS["cpu"] // logits.shape[-1])


def checkpointed(logits, teacher, labels):
    "PyTorch's checkpoint on each chunk."
    z, answers = answer_logits(logits, labels)
    t, _ = answer_logits(teacher, labels)
    total = 0
    for chunk in zip(*[part.split(size(logits)) for part in (z, answers, t)]):
        total = total + checkpoint(
            mixture, *chunk, use_reentrant=False, preserve_rng_state=False
        )
    return total / len(z)


class _InForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z, t, rows, answers, size):
        dz, total = torch.zeros_like(z), 0
        for at, words in zip(rows.split(size), answers.split(size)):
            some = z[at].requires_grad_()
            with torch.enable_grad():
                loss = mixture(some, words, t[at]) / len(rows)
            dz[at] = torch.autograd.grad(loss, some)[0]
            total = total + loss.detach()
        ctx.save_for_backward(dz)
        return total

    @staticmethod
    def backward(ctx, grad):
        return ctx.saved_tensors[0].mul_(grad), None, None, None, None


def in_forward(logits, teacher, labels):
    "The gradient is computed during the forward pass, as in Liger kernels; λ must be known by then."
    places, answers = answer_places(labels)
    return _InForward.apply(
        flat_logits(logits, labels),
        flat_logits(teacher, labels),
        places,
        answers,
        size(logits),
    )


EQUAL = {
    "plain": plain,
    "in chunks": ours,
    "checkpoint": checkpointed,
    "gradient in forward": in_forward,
}
FORMS = EQUAL | {
    f"in chunks, {WORDS} words": ours,
    "cross-entropy alone": cross_entropy,
}


def make(vocabulary, dtype, rows=8, tokens=160, answers=128):
    "Logits of student and teacher, and labels."
    torch.manual_seed(0)
    logits, teacher = (
        torch.randn(rows, tokens, vocabulary, dtype=dtype) for _ in range(2)
    )
    labels = torch.full((rows, tokens), -100)
    labels[:, -answers:] = torch.randint(vocabulary, (rows, answers))
    return logits.requires_grad_(), teacher, labels


def taught(form, teacher, labels):
    "What the form takes for a teacher; few words are found example by example, so that no copy is made."
    if "words" not in form:
        return teacher
    parts = [
        top_targets(answer_logits(t[None], row[None])[0], WORDS)
        for t, row in zip(teacher, labels)
    ]
    return Targets(*map(torch.cat, zip(*parts)))


def check():
    "Equal in value and gradient."
    logits, teacher, labels = make(50_000, torch.float32, 2, 40, 35)

    def both(form):
        loss = form(logits, teacher, labels)
        return loss, torch.autograd.grad(loss, logits)[0]

    want = both(plain)
    for form in EQUAL.values():
        torch.testing.assert_close(both(form), want, rtol=1e-4, atol=1e-7)


def memory(key):
    "VmRSS or VmHWM of this process in bytes."
    return 1024 * int(
        re.search(rf"{key}:\s+(\d+)", Path("/proc/self/status").read_text())[1]
    )


def peak(form, vocabulary, dtype):
    "Bytes beyond those before, at most, in this process, in units of the logits."
    # What is freed leaves the process at once, and is not "before".
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**16)
    for words in (64, vocabulary):  # the first round loads what torch loads once
        logits, teacher, labels = make(words, dtype)
        teacher = taught(form, teacher, labels)
        Path("/proc/self/clear_refs").write_text("5")
        before = memory("VmRSS")
        FORMS[form](logits, teacher, labels).backward()
    found = (memory("VmHWM") - before) / logits.nbytes
    assert found > 0.99, (
        f"{form}: {found}, but the gradient alone is as large as the logits"
    )
    return found


def fresh_peak(*args):
    "`peak` in a process of its own."
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(peak, args)


def seconds(form, logits, teacher, labels):
    logits.grad = None
    start = time.process_time()
    form(logits, teacher, labels).backward()
    return time.process_time() - start


def times_of_loss(vocabulary, dtype, rounds):
    "Form → seconds, and the ratio to the plain form."
    logits, teacher, labels = make(vocabulary, dtype)
    taught_by = {name: taught(name, teacher, labels) for name in FORMS}
    turns = []
    for i in range(rounds + 1):  # the first is not counted
        order = list(FORMS)[i % len(FORMS) :] + list(FORMS)[: i % len(FORMS)]
        turns.append(
            {
                name: seconds(FORMS[name], logits, taught_by[name], labels)
                for name in order
            }
        )
    return {
        name: {
            "time": statistics.median(turn[name] / turn["plain"] for turn in turns[1:]),
            "seconds": statistics.median(turn[name] for turn in turns[1:]),
        }
        for name in FORMS
    }


def cost_of_loss(sizes, rounds):
    "A row of results per vocabulary, dtype and form."
    setups = [
        (vocabulary, dtype)
        for vocabulary in sizes
        for dtype in (torch.float32, torch.bfloat16)
    ]
    peaks = {
        (*setup, form): fresh_peak(form, *setup) for setup in setups for form in FORMS
    }  # before autograd: they fork
    check()
    return [
        {
            "vocabulary": vocabulary,
            "dtype": str(dtype).removeprefix("torch."),
            "form": form,
            **times,
            "peak": peaks[vocabulary, dtype, form],
        }
        for vocabulary, dtype in setups
        for form, times in times_of_loss(vocabulary, dtype, rounds).items()
    ]


def cost_of_teachers(n=512, rows=64, rounds=5):
    "A row of results per teacher."
    dense, processor = load_bundled("cpu")
    student, _ = load_bundled("cpu")
    train = load_easy_vqa("train")
    prune(student, calibration_batch(train, processor), sparsity=0.8, progress=False)
    train = train.select(range(n))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "said.arrow"
        cached = cache_targets(dense, train, processor, file, k=WORDS)
        lines = Dataset.from_file(str(file))
        bytes_per_row = file.stat().st_size / n
        batches = [
            collate_targets([cached[j] for j in range(i, i + rows)], processor)
            for i in range(0, n, rows)
        ]

        def read(_, batch):
            examples = [lines[j] for j in range(rows)]
            return [
                torch.cat([torch.as_tensor(example[name]) for example in examples])
                for name in ("teacher_log_p", "teacher_words")
            ]

        second = ModelTeacher(dense)
        itself = SelfTeacher(dense, student.requires_grad_(False))
        teachers = {
            "second model": second,
            "student itself": itself,
            "cached": CachedTeacher(),
        }
        calls = {"second model": second, "student itself": itself, "cached": read}
        held = {
            "second model": sum(p.nbytes for p in dense.parameters()),
            "student itself": itself.nbytes,
            "cached": 0,
        }
        times = {name: [] for name in calls}
        for _ in range(rounds):
            for batch in batches:
                for name, call in calls.items():
                    start = time.process_time()
                    call(student, batch)
                    times[name].append(1000 * (time.process_time() - start))

        def divergence(teacher, batch):
            with torch.no_grad():
                logits = student(**model_inputs(batch)).logits
            targets = teacher(student, batch)
            return loss_terms(logits, targets, batch["labels"])[1].item()

        found = {
            name: [divergence(teacher, batch) for batch in batches]
            for name, teacher in teachers.items()
        }
    return [
        {
            "teacher": name,
            "bytes_held": held[name],
            "bytes_per_row": bytes_per_row if name == "cached" else 0,
            "milliseconds": statistics.median(times[name]),
            "divergence": statistics.mean(found[name]),
            "largest_difference": max(
                abs(a - b) for a, b in zip(found[name], found["second model"])
            ),
        }
        for name in calls
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out")
    args = parser.parse_args()
    torch.set_num_threads(1)
    loss = cost_of_loss((32_000, 128_000), args.rounds)
    result = {
        "device": "cpu",
        "threads": 1,
        "processor": platform.machine(),
        "torch": torch.__version__,
        "seed": 0,
        "rounds": args.rounds,
        "command": f"python tests/tools/benchmarks/distillation.py --rounds {args.rounds}",
        "loss": loss,
        "teachers": cost_of_teachers(),
    }
    print(json.dumps(result, indent=1))
    if args.out:
        Path(args.out).write_text(json.dumps(result, indent=1))
