"""Run notebooks. `python tests/tools/notebooks.py [--slow] [NAME ...]` runs them in place and keeps their outputs.

NAME is a file's name (`engine`) or, where two have the same one, its path (`course/11_repair`)."""

import json
import re
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from warm_kernels import WarmKernelManager

ROOT = Path(__file__).parent.parent.parent
NBS = ROOT / "nbs"
PATHS = sorted(NBS.rglob("[!.]*.ipynb"))
# Warnings about the machine, progress bars and times have no place in a page.
ENVIRONMENT = {
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_OFFLINE": "1",
    "TQDM_DISABLE": "1",
}


def name_of(path):
    "A notebook's path inside `nbs/`, without its ending: `course/03_masks`."
    return str(path.relative_to(NBS).with_suffix(""))


def flags(cell):
    "The words of a cell's `#|` lines: {'export', 'hide', 'gpu', ...}."
    return {
        line[2:].split()[0]
        for line in cell.source.splitlines()
        if re.match(r"#\|\s*\w", line)
    }


def run(path, skip=("gpu", "slow")):
    "The notebook as it is after running; cells with a flag of `skip` keep what they have."
    import os

    os.environ.update(ENVIRONMENT | ({} if "slow" in skip else {"REMAKE": "1"}))
    notebook = nbformat.read(path, 4)
    kept = [
        (cell, cell.source, cell.outputs)
        for cell in notebook.cells
        if cell.cell_type == "code" and flags(cell) & set(skip)
    ]
    for cell, _, _ in kept:
        cell.source = ""
    NotebookClient(
        notebook,
        timeout=3600 if "slow" not in skip else 900,
        kernel_name="python3",
        kernel_manager_class=WarmKernelManager,
        record_timing=False,
        resources={"metadata": {"path": str(path.parent)}},
    ).execute()
    for cell, source, outputs in kept:
        cell.source, cell.outputs = source, outputs
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        cell.execution_count = None
        for output in cell.outputs:
            if "execution_count" in output:
                output.execution_count = None
    notebook.metadata = {
        "kernelspec": {
            "display_name": "python3",
            "language": "python",
            "name": "python3",
        }
    } | shown_widgets(notebook)
    return notebook


VIEW, STATE = (
    "application/vnd.jupyter.widget-" + kind for kind in ("view+json", "state+json")
)


def widget_views(notebook):
    "What the cells show as widgets: [{'model_id': …}]."
    outputs = [
        output
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
    ]
    return [output.data[VIEW] for output in outputs if VIEW in output.get("data", {})]


def shown_widgets(notebook):
    "The state of all widgets that are shown, for the metadata; numbered as they appear, so that a rerun gives the same."
    stored = notebook.metadata.get("widgets", {}).get(STATE, {})
    views, models = widget_views(notebook), stored.get("state", {})
    order = [view["model_id"] for view in views]
    for name in order:  # grows on the way
        parts = re.findall(r"IPY_MODEL_(\w+)", json.dumps(models[name]["state"]))
        order.extend(part for part in dict.fromkeys(parts) if part not in order)
    if not order:
        return {}
    number = {name: f"{i:032x}" for i, name in enumerate(order)}
    for view in views:
        view["model_id"] = number[view["model_id"]]
    text = json.dumps({name: models[name] for name in order})
    kept = json.loads(re.sub("|".join(order), lambda found: number[found[0]], text))
    for model in kept.values():
        model["state"] = {
            name: value for name, value in model["state"].items() if value is not None
        }
    return {"widgets": {STATE: stored | {"state": kept}}}


def text_outputs(notebook):
    "What each cell prints and shows as text, without pictures."
    shown = []
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        parts = [
            o.get("text", o.get("data", {}).get("text/plain", "")) for o in cell.outputs
        ]
        shown.append("".join("".join(part) for part in parts if "<Figure" not in part))
    return shown


def with_new_prose(ran, now):
    "The notebook as it is now on disk, with the outputs of the run; its code must be the same."
    code = {cell.id: cell for cell in ran.cells if cell.cell_type == "code"}
    for cell in now.cells:
        if cell.cell_type != "code":
            continue
        if cell.id not in code or code.pop(cell.id).source != cell.source:
            sys.exit("the code was edited while it ran: its outputs are not written")
    if code:
        sys.exit("a cell was removed while it ran: its outputs are not written")
    outputs = {cell.id: cell for cell in ran.cells}
    now.cells = [
        outputs[cell.id] if cell.cell_type == "code" else cell for cell in now.cells
    ]
    now.metadata = ran.metadata
    return now


if __name__ == "__main__":
    names = [name for name in sys.argv[1:] if not name.startswith("--")]
    for path in PATHS:
        if names and not {path.stem, name_of(path)} & set(names):
            continue
        print(name_of(path), flush=True)
        new = run(path, ("gpu",) if "--slow" in sys.argv else ("gpu", "slow"))
        new = with_new_prose(new, nbformat.read(path, 4))
        nbformat.write(new, path)
