"""How long one point of the accuracy surface takes (prune both parts, answer 1,000 questions), staged and naively.

    OMP_NUM_THREADS=1 python tests/benchmarks/allocation.py [--questions 1000] [--out FILE.json]

A grid over vision and language sparsity, one front per row of it; the naive way to the same point is taken in
alternation. Seconds are medians over points; `grid_seconds_per_point` also counts the fronts. They are seconds of
processor time, so that other programs on the machine do not count; on one thread they are what a quiet core takes.
"""

import argparse
import json
import platform
import statistics
import time

import torch

from ressa.allocation.budgets import by_modality
from ressa.course.allocation_study import Staged
from ressa.course.bench import bench
from ressa.data.collate import calibration_batch
from ressa.models.bundled import load_bundled
from ressa.pruning.engine import prune


def timed(function):
    start = time.process_time()
    result = function()
    return time.process_time() - start, result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--questions", type=int, default=1000)
    parser.add_argument("--out")
    args = parser.parse_args()
    questions, (dense, processor) = bench(args.questions), load_bundled("cpu")
    sample = calibration_batch(questions.train, processor, seed=0)
    staged = Staged(load_bundled("cpu")[0], sample, questions.questions)
    fronts, points, naive, equal = [], [], [], True
    for vision in (0.5, 0.6, 0.7, 0.8):
        front = by_modality(dense, vision=vision)
        fronts.append(timed(lambda: staged.front(front))[0])
        for language in (0.4, 0.5, 0.6, 0.7, 0.8):
            last, model = by_modality(dense, language=language), load_bundled("cpu")[0]
            seconds, right = timed(lambda: staged.right(front, last))
            points.append(seconds)

            def whole():
                prune(model, sample, sparsity=front | last, progress=False)
                return questions.right(model)

            seconds, wanted = timed(whole)
            naive.append(seconds)
            equal = equal and bool((right == wanted).all())
    result = dict(
        questions=args.questions,
        points=len(points),
        staged_seconds=statistics.median(points),
        front_seconds=statistics.median(fronts),
        naive_seconds=statistics.median(naive),
        grid_seconds_per_point=(sum(points) + sum(fronts)) / len(points),
        equal_answers=equal,
        device="cpu",
        threads=torch.get_num_threads(),
        processor=platform.machine(),
        seed=0,
        clock="processor time",
        command=f"OMP_NUM_THREADS={torch.get_num_threads()} python tests/benchmarks/allocation.py "
        f"--questions {args.questions}",
    )
    print(json.dumps(result, indent=1))
    if args.out:
        with open(args.out, "w") as file:
            json.dump(result, file, indent=1)
