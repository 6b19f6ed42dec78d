"""Work that a kill ends in the middle; each is run in a process of its own."""

import os
import signal


def _dies_at_call(number, function):
    "The function, which kills its process instead of being called for that time."
    calls = []

    def counted(*args, **options):
        calls.append(args)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **options)

    return counted


def targets_of_two_batches(file):
    "Cache what the bundled model says; dies in the third batch of four."
    from ressa import cache_targets, load_bundled, load_easy_vqa

    dense, processor = load_bundled("cpu")
    dense.forward = _dies_at_call(3, dense.forward)
    examples = load_easy_vqa("train").select(range(8))
    cache_targets(dense, examples, processor, file, batch_size=2)


def one_of_two_files(folder):
    "Write a folder of packed weights; dies at the second file."
    import torch

    from ressa.checkpoints import sparse
    from ressa.files import whole_folder

    sparse._write_file = _dies_at_call(2, sparse._write_file)
    with whole_folder(folder) as part:
        sparse._write_packed(part, {str(i): torch.ones(9) for i in range(4)}, 40)
