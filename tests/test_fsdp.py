"""The configuration for several GPUs, on two processes of a CPU."""

import json
import os
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from peft import PeftModel
from safetensors.torch import load_file

from ressa.adaptation.adapters import zero_masks, zeros_filled
from ressa.pruning.masks import sparsity_of

CONFIG = str(files("ressa") / "assets" / "fsdp.json")
HERE = Path(__file__).parent


def environment(*options):
    "What `accelerate launch --config_file ressa/assets/fsdp.json` hands to its processes."
    args = launch_command_parser().parse_args(
        ["--config_file", CONFIG, *options, "script.py"]
    )
    return prepare_multi_gpu_env(_validate_launch_command(args)[0])


def launched(folder, processes, batch_size, env):
    folder.mkdir()
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(processes),
        str(HERE / "fsdp_processes.py"),
        str(folder),
        str(batch_size),
    ]
    done = subprocess.run(
        command,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads((folder / "found.json").read_text()), load_file(
        folder / "adapter" / "adapter_model.safetensors"
    )


def test_two_processes_with_half_a_model_each_repair_like_one_with_all_of_it(tmp_path):
    env = {
        k: v
        for k, v in environment("--mixed_precision", "no").items()
        if k.startswith(("FSDP_", "ACCELERATE_"))
    }
    (one, alone), (two, shared) = (
        launched(tmp_path / "one", 1, 8, {}),
        launched(tmp_path / "two", 2, 4, env),
    )
    assert (
        two["kind"] == "FSDP"
        and two["share"] == pytest.approx(0.5, abs=0.02)
        and one["share"] == 1
    )
    assert two["cut"] >= 8  # the blocks of all three networks, and the rest
    for a, b in zip(one["log"], two["log"], strict=True):
        for key in ("loss", "task_loss", "distillation_loss", "grad_norm"):
            assert a[key] == pytest.approx(b[key], rel=1e-3), key
    size = max(weight.abs().max() for name, weight in alone.items() if "lora_B" in name)
    assert alone.keys() == shared.keys()
    for name, weight in alone.items():
        torch.testing.assert_close(
            shared[name], weight, rtol=0, atol=float(size) / 100, msg=name
        )
    from same_repair import pruned_and_dense

    model = pruned_and_dense()[0]
    masks = zero_masks(model)
    merged = PeftModel.from_pretrained(
        model, tmp_path / "two" / "adapter"
    ).merge_and_unload(safe_merge=True)
    assert (
        zeros_filled(masks, merged) == 0
        and sparsity_of(merged.get_submodule(next(iter(masks))).weight) > 0.6
    )
