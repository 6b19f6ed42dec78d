"""Pruning a model of 200 million parameters, beside one plain forward pass over the same 4,096 tokens.

    python tests/tools/benchmarks/big.py [--rounds 5] [--out nbs/results/big.json]

A SmolVLM of random weights: 12 vision blocks of width 768, 30 language blocks of width 576, 32 examples of 128 tokens of
which 16 are an image. Its vocabulary is small, so that the forward pass is not made longer by an output layer that pruning never
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

IMAGE = 3  # the token that stands for an image's place
VOCABULARY = 8192
IMAGE_PLACES = 16  # in each example


def make(examples=32, tokens=128, vision_layers=12, layers=30):
    "The model, and a batch of examples × tokens."
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
    ids = torch.randint(10, VOCABULARY, (examples, tokens))
    ids[:, :IMAGE_PLACES] = IMAGE
    batch = dict(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        pixel_values=torch.randn(examples, 1, 3, 128, 128),
    )
    return model, batch


@torch.no_grad()
def plain(model, batch):
    return model(**batch, use_cache=False).logits


def wanda(model, batch):
    return prune(model, batch, "wanda", sparsity=0.5, progress=False)


def timed(function):
    "Seconds by the wall's clock, seconds of processor time, and the result."
    start = time.perf_counter()
    worked = time.process_time()
    result = function()
    return time.perf_counter() - start, time.process_time() - worked, result


def formula(model, batch, logits):
    "Bytes, from shapes alone."
    layers = modality_map(model).layers.values()
    largest = max(layer.weight.numel() for layer in layers)
    return dict(
        weights=sum(p.nbytes for p in model.parameters()),
        logits=logits.nbytes,
        # The largest layer's score, the copy of it that is sorted, the new weight (4 bytes
        # each) and the mask (1 byte).
        pruning=13 * largest,
    )


def compare(rounds=5, **shape):
    "Medians over rounds of pruning / plain pass."
    dense, batch = make(**shape)
    logits = plain(dense, batch)
    seconds = {"plain": [], "prune": []}
    work = {"plain": [], "prune": []}

    def take_turn(name, function, model):
        taken, worked, result = timed(lambda: function(model, batch))
        seconds[name].append(taken)
        work[name].append(worked)
        return result

    for i in range(rounds):
        model = copy.deepcopy(dense)
        if i % 2 == 0:
            take_turn("plain", plain, dense)
        report = take_turn("prune", wanda, model)
        if i % 2 == 1:
            take_turn("plain", plain, dense)
    ratios = [a / b for a, b in zip(seconds["prune"], seconds["plain"])]
    work_ratios = [a / b for a, b in zip(work["prune"], work["plain"])]
    return dict(
        parameters=sum(p.numel() for p in dense.parameters()),
        tokens=batch["input_ids"].numel(),
        rounds=rounds,
        ratio=statistics.median(ratios),
        ratios=ratios,
        work_ratio=statistics.median(work_ratios),
        work_ratios=work_ratios,
        seconds={name: statistics.median(values) for name, values in seconds.items()},
        parts=report.parts(),
        bytes=formula(dense, batch, logits),
    )


STAGES = ("nothing", "plain", "prune")  # what a process does once the model is made


def peak(stage):
    "Peak resident bytes of a process that makes the model, and then does a stage."
    done = subprocess.run(
        [sys.executable, __file__, "--stage", stage],
        capture_output=True,
        text=True,
        check=True,
    )
    return int(done.stdout.split()[-1])


def act(stage):
    "Do a stage in this process, and print its peak of resident bytes."
    model, batch = make()
    if stage == "plain":
        plain(model, batch)
    elif stage == "prune":
        wanda(model, batch)
    kibibytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # on Linux
    print(kibibytes * 1024)


def main(args):
    # First, while this process is small: Linux lets a child inherit the peak of its parent.
    peaks = {stage: [peak(stage) for _ in range(3)] for stage in STAGES}
    result = compare(args.rounds) | {"peak_bytes": peaks}
    print(json.dumps(result, indent=1))
    if args.out:
        about = dict(
            command=f"python tests/tools/benchmarks/big.py --rounds {args.rounds}",
            device="cpu",
            seed=0,
            threads=torch.get_num_threads(),
            processor=platform.machine(),
            torch=torch.__version__,
        )
        args.out.write_text(json.dumps(about | result, indent=1))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.stage:
        act(args.stage)
    else:
        main(args)
