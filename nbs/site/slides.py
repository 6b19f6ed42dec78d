"""All figures of the course on one page, for slides: `python nbs/site/slides.py FOLDER` writes slides.md and its pictures."""

import base64
import re
import sys
from pathlib import Path

import nbformat
from pages import COURSE

HEAD = """# Figures for slides

Every figure of the course, as its chapter shows it, with a description for those who cannot see it and the sentence
that the chapter says about it. You may use them in your own slides. The title names the chapter to cite and to open.
"""


def figures(cells):
    "Of each figure that readers see: the heading above it, its alt text, the sentence below it, and its PNG."
    heading = ""
    for i, cell in enumerate(cells):
        if cell.cell_type == "markdown":
            heading = ([heading] + re.findall(r"^##+ (.+)$", cell.source, re.M))[-1]
        alt = re.search(r"^#\| fig-alt: (.+)", cell.source, re.M)
        is_hidden = re.search(r"^#\| hide$", cell.source, re.M)
        if cell.cell_type != "code" or not alt or is_hidden:
            continue
        below = [c.source for c in cells[i + 1 : i + 3] if c.cell_type == "markdown"]
        sentence = below[0].partition("\n\n")[0] if below else ""
        for output in cell.outputs:
            if "image/png" in output.get("data", {}):
                picture = base64.b64decode(output.data["image/png"])
                yield heading, alt[1], sentence.lstrip("# "), picture


def slides():
    "The text of the page, and its pictures: path beside the page → bytes."
    parts, pictures = [HEAD], {}
    for path in COURSE:
        cells = nbformat.read(path, 4).cells
        titles = [c.source.splitlines()[0][2:] for c in cells if c.source[:2] == "# "]
        for k, (heading, alt, sentence, picture) in enumerate(figures(cells), 1):
            if k == 1:
                parts.append(f"## [{path.stem[:2]} · {titles[0]}]({path.name})")
            name = f"figures/{path.stem}-{k}.png"
            pictures[name] = picture
            alt_text = re.sub(r"([\[\]])", r"\\\1", alt)
            parts += [f"### {heading or 'Opening'}", f"![{alt_text}]({name})"]
            parts += [f"*In words:* {alt}", sentence]
    return "\n\n".join(filter(None, parts)) + "\n", pictures


def write(folder):
    "Write the page and its pictures to a folder."
    text, pictures = slides()
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    (folder / "slides.md").write_text(text, encoding="utf-8")
    for name, picture in pictures.items():
        (folder / name).write_bytes(picture)


if __name__ == "__main__":
    write(Path(sys.argv[1]))
