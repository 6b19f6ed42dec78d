"""The configuration for several GPUs, on two processes of a CPU."""

import json
from importlib.resources import files

import fsdp_processes
import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from peft import PeftModel
from safetensors.torch import load_file
from warm_processes import together

from ressa.adaptation.adapters import zero_masks, zeros_filled
from ressa.pruning.masks import sparsity_of

CONFIG = str(files("ressa") / "assets" / "fsdp.json")


def environment(*options):
    "What `accelerate launch --config_file ressa/assets/fsdp.json` hands to its processes."
    arguments = ["--config_file", CONFIG, *options, "script.py"]
    args = launch_command_parser().parse_args(arguments)
    everything = prepare_multi_gpu_env(_validate_launch_command(args)[0])
    return {
        name: value
        for name, value in everything.items()
        if name.startswith(("FSDP_", "ACCELERATE_"))
    }


def launched(folder, processes, batch_size, env):
    "What the processes found, and the adapter that they saved."
    folder.mkdir()
    together(processes, fsdp_processes.main, folder, batch_size, environment=env)
    found = json.loads((folder / "found.json").read_text())
    return found, load_file(folder / "adapter" / "adapter_model.safetensors")


@pytest.mark.slow
def test_two_processes_with_half_a_model_each_repair_like_one_with_all_of_it(
    case, tmp_path
):
    one, alone = launched(tmp_path / "one", 1, 8, {})
    env = environment("--mixed_precision", "no")
    two, shared = launched(tmp_path / "two", 2, 4, env)
    assert one["share"] == 1
    assert two["kind"] == "FSDP"
    assert two["share"] == pytest.approx(0.5, abs=0.02)
    assert two["cut"] >= 8  # the blocks of all three networks, and the rest
    for a, b in zip(one["log"], two["log"], strict=True):
        for key in ("loss", "task_loss", "distillation_loss", "grad_norm"):
            assert a[key] == pytest.approx(b[key], rel=1e-3), key
    assert alone.keys() == shared.keys()
    moved = max(float(w.abs().max()) for name, w in alone.items() if "lora_B" in name)
    for name, weight in alone.items():
        torch.testing.assert_close(
            shared[name], weight, rtol=0, atol=moved / 100, msg=name
        )
    masks = zero_masks(case.pruned)
    student = PeftModel.from_pretrained(case.pruned, tmp_path / "two" / "adapter")
    merged = student.merge_and_unload(safe_merge=True)
    assert zeros_filled(masks, merged) == 0
    some_layer = next(iter(masks))
    assert sparsity_of(merged.get_submodule(some_layer).weight) > 0.6
