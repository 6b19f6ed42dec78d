"""Packing in memory, with checksums, the disk left out; and CSR against dense products.

python tests/tools/benchmarks/storage.py --out nbs/results/storage.json
"""

import argparse
import json
import platform
import statistics
import time
import warnings
import zlib

import torch

from ressa.checkpoints.packing import pack_tensor, unpack_tensor
from ressa.checkpoints.semi_structured import measured_gain
from ressa.pruning.scores import magnitude

TARGETS = {
    "50%": dict(sparsity=0.5),
    "70%": dict(sparsity=0.7),
    "2:4": dict(pattern="2:4"),
}


def packing(dtype, target, width, rounds):
    "Dense megabytes per second of one linear layer, packed and unpacked in turn; medians."
    weight = magnitude(torch.randn(width, width), **TARGETS[target]).to(dtype)
    seconds = {"pack": [], "unpack": []}
    for _ in range(rounds + 1):
        start = time.perf_counter()
        packed = pack_tensor(weight)
        checksum = zlib.crc32(packed.values, zlib.crc32(packed.index))
        half = time.perf_counter()
        assert zlib.crc32(packed.values, zlib.crc32(packed.index)) == checksum
        again = unpack_tensor(packed, weight.dtype, weight.shape)
        seconds["pack"].append(half - start)
        seconds["unpack"].append(time.perf_counter() - half)
    assert torch.equal(again, weight)
    rate = {
        f"{way}_mb_s": weight.nbytes / 1e6 / statistics.median(times[1:])
        for way, times in seconds.items()
    }
    return {
        "dtype": str(dtype)[6:],
        "target": target,
        "how": packed.how,
        "ratio": (packed.index.nbytes + packed.values.nbytes) / weight.nbytes,
    } | rate


def csr(width, sparsities, tokens, rounds):
    "Sparsity → tokens → how many times faster than dense."
    found = {}
    for sparsity in sparsities:
        weight = magnitude(torch.randn(width, width), sparsity=sparsity)
        found[str(sparsity)] = {
            str(n): measured_gain(weight, torch.Tensor.to_sparse_csr, n, rounds)
            for n in tokens
        }
    return {"width": width, "dtype": "float32", "rounds": rounds, "gains": found}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--width", type=int, default=4096, help="of the layers that are packed"
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", message="Sparse CSR")
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    rows = [
        packing(dtype, target, args.width, args.rounds)
        for dtype in (torch.bfloat16, torch.float32)
        for target in TARGETS
    ]
    for row in rows:
        print(row, flush=True)
    table = csr(
        1024, (0.5, 0.7, 0.8, 0.9, 0.95, 0.99), (1, 4, 16, 64, 256), 3 * args.rounds
    )
    for sparsity, row in table["gains"].items():
        print(sparsity, {n: round(gain, 2) for n, gain in row.items()})
    if args.out:
        command = f"python tests/tools/benchmarks/storage.py --threads {args.threads} --width {args.width} --rounds {args.rounds}"
        with open(args.out, "w") as file:
            json.dump(
                dict(
                    command=command,
                    device=f"{platform.machine()} CPU",
                    seed=0,
                    threads=args.threads,
                    torch=torch.__version__,
                    width=args.width,
                    packing=rows,
                    csr=table,
                ),
                file,
                indent=1,
            )
