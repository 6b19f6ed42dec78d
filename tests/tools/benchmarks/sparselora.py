"""How long SparseLoRA's forward and backward pass takes beside PEFT's LoRA layer, and what each holds in between.

    python tests/tools/benchmarks/sparselora.py [--threads 1 2] [--rounds 40] [--out FILE.json]
    python tests/tools/benchmarks/sparselora.py --device cuda --width 4096 --dtype bfloat16 [--out FILE.json]

The layers have rank 16 and an input that needs its gradient. `naive` is the masked formula left to autograd. All forms
take turns in one process; the figures are medians of the ratios of neighbours. With one CPU thread the clock is that of
the process, which other work on the machine does not move; otherwise it is the wall's. `bundled` is every layer that the
default adapter adds to, at the tokens that 64 questions send through it.
"""

import argparse
import collections
import json
import platform
import statistics
import time
import warnings

import torch
from peft import LoraConfig
from peft.tuners.lora import Linear as LoraLinear
from torch import nn
from torch.nn import functional as F

from ressa.adaptation.fast_mask import masked_weight
from ressa.adaptation.sparse_lora import SparseLoraLinear
from ressa.data.collate import calibration_batch
from ressa.data.easy_vqa import load_easy_vqa
from ressa.models.bundled import load_bundled
from ressa.parts import modality_map
from ressa.pruning.scores import magnitude


class Naive(LoraLinear):
    "The masked formula as it stands, its gradients by autograd."

    def forward(self, x):
        weight = masked_weight(
            self.base_layer.weight,
            self.lora_A["default"].weight,
            self.lora_B["default"].weight * self.scaling["default"],
        )
        return F.linear(x, weight, self.base_layer.bias)


FORMS = {"peft": LoraLinear, "ours": SparseLoraLinear, "naive": Naive}


def make(kind, weight, bias, r=16):
    "An adapted layer around a pruned weight."
    linear = nn.Linear(
        weight.shape[1],
        weight.shape[0],
        bias=bias,
        device=weight.device,
        dtype=weight.dtype,
    )
    linear.weight.data = weight.clone()
    layer = kind(
        linear.requires_grad_(False), "default", config=LoraConfig(), r=r, lora_alpha=16
    )
    layer.to(weight.dtype)
    nn.init.normal_(layer.lora_B["default"].weight, std=0.02)
    return layer


def now(device):
    "Seconds on the clock described above."
    if device.type == "cuda":
        torch.cuda.synchronize()
    if device.type == "cpu" and torch.get_num_threads() == 1:
        return time.process_time()
    return time.perf_counter()


def seconds(layer, x, dy):
    "One forward and backward pass."
    layer.zero_grad()
    x.grad = None
    start = now(x.device)
    layer(x).backward(dy)
    return now(x.device) - start


def held(layer, x):
    "Bytes that autograd holds between forward and backward, parameters not counted."
    known = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    sizes = {}

    def pack(t):
        sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(x)
    return sum(n for pointer, n in sizes.items() if pointer not in known)


def compare(out, width, tokens, rounds, bias=False, device="cpu", dtype=torch.float32):
    "Medians over rounds of ours / PEFT's and naive / PEFT's; milliseconds; bytes held."
    torch.manual_seed(0)
    weight = magnitude(
        torch.randn(out, width, device=device) / width**0.5, sparsity=0.5
    ).to(dtype)
    x = torch.randn(*tokens, width, device=device, dtype=dtype, requires_grad=True)
    dy = torch.randn(*tokens, out, device=device, dtype=dtype)
    layers = {name: make(kind, weight, bias) for name, kind in FORMS.items()}
    for layer in layers.values():
        for _ in range(3):
            seconds(layer, x, dy)
    rows = []
    # Each form follows each other one in turn, so that none always finds the same heap.
    for i in range(rounds):
        order = list(layers)[i % 3 :] + list(layers)[: i % 3]
        if i % 2:
            order.reverse()
        rows.append({name: seconds(layers[name], x, dy) for name in order})
    return {
        "out": out,
        "in": width,
        "tokens": x[..., 0].numel(),
        "rounds": rounds,
        "ours_over_peft": statistics.median(row["ours"] / row["peft"] for row in rows),
        "naive_over_peft": statistics.median(
            row["naive"] / row["peft"] for row in rows
        ),
        "ms": {
            name: 1000 * statistics.median(row[name] for row in rows) for name in layers
        },
        "held_bytes": {name: held(layer, x) for name, layer in layers.items()},
    }


def mask_ms(width, rounds=40, device="cpu"):
    "Milliseconds to mask a width × width update: torch.where, the same with all zeros on the right, hard-shrink's derivative."
    weight = magnitude(torch.randn(width, width, device=device), sparsity=0.5)
    update, kept = torch.randn_like(weight), weight != 0
    in_order = kept.sort(dim=1, descending=True).values
    forms = {
        "where": lambda: torch.where(kept, update, 0),
        "where_in_order": lambda: torch.where(in_order, update, 0),
        "hard_shrink": lambda: torch.ops.aten.hardshrink_backward.grad_input(
            update, weight, 0.0, grad_input=update
        ),
    }
    times = {name: [] for name in forms}
    for _ in range(rounds):
        for name, form in forms.items():
            start = now(weight.device)
            form()
            times[name].append(1000 * (now(weight.device) - start))
    return {name: statistics.median(values) for name, values in times.items()}


def bundled_shapes(rows=64):
    "How many layers of the bundled model have which (out, in, shape of tokens, bias)."
    model, processor = load_bundled("cpu")
    shapes = collections.Counter()

    def count(layer, args, output):
        shapes[
            *layer.weight.shape, tuple(args[0].shape[:-1]), layer.bias is not None
        ] += 1

    for part in modality_map(model).linears.values():
        for layer in part.values():
            layer.register_forward_hook(count)
    with torch.no_grad():
        model(**calibration_batch(load_easy_vqa("train"), processor, n=rows))
    return shapes


def bundled(shapes, rounds, device="cpu"):
    "Each shape by itself, and the sum over all layers: of medians, ours / PEFT's."
    cases = [
        compare(out, width, tokens, rounds, bias, device) | {"layers": n}
        for (out, width, tokens, bias), n in sorted(shapes.items())
    ]
    total = {
        name: sum(case["ms"][name] * case["layers"] for case in cases) for name in FORMS
    }
    return {
        "ours_over_peft": total["ours"] / total["peft"],
        "naive_over_peft": total["naive"] / total["peft"],
        "layers": sum(shapes.values()),
        "ms": total,
        "shapes": cases,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 2048])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--out")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    shapes, results = bundled_shapes(), []
    for threads in args.threads if args.device == "cpu" else [torch.get_num_threads()]:
        torch.set_num_threads(threads)
        wide = [
            compare(
                args.width,
                args.width,
                (n,),
                args.rounds,
                device=args.device,
                dtype=getattr(torch, args.dtype),
            )
            for n in args.tokens
        ]
        results.append(
            {
                "threads": threads,
                "mask_ms": mask_ms(args.width, device=args.device),
                "wide": wide,
                "bundled": bundled(shapes, 3 * args.rounds, args.device),
            }
        )
        for case in wide + results[-1]["bundled"]["shapes"] + [results[-1]["bundled"]]:
            print(
                threads,
                {
                    k: round(v, 3) if isinstance(v, float) else v
                    for k, v in case.items()
                    if k not in ("ms", "shapes", "held_bytes")
                },
                flush=True,
            )
        print(threads, results[-1]["mask_ms"], flush=True)
    if args.out:
        options = (
            f"--device {args.device} --dtype {args.dtype} --width {args.width} --tokens {' '.join(map(str, args.tokens))} "
            f"--threads {' '.join(map(str, args.threads))} --rounds {args.rounds}"
        )
        name = torch.cuda.get_device_name() if args.device == "cuda" else args.device
        with open(args.out, "w") as file:
            json.dump(
                dict(
                    command=f"python tests/tools/benchmarks/sparselora.py {options}",
                    device=name,
                    seed=0,
                    rank=16,
                    processor=platform.machine(),
                    torch=torch.__version__,
                    results=results,
                ),
                file,
                indent=1,
            )
