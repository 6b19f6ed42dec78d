"""The memory that pruning takes beyond the weights, beside both formulas: that of one layer, and that of the command.

    python tests/tools/benchmarks/pruning_formulas.py [--out nbs/results/pruning_formulas.json]

The model and the batch are those of `big.py`: 200 million weights, 32 examples of 128 tokens. Each way of pruning has a
process of its own. There the peak of resident memory is set back when the model is made (Linux), so the figure is what
pruning adds.
"""

import argparse
import ctypes
import gc
import json
import platform
import subprocess
import sys
from pathlib import Path

import torch
from big import formula, make

from ressa.cli.memory import Load, memory_needed
from ressa.devices import return_large_blocks
from ressa.parts import modality_map
from ressa.pruning.engine import prune

WAYS = {  # how `prune` is called
    "as the command: no dense copy": dict(keep_dense=False),
    "the same, in micro-batches of 8": dict(keep_dense=False, micro_batch=8),
    "with a dense copy, to undo a failure": dict(keep_dense=True),
}


def status(key):
    "Bytes in a line of Linux's account of this process."
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def by_formula(model, batch, micro_batch=None, **_):
    "Bytes beyond the weights, by `memory_needed`."
    examples, tokens = batch["input_ids"].shape
    vision = model.config.vision_config
    load = Load(
        dtype_bytes=4,
        text_tokens=tokens,
        picture_tokens=(vision.image_size // vision.patch_size) ** 2,
        batch_size=1,
        calibration=examples,
        micro_batch=micro_batch,
        test_batch=1,
        ranks=0,
        teacher="none",
        sparsity=0.5,
        picture_bytes=batch["pixel_values"][0].nbytes,
    )
    need = memory_needed(model, modality_map(model), load)
    return need.phases["pruning"] - sum(p.nbytes for p in model.parameters())


def measure(way, **shape):
    "Prune in this process: what it adds to the resident memory, and what the formulas say."
    return_large_blocks()  # as the command does for a large model on a CPU
    model, batch = make(**shape)
    gc.collect()
    # memory that was freed before would be used again without being seen
    ctypes.CDLL(None).malloc_trim(0)
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is resident
    prune(model, batch, "wanda", sparsity=0.5, progress=False, **WAYS[way])
    return {
        "measured": status("VmHWM") - before,
        "memory_needed": by_formula(model, batch, **WAYS[way]),
        "one layer": formula(model, batch, torch.empty(0))["pruning"],
    }


def main(out):
    rows = {}
    for way in WAYS:
        done = subprocess.run(
            [sys.executable, __file__, "--way", way],
            capture_output=True,
            text=True,
            check=True,
        )
        rows[way] = json.loads(done.stdout.splitlines()[-1])
    about = dict(
        command="python tests/tools/benchmarks/pruning_formulas.py",
        device="cpu",
        seed=0,
        threads=torch.get_num_threads(),
        processor=platform.machine(),
        torch=torch.__version__,
    )
    result = about | {"bytes": rows}
    print(json.dumps(result, indent=1))
    if out:
        out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        print(json.dumps(measure(args.way)))
    else:
        main(args.out)
