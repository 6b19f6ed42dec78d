"""A whole `ressa repair` of a model of 200 million weights on a folder of conversations: memory beside
its formula for each teacher, two kills, two processes, and plain transformers that opens the result.

    python tests/tools/benchmarks/whole_run.py [--steps 6] [--out nbs/results/whole_run.json]

The model is a random Idefics3 in float32 (a SmolVLM is one; its own processor needs torchvision). The data are 300 drawn pictures, each with a conversation. Every
run is a process of its own, which a recipe describes. The peak is the highest resident memory less that of
the same process when all was imported and nothing was loaded, which is what the formula counts.
"""

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import threading
import time
from datetime import date
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

SIZE = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12)
HEADS = dict(num_attention_heads=12, initializer_range=0.02)
PICTURE = 64  # pixels along one side
PICTURES = 300
RECIPE = """model: {folder}/model
data: {folder}/data/llava.json
image_folder: {folder}/data
sparsity: 0.5
calibration: 8
micro_batch: 2
test_batch: 4
limit: 8
max_steps: {steps}
save_steps: 2
per_device_train_batch_size: 2
learning_rate: 1e-3
"""
SERVED = """
import sys
from PIL import Image
from transformers import pipeline
served = pipeline("image-text-to-text", model=sys.argv[1], device="cpu")
answer = served(
    images=Image.open(sys.argv[2]), text="<image>What color is the shape?",
    max_new_tokens=4, return_full_text=False,
)
assert isinstance(answer[0]["generated_text"], str) and "ressa" not in sys.modules
"""


def make(folder):
    "Save the model, its processor and the data; the number of weights."
    import shapes_folder
    import transformers
    from tiny_models import LLAMA, VIT, idefics3

    torch.manual_seed(0)
    config, processor = idefics3()
    edge = {"longest_edge": PICTURE}
    processor.image_processor.size = processor.image_processor.max_image_size = edge
    processor.image_seq_len = 4
    config = transformers.Idefics3Config(
        vision_config=VIT | SIZE | HEADS | dict(image_size=PICTURE, patch_size=16),
        text_config=LLAMA | SIZE | HEADS | dict(num_key_value_heads=12),
        scale_factor=2,
        image_token_id=config.image_token_id,
    )
    model = transformers.AutoModelForImageTextToText.from_config(config)
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    shapes_folder.make(folder / "data", "llava", rows=PICTURES, size=PICTURE)
    return sum(weight.numel() for weight in model.parameters())


def status(name):
    "A value of this process in bytes: VmRSS, the memory now, or VmHWM, the highest."
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024


def act(line):
    "Run the command in this process; print the formula and the peak, in bytes."
    from ressa.cli import main_job
    from ressa.cli.app import main

    formula = []
    needed = main_job.memory_needed

    def noted(*given):
        need = needed(*given)
        formula.append(need)
        return need

    main_job.memory_needed = noted
    before = status("VmRSS")
    code = main(line)
    need = formula[0]  # before anything is loaded
    found = {"formula": need.peak, "peak": status("VmHWM") - before, "code": code or 0}
    print(json.dumps(found))


def command(folder, out, *more):
    "The command line of a run."
    out = folder / "runs" / out
    return ["repair", str(folder / "recipe.yaml"), "--out", str(out), *more]


def run_to_end(line):
    "Run a command line in a process; what it printed."
    done = subprocess.run(line, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    return done.stdout


def killed(line, when, seconds=1200):
    "Start a command line, and kill it as soon as a file is there."
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    threading.Thread(target=process.stdout.read, daemon=True).start()
    ends = time.monotonic() + seconds
    while not when() and time.monotonic() < ends and process.poll() is None:
        time.sleep(0.05)
    was_running = process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    return was_running


def weights_of(folder):
    "The weights of a saved model."
    from safetensors.torch import load_file

    return load_file(folder / "model/model.safetensors")


def largest_difference(one, other, start):
    "Of the weights of two models, as a share of the largest change since the start."
    changes = (float((one[name] - start[name]).abs().max()) for name in one)
    differences = (float((one[name] - other[name]).abs().max()) for name in one)
    return max(differences) / max(changes)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--act", nargs=argparse.REMAINDER)
    args = parser.parse_args()
    if args.act:
        act(args.act)
        sys.exit()
    ressa = [sys.executable, "-m", "ressa"]
    os.environ.update(OMP_NUM_THREADS="1", TQDM_DISABLE="1")
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        found = {"weights": make(folder)}
        recipe = RECIPE.format(folder=folder, steps=args.steps)
        (folder / "recipe.yaml").write_text(recipe)

        memory = {}
        for teacher in ("model", "cached"):
            line = command(folder, teacher, "--teacher", teacher)
            printed = run_to_end([sys.executable, __file__, "--act", *line])
            memory[teacher] = json.loads(printed.splitlines()[-1])
            print(teacher, memory[teacher], flush=True)
        found["memory"] = memory
        peaks = {teacher: row["peak"] for teacher, row in memory.items()}
        found["cached_below_model"] = 1 - peaks["cached"] / peaks["model"]
        whole = weights_of(folder / "runs/model")

        again = [*ressa, *command(folder, "killed", "--teacher", "model")]
        checkpoints = folder / "runs/killed/checkpoints/repaired"
        found["killed"] = [
            killed(again, (folder / "runs/killed/steps.json").exists),
            killed(again, lambda: any(checkpoints.glob("*/trainer_state.json"))),
        ]
        run_to_end(again)
        resumed = weights_of(folder / "runs/killed")
        found["same_bits_after_kills"] = all(
            torch.equal(resumed[name], weight) for name, weight in whole.items()
        )
        print("killed", found["killed"], found["same_bits_after_kills"], flush=True)

        picture = str(next((folder / "data/pictures").iterdir()))
        served = [
            sys.executable,
            "-c",
            SERVED,
            str(folder / "runs/model/model"),
            picture,
        ]
        run_to_end(served)
        found["opened_by_pipeline"] = True

        launch = Path(sys.executable).with_name("accelerate")
        several = [str(launch), "launch", "--cpu", "--num_processes", "2"]
        line = command(folder, "two", "--per_device_train_batch_size", "1")
        run_to_end([*several, "-m", "ressa", *line])
        two = weights_of(folder / "runs/two")
        start = weights_of(folder)
        found["two_processes_differ_by"] = largest_difference(whole, two, start)
        print("two processes", found["two_processes_differ_by"], flush=True)
        recipe = recipe.replace(str(folder), "FOLDER")
    found |= {
        "what": __doc__.splitlines()[0],
        "recipe": recipe,
        "dtype": "float32",
        "seed": 0,
        "date": date.today().isoformat(),
        "machine": platform.machine(),
        "torch": torch.__version__,
        "command": "python tests/tools/benchmarks/whole_run.py",
    }
    print(json.dumps(found, indent=1))
    if args.out:
        args.out.write_text(json.dumps(found, indent=1) + "\n")
