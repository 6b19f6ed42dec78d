"""What a 7B model asks of a GPU: pruning, a step of repair, and 2:4 inference.

    python tests/benchmarks/gpu.py [--rows 128] [--micro-batch 8] [--steps 10] [--out nbs/results/gpu.json]
    python tests/benchmarks/gpu.py --tiny --device cpu

An InstructBLIP of Vicuna-7B's shape with random weights, made on the GPU itself in bfloat16, and random images and words.
Times of forms that are compared are taken in alternation; the figures are medians of the ratios. Memory is the peak that
torch's allocator counts, 0 on a CPU. `--tiny` is the same on a model of tens of thousands of weights.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F
from transformers import InstructBlipConfig, InstructBlipForConditionalGeneration

from ressa.adaptation.sparse_lora import SparseLoraConfig, peft_targets
from ressa.parts import modality_map
from ressa.pruning.engine import prune

IMAGE = 5
TINY = dict(
    vision=dict(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=28,
    ),
    qformer=dict(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=100,
        encoder_hidden_size=32,
    ),
    text=dict(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=100,
    ),
)
VICUNA_7B = dict(
    vision={},
    qformer=dict(vocab_size=30523),  # EVA ViT-g and BERT-base are the defaults
    text=dict(
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        vocab_size=32001,
    ),
)


def make(shape, device):
    "The model, in bfloat16 from its first moment on."
    config = InstructBlipConfig(
        vision_config=shape["vision"],
        qformer_config=shape["qformer"],
        image_token_index=IMAGE,
        text_config=shape["text"] | dict(model_type="llama", pad_token_id=0),
        num_query_tokens=32,
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            return InstructBlipForConditionalGeneration(config).eval()
    finally:
        torch.set_default_dtype(before)


def pairs(model, rows, words=32):
    "Random images, each with 32 places for it and some words."
    size, vocabulary = (
        model.config.vision_config.image_size,
        model.config.text_config.vocab_size,
    )
    ids = torch.randint(10, vocabulary, (rows, 32 + words))
    ids[:, :32] = IMAGE
    asked = torch.randint(10, model.config.qformer_config.vocab_size, (rows, words))
    batch = dict(
        pixel_values=torch.randn(rows, 3, size, size, dtype=torch.bfloat16),
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        qformer_input_ids=asked,
        qformer_attention_mask=torch.ones_like(asked),
    )
    return {name: value.to(model.device) for name, value in batch.items()}


def measured(device, function):
    "Seconds, peak MiB that torch allocated, and the result."
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    result = function()
    if on_gpu:
        torch.cuda.synchronize()
    return (
        time.perf_counter() - start,
        torch.cuda.max_memory_allocated() / 2**20 if on_gpu else 0.0,
        result,
    )


def pruning(shape, device, method, rows, micro_batch):
    "One pass over all pairs, on a fresh model. The first, of a few pairs, only warms up."
    for n in (micro_batch, rows):
        model = make(shape, device)
        batch = pairs(model, n)
        held = torch.cuda.memory_allocated() / 2**20 if device.type == "cuda" else 0.0
        seconds, peak, report = measured(
            device,
            lambda: prune(
                model,
                batch,
                method,
                sparsity=0.5,
                progress=False,
                micro_batch=micro_batch,
            ),
        )
        if n != rows:
            del model, batch
    return model, dict(
        method=method,
        rows=rows,
        micro_batch=micro_batch,
        seconds=seconds,
        peak_mib=peak,
        model_mib=held,
        layers=len(report.layers),
        parts=report.parts(),
    )


def step(student, batch):
    "Forward, loss and backward; the optimizer of so few weights is nothing beside them."
    student.zero_grad(set_to_none=True)
    student(
        **batch,
        labels=batch["input_ids"].masked_fill(batch["input_ids"] == IMAGE, -100),
    ).loss.backward()


def repair_steps(shape, device, model, rows, steps):
    "SparseLoRA beside plain LoRA, each on its own copy of the adapters' places: seconds per step, in turns."
    batch, targets = pairs(model, rows), peft_targets(model, 8, 16)
    student = get_peft_model(model, LoraConfig(**targets)).train()
    found = {"lora": [], "sparselora": []}
    peaks = dict.fromkeys(found, 0.0)
    for i in range(steps + 2):  # two rounds to warm up
        for name in found:
            base = (
                student.unload()
            )  # adapters off, and others on: the model itself is never copied
            config = (
                LoraConfig(**targets) if name == "lora" else SparseLoraConfig(**targets)
            )
            student = get_peft_model(base, config).train()
            seconds, peak, _ = measured(device, lambda: step(student, batch))
            if i > 1:
                found[name].append(seconds)
            peaks[name] = max(peaks[name], peak)
    return dict(
        rows=rows,
        steps=steps,
        seconds={name: statistics.median(values) for name, values in found.items()},
        ratio=statistics.median(
            a / b for a, b in zip(found["sparselora"], found["lora"])
        ),
        peak_mib=peaks,
    )


def semi_structured(shape, device, tokens=(1, 16, 256, 4096), rounds=20):
    "A 2:4 layer against the same layer dense, for each shape of layer of the model; nothing without a GPU."
    if device.type != "cuda":
        return []
    from torch.sparse import to_sparse_semi_structured

    rows, sizes = (
        [],
        sorted(
            {
                tuple(m.weight.shape)
                for m in modality_map(make(shape, "meta")).layers.values()
            }
        ),
    )
    for out, width in sizes:
        weight = torch.randn(out, width, device=device, dtype=torch.bfloat16)
        weight = weight * torch.tensor([1, 1, 0, 0], device=device).repeat(width // 4)
        forms = {"dense": weight, "2:4": to_sparse_semi_structured(weight)}
        for n in tokens:
            x = torch.randn(
                max(n, 64), width, device=device, dtype=torch.bfloat16
            )  # the kernels want a full tile
            times = {name: [] for name in forms}
            for i in range(rounds + 3):
                for name, w in forms.items():
                    seconds = (
                        measured(device, lambda: [F.linear(x, w) for _ in range(10)])[0]
                        / 10
                    )
                    if i > 2:
                        times[name].append(seconds)
            rows.append(
                {
                    "out": out,
                    "in": width,
                    "tokens": len(x),
                    "dense_over_sparse": statistics.median(
                        a / b for a, b in zip(times["dense"], times["2:4"])
                    ),
                    "microseconds": {
                        name: 1e6 * statistics.median(t) for name, t in times.items()
                    },
                }
            )
    return rows


def run(tiny=False, device="cuda", rows=128, micro_batch=8, steps=10):
    "Everything, as one dictionary."
    device, shape = torch.device(device), TINY if tiny else VICUNA_7B
    found = {"pruning": []}
    for method in ("wanda", "sparsegpt"):
        model, row = pruning(shape, device, method, rows, micro_batch)
        found["pruning"].append(row)
        if method == "wanda":
            del model
    found["parameters"] = sum(p.numel() for p in model.parameters())
    found["repair"] = repair_steps(shape, device, model, micro_batch, steps)
    del model
    return found | {"semi_structured": semi_structured(shape, device)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--micro-batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    result = run(args.tiny, args.device, args.rows, args.micro_batch, args.steps)
    about = dict(
        command=f"python tests/benchmarks/gpu.py {'--tiny ' * args.tiny}--device {args.device} --rows {args.rows} "
        f"--micro-batch {args.micro_batch} --steps {args.steps}",
        seed=0,
        torch=torch.__version__,
        device=torch.cuda.get_device_name() if args.device == "cuda" else args.device,
    )
    print(json.dumps(about | result, indent=1))
    if args.out:
        args.out.write_text(json.dumps(about | result, indent=1))
