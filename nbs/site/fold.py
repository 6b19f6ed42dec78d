"""Fold in Jupyter what the site folds or leaves out: the code of the cells marked `hide` or `hide_input`."""

import re

import nbformat
from pages import NBS

FOLDED = {"source_hidden": True}  # JupyterLab and VS Code read it


def fold(notebook):
    "Mark each code cell as folded or not. Changes the notebook in place; returns whether it did."
    changed = False
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        wanted = (
            FOLDED if re.search(r"^#\| hide(_input)?$", cell.source, re.M) else None
        )
        if cell.metadata.get("jupyter") == wanted:
            continue
        changed = True
        if wanted:
            cell.metadata["jupyter"] = dict(wanted)
        else:
            del cell.metadata["jupyter"]
    return changed


if __name__ == "__main__":
    for path in sorted(NBS.rglob("[!.]*.ipynb")):
        notebook = nbformat.read(path, 4)
        if fold(notebook):
            nbformat.write(notebook, path)
