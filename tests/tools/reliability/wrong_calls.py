"""Calls that cannot be met, and odd ones that can: each must end in a right result, or in an error that names what is wrong."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from ressa.allocation import budgets
from ressa.checkpoints import packing
from ressa.evaluation import answers, intervals, lmms_eval, metrics, retrieval
from ressa.pruning import masks
from ressa.pruning.dsnot import dsnot
from ressa.pruning.scores import magnitude, ria, wanda
from ressa.pruning.sparsegpt import inverse_factor, sparsegpt
from ressa.pruning.statistics import Statistics

NAN, INF = math.nan, math.inf
METHODS = dict(
    magnitude=magnitude, wanda=wanda, ria=ria, sparsegpt=sparsegpt, dsnot=dsnot
)
NEED_INPUTS = [name for name in METHODS if name != "magnitude"]


@dataclass
class Call:
    kind: str  # of fault
    name: str  # what is called, and how
    run: Callable  # the call
    says: str = ""  # what a refusal must name, one of several words
    right: Callable | None = (
        None  # whether a result is right; None: there is no right one
    )


def outcome(call):
    "'right', 'refused', or what went wrong."
    try:
        result = call.run()
    except (ValueError, TypeError) as error:
        said = str(error)
        if call.says and any(word in said for word in call.says.split("|")):
            return "refused"
        return f"does not name {call.says or 'an argument (it should work)'}: {type(error).__name__}: {said[:90]}"
    except Exception as error:
        return f"another error: {type(error).__name__}: {str(error)[:90]}"
    if call.right is None:
        return "silently wrong: " + repr(result)[:70]
    return "right" if call.right(result) else "silently wrong: " + repr(result)[:70]


def example(out, width, tokens=24):
    mix = torch.randn(width, width) / width**0.5 + torch.eye(width)
    return torch.randn(out, width), torch.randn(tokens, width) @ mix + torch.randn(
        width
    )


def spoiled(tensor, value):
    "The tensor with a value at a random place."
    flat = tensor.clone().flatten()
    flat[torch.randint(flat.numel(), ())] = value
    return flat.view_as(tensor)


def pruning():
    "Every pruning method, with a fault in each of its arguments."
    out, width = int(torch.randint(2, 7, ())), 8 * int(torch.randint(1, 5, ()))
    weight, x = example(out, width)
    stats, odd = Statistics.of(x), example(3, 7)
    for name, prune in METHODS.items():

        def call(
            kind,
            how,
            says="",
            right=None,
            w=weight,
            s=stats,
            prune=prune,
            name=name,
            **target,
        ):
            target = target or dict(sparsity=0.5)
            return Call(
                kind, f"{name}: {how}", lambda: prune(w, s, **target), says, right
            )

        for bad in (1.3, 1, -0.1, NAN, INF, "half", [0.5], None):
            yield call(
                "impossible sparsity", f"sparsity={bad!r}", "sparsity", sparsity=bad
            )
        for bad in ("4:2", "0:4", "2:2", "two of four", "2:4:8", "", 24):
            yield call("impossible pattern", f"pattern={bad!r}", "pattern", pattern=bad)
        yield call(
            "two targets",
            "sparsity and pattern",
            "sparsity",
            sparsity=0.5,
            pattern="2:4",
        )
        yield call(
            "odd width under N:M",
            "2:4 on 7 inputs",
            "divisible",
            w=odd[0],
            s=Statistics.of(odd[1]),
            pattern="2:4",
        )
        yield call(
            "odd width",
            "50 % of 7 inputs",
            right=lambda p: p.isfinite().all() and (p == 0).sum() >= 9,
            w=odd[0],
            s=Statistics.of(odd[1]),
        )
        for bad in (NAN, INF, -INF):
            yield call(
                "NaN or infinity in a weight",
                str(bad),
                "weight|score",
                w=spoiled(weight, bad),
            )
        yield call("wrong shape", "a vector as weight", "weight", w=weight[0])
        yield call("wrong shape", "a weight of three axes", "weight", w=weight[None])
        for dtype in (torch.int32, torch.bool, torch.complex64, torch.float8_e4m3fn):
            yield call(
                "wrong dtype", f"weight of {dtype}", "weight", w=weight.to(dtype)
            )
        yield call(
            "empty tensor",
            "no output",
            right=lambda p: p.shape == (0, width),
            w=weight[:0],
        )
        if name == "magnitude":
            continue
        for bad in (NAN, INF):
            yield call(
                "NaN or infinity in activations",
                str(bad),
                "stats|input|score",
                s=Statistics.of(spoiled(x, bad)),
            )
        yield call("empty tensor", "no token", "token", s=Statistics.of(x[:0]))
        for other in (1, width + 8):
            yield call(
                "wrong shape",
                f"stats of {other} inputs",
                "inputs",
                s=Statistics.of(torch.randn(5, other)),
            )


def options():
    "Options of single methods, masks and statistics."
    weight, x = example(4, 16)
    stats = Statistics.of(x)

    def call(kind, name, run, says="", right=None):
        return Call(kind, name, run, says, right)

    for bad in (NAN, INF, -1.0):
        yield call(
            "number out of range",
            f"sparsegpt: damp={bad}",
            lambda bad=bad: sparsegpt(weight, stats, sparsity=0.5, damp=bad),
            "damp",
        )
    yield call(
        "number out of range",
        "inverse_factor: damp=nan",
        lambda: inverse_factor(stats, NAN),
        "damp",
    )
    for bad in (0, -5):
        yield call(
            "number out of range",
            f"sparsegpt: blocksize={bad}",
            lambda bad=bad: sparsegpt(weight, stats, sparsity=0.5, blocksize=bad),
            "blocksize",
        )
    for shape in ((16, 3), (12, 12), (16,)):
        yield call(
            "wrong shape",
            f"sparsegpt: factor {shape}",
            lambda shape=shape: sparsegpt(
                weight, stats, sparsity=0.5, factor=torch.ones(shape)
            ),
            "factor",
        )
    for name, bad in (
        ("max_cycles", -1),
        ("tolerance", NAN),
        ("tolerance", -1.0),
        ("power", NAN),
    ):
        yield call(
            "number out of range",
            f"dsnot: {name}={bad}",
            lambda name=name, bad=bad: dsnot(
                weight, stats, sparsity=0.5, **{name: bad}
            ),
            name,
        )
    yield call(
        "wrong name",
        "dsnot: start='wanda'",
        lambda: dsnot(weight, stats, sparsity=0.5, start="wanda"),
        "start",
    )
    yield call(
        "wrong shape",
        "dsnot: start of another shape",
        lambda: dsnot(weight, stats, sparsity=0.5, start=weight[:2]),
        "start",
    )
    yield call(
        "wrong name",
        "wanda: group='column'",
        lambda: wanda(weight, stats, sparsity=0.5, group="column"),
        "group",
    )
    for bad in (
        torch.rand(4, 16),
        torch.ones(16, dtype=torch.bool),
        torch.ones(4, 1, dtype=torch.bool),
    ):
        yield call(
            "wrong shape" if bad.dtype == torch.bool else "wrong dtype",
            f"apply_mask: {bad.dtype} {tuple(bad.shape)}",
            lambda bad=bad: masks.apply_mask(weight, bad),
            "mask",
        )
    for bad in (
        torch.rand(16),
        torch.tensor(1.0),
        torch.rand(2, 4, 8),
        torch.randn(4, 16).to(torch.complex64),
    ):
        yield call(
            "wrong shape",
            f"select: {bad.dtype} {tuple(bad.shape)}",
            lambda bad=bad: masks.select(bad, 0.5),
            "score",
        )
    for shape in ((0, 8), (0, 40), (3, 0)):
        yield call(
            "empty tensor",
            f"select: {shape}",
            lambda shape=shape: masks.select(torch.rand(shape), 0.5),
            right=lambda m, shape=shape: m.shape == shape,
        )
    yield call(
        "empty tensor",
        "sparsity_of: nothing",
        lambda: masks.sparsity_of(torch.rand(0)),
        right=lambda s: s == 0,
    )
    for bad in (torch.tensor(1.0), torch.rand(5, 0)):
        yield call(
            "empty tensor",
            f"Statistics.of: {tuple(bad.shape)}",
            lambda bad=bad: Statistics.of(bad),
            "x",
        )
    for other in (1, 8):
        yield call(
            "wrong shape",
            f"Statistics.update: {other} inputs",
            lambda other=other: Statistics.of(x).update(torch.rand(3, other)),
            "inputs",
        )
    for dtype in (torch.float8_e4m3fn, torch.bool, torch.int8):
        t = torch.ones(3, 3).to(dtype)
        yield call(
            "odd dtype",
            f"pack_tensor: {dtype}",
            lambda t=t: packing.unpack_tensor(packing.pack_tensor(t), t.dtype, t.shape),
            right=lambda u, t=t: u.float().equal(t.float()),
        )
    for t in (
        torch.ones(3, device="meta"),
        torch.ones(3, 3).to_sparse(),
        torch.quantize_per_tensor(torch.ones(3), 1.0, 0, torch.qint8),
    ):
        yield call(
            "odd dtype",
            f"pack_tensor: {t.dtype}, {t.layout}",
            lambda t=t: packing.pack_tensor(t),
            "tensor",
        )


def allocating():
    "Budgets."
    shapes = {"a": (4, 8), "b": (8, 16)}
    preferred = dict.fromkeys(shapes, 0.5)

    def meet(kind, how, says, right=None, preferred=preferred, sparsity=0.5, **limits):
        return Call(
            kind,
            f"meet_budget: {how}",
            lambda: budgets.meet_budget(shapes, preferred, sparsity, **limits),
            says,
            right,
        )

    for bad in (1.3, -0.1, NAN, INF):
        yield meet("impossible sparsity", f"sparsity={bad}", "sparsity", sparsity=bad)
    for bad in (NAN, -0.5):
        yield meet(
            "number out of range",
            f"max_sparsity={bad}",
            "max_sparsity",
            max_sparsity=bad,
        )
    yield meet(
        "number out of range", "a cap below the target", "sparsity", max_sparsity=0.25
    )
    yield meet("wrong name", "a layer without a preference", "b", preferred={"a": 0.5})
    yield meet("wrong name", "a fixed layer that is not there", "zz", fixed={"zz": 0.5})
    yield meet(
        "NaN or infinity in a preference",
        "nan",
        "preferred",
        preferred={"a": NAN, "b": 0.5},
    )
    for m in (0, 1, 3):
        yield meet("impossible pattern", f"m={m}", "pattern|m=", m=m)
    yield meet(
        "right call",
        "half of all",
        "",
        lambda a: abs(budgets.achieved_sparsity(a, shapes) - 0.5) < 0.03,
    )
    yield Call(
        "wrong name",
        "achieved_sparsity: a layer without a shape",
        lambda: budgets.achieved_sparsity({"zz": 0.5}, shapes),
        "zz",
    )
    yield Call(
        "empty",
        "achieved_sparsity: no layer",
        lambda: budgets.achieved_sparsity({}, shapes),
        "allocation",
    )
    for bad in (1.3, NAN, "4:2", "2:3"):
        yield Call(
            "impossible target",
            f"zeros_of: {bad}",
            lambda bad=bad: budgets.zeros_of(bad, (4, 8)),
            "sparsity|pattern",
        )


def judging():
    "Evaluation and metrics."

    def call(kind, name, run, says="", right=None):
        return Call(kind, name, run, says, right)

    E = answers.Evaluation
    yield call(
        "wrong length",
        "Evaluation: fewer answers",
        lambda: E(["a"], [["a"], ["b"]], np.ones(2), ["x", "x"], "exact match"),
        "answers",
    )
    yield call(
        "wrong length",
        "Evaluation: fewer types",
        lambda: E(["a", "b"], [["a"], ["b"]], np.ones(2), ["x"], "exact match"),
        "types",
    )
    yield call("empty", "interval: nothing", lambda: intervals.interval([]), "values")
    for level in (1.5, -0.1, NAN):
        yield call(
            "number out of range",
            f"interval: level={level}",
            lambda level=level: intervals.interval([0, 1.0], level=level),
            "level",
        )
    yield call(
        "number out of range",
        "interval: draws=0",
        lambda: intervals.interval([0, 1.0], draws=0),
        "draws",
    )
    yield call(
        "NaN or infinity in values",
        "interval: nan",
        lambda: intervals.interval([0, NAN]),
        "values",
    )
    yield call(
        "wrong shape",
        "interval: three axes",
        lambda: intervals.interval(np.ones((2, 2, 2))),
        "values",
    )
    yield call(
        "wrong length",
        "cider: fewer predictions",
        lambda: metrics.cider(["a red circle"], [["a red circle"], ["a blue square"]]),
        "references",
    )
    yield call(
        "empty",
        "exact_match: no batch",
        lambda: answers.exact_match(None, []),
        "batches",
    )
    yield call(
        "empty",
        "blind: no training rows",
        lambda: answers.blind(
            dict(prompt=[], answer=[]),
            dict(prompt=["a"], answer=["b"], question_type=["c"]),
        ),
        "train",
    )
    for dense in (0.2, 0.1, NAN):
        yield call(
            "number out of range",
            f"won_back: dense {dense}",
            lambda dense=dense: intervals.won_back(0.3, 0.2, dense),
            "dense",
        )
    for c, n in ((-1, 3), (4, 3), (0, 0)):
        yield call(
            "number out of range",
            f"agreement: {c} of {n}",
            lambda c=c, n=n: metrics.agreement(c, n),
            "agreeing must",
        )
    yield call(
        "empty",
        "vqa_accuracy: nobody asked",
        lambda: metrics.vqa_accuracy("red", []),
        "people",
    )
    yield call(
        "wrong dtype",
        "vqa_accuracy: a text for a list",
        lambda: metrics.vqa_accuracy("red", "red"),
        "people",
    )
    s, image_of = torch.randn(3, 6), [0, 0, 1, 1, 2, 2]
    for bad in (NAN, INF):
        yield call(
            "NaN or infinity in activations",
            f"recall_at: {bad}",
            lambda bad=bad: retrieval.recall_at(spoiled(s, bad), image_of),
            "similarity",
        )
    yield call(
        "wrong length",
        "recall_at: fewer texts",
        lambda: retrieval.recall_at(s, image_of[:4]),
        "image_of",
    )
    for bad in (7, -1):
        yield call(
            "number out of range",
            f"recall_at: image {bad}",
            lambda bad=bad: retrieval.recall_at(torch.randn(3, 7), image_of + [bad]),
            "image_of",
        )
    yield call(
        "wrong shape",
        "recall_at: a vector",
        lambda: retrieval.recall_at(s[0], image_of),
        "similarity",
    )
    yield call(
        "wrong name",
        "lmms_command: no model",
        lambda: lmms_eval.lmms_command("/nowhere"),
        "model",
    )


def learning():
    "Distillation and SparseLoRA."
    from ressa.adaptation.distillation import distillation_loss
    from ressa.adaptation.loss_terms import Targets, top_targets
    from ressa.adaptation.masked_update import sparse_lora_linear
    from ressa.adaptation.sparse_lora import SparseLoraConfig

    student, teacher, labels = (
        torch.randn(2, 5, 7),
        torch.randn(2, 5, 7),
        torch.randint(7, (2, 5)),
    )

    def loss(kind, how, says, right=None, z=student, t=teacher, y=labels, **options):
        return Call(
            kind,
            f"distillation_loss: {how}",
            lambda: distillation_loss(z, t, y, **options),
            says,
            right,
        )

    yield loss("right call", "as it should be", "", lambda value: value.isfinite())
    for bad in (1.3, -0.1, NAN):
        yield loss("number out of range", f"weight={bad}", "weight", weight=bad)
    for bad in (0, -1.0, NAN, INF):
        yield loss(
            "number out of range", f"temperature={bad}", "temperature", temperature=bad
        )
    yield loss("wrong name", "positions='prompt'", "positions", positions="prompt")
    yield loss("wrong shape", "labels of another length", "labels", y=labels[:, :4])
    yield loss("wrong shape", "labels of one axis", "labels", y=labels[0])
    yield loss(
        "wrong shape", "a teacher of another vocabulary", "teacher", t=teacher[..., :6]
    )
    yield loss("wrong shape", "a teacher of other rows", "logits", t=teacher[:1])
    yield loss("wrong dtype", "labels of floats", "labels", y=labels.float())
    yield loss("empty", "no answer", "labels", y=torch.full((2, 5), -100))
    yield loss(
        "number out of range",
        "a label beyond the vocabulary",
        "labels",
        y=torch.full((2, 5), 9),
    )
    yield loss(
        "number out of range", "a negative label", "labels", y=torch.full((2, 5), -7)
    )
    yield loss(
        "wrong length",
        "targets of fewer answers",
        "targets",
        t=Targets(torch.zeros(3, 3), torch.zeros(3, 2).long()),
    )
    yield loss(
        "NaN or infinity in activations",
        "a student's NaN stays seen",
        "",
        lambda value: value.isnan(),
        z=student * NAN,
    )
    for bad in (0, -1):
        yield Call(
            "number out of range",
            f"top_targets: k={bad}",
            lambda bad=bad: top_targets(teacher[0], bad),
            "k must",
        )
    for bad in (0, NAN):
        yield Call(
            "number out of range",
            f"top_targets: temperature={bad}",
            lambda bad=bad: top_targets(teacher[0], 2, bad),
            "temperature",
        )
    for bad in (0, -1, {}):
        yield Call(
            "number out of range",
            f"SparseLoraConfig: r={bad}",
            lambda bad=bad: SparseLoraConfig(r=bad),
            "r",
        )
    yield Call(
        "wrong name",
        "SparseLoraConfig: use_dora",
        lambda: SparseLoraConfig(r=2, use_dora=True),
        "use_dora",
    )
    W, x, A, B = (
        torch.randn(4, 8),
        torch.randn(3, 8),
        torch.randn(2, 8),
        torch.randn(4, 2),
    )
    for name, bad in (
        ("A", (A[:, :5], B)),
        ("B", (A, B[:3])),
        ("B", (A, B[:1])),
        ("rank", (A, B[:, :1])),
        ("A", (A[:, :1], B)),
    ):
        yield Call(
            "wrong shape",
            f"sparse_lora_linear: {name}",
            lambda bad=bad: sparse_lora_linear(x, W, None, *bad),
            "A|B|shape",
        )


GROUPS = (pruning, options, allocating, judging, learning)


def calls(seed=0):
    "All calls, with random shapes and places."
    torch.manual_seed(seed)
    return [call for group in GROUPS for call in group()]
