"""Pruning a model of 200 million parameters, beside one plain forward pass over the same 4,096 tokens.

    python tests/benchmarks/big.py [--rounds 5] [--out nbs/results/big.json]

A SmolVLM of random weights: 12 blocks of 768 that see, 30 blocks of 576 that read, 32 rows of 128 tokens of which 16 are
an image. Its vocabulary is small, so that the forward pass is not made longer by an output layer that pruning never
touches. Times are taken in alternation in one process; the figure is the median of the ratios. `work` is the same in
processor time, which other programs on the machine hardly move. Memory is the peak of a
process of its own for each stage, three times, beside what the shapes say.
"""

import argparse
import copy
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from transformers import SmolVLMConfig, SmolVLMForConditionalGeneration

from ressa.parts import modality_map
from ressa.pruning.engine import prune

IMAGE, VOCABULARY = 3, 8192


def make(rows=32, tokens=128, vision_layers=12, layers=30):
    "The model, and a batch of rows × tokens."
    torch.manual_seed(0)
    vision = dict(
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=vision_layers,
        num_attention_heads=12,
        image_size=128,
        patch_size=16,
    )
    text = dict(
        model_type="llama",
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=VOCABULARY,
        pad_token_id=0,
    )
    config = SmolVLMConfig(
        vision_config=vision,
        text_config=text,
        scale_factor=2,
        image_token_id=IMAGE,
        tie_word_embeddings=True,
        pad_token_id=0,
    )
    model = SmolVLMForConditionalGeneration(config).eval()
    ids = torch.randint(10, VOCABULARY, (rows, tokens))
    ids[:, :16] = IMAGE
    batch = dict(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        pixel_values=torch.randn(rows, 1, 3, 128, 128),
    )
    return model, batch


@torch.no_grad()
def plain(model, batch):
    return model(**batch, use_cache=False).logits


def wanda(model, batch):
    return prune(model, batch, "wanda", sparsity=0.5, progress=False)


def timed(function):
    "Seconds by the wall's clock, seconds that all processors worked for us, and the result."
    start, worked = time.perf_counter(), time.process_time()
    result = function()
    return time.perf_counter() - start, time.process_time() - worked, result


def formula(model, batch, logits):
    "Bytes, from shapes alone."
    layer = max(m.weight.numel() for m in modality_map(model).layers.values())
    return dict(
        weights=sum(p.nbytes for p in model.parameters()),
        logits=logits.nbytes,
        # of the largest layer: its score and the copy that is sorted, the new weight (4 bytes each) and the mask
        pruning=13 * layer,
    )


def compare(rounds=5, **shape):
    "Medians over rounds of pruning / plain pass."
    dense, batch = make(**shape)
    logits = plain(dense, batch)
    seconds, work = ({"plain": [], "prune": []} for _ in range(2))
    for i in range(rounds):
        model = copy.deepcopy(dense)
        turns = [
            ("plain", lambda: plain(dense, batch)),
            ("prune", lambda: wanda(model, batch)),
        ]
        for name, function in turns[:: (-1) ** i]:
            taken, worked, result = timed(function)
            seconds[name].append(taken)
            work[name].append(worked)
            if name == "prune":
                report = result
    ratios, work = (
        [a / b for a, b in zip(each["prune"], each["plain"])]
        for each in (seconds, work)
    )
    return dict(
        parameters=sum(p.numel() for p in dense.parameters()),
        tokens=batch["input_ids"].numel(),
        rounds=rounds,
        ratio=statistics.median(ratios),
        ratios=ratios,
        work_ratio=statistics.median(work),
        work_ratios=work,
        seconds={name: statistics.median(values) for name, values in seconds.items()},
        parts=report.parts(),
        bytes=formula(dense, batch, logits),
    )


def peak(stage):
    "Peak resident bytes of a process that makes the model, and then does `stage`: 'nothing', 'plain' or 'prune'."
    done = subprocess.run(
        [sys.executable, __file__, "--stage", stage],
        capture_output=True,
        text=True,
        check=True,
    )
    return int(done.stdout.split()[-1])


def act(stage):
    model, batch = make()
    if stage != "nothing":
        {"plain": plain, "prune": wanda}[stage](model, batch)
    print(
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )  # Linux counts in KiB


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    parser.add_argument(
        "--stage", choices=["nothing", "plain", "prune"], help=argparse.SUPPRESS
    )
    args = parser.parse_args()
    if args.stage:
        act(args.stage)
        sys.exit()
    # First, while this process is small: Linux lets a child inherit the peak of its parent.
    peaks = {
        stage: [peak(stage) for _ in range(3)]
        for stage in ("nothing", "plain", "prune")
    }
    result = compare(args.rounds) | {"peak_bytes": peaks}
    print(json.dumps(result, indent=1))
    if args.out:
        about = dict(
            command=f"python tests/benchmarks/big.py --rounds {args.rounds}",
            device="cpu",
            seed=0,
            threads=torch.get_num_threads(),
            processor=platform.machine(),
            torch=torch.__version__,
        )
        args.out.write_text(json.dumps(about | result, indent=1))
