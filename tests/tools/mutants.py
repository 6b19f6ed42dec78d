"""Mutation testing: change one thing in a module, and see whether the tests of that module notice.

    python tests/tools/mutants.py --sample 40 --seed 0 --out nbs/results/mutation.json pruning.masks …

The changes are those of mutmut (`pip install mutmut`). Its own runner skips decorated functions and copies the project, so
mutants are run here: a process that has imported the heavy libraries forks, and the child imports the mutated module instead of
the one on disk. Not mutated: exercises' checks (`check_*`, tested with the chapters), docstrings and the texts of messages."""

import argparse
import difflib
import importlib.machinery
import importlib.util
import json
import os
import platform
import random
import resource
import signal
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
MODULES = (  # the tests of `pruning.masks` are tests/pruning/test_masks.py
    "pruning.masks",
    "pruning.scores",
    "pruning.sparsegpt",
    "pruning.dsnot",
    "adaptation.masked_update",
    "adaptation.sparse_lora",
    "adaptation.distillation",
    "adaptation.loss_terms",
    "checkpoints.packing",
    "checkpoints.sparse",
)
# Left out: what starts other processes, which import the module on disk, and what is slow.
LEFT_OUT = (
    "not killed and not compile and not plain_peft and not process and not command"
)


def tests_of(module):
    "The test file of a module."
    package, _, name = module.rpartition(".")
    return ROOT / "tests" / package / f"test_{name}.py"


def changes_of(source):
    "A module's syntax tree, and every change that might be made to it: (function, node before, node after)."
    import libcst as cst
    from libcst.metadata import MetadataWrapper
    from mutmut.mutation.file_mutation import MutationVisitor
    from mutmut.mutation.mutators import mutation_operators
    from mutmut.mutation.pragma_handling import IgnoredCode

    class Visitor(MutationVisitor):
        "Enters decorated functions too, and leaves alone what only people read."

        def _skip_node_and_children(self, node):
            if isinstance(node, cst.FunctionDef):
                return node.name.value.startswith("check_")
            if isinstance(node, cst.Call) and "warn" in cst.Module([]).code_for_node(
                node.func
            ):
                return True
            if isinstance(node, cst.Expr) and isinstance(node.value, cst.BaseString):
                return True
            return isinstance(node, cst.Raise) or super()._skip_node_and_children(node)

    found = Visitor(mutation_operators, IgnoredCode(set(), set(), set()))
    tree = MetadataWrapper(cst.parse_module(source)).visit(found)
    inside = [
        (c.contained_by_top_level_function, c.original_node, c.mutated_node)
        for c in found.mutations
    ]
    return tree, [
        (f.name.value, a, b) for f, a, b in inside if isinstance(f, cst.FunctionDef)
    ]


def mutated(source, tree, before, after):
    "The changed source, and its changed lines before and after."
    new = tree.deep_replace(before, after).code
    diff = [
        line
        for line in difflib.ndiff(source.splitlines(), new.splitlines())
        if line[0] in "+-"
    ]
    return new, *(
        " ".join(line[2:].strip() for line in diff if line[0] == sign) for sign in "-+"
    )


class Instead(importlib.machinery.SourceFileLoader):
    "Imports another source in place of that of a file."

    def __init__(self, module, source):
        path = ROOT / "ressa" / f"{module.replace('.', '/')}.py"
        super().__init__(f"ressa.{module}", str(path))
        self.source = source

    def get_code(self, name):
        return compile(self.source, self.path, "exec")

    def find_spec(self, name, path=None, target=None):
        if name == self.name:
            return importlib.util.spec_from_file_location(name, self.path, loader=self)


def survives(module, source, seconds=120):
    "Whether the tests of the module pass with this source; a mutant that takes too much CPU time is noticed too."
    child = os.fork()
    if not child:
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in (1, 2):
            os.dup2(nowhere, stream)
        if source is not None:
            sys.meta_path.insert(0, Instead(module, source))
        import pytest

        options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
        chosen = ["-k", LEFT_OUT, "-m", "not slow"]
        os._exit(int(pytest.main([str(tests_of(module)), *options, *chosen])))
    return _ended(child, 20 * seconds) == 0


def _ended(child, seconds):
    "Exit status of a child, which is ended if it sleeps for ever."
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status
        time.sleep(0.05)
    os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1] or 1


def examine(module, sample, seed, known):
    "Run a sample of the mutants of a module; `known`: why a survivor cannot be noticed, by its id."
    source = (ROOT / "ressa" / f"{module.replace('.', '/')}.py").read_text()
    tree, changes = changes_of(source)
    drawn = random.Random(seed).sample(
        range(len(changes)), min(sample or len(changes), len(changes))
    )
    if not survives(module, None):
        raise SystemExit(f"{module}: its tests fail without any mutation")
    killed, survivors = 0, []
    for i in sorted(drawn):
        name, *nodes = changes[i]
        new, before, after = mutated(source, tree, *nodes)
        if not survives(module, new):
            killed += 1
            continue
        mutant = f"{module}.{name}: {before} → {after}"
        survivors.append(dict(mutant=mutant, equivalent=known.get(mutant)))
        print(mutant, flush=True)
    equivalent = sum(bool(row["equivalent"]) for row in survivors)
    real = killed + len(survivors) - equivalent
    return dict(
        mutants=len(changes),
        sampled=len(drawn),
        killed=killed,
        survived=len(survivors),
        equivalent=equivalent,
        score=round(killed / (killed + len(survivors)), 4),
        score_without_equivalent=round(killed / max(real, 1), 4),
        survivors=survivors,
    )


def main():
    import datasets  # noqa: F401  what every child needs
    import hypothesis  # noqa: F401
    import peft  # noqa: F401
    import pytest  # noqa: F401
    import torch  # noqa: F401
    import transformers  # noqa: F401

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "modules", nargs="*", help=f"default: all of {', '.join(MODULES)}"
    )
    parser.add_argument(
        "--sample", type=int, default=40, help="mutants of each module; 0: all"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--out", type=Path, default=ROOT / "nbs" / "results" / "mutation.json"
    )
    args = parser.parse_args()
    found = json.loads(args.out.read_text()) if args.out.exists() else {"modules": {}}
    for module in args.modules or MODULES:
        rows = found["modules"].get(module, {}).get("survivors", [])
        known = {row["mutant"]: row["equivalent"] for row in rows if row["equivalent"]}
        row = found["modules"][module] = examine(module, args.sample, args.seed, known)
        print(
            f"{module}: {row['killed']} of {row['sampled']} noticed, {row['equivalent']} cannot be",
            flush=True,
        )
        found |= dict(
            seed=args.seed,
            sample=args.sample,
            command="python tests/tools/mutants.py",
            tool="mutmut's operators",
            device=f"cpu, {platform.machine()}",
        )
        args.out.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
