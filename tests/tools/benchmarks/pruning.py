"""How long pruning takes, beside one plain forward pass and beside the usual way of doing it.

    python tests/tools/benchmarks/pruning.py [--hidden 256 512 1024] [--rounds 5] [--out FILE.json]

The usual way is that of the methods' published implementations, written here anew: samples one at a time, every
block computed twice (to gather, then to go on), a full sort for Wanda, a column loop and a Hessian of its own per
layer for SparseGPT. All times are taken in alternation in one process; the figures are medians of the ratios.
"""

import argparse
import copy
import json
import platform
import statistics
import time
from contextlib import suppress
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaModel

from ressa.pruning.engine import prune_layers
from ressa.pruning.sparsegpt import inverse_factor
from ressa.pruning.statistics import Statistics

LAYERS = 4
EXAMPLES = 64
TOKENS = 64  # of each example
BLOCK_SIZE = 128  # columns that SparseGPT prunes before it corrects the later ones


def linears_of(model):
    "The linear layers of a model by name."
    return {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}


def make(hidden):
    "Llama blocks with random weights, and a batch of examples × tokens."
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=hidden,
        intermediate_size=11 * hidden // 4,
        num_hidden_layers=LAYERS,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        use_cache=False,
    )
    model = LlamaModel(config).eval()
    return model, {"input_ids": torch.randint(0, 1000, (EXAMPLES, TOKENS))}


def usual_wanda(weight, inputs, sparsity):
    "Score, full sort, scatter."
    norm = torch.zeros(weight.shape[1])
    for n, x in enumerate(inputs, start=1):
        x = x.reshape(-1, x.shape[-1]).float()
        norm = norm * ((n - 1) / n) + x.norm(dim=0) ** 2 / n
    score = weight.abs() * norm.sqrt()
    mask = torch.zeros_like(weight, dtype=torch.bool)
    order = score.sort(dim=1, stable=True).indices[:, : int(sparsity * weight.shape[1])]
    mask.scatter_(1, order, True)
    weight[mask] = 0


def usual_sparsegpt(weight, inputs, sparsity):
    "A Hessian gathered sample by sample, three factorisations, one column at a time."
    H = torch.zeros(weight.shape[1], weight.shape[1])
    for n, x in enumerate(inputs, start=1):
        x = x.reshape(-1, x.shape[-1]).float().T
        H *= (n - 1) / n
        x = (2 / n) ** 0.5 * x
        H += x @ x.T
    W = weight.clone()
    dead = H.diagonal() == 0
    H[dead, dead] = 1
    W[:, dead] = 0
    H += 0.01 * H.diagonal().mean() * torch.eye(len(H))
    U = torch.linalg.cholesky(
        torch.cholesky_inverse(torch.linalg.cholesky(H)), upper=True
    )
    for i in range(0, W.shape[1], BLOCK_SIZE):
        j = min(i + BLOCK_SIZE, W.shape[1])
        block = W[:, i:j].clone()
        inner = U[i:j, i:j]
        result = torch.zeros_like(block)
        errors = torch.zeros_like(block)
        score = block**2 / inner.diagonal() ** 2
        mask = score <= score.flatten().sort().values[int(score.numel() * sparsity)]
        for c in range(j - i):
            w = block[:, c]
            d = inner[c, c]
            q = w.clone()
            q[mask[:, c]] = 0
            result[:, c] = q
            error = (w - q) / d
            block[:, c:] -= error.unsqueeze(1) @ inner[c, c:].unsqueeze(0)
            errors[:, c] = error
        W[:, i:j] = result
        W[:, j:] -= errors @ U[i:j, j:]
    weight.copy_(W)


USUAL = {"wanda": usual_wanda, "sparsegpt": usual_sparsegpt}


class Caught(Exception):
    "Raised to leave the model once the first block has been given its input."


def inputs_of_first_block(model, batch):
    "The hidden states of each example, and the other arguments of a block."
    states = []
    others = {}

    def catch(module, args, kwargs):
        states.append(args[0] if args else kwargs["hidden_states"])
        others.update({k: v for k, v in kwargs.items() if k != "hidden_states"})
        raise Caught

    hook = model.layers[0].register_forward_pre_hook(catch, with_kwargs=True)
    for example in batch["input_ids"]:
        with suppress(Caught):
            model(input_ids=example[None])
    hook.remove()
    return states, others


@torch.no_grad()
def usual_way(model, batch, sparsity, method):
    "Block by block, example by example, each block computed twice."
    states, others = inputs_of_first_block(model, batch)
    for block in model.layers:
        inputs = {layer: [] for layer in linears_of(block).values()}

        def note(layer, args, output):
            inputs[layer].append(args[0])

        hooks = [layer.register_forward_hook(note) for layer in inputs]
        for x in states:
            block(x, **others)
        for hook in hooks:
            hook.remove()
        for layer in inputs:
            USUAL[method](layer.weight.data, inputs[layer], sparsity)
        outputs = [block(x, **others) for x in states]
        states = [out[0] if isinstance(out, tuple) else out for out in outputs]
    return model


def groups_of(block):
    "Layers of a Llama block that read the same input."
    attention, mlp = block.self_attn, block.mlp
    return [
        [attention.q_proj, attention.k_proj, attention.v_proj],
        [attention.o_proj],
        [mlp.gate_proj, mlp.up_proj],
        [mlp.down_proj],
    ]


def products_alone(model, tokens):
    """Seconds of the matrix products that SparseGPT cannot do without.

    These are the Gram matrix, its factor, and the corrections of later columns.
    """
    seconds = 0.0
    for block in model.layers:
        for group in groups_of(block):
            width = group[0].in_features
            out = sum(layer.out_features for layer in group)
            x = torch.randn(tokens, width)
            errors = torch.randn(BLOCK_SIZE, out)
            columns = torch.randn(width, out)
            stats = Statistics.of(x, mean=False, gram=False)
            start = time.perf_counter()
            stats.gram = x.T @ x
            U = inverse_factor(stats)
            for i in range(0, width, BLOCK_SIZE):
                end = i + BLOCK_SIZE
                some = errors[: min(BLOCK_SIZE, width - i)]
                columns[end:].addmm_(U[i:end, end:].T, some, alpha=-1)
            seconds += time.perf_counter() - start
    return seconds


def timed(function):
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


def zeros(model):
    "Where the weights of all linear layers are zero, as one vector."
    layers = linears_of(model).values()
    return torch.cat([(layer.weight == 0).flatten() for layer in layers])


@torch.no_grad()
def compare(hidden, method, rounds, sparsity=0.5):
    "Medians over rounds of: ours / plain pass, usual / ours; and the share of equal masks."
    dense, batch = make(hidden)
    targets = dict.fromkeys(linears_of(dense), sparsity)

    def ours(**options):
        model = copy.deepcopy(dense)
        layers = linears_of(model)
        options["progress"] = False
        seconds, _ = timed(
            lambda: prune_layers(model, batch, layers, targets, method, **options)
        )
        return seconds, model

    def usual():
        model = copy.deepcopy(dense)
        return timed(lambda: usual_way(model, batch, sparsity, method))

    dense(**batch)  # the first pass is slower than those that follow
    times = []
    for _ in range(rounds):
        seconds = {}
        seconds["plain"], _ = timed(lambda: dense(**batch))
        seconds["ours"], mine = ours()
        seconds["usual"], theirs = usual()
        if method == "sparsegpt":
            tokens = batch["input_ids"].numel()
            seconds["products"] = products_alone(dense, tokens)
        times.append(seconds)

    def median_ratio(above, below):
        return statistics.median(row[above] / row[below] for row in times)

    _, by_block = ours(micro_batch=EXAMPLES, recompute="block")
    wanted = zeros(theirs)
    result = {
        "hidden": hidden,
        "method": method,
        "rounds": rounds,
        "ours_over_plain": median_ratio("ours", "plain"),
        "usual_over_plain": median_ratio("usual", "plain"),
        "usual_over_ours": median_ratio("usual", "ours"),
        "equal_masks_block_by_block": (
            (zeros(by_block) == wanted).float().mean().item()
        ),
        "equal_masks_in_flight": (zeros(mine) == wanted).float().mean().item(),
        "seconds": {
            key: statistics.median(row[key] for row in times) for key in times[0]
        },
    }
    if method == "sparsegpt":
        result["products_share_of_ours"] = statistics.median(
            row["products"] / (row["ours"] - row["plain"]) for row in times
        )
    return result


def main(args):
    results = []
    for hidden in args.hidden:
        for method in args.methods:
            result = compare(hidden, method, args.rounds)
            results.append(result)
            print({k: v for k, v in result.items() if k != "seconds"}, flush=True)
    if not args.out:
        return
    options = f"--hidden {' '.join(map(str, args.hidden))} --rounds {args.rounds}"
    about = dict(
        command=f"python tests/tools/benchmarks/pruning.py {options}",
        device="cpu",
        seed=0,
        threads=torch.get_num_threads(),
        processor=platform.machine(),
        torch=torch.__version__,
        tokens=EXAMPLES * TOKENS,
        layers=LAYERS,
        results=results,
    )
    args.out.write_text(json.dumps(about, indent=1))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hidden", type=int, nargs="+", default=[256, 512, 1024])
    parser.add_argument("--methods", nargs="+", default=["wanda", "sparsegpt"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    main(parser.parse_args())
