"""Break it many times, and count: wrong calls, damaged checkpoints, kills and full disks at random moments, memory, determinism.

    python tests/tools/reliability/faults.py --rounds 50 --out nbs/results/reliability.json

A fault is survived if the call is refused by name or its result is right, if damage is found, and if the same command, given
again after a kill or an error, ends with the same bits as one that nothing disturbed."""

import argparse
import contextlib
import ctypes
import hashlib
import io
import json
import os
import platform
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import warnings
from pathlib import Path

os.environ |= dict(
    TQDM_DISABLE="1",
    HF_HUB_OFFLINE="1",
    TRANSFORMERS_VERBOSITY="error",
    OMP_NUM_THREADS="1",
)
HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import torch  # noqa: E402

from ressa.adaptation.repair import repair
from ressa.checkpoints.sparse import load_sparse, save_sparse
from ressa.cli.app import main as ressa
from ressa.data.collate import calibration_batch
from ressa.data.easy_vqa import load_easy_vqa
from ressa.models.bundled import load_bundled
from ressa.pruning.engine import prune

SMALL = dict(
    prune=["--calibration", "8"],
    repair=["--limit", "8", "--steps", "3", "--batch-size", "4", "--calibration", "8"],
)
WRONG = [
    ["--sparsity", "1.3"],
    ["--sparsity", "nan"],
    ["--sparsity", "-0.1"],
    ["--method", "wandering"],
    ["--pattern", "4:2"],
    ["--pattern", "2:7"],
    ["--vision", "2"],
    ["--lr", "nan"],
    ["--lr", "inf"],
    ["--lr", "0"],
    ["--temperature", "nan"],
    ["--temperature", "-1"],
    ["--distill-weight", "nan"],
    ["--steps", "-3"],
    ["--limit", "0"],
    ["--batch-size", "0"],
    ["--calibration", "0"],
    ["--device", "abacus"],
    ["--dtype", "int3"],
    ["--model", "/nowhere"],
    ["--data", "/nowhere.json"],
    ["--steps", "three"],
    ["--no-such-flag", "1"],
    ["--model", os.devnull],
    ["--data", os.devnull],
]


def obey_modes():
    "From now on a folder's mode binds this process, as it binds everyone but root (capabilities(7), bits 1 and 2)."
    version, held = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    call = ctypes.CDLL(None, use_errno=True)
    if call.capget(version, held):
        raise OSError(ctypes.get_errno(), "capget")
    held[0] &= ~0b110
    if call.capset(version, held):
        raise OSError(ctypes.get_errno(), "capset")


def forked(work, limit=None, modes=False):
    "Start `work` in a child that may write files of at most `limit` bytes, or where modes allow; its output is dropped."
    child = os.fork()
    if child:
        return child
    code = 70  # an exception that nobody has met
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in (1, 2):
            os.dup2(nowhere, stream)
        sys.stdout, sys.stderr = open(1, "w"), open(2, "w")
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        if modes:
            obey_modes()
        code = work() or 0
    finally:
        os._exit(code)


def ended(child):
    "Exit code of a child; negative: the signal that ended it."
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def bits(folder):
    "A checksum of every file of weights in a folder, by name."
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(Path(folder).rglob("*.safetensors"))
    }


def commands():
    "What is disturbed: name → (work on a folder, the folder of its weights)."
    model = load_bundled("cpu")[0]

    def command(name):
        return lambda out: ressa([name, "--out", str(out), *SMALL[name]])

    def save(out):
        if out.exists():
            return 0
        save_sparse(model, None, out, max_shard_size=2e5)

    return {
        "ressa prune": (command("prune"), "model"),
        "ressa repair": (command("repair"), "model"),
        "save_sparse": (save, "."),
    }


class Counts:
    "Kind of fault → tried, survived, and what was lost."

    def __init__(self, rows, part=""):
        self.rows, self.part = rows, part

    def note(self, kind, survived, what=""):
        row = self.rows.setdefault(
            kind, dict(part=self.part, tried=0, survived=0, lost=[])
        )
        row["tried"] += 1
        row["survived"] += bool(survived)
        if not survived:
            row["lost"].append(what)


def wrong_calls(counts, rounds, folder):
    import wrong_calls as calls

    for seed in range(rounds):
        for call in calls.calls(seed):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = calls.outcome(call)
            counts.note(
                f"wrong call: {call.kind}",
                found in ("right", "refused"),
                f"{call.name}: {found}",
            )


def wrong_commands(counts, rounds, folder):
    for arguments in WRONG:
        out, said = folder / "wrong", io.StringIO()
        with (
            contextlib.redirect_stderr(said),
            contextlib.redirect_stdout(io.StringIO()),
        ):
            try:
                code = ressa(
                    ["repair", *SMALL["repair"], *arguments, "--out", str(out)]
                )
            except SystemExit as end:
                code = end.code
            except Exception as error:
                code = repr(error)[:90]
        clear = code == 2 and "error:" in said.getvalue() and not out.exists()
        counts.note(
            "wrong command line", clear, f"{arguments}: {code}: {said.getvalue()[-90:]}"
        )
        shutil.rmtree(out, ignore_errors=True)


def odd_arguments(counts, rounds, folder):
    "Every public function with one argument made odd; nothing about it is random."
    import odd_arguments as odd

    for name, argument, instead, found, said in odd.trials(folder):
        kind = (
            "odd argument, refused by name"
            if found == "refused"
            else "odd argument, or none: a right result"
        )
        counts.note(
            "odd argument: another error" if found == "lost" else kind,
            found != "lost",
            f"{name}({argument}={instead}): {said}",
        )


def damaged(counts, rounds, folder):
    "Random damage to a packed model: bytes turned over, runs of zeros, cuts, files gone or exchanged."
    pristine = folder / "pristine"
    save_sparse(load_bundled("cpu")[0], None, pristine, max_shard_size=2e5)
    whole = {
        name: t.clone() for name, t in load_sparse(pristine)[0].state_dict().items()
    }

    def turn(data):
        data[random.randrange(len(data))] ^= 1 << random.randrange(8)

    def blank(data):
        i = random.randrange(len(data))
        data[i : i + 64] = bytes(len(data[i : i + 64]))

    def cut(data):
        del data[random.randrange(len(data)) :]

    def grow(data):
        data.extend(os.urandom(random.randrange(1, 99)))

    for kind in (turn, blank, cut, grow, "gone", "exchanged"):
        for _ in range(rounds):
            copy = shutil.copytree(pristine, folder / "copy")
            a, b = random.sample(
                sorted(p for p in copy.iterdir() if p.name != "generation_config.json"),
                2,
            )
            if kind == "gone":
                a.unlink()
            elif kind == "exchanged":
                data = a.read_bytes()
                a.write_bytes(b.read_bytes())
                b.write_bytes(data)
            else:
                data = bytearray(a.read_bytes())
                kind(data)
                a.write_bytes(data)
            try:
                again = load_sparse(copy)[0].state_dict()
            except ValueError:
                fine, what = True, ""
            except Exception as error:
                fine, what = False, f"{a.name}: {error!r:.90}"
            else:  # what is still readable must be what was written
                fine = again.keys() == whole.keys() and all(
                    torch.equal(again[k], whole[k]) for k in whole
                )
                what = f"{a.name}: other weights were accepted"
            counts.note(f"damage: {getattr(kind, '__name__', kind)}", fine, what)
            shutil.rmtree(copy)


def resumed(counts, kind, run, out, weights, reference):
    "Give the command again, undisturbed: is it as if nothing had happened?"
    code = ended(forked(lambda: run(out)))
    counts.note(
        kind,
        code == 0 and bits(out / weights) == reference,
        f"given again: exit {code}, other bits",
    )
    for path in out.parent.glob(f"{out.name}*"):
        shutil.rmtree(path)


def half_written(out, weights, reference):
    "Whether a folder of weights is there under its final name that is not whole."
    return (
        (out / weights).exists()
        and weights != "."
        and bits(out / weights) != reference
        or weights == "."
        and out.exists()
        and bits(out) != reference
    )


def disturbed(counts, rounds, folder, only):
    "Kill a command at random moments, and let its disk run full a fifth as often; then give it again."
    for name, (run, weights) in commands().items():
        if name != only:
            continue
        out, start = folder / "out", time.perf_counter()
        if code := ended(forked(lambda: run(out))):
            raise SystemExit(f"{name}: exit {code} without any fault")
        seconds, reference = time.perf_counter() - start, bits(out / weights)
        largest = max(p.stat().st_size for p in out.rglob("*") if p.is_file())
        shutil.rmtree(out)
        for _ in range(rounds):
            child = forked(lambda: run(out))
            time.sleep(random.uniform(0, seconds))
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
            ended(child)
            counts.note(
                f"kill, nothing half-written: {name}",
                not half_written(out, weights, reference),
                "half a folder",
            )
            resumed(counts, f"kill, then again: {name}", run, out, weights, reference)
        for _ in range(-(-rounds // 5)):
            code = ended(forked(lambda: run(out), limit=random.randrange(largest)))
            clear = code in (1, 2) if name.startswith("ressa") else code != 0
            clear = clear and not half_written(out, weights, reference)
            counts.note(
                f"full disk, said and nothing half-written: {name}",
                clear,
                f"exit {code}",
            )
            resumed(
                counts, f"full disk, then again: {name}", run, out, weights, reference
            )
        print(f"{name}: {seconds:.1f} s undisturbed", file=sys.stderr, flush=True)


def disturbed_prune(counts, rounds, folder):
    disturbed(counts, rounds, folder, "ressa prune")


def disturbed_repair(counts, rounds, folder):
    disturbed(counts, rounds, folder, "ressa repair")


def disturbed_save(counts, rounds, folder):
    disturbed(counts, rounds, folder, "save_sparse")


def read_only(counts, rounds, folder):
    "Folders that may be read and not written: to write there is refused, to read from there is enough."
    for name, (run, weights) in commands().items():
        parent = folder / "locked"

        def cases():  # the folder that is locked, each time anew
            parent.mkdir()
            yield "its parent", parent
            if weights == ".":
                return  # an existing folder is never written to
            (parent / "out").mkdir()
            yield "the folder", parent / "out"

        for what, locked in cases():
            before = sorted(parent.rglob("*"))
            locked.chmod(0o555)
            code = ended(forked(lambda: run(parent / "out"), modes=True))
            locked.chmod(0o755)
            clear = (
                code in (1, 2) if name.startswith("ressa") else code == 70
            ) and sorted(parent.rglob("*")) == before
            counts.note(
                f"read-only, refused and nothing written: {name}",
                clear,
                f"{what}: exit {code}",
            )
            if locked != parent:
                locked.rmdir()
            first = (
                ended(forked(lambda: run(folder / "free"))),
                bits(folder / "free" / weights),
            )
            resumed(
                counts,
                f"read-only, then again: {name}",
                run,
                parent / "out",
                weights,
                first[1],
            )
            shutil.rmtree(folder / "free")
        shutil.rmtree(parent)
    packed = folder / "packed"
    save_sparse(*load_bundled("cpu"), packed)
    packed.chmod(0o555)
    code = ended(forked(lambda: load_sparse(packed) and 0, modes=True))
    counts.note("read-only, read: load_sparse", code == 0, f"exit {code}")


def patient():
    "A pruned copy, the dense model, the processor and the rows."
    model, processor = load_bundled("cpu")
    rows = load_easy_vqa("train")
    prune(model, calibration_batch(rows, processor, n=8), sparsity=0.7, progress=False)
    return model, load_bundled("cpu")[0], processor, rows.select(range(512))


def same_again(counts, rounds, folder):
    "The same seed gives the same bits."

    def once(seed, place):
        model, dense, processor, rows = patient()
        report = repair(
            model,
            rows,
            processor,
            teacher=dense,
            folder=place,
            steps=3,
            batch_size=4,
            seed=seed,
        )
        return [w.clone() for w in report.model.parameters()]

    for seed in range(rounds):
        first, second = (once(seed, folder / f"same{i}") for i in (1, 2))
        counts.note(
            "same seed, same bits: prune and repair",
            all(map(torch.equal, first, second)),
            f"seed {seed}",
        )
        for i in (1, 2):
            shutil.rmtree(folder / f"same{i}")


def memory(counts, rounds, folder, steps=200):
    "Resident memory over repair steps; returns MB after a quarter of them, and at the end."
    from transformers import TrainerCallback

    from ressa.adaptation.adapters import adapt
    from ressa.adaptation.trainer import RessaArguments, RessaTrainer

    seen = {}

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step in (steps // 4, steps):
                pages = int(Path("/proc/self/statm").read_text().split()[1])
                seen[state.global_step] = round(
                    pages * resource.getpagesize() / 2**20, 1
                )

    model, dense, processor, rows = patient()
    args = RessaArguments(
        str(folder / "memory"),
        max_steps=steps,
        per_device_train_batch_size=4,
        save_strategy="no",
        use_cpu=True,
    )
    RessaTrainer(
        adapt(model), args, dense, processor, train_dataset=rows, callbacks=[Watch()]
    ).train()
    early, late = seen.values()
    counts.note(
        f"memory over {steps} repair steps grows by less than 5 %",
        late < 1.05 * early,
        f"{early} to {late} MB",
    )
    return {f"memory_mb_at_step_{step}": value for step, value in seen.items()}


PARTS = (
    wrong_calls,
    odd_arguments,
    wrong_commands,
    damaged,
    read_only,
    disturbed_save,
    disturbed_prune,
    disturbed_repair,
    same_again,
    memory,
)


def run():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--out", type=Path, default=Path("nbs/results/reliability.json")
    )
    parser.add_argument(
        "--only",
        choices=[part.__name__ for part in PARTS],
        help="this part alone; other rows are kept",
    )
    args = parser.parse_args()
    random.seed(args.seed)
    torch.set_num_threads(1)
    about = json.loads(args.out.read_text()) if args.only and args.out.exists() else {}
    counts = Counts(
        {
            kind: row
            for kind, row in about.get("faults", {}).items()
            if row["part"] != args.only
        }
    )
    for part in PARTS:
        if args.only not in (None, part.__name__):
            continue
        counts.part = part.__name__
        with tempfile.TemporaryDirectory() as folder:
            more = part(counts, args.rounds, Path(folder)) or {}
        about |= more | {
            "rounds": about.get("rounds", {}) | {part.__name__: args.rounds},
            "faults": counts.rows,
        }
        about |= dict(
            seed=args.seed,
            command="python tests/tools/reliability/faults.py --rounds N, N under rounds",
            device=f"cpu, {platform.machine()}, 1 thread",
        )
        args.out.write_text(json.dumps(about, indent=1, ensure_ascii=False) + "\n")
        print(part.__name__, "done", file=sys.stderr, flush=True)
    for kind, row in counts.rows.items():
        print(f"{row['tried']:6d} {row['survived']:6d} {len(row['lost']):4d}  {kind}")
    return int(any(row["lost"] for row in counts.rows.values()))


if __name__ == "__main__":
    sys.exit(run())
