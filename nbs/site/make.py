"""Make the site: notebooks, as nbdev processes them, become pages that need no network.

python nbs/site/make.py [folder]     # by default the `doc_path` of settings.ini
"""

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path
from runpy import run_path

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

HERE = Path(__file__).resolve().parent
PARTS = {
    "0": "The model",
    "1": "Prune",
    "2": "Allocate",
    "3": "Repair",
    "4": "Ship",
    "5": "Scale",
    "9": "Reference",
}  # by the first digit, for a notebook that the table of index.ipynb lacks
HIDDEN = {"hide", "default_exp", "exporti", "include:"}
BADGES = {"gpu", "slow"}  # directives that the page shows


def docname(path):
    "nbdev's name for the page of a notebook: `14_prune.ipynb` → `prune`."
    return re.sub(r"^\d+_", "", Path(path).stem)


def linked(text, names, pages):
    """Markdown with links: `prune` → its entry, `14_prune` and *notebook 14* → that page, and files
    of notebooks → their pages. `names`: {name: module}; `pages`: {notebook's stem: page}."""
    numbers = {stem[:2]: page for stem, page in pages.items() if stem[0].isdigit()}

    def name(match):
        code = match.group(1)
        if code in pages:
            return f"[`{code}`]({pages[code]}.ipynb)"
        bare = code.removesuffix("()").removeprefix("ressa.")
        bare = bare if bare in names else bare.partition(".")[2]
        return (
            f"{{py:obj}}`{code} <ressa.{names[bare]}.{bare}>`"
            if bare in names
            else match.group()
        )

    def number(match):
        return re.sub(
            r"\d\d",
            lambda n: (
                f"[{n.group()}]({numbers[n.group()]}.ipynb)"
                if n.group() in numbers
                else n.group()
            ),
            match.group(),
        )

    lines, fenced = [], False
    for line in text.splitlines():
        if re.match(r"\s*(```|~~~)", line):
            fenced = not fenced
        elif not fenced:
            line = re.sub(
                r"\]\((\w+)\.ipynb", lambda m: f"]({docname(m.group(1))}.ipynb", line
            )
        if not fenced and not line.startswith("#"):
            line = re.sub(
                r"(?<![`\[{}\w])`([A-Za-z\d_.]+(?:\(\))?)`(?![`\]])", name, line
            )
            line = re.sub(
                r"\b[Nn]otebooks? \d\d(?:(?:, | and | to )\d\d)*\b", number, line
            )
        lines.append(line)
    return "\n".join(lines)


def markdown(source):
    return nbformat.v4.new_markdown_cell(source)


def folded(source, title, is_open):
    "Exported code under a line that folds it."
    return markdown(
        f'<details class="source"{" open" if is_open else ""}><summary>{title}</summary>\n\n'
        f"```ipython3\n{source}\n```\n\n</details>"
    )


def exported(source, entries):
    "How exported code is shown: first its entries, then the code; checks and imports are folded."
    tree = ast.parse(source).body
    if all(isinstance(node, (ast.Import, ast.ImportFrom)) for node in tree):
        return [folded(source, "Imports of the library", False)]
    if not entries:
        return [nbformat.v4.new_code_cell(source)]
    checks = all(name.startswith("check_") for name in definitions(source))
    return [*entries, folded(source, "Source", not checks)]


def bare(source):
    "Code without directives, of which nbdev leaves Quarto's own."
    return re.sub(r"^#\|.*\n?", "", source, flags=re.M)


def shown(cell):
    "A code cell as MyST-NB wants it: alt text, hidden input, badges."
    directives = cell.directives_
    new = nbformat.v4.new_code_cell(
        bare(cell.source), outputs=[nbformat.from_dict(o) for o in cell.outputs]
    )
    new.metadata["tags"] = sorted(BADGES & directives.keys())
    if "hide_input" in directives or directives.get("echo:") == ["false"]:
        new.metadata["tags"].append("remove-input")
    if words := re.search(r"^#\| fig-alt: (.+)", cell.source, re.M):
        new.metadata["mystnb"] = {"image": {"alt": words[1].strip()}}
    return new


def links(path, config):
    "The line under a title: what can be done with the page."
    parts = [f"{{download}}`Download the notebook </notebooks/{path.name}>`"]
    home = (config.git_url or "").rstrip("/")
    if home.startswith("https://github.com/"):
        where = f"{home.removeprefix('https://github.com/')}/blob/{config.branch}/{config.nbs_path.name}"
        parts.append(
            f"[Open in Colab](https://colab.research.google.com/github/{where}/{path.name})"
        )
    return "{.page-links}\n" + " · ".join(parts)


def page(path, names, pages, config):
    "The notebook of one page."
    processed = NBProcessor(
        path,
        [
            add_show_docs,
            hide_line,
            filter_stream_,
            strip_ansi,
            rm_header_dash,
            clean_magics,
        ],
        process=True,
    ).nb
    cells, source, entries, module = [], None, [], docname(path)

    def flush():
        if source is not None:
            cells.extend(exported(source, entries))

    for cell in processed.cells:
        directives = getattr(cell, "directives_", {})
        if getattr(cell, "has_sd", False):  # nbdev asks for an entry here
            name = re.fullmatch(r"show_doc\((\w+)\)", cell.source).group(1)
            entries.append(
                markdown(entry(definitions(source)[name], source, f"ressa.{module}"))
            )
            continue
        flush()
        source, entries = None, []
        if cell.cell_type == "markdown":
            cells.append(markdown(cell.source))
        elif (
            cell.cell_type != "code"
            or not cell.source.strip()
            or HIDDEN & directives.keys()
        ):
            continue
        elif {"export", "exports"} & directives.keys():
            source = bare(cell.source)
        else:
            cells.append(shown(cell))
    flush()
    for cell in cells:
        if cell.cell_type == "markdown":
            cell.source = linked(cell.source, names, pages)
    if path.stem != "index":
        about = (
            f"```{{py:module}} ressa.{module}\n```\n" if path.stem[0].isdigit() else ""
        )
        cells.insert(1, markdown(about + links(path, config)))
    metadata = {
        **processed.metadata,
        "language_info": {"name": "python", "pygments_lexer": "ipython3"},
    }
    return nbformat.v4.new_notebook(cells=cells, metadata=nbformat.from_dict(metadata))


def title(path):
    "The first heading of a notebook or Markdown file."
    text = (
        path.read_text(encoding="utf-8")
        if path.suffix == ".md"
        else "\n".join(
            cell.source
            for cell in nbformat.read(path, 4).cells
            if cell.cell_type == "markdown"
        )
    )
    return re.search(r"^# (.+)$", text, re.M).group(1)


def parts_of(index):
    "The part of each notebook in the table of index.ipynb: {stem: part}."
    parts, part = {}, ""
    for cell in index.cells:
        for name, stem in re.findall(
            r"^\| *([\w ]*?) *\| \[\w+\]\((\w+)\.ipynb\)", cell.source, re.M
        ):
            part = name or part
            parts[stem] = part.capitalize()
    return parts


def contents(pages, known):
    "The table of contents, of {source file: title}; hidden on the page itself. `known`: {stem: part}."
    parts = {part: [] for part in [*PARTS.values()][:-1] + ["Teaching", "Reference"]}
    for path, heading in pages.items():
        numbered = path.stem[0].isdigit()
        part = known.get(path.stem, PARTS[path.stem[0]]) if numbered else "Teaching"
        number = f"{path.stem[:2]} · " if numbered and part != "Reference" else ""
        parts.setdefault(part, []).append(f"{number}{heading} <{docname(path)}>")
    parts["Reference"].append("Index of names <genindex>")
    return "\n".join(
        f"```{{toctree}}\n:hidden:\n:caption: {part}\n\n" + "\n".join(lines) + "\n```\n"
        for part, lines in parts.items()
        if lines
    )


def prepare(folder):
    "Write the sources of the site to a folder."
    config = get_config()
    here = config.nbs_path
    notebooks = sorted(here.glob("*.ipynb"))
    pages = {p.stem: docname(p) for p in notebooks if p.stem != "index"}
    names = symbols((docname(p), nbformat.read(p, 4)) for p in notebooks)
    (folder / "notebooks").mkdir(parents=True)
    if (here / "images").exists():
        shutil.copytree(here / "images", folder / "images")
    for path in here.glob("*.md"):
        shutil.copy(path, folder)
    if (here / "slides.py").exists():
        run_path(here / "slides.py")["write"](folder)
    texts = sorted(folder.glob("*.md"))
    for path in texts:
        path.write_text(
            linked(path.read_text(encoding="utf-8"), names, pages), encoding="utf-8"
        )
    for path in notebooks:
        shutil.copy(path, folder / "notebooks")
        nb = page(path, names, pages, config)
        if path.stem == "index":
            titles = {p: title(p) for p in notebooks + texts if p != path}
            nb.cells.append(
                markdown(contents(titles, parts_of(nbformat.read(path, 4))))
            )
        nbformat.write(nb, folder / f"{docname(path)}.ipynb")


def build(out):
    "Make the site in a folder; a warning is an error."
    root = get_config().config_path
    work = (
        root / "_proc"
        if out == get_config().doc_path
        else out.with_name(out.name + "-made")
    )
    sources, html = work / "sources", work / "html"
    for folder in (sources, html):
        shutil.rmtree(folder, ignore_errors=True)
    prepare(sources)
    subprocess.run(
        [
            sys.executable,
            "-m",
            "sphinx",
            "-W",
            "--keep-going",
            "-q",
            "-c",
            HERE,
            "-d",
            work / "doctrees",
            sources,
            html,
        ],
        check=True,
        cwd=root,
    )
    shutil.rmtree(out, ignore_errors=True)
    shutil.move(html, out)


if __name__ == "__main__":
    build(Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else get_config().doc_path)
