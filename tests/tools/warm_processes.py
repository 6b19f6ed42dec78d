"""Processes that start at once: they are forked from one that has imported what tests and pages import."""

import multiprocessing
import os
import random
import socket

import numpy
import torch

# Without pyplot: it has to find the notebook's shell when it is first imported.
IMPORTED_ONCE = [
    "torch",
    "transformers",
    "peft",
    "datasets",
    "pandas",
    "ipywidgets",
    "ipykernel.kernelapp",
    "matplotlib.backends.backend_agg",
    "ressa.models.bundled",
    "ressa.adaptation.repair",
]
_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(IMPORTED_ONCE)


def _call(function, environment, args, options):
    "Run in the forked process."
    os.environ.update(environment)
    # A fork inherits its parent's random numbers. In a new process they are new, and what
    # forgets to seed has to show it.
    random.seed()
    numpy.random.seed()
    torch.seed()
    function(*args, **options)


def started(
    function,  # of a module in `tests/tools` or in the library
    *args,
    environment=None,
    **options,
):
    "A process that calls a function; its `exitcode` is below 0 if a signal ended it."
    process = _forks.Process(
        target=_call, args=(function, environment or {}, args, options)
    )
    process.start()
    return process


def ended(function, *args, **options):
    "Call a function in a process of its own, and return the process's exit code."
    process = started(function, *args, **options)
    process.join()
    return process.exitcode


def together(count, function, *args, environment=None):
    "Call a function in processes that know of each other, as those of `torchrun` do."
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    processes = []
    for rank in range(count):
        told = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=count)
        told |= dict(LOCAL_WORLD_SIZE=count, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        told = {name: str(value) for name, value in told.items()}
        told |= dict(OMP_NUM_THREADS="1") | (environment or {})
        processes.append(started(function, *args, environment=told))
    for process in processes:
        process.join(300)
    codes = [process.exitcode for process in processes]
    for process in processes:
        if process.is_alive():
            process.kill()
    assert codes == [0] * count, "a process failed; it said why above"
