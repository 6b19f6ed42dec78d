"""What every tool of the site needs to know of the notebooks: where they are, their titles, their modules and their order."""

import re
from pathlib import Path

import nbformat

NBS = Path(__file__).resolve().parent.parent
ROOT = NBS.parent
COURSE = sorted((NBS / "course").glob("[0-9]*.ipynb"))
STUDIES = sorted((NBS / "studies").glob("*.ipynb"))
# The reference, in the order of the library: what a package needs comes before it.
REFERENCE_ORDER = {
    "Models and parts": [
        "load_model",
        "weights",
        "bundled",
        "real",
        "inputs",
        "parts",
        "devices",
    ],
    "Data": [
        "easy_vqa",
        "load_data",
        "columns",
        "tables",
        "pictures",
        "held_out",
        "prompts",
        "choices",
        "conversations",
        "encoding",
        "collate",
        "hub_errors",
        "hub_access",
    ],
    "Evaluation": [
        "answers",
        "metrics",
        "intervals",
        "score_intervals",
        "perplexity",
        "retrieval",
        "lmms_eval",
    ],
    "Pruning": [
        "engine",
        "methods",
        "masks",
        "mask_targets",
        "statistics",
        "sparsegpt",
        "dsnot",
        "passes",
        "placement",
        "prune_report",
        "any_vlm",
        "gpu",
    ],
    "Allocation": ["budgets", "rules", "search"],
    "Adaptation": [
        "repair",
        "resume",
        "sparse_lora",
        "fast_mask",
        "adapters",
        "adapter_checks",
        "kept_masks",
        "loss_terms",
        "teachers",
        "trainer",
    ],
    "Checkpoints": [
        "packing",
        "quantized",
        "sparse_checkpoints",
        "adapter_folders",
        "semi_structured",
        "files",
        "progress",
    ],
    "Command": [],  # whatever begins with `command`, results, report, model_card
    "Course": [
        "page_style",
        "palette",
        "explorers",
        "checking",
        "studies",
        "bench",
        "layer_inputs",
    ],
}


def reference():
    "The pages of the reference by group: {group: [path, …]}; a page that no group names goes with the command or comes last."
    paths = {path.stem: path for path in sorted((NBS / "reference").glob("*.ipynb"))}
    groups = {}
    for group, names in REFERENCE_ORDER.items():
        groups[group] = [paths.pop(name) for name in names if name in paths]
    command = [
        name
        for name in paths
        if re.match("command|recipes|results|report|model_card", name)
    ]
    groups["Command"] += [paths.pop(name) for name in command]
    groups["Course"] += paths.values()
    return {group: found for group, found in groups.items() if found}


def page_name(path):
    "The page of a notebook, as nbdev names it: `course/03_masks.ipynb` → `course/masks`."
    inside = Path(path).resolve().relative_to(NBS)
    return str(inside.with_name(re.sub(r"^\d+_", "", inside.stem)))


def title(path):
    "The first heading of a notebook or Markdown file."
    if path.suffix == ".md":
        text = path.read_text(encoding="utf-8")
    else:
        cells = nbformat.read(path, 4).cells
        text = "\n".join(c.source for c in cells if c.cell_type == "markdown")
    return re.search(r"^# (.+)$", text, re.M).group(1)


def module_of(notebook):
    "The module that a notebook exports, such as `pruning.masks`, or None."
    for cell in notebook.cells:
        found = re.search(r"^#\| *default_exp ([\w.]+)", cell.source, re.M)
        if found:
            return found.group(1)
    return None
