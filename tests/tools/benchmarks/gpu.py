"""What a 7B model asks of a GPU: pruning, a step of repair, and 2:4 inference.

    python tests/tools/benchmarks/gpu.py [--examples 128] [--micro-batch 8] [--steps 10] [--out nbs/results/gpu.json]
    python tests/tools/benchmarks/gpu.py --tiny --device cpu

An InstructBLIP of Vicuna-7B's shape with random weights, made on the GPU itself in bfloat16, and random images and words.
Times of forms that are compared are taken in alternation; the figures are medians of the ratios. Memory is the peak that
torch's allocator counts, 0 on a CPU. `--tiny` is the same on a model of tens of thousands of weights.
"""

import argparse
import copy
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

IMAGE = 5  # the token that stands for an image's place
IMAGE_PLACES = 32  # in each example, as many as the Q-Former has queries
MIB = 2**20
WARM_UP_ROUNDS = 3  # not counted
CALLS = 10  # of a layer for one measurement, since one call is too short for a clock
SMALLEST_TILE = 64  # rows that the 2:4 kernels want at least
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
        num_query_tokens=IMAGE_PLACES,
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            return InstructBlipForConditionalGeneration(config).eval()
    finally:
        torch.set_default_dtype(before)


def pairs(model, examples, words=32):
    "Random images, each with its places in the prompt and some words."
    config = model.config
    size = config.vision_config.image_size
    ids_shape = (examples, IMAGE_PLACES + words)
    ids = torch.randint(10, config.text_config.vocab_size, ids_shape)
    ids[:, :IMAGE_PLACES] = IMAGE
    questions = torch.randint(10, config.qformer_config.vocab_size, (examples, words))
    batch = dict(
        pixel_values=torch.randn(examples, 3, size, size, dtype=torch.bfloat16),
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        qformer_input_ids=questions,
        qformer_attention_mask=torch.ones_like(questions),
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
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated() / MIB if on_gpu else 0.0
    return seconds, peak, result


def prune_once(shape, device, method, examples, micro_batch):
    "One pass over the pairs, on a fresh model: the model, and what the pass took."
    model = make(shape, device)
    batch = pairs(model, examples)
    held = torch.cuda.memory_allocated() / MIB if device.type == "cuda" else 0.0
    options = dict(sparsity=0.5, progress=False, micro_batch=micro_batch)
    seconds, peak, report = measured(
        device, lambda: prune(model, batch, method, **options)
    )
    return model, dict(
        method=method,
        rows=examples,
        micro_batch=micro_batch,
        seconds=seconds,
        peak_mib=peak,
        model_mib=held,
        layers=len(report.layers),
        parts=report.parts(),
    )


def pruning(shape, device, method, examples, micro_batch):
    "One pass over all pairs. An earlier pass over a few pairs only warms up."
    prune_once(shape, device, method, micro_batch, micro_batch)
    return prune_once(shape, device, method, examples, micro_batch)


def step(student, batch):
    "Forward, loss and backward; the optimizer of so few weights costs nothing beside them."
    student.zero_grad(set_to_none=True)
    labels = batch["input_ids"].masked_fill(batch["input_ids"] == IMAGE, -100)
    student(**batch, labels=labels).loss.backward()


def repair_steps(model, examples, steps):
    "SparseLoRA beside plain LoRA on the same layers: seconds per step, in turns."
    device = model.device
    batch = pairs(model, examples)
    targets = peft_targets(model, 8, 16)
    configs = {
        "lora": LoraConfig(**targets),
        "sparselora": SparseLoraConfig(**targets),
    }
    found = {name: [] for name in configs}
    peaks = dict.fromkeys(configs, 0.0)
    for i in range(steps + WARM_UP_ROUNDS):
        for name, config in configs.items():
            student = get_peft_model(model, copy.deepcopy(config)).train()
            seconds, peak, _ = measured(device, lambda: step(student, batch))
            model = student.unload()  # adapters off: the model itself is never copied
            if i >= WARM_UP_ROUNDS:
                found[name].append(seconds)
            peaks[name] = max(peaks[name], peak)
    ratios = [a / b for a, b in zip(found["sparselora"], found["lora"])]
    return dict(
        rows=examples,
        steps=steps,
        seconds={name: statistics.median(values) for name, values in found.items()},
        ratio=statistics.median(ratios),
        peak_mib=peaks,
    )


def layer_shapes(shape):
    "The different sizes (out, in) of the layers of a model."
    layers = modality_map(make(shape, "meta")).layers.values()
    return sorted({tuple(layer.weight.shape) for layer in layers})


def compare_semi_structured(weight, x, rounds):
    "A weight (out, in) with two of four zeros against the same weight dense, in turns."
    from torch.sparse import to_sparse_semi_structured

    forms = {"dense": weight, "2:4": to_sparse_semi_structured(weight)}
    times = {name: [] for name in forms}
    for i in range(rounds + WARM_UP_ROUNDS):
        for name, form in forms.items():
            seconds, _, _ = measured(
                x.device, lambda: [F.linear(x, form) for _ in range(CALLS)]
            )
            if i >= WARM_UP_ROUNDS:
                times[name].append(seconds / CALLS)
    ratios = [dense / sparse for dense, sparse in zip(times["dense"], times["2:4"])]
    return {
        "out": weight.shape[0],
        "in": weight.shape[1],
        "tokens": len(x),
        "dense_over_sparse": statistics.median(ratios),
        "microseconds": {
            name: 1e6 * statistics.median(values) for name, values in times.items()
        },
    }


def semi_structured(shape, device, tokens=(1, 16, 256, 4096), rounds=20):
    "A 2:4 layer against a dense one, for each size of layer; nothing without a GPU."
    if device.type != "cuda":
        return []
    results = []
    for out, width in layer_shapes(shape):
        pattern = torch.tensor([1, 1, 0, 0], device=device).repeat(width // 4)
        weight = torch.randn(out, width, device=device, dtype=torch.bfloat16)
        for n in tokens:
            n = max(n, SMALLEST_TILE)
            x = torch.randn(n, width, device=device, dtype=torch.bfloat16)
            results.append(compare_semi_structured(weight * pattern, x, rounds))
    return results


def run(tiny=False, device="cuda", examples=128, micro_batch=8, steps=10):
    "Everything, as one dictionary."
    device = torch.device(device)
    shape = TINY if tiny else VICUNA_7B
    found = {"pruning": []}
    for method in ("wanda", "sparsegpt"):
        model = None  # two models of seven billion weights need not fit
        model, result = pruning(shape, device, method, examples, micro_batch)
        found["pruning"].append(result)
    found["parameters"] = sum(p.numel() for p in model.parameters())
    found["repair"] = repair_steps(model, micro_batch, steps)
    del model
    found["semi_structured"] = semi_structured(shape, device)
    return found


def main(args):
    result = run(args.tiny, args.device, args.examples, args.micro_batch, args.steps)
    tiny = "--tiny " if args.tiny else ""
    about = dict(
        command=f"python tests/tools/benchmarks/gpu.py {tiny}--device {args.device} "
        f"--examples {args.examples} --micro-batch {args.micro_batch} "
        f"--steps {args.steps}",
        seed=0,
        torch=torch.__version__,
        device=torch.cuda.get_device_name() if args.device == "cuda" else args.device,
    )
    print(json.dumps(about | result, indent=1))
    if args.out:
        args.out.write_text(json.dumps(about | result, indent=1))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--examples", type=int, default=128)
    parser.add_argument("--micro-batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--out", type=Path)
    main(parser.parse_args())
