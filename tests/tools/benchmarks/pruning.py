"""How long pruning takes, beside one plain forward pass and beside the usual way of doing it.

    python tests/benchmarks/pruning.py [--hidden 256 512 1024] [--rounds 5] [--out FILE.json]

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

import torch
from transformers import LlamaConfig, LlamaModel

from ressa.pruning.engine import prune_layers
from ressa.pruning.sparsegpt import inverse_factor
from ressa.pruning.statistics import Statistics


def make(hidden, layers=4, rows=64, tokens=64):
    "Llama blocks with random weights, a batch of rows × tokens, and the blocks' linear layers by name."
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=hidden,
        intermediate_size=11 * hidden // 4,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        use_cache=False,
    )
    model = LlamaModel(config).eval()
    batch = {"input_ids": torch.randint(0, 1000, (rows, tokens))}
    linears = {
        name: m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)
    }
    return model, batch, linears


def usual_wanda(weight, inputs, sparsity):
    "Score, full sort, scatter."
    norm = torch.zeros(weight.shape[1])
    seen = 0
    for x in inputs:
        x = x.reshape(-1, x.shape[-1]).float()
        norm = norm * (seen / (seen + 1)) + x.norm(dim=0) ** 2 / (seen + 1)
        seen += 1
    score = weight.abs() * norm.sqrt()
    mask = torch.zeros_like(weight, dtype=torch.bool)
    order = score.sort(dim=1, stable=True).indices[:, : int(sparsity * weight.shape[1])]
    mask.scatter_(1, order, True)
    weight[mask] = 0


def usual_sparsegpt(weight, inputs, sparsity, blocksize=128):
    "A Hessian gathered sample by sample, three factorisations, one column at a time."
    n, H = 0, torch.zeros(weight.shape[1], weight.shape[1])
    for x in inputs:
        x = x.reshape(-1, x.shape[-1]).float().T
        H *= n / (n + 1)
        n += 1
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
    for i in range(0, W.shape[1], blocksize):
        j = min(i + blocksize, W.shape[1])
        block, inner = W[:, i:j].clone(), U[i:j, i:j]
        result, errors = torch.zeros_like(block), torch.zeros_like(block)
        score = block**2 / inner.diagonal() ** 2
        mask = score <= score.flatten().sort().values[int(score.numel() * sparsity)]
        for c in range(j - i):
            w, d = block[:, c], inner[c, c]
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


@torch.no_grad()
def usual_way(model, batch, sparsity, method):
    "Block by block, sample by sample, each block computed twice."
    states, rest = [], {}

    class Caught(Exception):
        pass

    def catch(module, args, kwargs):
        states.append(args[0] if args else kwargs["hidden_states"])
        rest.update({k: v for k, v in kwargs.items() if k != "hidden_states"})
        raise Caught

    hook = model.layers[0].register_forward_pre_hook(catch, with_kwargs=True)
    for row in batch["input_ids"]:
        try:
            model(input_ids=row[None])
        except Caught:
            pass
    hook.remove()
    for block in model.layers:
        layers = [m for m in block.modules() if isinstance(m, torch.nn.Linear)]
        inputs = {layer: [] for layer in layers}
        hooks = [
            m.register_forward_hook(lambda m, i, o: inputs[m].append(i[0]))
            for m in layers
        ]
        for x in states:
            block(x, **rest)
        for hook in hooks:
            hook.remove()
        for layer in layers:
            USUAL[method](layer.weight.data, inputs[layer], sparsity)
        states = [
            out[0] if isinstance(out := block(x, **rest), tuple) else out
            for x in states
        ]
    return model


def products_alone(model, batch, method="sparsegpt"):
    "Seconds of the matrix products that SparseGPT cannot do without: Gram matrix, factor, corrections to later columns."
    total, rows = 0.0, batch["input_ids"].numel()
    for block in model.layers:
        groups = [
            [block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj],
            [block.self_attn.o_proj],
            [block.mlp.gate_proj, block.mlp.up_proj],
            [block.mlp.down_proj],
        ]
        for group in groups:
            width, out = group[0].in_features, sum(m.out_features for m in group)
            x, errors, columns = (
                torch.randn(rows, width),
                torch.randn(128, out),
                torch.randn(width, out),
            )
            stats = Statistics.of(x, mean=False, gram=False)
            start = time.perf_counter()
            stats.gram = x.T @ x
            U = inverse_factor(stats)
            for i in range(0, width, 128):
                columns[i + 128 :].addmm_(
                    U[i : i + 128, i + 128 :].T, errors[: min(128, width - i)], alpha=-1
                )
            total += time.perf_counter() - start
    return total


def timed(function):
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


def zeros(model):
    return torch.cat(
        [
            (m.weight == 0).flatten()
            for m in model.modules()
            if isinstance(m, torch.nn.Linear)
        ]
    )


@torch.no_grad()
def compare(hidden, method, rounds, sparsity=0.5):
    "Medians over rounds of: ours / plain pass, usual / ours; and the share of equal masks."
    dense, batch, _ = make(hidden)
    chosen = {name: sparsity for name in make(hidden)[2]}

    def ours(**options):
        model = copy.deepcopy(dense)
        layers = {name: model.get_submodule(name) for name in chosen}
        return timed(
            lambda: prune_layers(
                model, batch, layers, chosen, method, progress=False, **options
            )
        )[0], model

    def usual():
        model = copy.deepcopy(dense)
        return timed(lambda: usual_way(model, batch, sparsity, method))[0], model

    dense(**batch)
    rows = []
    for _ in range(rounds):
        plain, (a, mine), (b, theirs) = (
            timed(lambda: dense(**batch))[0],
            ours(),
            usual(),
        )
        rows.append(dict(plain=plain, ours=a, usual=b))
        if method == "sparsegpt":
            rows[-1]["products"] = products_alone(dense, batch)
    _, by_block = ours(micro_batch=64, recompute="block")
    result = {
        "hidden": hidden,
        "method": method,
        "rounds": rounds,
        "ours_over_plain": statistics.median(r["ours"] / r["plain"] for r in rows),
        "usual_over_plain": statistics.median(r["usual"] / r["plain"] for r in rows),
        "usual_over_ours": statistics.median(r["usual"] / r["ours"] for r in rows),
        "equal_masks_block_by_block": (zeros(by_block) == zeros(theirs))
        .float()
        .mean()
        .item(),
        "equal_masks_in_flight": (zeros(mine) == zeros(theirs)).float().mean().item(),
        "seconds": {key: statistics.median(r[key] for r in rows) for key in rows[0]},
    }
    if method == "sparsegpt":
        result["products_share_of_ours"] = statistics.median(
            r["products"] / (r["ours"] - r["plain"]) for r in rows
        )
    return result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hidden", type=int, nargs="+", default=[256, 512, 1024])
    parser.add_argument("--methods", nargs="+", default=["wanda", "sparsegpt"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out")
    args = parser.parse_args()
    results = []
    for hidden in args.hidden:
        for method in args.methods:
            results.append(compare(hidden, method, args.rounds))
            print(
                {
                    k: round(v, 3) if isinstance(v, float) else v
                    for k, v in results[-1].items()
                    if k != "seconds"
                },
                flush=True,
            )
    if args.out:
        options = f"--hidden {' '.join(map(str, args.hidden))} --rounds {args.rounds}"
        with open(args.out, "w") as file:
            json.dump(
                dict(
                    command=f"python tests/benchmarks/pruning.py {options}",
                    device="cpu",
                    seed=0,
                    threads=torch.get_num_threads(),
                    processor=platform.machine(),
                    torch=torch.__version__,
                    tokens=4096,
                    layers=4,
                    results=results,
                ),
                file,
                indent=1,
            )
