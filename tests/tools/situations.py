"""What can befall a model of any class: cut and padded batches, several pictures or none, failures, offloading, two cards.

python tests/tools/situations.py           try all classes, and write nbs/results/situations.json
python tests/tools/situations.py Aria      try one again
"""

import copy
import functools
import json
import sys
import tempfile
import traceback
import warnings
from pathlib import Path

import odd_models
import tiny_models
import torch
import transformers
from accelerate import cpu_offload
from peft import get_peft_model
from pretended_device import PretendedCards, spread, values_of

from ressa.adaptation.adapters import zero_masks, zeros_filled
from ressa.adaptation.sparse_lora import SparseLoraConfig
from ressa.allocation.rules import calibration_loss, ecoflap, loss_pieces, owl
from ressa.models.inputs import model_batch
from ressa.parts import modality_map
from ressa.pruning.engine import input_statistics, prune
from ressa.pruning.passes import output_head

RESULTS = Path(__file__).parents[2] / "nbs" / "results" / "situations.json"
ALL = [*tiny_models.TINY, *odd_models.ODD]
HALF = dict(sparsity=0.5, progress=False)
# A processor that reads no text without a picture; its third example is left out.
NO_TEXT_ALONE = ("PaliGemma",)
# What differs, for a reason, between a batch and its examples alone: class → names
DIFFERS = {
    # reads pictures in one call and videos in a second; the first is measured
    "Video-LLaVA": ("multi_modal_projector",),
    # a text without picture skips these layers, and in a batch it does not; what comes
    # behind them differs by what it has seen there
    "Mllama": ("language_model",),
}
NEAR_TIES = 2  # weights of a model whose scores may be rounded to either side


class Case:
    "A model, a batch of three examples, and each of the examples as a batch."

    def __init__(self, name):
        torch.manual_seed(0)
        self.name = name
        if name in odd_models.ODD:
            self.model, self.batch = odd_models.odd(name)
            self.alone = [odd_models.alone(self.batch, i) for i in range(3)]
        else:
            self.model, processor = self._tiny()
            examples = tiny_models.examples(name, processor)
            self.batch = model_batch(self.model, examples, processor)
            if name in NO_TEXT_ALONE:
                examples = examples[:2]
            self.alone = [model_batch(self.model, [e], processor) for e in examples]
            self.read_alone = model_batch(self.model, examples, processor)
        if name in odd_models.ODD:
            self.read_alone = self.batch
        self.writes = "labels" in self.batch

    def _tiny(self):
        config, processor = tiny_models.TINY[self.name]()
        retrieves = self.name in tiny_models.RETRIEVING
        auto = transformers.AutoModelForImageTextToText
        if retrieves:
            auto = transformers.AutoModel
        return auto.from_config(config).eval(), processor

    def fresh(self):
        return copy.deepcopy(self.model)

    def pruned(self, **options):
        model = self.fresh()
        report = prune(model, self.batch, **HALF | options)
        assert not report.left_dense, report.dense_lines()
        return model, report

    @functools.cached_property
    def whole(self):
        return self.pruned()


def tokens(report):
    return {line.name: line.tokens for line in report.layers}


def differing_zeros(found, wanted):
    "How many weights are zero in one of two state dictionaries alone."
    pairs = ((found[name], tensor) for name, tensor in wanted.items())
    return sum(int(((a == 0) != (b == 0)).sum()) for a, b in pairs)


def micro_batches(case):
    "The same weights are pruned as on the whole batch, on the same tokens."
    whole, report = case.whole
    for size in (1, 2):
        cut, in_cut = case.pruned(micro_batch=size)
        assert tokens(in_cut) == tokens(report), f"micro_batch={size}"
        differ = differing_zeros(cut.state_dict(), whole.state_dict())
        assert differ <= NEAR_TIES, f"micro_batch={size}: {differ} weights"


def padding(case):
    "A batch is measured as its examples alone are: text, one picture, two, no padding."
    together = input_statistics(case.model, case.read_alone)
    n = dict.fromkeys(together, 0)
    squares = dict.fromkeys(together, 0.0)
    for example in case.alone:
        for name, stats in input_statistics(case.model, example).items():
            n[name] += stats.n
            squares[name] = squares[name] + stats.square_sum
    for name, stats in together.items():
        if set(DIFFERS.get(case.name, ())) & set(name.split(".")):
            continue
        assert stats.n == n[name], f"{name}: {stats.n} tokens, alone {n[name]}"
        error = (stats.square_sum - squares[name]).abs().max()
        assert error <= 1e-4 * stats.square_sum.max(), name


def configurations(modules):
    "What each configuration of a model says."
    configs = [getattr(module, "config", None) for module in modules]
    return [
        c.to_dict() for c in configs if isinstance(c, transformers.PretrainedConfig)
    ]


def early_end(case):
    "A pass ends before logits and loss, and leaves modes, configurations and model."
    for options in ({}, {"micro_batch": 1}, {"method": "sparsegpt"}):
        model = case.fresh()
        modules = list(model.modules())
        for module in modules[::3]:
            module.training = True
        modes = [module.training for module in modules]
        configs = configurations(modules)
        calls = []
        head = output_head(model)
        if head is not None:
            head.register_forward_hook(lambda *call: calls.append("head"))
        prune(model, case.batch, **HALF | options)
        assert not calls, options
        assert [module.training for module in modules] == modes
        assert configurations(modules) == configs
    with torch.no_grad():  # what has been left is as before
        first, second = model.eval()(**case.batch), model(**case.batch)
    assert torch.equal(first[0], second[0])


class Stopped(Exception):
    pass


def failure(case):
    "Where a method fails half-way, the dense weights are put back."
    calls = []

    def fails_at_last(weight, stats, *, sparsity, pattern):
        calls.append(weight)
        if len(calls) == len(case.whole[1].layers):
            raise Stopped
        return torch.zeros_like(weight)

    for options in ({}, {"micro_batch": 2}):
        calls.clear()
        model = case.fresh()
        try:
            prune(model, case.batch, fails_at_last, **HALF | options)
        except Stopped:
            pass
        else:
            raise AssertionError("no failure")
        assert_same_weights(model, case.model)


def assert_same_weights(found, wanted):
    wanted = wanted.state_dict()
    for name, tensor in found.state_dict().items():
        assert torch.equal(tensor, wanted[name]), name


def allocation(case):
    "ecoflap's pieces have the losses of their rows; nothing that is measured changes."
    owl(case.model, case.batch, 0.5)
    if case.writes:
        pieces = loss_pieces(case.model, case.batch, 3)
        labels = case.batch["labels"]
        for i, piece in enumerate(pieces):
            only = torch.full_like(labels, -100)
            only[i] = labels[i]
            wanted = calibration_loss(case.model, case.batch | {"labels": only})
            found = calibration_loss(case.model, piece)
            assert abs(found - wanted) <= 1e-4 * wanted, f"piece {i}"
        ecoflap(case.model, case.batch, 0.5, pieces=1)
    assert_same_weights(case.model, case.dense)


def adapter(case):
    "A masked adapter trains, merges and is saved with every zero in place."
    pruned = copy.deepcopy(case.whole[0])
    masks = zero_masks(pruned)
    with torch.no_grad():
        before = pruned(**case.batch)
    student = get_peft_model(pruned, SparseLoraConfig(r=2))
    out = student(**case.batch)
    logits = "logits" if "logits" in out else "logits_per_image"
    assert torch.allclose(out[logits], before[logits], atol=1e-5)
    loss = out["loss"] if case.writes else out[logits].square().mean()
    loss.backward()
    with torch.no_grad():
        for weight in student.parameters():
            if weight.requires_grad and weight.grad is not None:
                weight -= 0.1 * weight.grad.sign()
        trained = student(**case.batch)[logits]
        merged = student.merge_and_unload(safe_merge=True).eval()
        assert not torch.allclose(trained, before[logits], atol=1e-3), "not trained"
        assert torch.allclose(merged(**case.batch)[logits], trained, atol=1e-4)
    assert zeros_filled(masks, merged) == 0
    with tempfile.TemporaryDirectory() as folder:
        merged.save_pretrained(folder)
        again = type(merged).from_pretrained(folder)
        assert_same_weights(again, merged)


def offloaded(case):
    "The same weights are pruned, or the class is refused by name and nothing changes."
    model = cpu_offload(case.fresh(), execution_device=torch.device("cpu"))
    try:
        prune(model, case.batch, **HALF)
    except ValueError as error:
        assert type(model).__name__ in str(error) and "offloaded" in str(error)
        assert not zero_masks(model).keys() - zero_masks(case.model).keys()
        return "refused"
    found, wanted = zero_masks(model), zero_masks(case.whole[0])
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], mask) for name, mask in wanted.items())
    return None


def two_cards(case):
    "Every second layer lies on a second card; the same weights are pruned."
    dense = case.fresh()
    dense.set_attn_implementation("eager")  # other kernels are rounded in another way
    wanted = copy.deepcopy(dense)
    prune(wanted, case.batch, **HALF)
    with PretendedCards():
        model = spread(dense, list(modality_map(dense).layers)[::2])
        prune(model, case.batch, **HALF)
        found = values_of(model)
    assert differing_zeros(found, wanted.state_dict()) <= NEAR_TIES


SITUATIONS = {
    "micro-batches": micro_batches,
    "padding": padding,
    "early end": early_end,
    "failure": failure,
    "allocation": allocation,
    "adapter": adapter,
    "offloaded": offloaded,
    "two cards": two_cards,
}


@functools.cache
def case_of(name):
    case = Case(name)
    case.dense = case.fresh()
    return case


def outcome(name, situation):
    "None, `refused`, or what went wrong."
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return SITUATIONS[situation](case_of(name))
        except Exception:
            return traceback.format_exc(limit=-4)


def main(names):
    transformers.utils.logging.set_verbosity_error()
    classes = {}
    for name in names or ALL:
        found = {situation: outcome(name, situation) for situation in SITUATIONS}
        classes[name] = {
            "class": type(case_of(name).model).__name__,
            "situations": {
                situation: {None: "passed", "refused": "refused"}.get(said, "failed")
                for situation, said in found.items()
            },
        }
        print(name, classes[name]["situations"], flush=True)
        for situation, said in found.items():
            if said not in (None, "refused"):
                print(f"--- {situation}\n{said}", flush=True)
        case_of.cache_clear()
    if names:  # the others are as they were
        classes = json.loads(RESULTS.read_text())["classes"] | classes
    table = dict(
        device="cpu",
        seed=0,
        command="python tests/tools/situations.py",
        torch=torch.__version__,
        transformers=transformers.__version__,
        classes={name: classes[name] for name in ALL},
    )
    RESULTS.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
