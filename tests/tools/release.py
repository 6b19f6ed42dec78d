"""The story of a release from an empty environment, command by command: build, install, run, for each row of .ci/matrix.json.

    python tests/tools/release.py --out nbs/results/release.json
    python tests/tools/release.py --only oldest --python 3.11=/opt/python3.11/bin/python

An environment holds the wheel and what it requires, nothing else; the tests come last, with pytest and hypothesis."""

import argparse
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
MATRIX = json.loads((ROOT / ".ci" / "matrix.json").read_text())
TOOLS = (
    "nbdev",
    "execnb",
    "fastcore",
    "jupyterlab",
    "nbclient",
    "pytest",
    "hypothesis",
    "sphinx",
    "mypy",
)
SHOWN = (
    "torch",
    "transformers",
    "datasets",
    "peft",
    "accelerate",
    "safetensors",
    "matplotlib",
    "ipywidgets",
    "numpy",
)
TESTED = ("pruning", "adaptation", "checkpoints")  # folders of tests/
NOT_TESTED = "not slow and not notebook and not browser"
NO_TOOLS = f"import importlib.util as u; print([t for t in {TOOLS!r} if u.find_spec(t)] or 'no development tools')"
VERSIONS = f"import importlib.metadata as m, json; print(json.dumps({{n: m.version(n) for n in {SHOWN!r}}}))"
QUICK = "--limit 200 --steps 40 --calibration 32"


def steps(wheel):
    "What a user types; `{bin}` are the programs of the environment."
    return [
        f"{{bin}}python -m pip install --quiet {wheel}",
        "{bin}python -m pip check",
        f'{{bin}}python -c "{NO_TOOLS}"',
        '{bin}python -W error -c "from ressa import *"',
        f"{{bin}}ressa repair {QUICK} --out walk",
        "{bin}ressa pack --model walk/model --out packed",
        "{bin}ressa unpack --model packed --out plain",
        "{bin}python -m pip install --quiet pytest hypothesis",
        "{bin}python -m pytest -q -p no:cacheprovider -x --import-mode=importlib "
        f"-m '{NOT_TESTED}' " + " ".join(f"tests/{name}" for name in TESTED),
    ]


def told(command, folder, **more):
    "Run a command; what it was, its exit code, its last line and its minutes."
    environment = {
        k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")
    }
    start = time.monotonic()
    done = subprocess.run(
        command,
        shell=True,
        cwd=folder,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment
        | dict(HF_HUB_OFFLINE="1", TQDM_DISABLE="1", OMP_NUM_THREADS="1")
        | more,
    )
    if done.returncode:
        print(done.stdout[-3000:], file=sys.stderr)
    lines = [
        line
        for line in re.split(r"[\r\n]+", done.stdout)
        if line.strip() and not line.startswith("WARNING")
    ]
    last = (
        re.sub(r" in [\d.]+s.*", "", lines[-1].replace(str(folder), "."))
        if lines
        else ""
    )
    last = last.replace(tempfile.gettempdir(), "…")[
        :160
    ]  # what a page keeps names no machine's folders
    return dict(
        exit=done.returncode,
        said=last.strip("= "),
        minutes=round((time.monotonic() - start) / 60, 1),
    )


def import_seconds(folder, times=5):
    "Medians of what `import ressa.all` takes in our own modules, and in all others."
    own, others = [], []
    for _ in range(times):
        done = subprocess.run(
            'env/bin/python -X importtime -c "from ressa import *"',
            shell=True,
            cwd=folder,
            capture_output=True,
            text=True,
        )
        rows = re.findall(r"import time:\s+(\d+) \|\s+\d+ \|\s+(\S+)", done.stderr)
        for where, ours in ((own, True), (others, False)):
            where.append(
                sum(
                    int(micro)
                    for micro, name in rows
                    if (name.partition(".")[0] == "ressa") == ours
                )
                / 1e6
            )
    return dict(
        own_seconds=round(statistics.median(own), 3),
        other_seconds=round(statistics.median(others), 2),
        times=times,
    )


def story(row, python, wheel):
    "All steps of a row of the matrix in an empty environment; they end with the first that fails."
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        shutil.copytree(
            ROOT / "tests",
            folder / "tests",
            ignore=shutil.ignore_patterns("__pycache__"),
        )
        shutil.copy(wheel, folder)
        constraints = (
            {}
            if row["constraints"] is None
            else dict(PIP_CONSTRAINT=str(ROOT / row["constraints"]))
        )
        rows = [
            dict(command=f"python{row['python']} -m venv env")
            | told(f"{python} -m venv env", folder)
        ]
        for step in steps(wheel.name):
            if rows[-1]["exit"]:
                break
            rows.append(
                dict(command=step.replace("{bin}", ""))
                | told(step.replace("{bin}", "env/bin/"), folder, **constraints)
            )
            print(
                f"{row['name']}: {rows[-1]['exit']}  {rows[-1]['command'][:90]}",
                file=sys.stderr,
                flush=True,
            )
        shown = subprocess.run(
            ["env/bin/python", "-c", VERSIONS],
            cwd=folder,
            capture_output=True,
            text=True,
        )
        return row | {
            "versions": json.loads(shown.stdout or "{}"),
            "story": rows,
            "import": import_seconds(folder),
        }


def built(folder):
    "The source distribution, and the wheel made out of it."
    command = "python -m build --outdir dist ."
    row = dict(command=command) | told(
        f"{sys.executable} -m build --outdir {folder} {ROOT}", folder
    )
    files = sorted(
        path for path in Path(folder).iterdir() if path.suffix in (".whl", ".gz")
    )
    row["said"] = ", ".join(
        f"{path.name}: {path.stat().st_size / 2**20:.1f} MiB" for path in files
    )
    return row, next((path for path in files if path.suffix == ".whl"), None)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only",
        choices=[row["name"] for row in MATRIX],
        help="this row alone; the others stay as they are",
    )
    parser.add_argument(
        "--python",
        action="append",
        default=[],
        metavar="3.11=PATH",
        help="where a Python is, if not on the path",
    )
    parser.add_argument(
        "--out", type=Path, default=ROOT / "nbs" / "results" / "release.json"
    )
    args = parser.parse_args()
    pythons = dict(entry.split("=", 1) for entry in args.python)
    about = json.loads(args.out.read_text()) if args.out.exists() else {}
    rows = {row["name"]: row for row in about.get("rows", [])}
    with tempfile.TemporaryDirectory() as folder:
        build, wheel = built(Path(folder))
        if build["exit"]:
            return build["exit"]
        for row in MATRIX:
            if args.only not in (None, row["name"]):
                continue
            python = pythons.get(row["python"]) or shutil.which(
                f"python{row['python']}"
            )
            if python is None:
                print(f"{row['name']}: no Python {row['python']} here, skipped")
                continue
            rows[row["name"]] = story(row, python, wheel)
            about = dict(
                version=wheel.name.split("-")[1],
                command="python tests/tools/release.py",
                seed=0,
                device=f"cpu, {platform.machine()}, 1 thread",
                build=build,
                rows=[*rows.values()],
            )
            args.out.write_text(json.dumps(about, indent=1) + "\n")
    return int(any(step["exit"] for row in rows.values() for step in row["story"]))


if __name__ == "__main__":
    sys.exit(main())
