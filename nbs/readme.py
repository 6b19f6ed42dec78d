"""Write README.md from index.ipynb: its prose, its code, and what the code displays."""
import re
from pathlib import Path

import nbformat

here = Path(__file__).parent


def shown(cell):
    "The Markdown of one cell; a cell marked `hide` shows nothing, one marked `hide_input` its output alone."
    if cell.cell_type == "markdown": return cell.source
    marks = [line for line in cell.source.splitlines() if line.startswith("#|")]
    if "#| hide" in marks: return ""
    source = "\n".join(line for line in cell.source.splitlines() if line not in marks)
    parts = [] if "#| hide_input" in marks else [f"```python\n{source}\n```"]
    for output in cell.outputs:
        data = output.get("data", {})
        if "text/markdown" in data: parts.append("".join(data["text/markdown"]))
        elif "text/plain" in data: parts.append("```\n" + "".join(data["text/plain"]) + "\n```")
    return "\n\n".join(parts)


def readme():
    "The text of README.md."
    cells = nbformat.read(here / "index.ipynb", 4).cells
    text = "\n\n".join(filter(None, map(shown, cells))) + "\n"
    return re.sub(r"\]\((\w+\.ipynb)\)", r"](nbs/\1)", text)  # links as seen from the repository's root


if __name__ == "__main__":
    (here.parent / "README.md").write_text(readme(), encoding="utf-8")
