"""Peak memory of pruning a model of 200 million weights, in micro-batches, on 8 examples and on 128.

    python tests/tools/benchmarks/memory.py [--out nbs/results/prune_memory.json]

The model is the SmolVLM of `big.py`. Each figure is the peak of resident bytes of a process of
its own, less that of a process that makes the model and the batch and does nothing. `hidden` is
one copy of what has to wait between two blocks: the hidden states of the pictures, or of the
tokens, whichever are more. `pixels` are the pictures themselves.
"""

import argparse
import json
import platform
import resource
import subprocess
import sys
from pathlib import Path

import big
import torch

from ressa.pruning.engine import prune

EXAMPLES = (8, 128)
TOKENS = 24  # of which 16 are a picture's
PATCHES, VISION_WIDTH, TEXT_WIDTH = 64, 768, 576  # of `big.make`
FLOAT = 4  # bytes
WAYS = {
    "nothing": None,
    "micro_batch=4": {"micro_batch": 4, "recompute": "block"},
}


def act(way, examples):
    "Do one thing in this process, and print its peak of resident bytes."
    model, batch = big.make(examples=examples, tokens=TOKENS)
    if WAYS[way] is not None:
        options = dict(sparsity=0.5, keep_dense=False, progress=False)
        prune(model, batch, "wanda", **options | WAYS[way])
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)  # KiB on Linux


def peak(way, examples):
    "What `act` prints, from a process of its own."
    done = subprocess.run(
        [sys.executable, __file__, "--way", way, "--examples", str(examples)],
        capture_output=True,
        text=True,
        check=True,
    )
    return int(done.stdout.split()[-1])


def measure():
    "Peaks by way and number of examples, and how they grow."
    few, many = EXAMPLES
    peaks = {way: {n: peak(way, n) for n in EXAMPLES} for way in WAYS}
    added = {
        way: {n: found[n] - peaks["nothing"][n] for n in EXAMPLES}
        for way, found in peaks.items()
        if way != "nothing"
    }
    per_example = max(PATCHES * VISION_WIDTH, TOKENS * TEXT_WIDTH) * FLOAT
    return dict(
        examples=list(EXAMPLES),
        tokens=TOKENS,
        peak_bytes=peaks,
        added_bytes=added,
        growth_bytes={way: found[many] - found[few] for way, found in added.items()},
        hidden_bytes=(many - few) * per_example,
        pixels_bytes=(many - few) * 3 * 128 * 128 * FLOAT,
    )


def main(args):
    result = measure()
    about = dict(
        command="python tests/tools/benchmarks/memory.py",
        device="cpu",
        seed=0,
        threads=torch.get_num_threads(),
        processor=platform.machine(),
        torch=torch.__version__,
    )
    print(json.dumps(result, indent=1))
    if args.out:
        args.out.write_text(json.dumps(about | result, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--examples", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        act(args.way, args.examples)
    else:
        main(args)
