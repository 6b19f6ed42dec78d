"""How long one point of the accuracy surface takes (prune both parts, answer 1,000 questions), staged and naively.

    OMP_NUM_THREADS=1 python tests/tools/benchmarks/allocation.py [--questions 1000] [--out FILE.json]

A grid over vision and language sparsity is measured with one front for each vision sparsity, in alternation with
the naive way to the same point. Seconds are medians over points; `grid_seconds_per_point` also counts the fronts.
They are seconds of processor time, so that other programs on the machine do not count; on one thread they are what
an idle core takes.
"""

import argparse
import json
import platform
import time
from statistics import median

import torch

from ressa import by_modality, calibration_batch, load_bundled, prune
from ressa.course.allocation_study import StagedModel
from ressa.course.bench import bench
from ressa.files import write_json

VISION = (0.5, 0.6, 0.7, 0.8)
LANGUAGE = (0.4, 0.5, 0.6, 0.7, 0.8)


def timed(function, *arguments):
    "Seconds of processor time, and the result."
    start = time.process_time()
    result = function(*arguments)
    return time.process_time() - start, result


def naive_right(model, sample, allocation, bench):
    "Which questions a model answers rightly when it is pruned as a whole."
    prune(model, sample, sparsity=allocation, progress=False)
    return bench.right(model)


def measure(questions):
    "Seconds of both ways over the grid, and whether their answers are equal."
    some = bench(questions)
    dense, processor = load_bundled("cpu")
    sample = calibration_batch(some.train, processor, seed=0)
    staged = StagedModel(load_bundled("cpu")[0], sample, some.questions)
    front_seconds = []
    staged_seconds = []
    naive_seconds = []
    equal = True
    for vision in VISION:
        front = by_modality(dense, vision=vision)
        seconds, _ = timed(staged.prune_front, front)
        front_seconds.append(seconds)
        for language in LANGUAGE:
            last = by_modality(dense, language=language)
            seconds, right = timed(staged.right, front, last)
            staged_seconds.append(seconds)
            model, _ = load_bundled("cpu")
            seconds, wanted = timed(naive_right, model, sample, front | last, some)
            naive_seconds.append(seconds)
            equal = equal and bool((right == wanted).all())
    points = len(staged_seconds)
    return dict(
        questions=questions,
        points=points,
        staged_seconds=median(staged_seconds),
        front_seconds=median(front_seconds),
        naive_seconds=median(naive_seconds),
        grid_seconds_per_point=(sum(staged_seconds) + sum(front_seconds)) / points,
        equal_answers=equal,
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--questions", type=int, default=1000)
    parser.add_argument("--out")
    arguments = parser.parse_args()
    threads = torch.get_num_threads()
    result = measure(arguments.questions) | dict(
        device="cpu",
        threads=threads,
        processor=platform.machine(),
        seed=0,
        clock="processor time",
        command=f"OMP_NUM_THREADS={threads} python tests/tools/benchmarks/allocation.py "
        f"--questions {arguments.questions}",
    )
    print(json.dumps(result, indent=1))
    if arguments.out:
        write_json(arguments.out, result, indent=1)


if __name__ == "__main__":
    main()
