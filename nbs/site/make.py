"""Make the site: notebooks, as nbdev processes them, become pages that need no network.

python nbs/site/make.py [folder]     # by default the `doc_path` of settings.ini
"""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
from interface import definitions, entry, symbols
from nbdev.config import get_config
from nbdev.process import NBProcessor
from nbdev.processors import (
    add_show_docs,
    clean_magics,
    filter_stream_,
    hide_line,
    rm_header_dash,
    strip_ansi,
)
from pages import COURSE, NBS, STUDIES, module_of, page_name, reference, title
from slides import write as write_slides

HERE = Path(__file__).resolve().parent
HIDDEN = {"hide", "default_exp", "exporti", "include:"}
BADGES = {"gpu", "slow"}  # directives that the page shows


def notebooks():
    "All notebooks that have a page; exercise checks have none, because they tell the solutions."
    inside = [path for group in reference().values() for path in group]
    return [NBS / "index.ipynb", *COURSE, *inside, *STUDIES]


def linked(text, names, here):
    """Markdown with links: `prune` → its entry, and files of notebooks → their pages.

    `names` is {name: module}; `here` is the page that the text stands on."""
    folder = os.path.dirname(here)

    def name(match):
        bare = match.group(1).removesuffix("()").removeprefix("ressa.")
        bare = bare if bare in names else bare.rpartition(".")[2]
        if bare not in names:
            return match.group()
        return f"{{py:obj}}`{match.group(1)} <ressa.{names[bare]}.{bare}>`"

    def file(match):
        target = os.path.normpath(os.path.join(folder, match.group(1)))
        target = page_name(NBS / f"{target}.ipynb")
        return f"]({os.path.relpath(target, folder or '.')}.ipynb"

    lines, fenced = [], False
    for line in text.splitlines():
        if re.match(r"\s*(```|~~~)", line):
            fenced = not fenced
        elif not fenced:
            line = re.sub(r"\]\(([\w./]+)\.ipynb", file, line)
        if not fenced and not line.startswith("#"):
            line = re.sub(
                r"(?<![`\[{}\w])`([A-Za-z\d_.]+(?:\(\))?)`(?![`\]])", name, line
            )
        lines.append(line)
    return "\n".join(lines)


def markdown(source):
    return nbformat.v4.new_markdown_cell(source)


def folded(source, heading, is_open):
    "Exported code under a line that folds it."
    state = " open" if is_open else ""
    return markdown(
        f'<details class="source"{state}><summary>{heading}</summary>\n\n'
        f"```ipython3\n{source}\n```\n\n</details>"
    )


def exported(source, entries, is_open):
    "How exported code is shown: first its entries, then the code; imports are folded."
    tree = ast.parse(source).body
    if all(isinstance(node, ast.Import | ast.ImportFrom | ast.If) for node in tree):
        return [folded(source, "Imports of the library", False)]
    if not entries and is_open:
        return [nbformat.v4.new_code_cell(source)]
    return [*entries, folded(source, "Source", is_open)]


def bare(source):
    "Code without directives, of which nbdev leaves Quarto's own."
    return re.sub(r"^#\|.*\n?", "", source, flags=re.M)


def shown(cell, folds="hide-input"):
    "A code cell as MyST-NB wants it: alt text, badges, and the input folded (`hide-input`) or left out (`remove-input`)."
    directives = cell.directives_
    outputs = [nbformat.from_dict(output) for output in cell.outputs]
    new = nbformat.v4.new_code_cell(bare(cell.source), outputs=outputs)
    new.metadata["tags"] = sorted(BADGES & directives.keys())
    if "hide_input" in directives or directives.get("echo:") == ["false"]:
        new.metadata["tags"].append(folds)
    if words := re.search(r"^#\| fig-alt: (.+)", cell.source, re.M):
        new.metadata["mystnb"] = {"image": {"alt": words[1].strip()}}
    return new


def links(path, config):
    "The line under a title: what can be done with the page."
    inside = path.relative_to(NBS) if path.is_absolute() else path
    parts = [f"{{download}}`Download the notebook </notebooks/{inside}>`"]
    home = (config.git_url or "").rstrip("/")
    if home.startswith("https://github.com/"):
        repository = home.removeprefix("https://github.com/")
        where = f"{repository}/blob/{config.branch}/{config.nbs_path.name}/{inside}"
        colab = f"https://colab.research.google.com/github/{where}"
        parts.append(f"[Open in Colab]({colab})")
    return "{.page-links}\n" + " · ".join(parts)


def page(path, names, config):
    "The notebook of one page."
    processors = [
        add_show_docs,
        hide_line,
        filter_stream_,
        strip_ansi,
        rm_header_dash,
        clean_magics,
    ]
    module = module_of(nbformat.read(path, 4))
    processed = NBProcessor(path, processors, process=True).nb
    cells, source, is_open, entries, target = [], None, True, [], module

    def flush():
        if source is not None:
            cells.extend(exported(source, entries, is_open))

    for cell in processed.cells:
        directives = getattr(cell, "directives_", {})
        if getattr(cell, "has_sd", False):  # nbdev asks for an entry here
            name = re.fullmatch(r"show_doc\((\w+)\)", cell.source).group(1)
            text = entry(definitions(source)[name], source, f"ressa.{target}")
            entries.append(markdown(text))
            continue
        flush()
        source, entries = None, []
        if cell.cell_type == "markdown":
            cells.append(markdown(cell.source))
        elif cell.cell_type != "code" or not cell.source.strip():
            continue
        elif HIDDEN & directives.keys():
            continue
        elif {"export", "exports"} & directives.keys():
            source, is_open = bare(cell.source), "hide_input" not in directives
            named = directives.get("export") or directives.get("exports")
            target = named[0] if named else module
        else:
            # the front page is for reading; on all others a click opens the code
            folds = "remove-input" if path.stem == "index" else "hide-input"
            cells.append(shown(cell, folds))
    flush()
    for cell in cells:
        if cell.cell_type == "markdown":
            cell.source = linked(cell.source, modules(names), page_name(path))
    if path.stem != "index":
        about = f"```{{py:module}} ressa.{module}\n```\n" if module else ""
        cells.insert(1, markdown(about + links(path, config)))
    language = {"name": "python", "pygments_lexer": "ipython3"}
    metadata = {**processed.metadata, "language_info": language}
    return nbformat.v4.new_notebook(cells=cells, metadata=nbformat.from_dict(metadata))


def modules(names):
    "Names without their pages: {name: module}."
    return {name: module for name, (module, _) in names.items()}


def toctree(caption, lines):
    return (
        f"```{{toctree}}\n:hidden:\n:caption: {caption}\n\n"
        + "\n".join(lines)
        + "\n```\n"
    )


def contents():
    "The table of contents: course, reference, studies; hidden on the page itself."
    course = [f"{path.stem[:2]} · {title(path)} <{page_name(path)}>" for path in COURSE]
    course += ["Syllabus <course/syllabus>", "Figures for slides <course/slides>"]
    inside = [
        f"{title(path)} <{page_name(path)}>"
        for group in reference().values()
        for path in group
    ]
    studies = [f"{title(path)} <{page_name(path)}>" for path in STUDIES]
    return "\n".join(
        [
            toctree("Course", course),
            toctree("Reference", [*inside, "Index of names <genindex>"]),
            toctree("Studies", studies),
        ]
    )


def prepare(folder):
    "Write the sources of the site to a folder."
    config = get_config()
    read = {path: nbformat.read(path, 4) for path in notebooks()}
    names = symbols(
        (module_of(notebook), page_name(path), notebook)
        for path, notebook in read.items()
    )
    for section in ("course", "reference", "studies", "notebooks"):
        (folder / section).mkdir(parents=True)
    shutil.copytree(NBS / "images", folder / "images")
    write_slides(folder / "course")
    shutil.copy(NBS / "course" / "syllabus.md", folder / "course")
    for path in sorted((folder / "course").glob("*.md")):
        text = path.read_text(encoding="utf-8")
        text = linked(text, modules(names), f"course/{path.stem}")
        path.write_text(text, encoding="utf-8")
    for path in read:
        copy = folder / "notebooks" / path.relative_to(NBS)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
        notebook = page(path, names, config)
        if path.stem == "index":
            notebook.cells.append(markdown(contents()))
        nbformat.write(notebook, folder / f"{page_name(path)}.ipynb")


def build(out):
    "Make the site in a folder; a warning is an error."
    root = get_config().config_path
    is_default = out == get_config().doc_path
    work = root / "_proc" if is_default else out.with_name(out.name + "-made")
    sources, html = work / "sources", work / "html"
    for folder in (sources, html):
        shutil.rmtree(folder, ignore_errors=True)
    prepare(sources)
    options = ["-W", "--keep-going", "-q", "-c", HERE, "-d", work / "doctrees"]
    command = [sys.executable, "-m", "sphinx", *options, sources, html]
    subprocess.run(command, check=True, cwd=root)
    shutil.rmtree(out, ignore_errors=True)
    shutil.move(html, out)


if __name__ == "__main__":
    build(Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else get_config().doc_path)
