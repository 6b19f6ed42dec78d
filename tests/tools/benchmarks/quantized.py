"""Measure what rounding the kept weights costs: `python tests/tools/benchmarks/quantized.py [--real]`.

The bundled model and, with `--real`, the real one are pruned by SparseGPT and packed exactly, in 8 and
in 4 bits. The result is added to nbs/results/quantised.json."""

import argparse
import json
import math
import platform
import tempfile
from pathlib import Path

import torch
import transformers

from ressa.checkpoints.sparse import load_sparse, save_sparse
from ressa.course import real_study
from ressa.course.ablations import pruned_model
from ressa.course.bench import bench
from ressa.evaluation.intervals import wilson
from ressa.files import read_json, write_json

PATH = Path(__file__).parents[3] / "nbs/results/quantised.json"
SPARSITY = 0.7
QUESTIONS = 2000


def weight_bytes(folder):
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def linear_share(model, folder):
    "Bytes of the packed linear layers that are pruned, in units of their 16-bit size."
    pruned = {
        f"{name}.weight": layer.weight.numel()
        for name, layer in model.named_modules()
        if isinstance(layer, torch.nn.Linear)
        and (layer.weight == 0).float().mean() > 0.1
    }
    packed = 0
    for file in folder.glob("*.safetensors"):
        size = int.from_bytes(file.read_bytes()[:8], "little")

        header = json.loads(file.read_bytes()[8 : 8 + size])
        for key, entry in header.items():
            if key.partition("#")[0] in pruned:
                start, stop = entry["data_offsets"]
                packed += stop - start
    return packed / (2 * sum(pruned.values()))


def measured(model, judge):
    "Each number of bits: size and scores of the model that a packed folder gives back."
    dense_bytes = sum(p.numel() for p in model.parameters()) * 2
    rows = []
    for bits in (None, 8, 4):
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary, "packed")
            save_sparse(model, None, folder, bits=bits)
            again, _ = load_sparse(folder)
            row = {
                "bits": bits,
                "of_dense": weight_bytes(folder) / dense_bytes,
                "linear_layers": linear_share(model, folder),
            }
        rows.append(row | judge(again))
        print(rows[-1], flush=True)
    return rows


def judged_bundled(model):
    right = bench(QUESTIONS).right(model.float())
    return {"accuracy": float(right.mean()), "interval": wilson(right), "n": len(right)}


def judged_real(model):
    found = real_study.measured(model)
    texts = {
        name: math.exp(sum(found[name]) / len(found[name])) for name in real_study.TEXTS
    }
    return {
        "accuracy": found["accuracy"],
        "n": real_study.QUESTIONS,
        "perplexity": texts,
    }


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--real", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    study = read_json(PATH) if PATH.exists() else {}
    if options.real:
        model, _ = real_study.pruned("sparsegpt", {"language": SPARSITY}, 0)
        study["real"] = measured(model, judged_real)
    else:
        model = pruned_model(str(SPARSITY), method="sparsegpt").bfloat16()
        study["bundled"] = measured(model, judged_bundled)
    study |= {
        "what": "pruned to 70 % by SparseGPT (bundled: vision and language; real: "
        "language), packed, loaded again; of_dense: the whole file in units of the "
        "16-bit model; linear_layers: the pruned matrices alone",
        "command": "python tests/tools/benchmarks/quantized.py, and again with --real",
        "seed": 0,
        "device": "cpu, one thread",
        "machine": platform.machine(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    write_json(PATH, study, indent=1)


if __name__ == "__main__":
    main()
