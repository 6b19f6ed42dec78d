"""How a notebook is written: the rules that a machine can check."""

import ast
import re
import statistics

import nbformat
import pytest
from notebooks import PATHS, flags

LESSONS = [path for path in PATHS if re.match(r"[0-5]\d_", path.name)]
PARTS_1_TO_3 = [path for path in LESSONS if path.name[0] in "123"]


def cells(path, kind=None):
    return [c for c in nbformat.read(path, 4).cells if kind in (None, c.cell_type)]


def lines_of(cell):
    return [
        line
        for line in cell.source.splitlines()
        if line.strip() and not line.startswith("#|")
    ]


lessons = pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)


@lessons
def test_size_of_cells(path):
    code = cells(path, "code")
    lengths = [len(lines_of(cell)) for cell in code]
    assert 30 <= len(cells(path)) <= 90, f"{len(cells(path))} cells"
    assert statistics.median(lengths) <= 6
    assert sorted(lengths)[int(0.9 * len(lengths))] <= 15
    for cell, n in zip(code, lengths):
        is_class = re.search(r"^class ", cell.source, re.M)
        assert n <= (45 if is_class else 30), f"{n} lines: {cell.source[:80]}"
        for line in cell.source.splitlines():
            assert len(line) <= 100 or line.startswith("#| fig-alt"), line


@lessons
def test_prose_and_code_in_step(path):
    run, words, lines = 0, 0, 0
    for cell in cells(path):
        if cell.cell_type == "markdown":
            run, count = 0, len(cell.source.split())
            words += count
            assert count <= 150, f"{count} words: {cell.source[:80]}"
        elif "hide" not in flags(cell) and lines_of(cell):
            run, lines = run + 1, lines + len(lines_of(cell))
            assert run <= 3, (
                f"more than three code cells without prose before: {cell.source[:80]}"
            )
    assert 2 <= words / lines <= 8, f"{words / lines:.1f} words per line of code"


@lessons
def test_figures(path):
    figures = 0
    everything = cells(path)
    for i, cell in enumerate(everything):
        if cell.cell_type != "code":
            continue
        if not any("image/png" in output.get("data", {}) for output in cell.outputs):
            continue
        figures += 1
        assert "fig-alt:" in flags(cell), f"no alt text: {cell.source[:80]}"
        drawn = re.search(
            "plot_report|small_multiples", cell.source
        )  # they label their axes
        labelled = drawn or "xlabel" in cell.source and "ylabel" in cell.source
        assert labelled or "imshow" in cell.source and "xlabel" in cell.source, (
            f"axes: {cell.source[:80]}"
        )
        after = [c for c in everything[i + 1 : i + 3] if c.cell_type == "markdown"]
        assert after, f"no sentence after the figure: {cell.source[:80]}"
    assert figures >= 3, f"{figures} figures"


@lessons
def test_outputs_are_clean(path):
    assert path.stat().st_size < 2**20
    for cell in cells(path, "code"):
        for output in cell.outputs:
            assert output.output_type != "error", cell.source[:80]
            assert output.get("name") != "stderr", (
                f"{output.text[:200]} in {cell.source[:80]}"
            )
            text = str(output.get("text", output.get("data", {}).get("text/plain", "")))
            assert not re.search(r"(/root|/home|/tmp|/work|C:\\)", text), (
                f"a path: {text[:200]}"
            )
            assert "it/s" not in text and "%|" not in text, (
                f"a progress bar: {text[:200]}"
            )


@lessons
def test_structure(path):
    everything = cells(path)
    text = "\n".join(c.source for c in everything if c.cell_type == "markdown")
    assert everything[0].source.startswith("#| default_exp ")
    assert re.match(r"# .+\n\n> .+", everything[1].source), "title and claim"
    for needed in (
        "**What you will be able to do**",
        "**You need**",
        "**Time**",
        "## Exercises",
        "## What you know now",
        "**Limits.**",
        "**References.**",
        "**Next**",
    ):
        assert needed in text, f"{needed} is missing"
    exercises = re.findall(
        r"^\*\*\d · .+?\*\* \(difficulty [123], \d+ minutes\)\. \*Predict first\*",
        text,
        re.M,
    )
    assert len(exercises) >= 3, f"{len(exercises)} exercises in the form of the house"
    assert text.count("<details><summary>Solution</summary>") >= 3


@pytest.mark.parametrize("path", PARTS_1_TO_3, ids=lambda path: path.stem)
def test_gpu_section(path):
    code = cells(path, "code")
    assert sum("gpu" in flags(cell) for cell in code) >= 1
    assert any("pick_device" in cell.source for cell in code)


@lessons
def test_exported_names_are_explained(path):
    everything = [
        c for c in cells(path) if "hide" not in flags(c) or c.cell_type == "markdown"
    ]
    for i, cell in enumerate(everything):
        if cell.cell_type != "code" or "export" not in flags(cell):
            continue
        for node in ast.parse(cell.source).body:
            if not isinstance(
                node, (ast.FunctionDef, ast.ClassDef)
            ) or node.name.startswith("_"):
                continue
            assert ast.get_docstring(node), f"{node.name} has no docstring"
            if node.name.startswith("check_"):
                continue
            code_after = [
                c.source for c in everything[i + 1 :] if c.cell_type == "code"
            ][:3]
            used = any(re.search(rf"\b{node.name}\b", source) for source in code_after)
            kin = any(node.name in c.source for c in everything[max(0, i - 1) : i])
            assert used or kin, f"{node.name}: no example in the next three cells"


@lessons
def test_parameters_are_documented(path):
    for cell in cells(path, "code"):
        if "export" not in flags(cell):
            continue
        source = cell.source.splitlines()
        for node in ast.walk(ast.parse(cell.source)):
            if (
                not isinstance(node, ast.FunctionDef)
                or node.name.startswith("_")
                or node.col_offset
            ):
                continue
            named = [
                a
                for a in node.args.args + node.args.kwonlyargs
                if a.arg not in ("self", "cls")
            ]
            if not named or named[0].lineno == node.lineno:
                continue  # one-liners say it in the docstring
            bare = [a.arg for a in named if "#" not in source[a.lineno - 1]]
            assert len(bare) <= len(named) // 2, f"{node.name}: undocumented {bare}"


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_imports_come_from_earlier_lessons(path):
    home = {
        re.search(r"default_exp (\w+)", cells(p)[0].source).group(1): p.name
        for p in PATHS
        if re.match(r"\d\d_", p.name)
    }
    if not re.match(r"\d\d_", path.name):
        return
    for cell in cells(path, "code"):
        for module in re.findall(
            r"^\s*(?:from|import) ressa\.(\w+)", cell.source, re.M
        ):
            assert home[module] < path.name, f"{path.stem} imports ressa.{module}"


@lessons
def test_imports_live_in_import_cells(path):
    for cell in cells(path, "code"):
        if not lines_of(cell) or "hide" in flags(cell):
            continue
        top = [
            isinstance(n, ast.Import | ast.ImportFrom)
            or ast.unparse(n).startswith("if TYPE_CHECKING:")
            for n in ast.parse(cell.source).body
        ]
        assert (
            all(top) or not any(top) or "With a library" in _heading_before(path, cell)
        ), cell.source[:80]


def _heading_before(path, cell):
    heading = ""
    for c in cells(path):
        if c.cell_type == "markdown":
            found = re.findall(r"^##+ .+", c.source, re.M)
            heading = found[-1] if found else heading
        if c.source == cell.source:
            return heading
    return heading


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_what_a_gpu_cell_does_has_run_on_a_cpu(path):
    "A cell that is skipped without a GPU only calls, in another size, what another cell has called."
    code = cells(path, "code")
    run = "\n".join(cell.source for cell in code if not flags(cell) & {"gpu", "slow"})
    for cell in (cell for cell in code if "gpu" in flags(cell)):
        assert len(lines_of(cell)) <= 6, (
            f"{len(lines_of(cell))} lines: put the step into a function: {cell.source[:80]}"
        )
        for name in re.findall(r"\b([a-z_]\w*)\(", cell.source):
            assert re.search(rf"\b{name}\(", run), (
                f"{name} is called only on a GPU: {cell.source[:80]}"
            )
