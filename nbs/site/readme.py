"""Write README.md and its pictures from index.ipynb: its prose, its code, and what the code displays."""

import base64
import re

import nbformat
from pages import NBS, ROOT


def shown(cell, pictures):
    "The Markdown of one cell; a cell marked `hide` shows nothing, one marked `hide_input` its output alone."
    if cell.cell_type == "markdown":
        return cell.source
    marks = [line for line in cell.source.splitlines() if line.startswith("#|")]
    if "#| hide" in marks:
        return ""
    source = "\n".join(line for line in cell.source.splitlines() if line not in marks)
    parts = [] if "#| hide_input" in marks else [f"```python\n{source}\n```"]
    for output in cell.outputs:
        data = output.get("data", {})
        if "image/png" in data:
            name = f"images/index-{len(pictures) + 1}.png"
            pictures[name] = base64.b64decode(data["image/png"])
            alt = re.search(r"^#\| fig-alt: (.+)", cell.source, re.M)[1]
            parts.append(f"![{alt}](nbs/{name})")
        elif "text/markdown" in data:
            parts.append("".join(data["text/markdown"]))
        elif "text/plain" in data:
            parts.append("```\n" + "".join(data["text/plain"]) + "\n```")
    return "\n\n".join(parts)


def readme():
    "The text of README.md, and its pictures: path under nbs/ → bytes."
    cells, pictures = nbformat.read(NBS / "index.ipynb", 4).cells, {}
    text = "\n\n".join(filter(None, (shown(cell, pictures) for cell in cells))) + "\n"
    # links as seen from the repository's root
    text = re.sub(r"\]\(([\w/]+\.(?:ipynb|md))\)", r"](nbs/\1)", text)
    return text, pictures


if __name__ == "__main__":
    text, pictures = readme()
    (ROOT / "README.md").write_text(text, encoding="utf-8")
    (NBS / "images").mkdir(exist_ok=True)
    for name, data in pictures.items():
        (NBS / name).write_bytes(data)
