"""How a notebook is written: the rules that a machine can check."""

import ast
import functools
import re
import sys

import nbformat
import pytest
from notebooks import NBS, PATHS, flags, name_of

sys.path.insert(0, str(NBS / "site"))
from pages import COURSE, STUDIES, module_of, reference  # noqa: E402

REFERENCE = [path for group in reference().values() for path in group]
CHECKS = sorted((NBS / "reference" / "checks").glob("*.ipynb"))
PLOTS = r"small_multiples|\.plot\(|draw_\w+\(|plot_\w+\("  # they label their axes
NEEDED = (
    "**What you will be able to do**",
    "**You need**",
    "**Time**",
    "## Exercises",
    "## What you know now",
    "**Limits.**",
    "**References.**",
    "**Next**",
)

every_page = pytest.mark.parametrize("path", PATHS, ids=name_of)
chapters = pytest.mark.parametrize("path", COURSE, ids=name_of)


@functools.cache
def read(path):
    "A notebook, not to be changed: each of the tests looks at all of them."
    return nbformat.read(path, 4)


def cells(path, kind=None):
    return [c for c in read(path).cells if kind in (None, c.cell_type)]


def is_exported(cell):
    return cell.cell_type == "code" and "export" in flags(cell)


def test_every_notebook_has_its_place():
    index = [NBS / "index.ipynb"]
    assert set(PATHS) == {*index, *COURSE, *REFERENCE, *STUDIES, *CHECKS}


MOST_LINES = 60  # of a cell, all lines counted


@every_page
def test_lines_and_cells_can_be_read(path):
    for cell in cells(path, "code"):
        lines = cell.source.splitlines()
        assert len(lines) <= MOST_LINES, f"{len(lines)}: {cell.source[:80]}"
        for line in lines:
            assert len(line) <= 88 or line.startswith("#| fig-alt"), line


@every_page
def test_outputs_are_clean(path):
    assert path.stat().st_size < 2**20
    for cell in cells(path, "code"):
        for output in cell.outputs:
            assert output.output_type != "error", cell.source[:80]
            assert output.get("name") != "stderr", (
                f"{output.text[:200]}: {cell.source[:80]}"
            )
            shown = output.get("text", output.get("data", {}).get("text/plain", ""))
            paths = re.search(r"(/root|/home|/tmp|/work|C:\\)", str(shown))
            assert not paths, f"a path: {str(shown)[:200]}"
            assert "it/s" not in str(shown) and "%|" not in str(shown), "a progress bar"


@every_page
def test_figures_have_words_and_labels(path):
    everything = cells(path)
    for i, cell in enumerate(everything):
        if cell.cell_type != "code" or "hide" in flags(cell):
            continue
        if not any("image/png" in output.get("data", {}) for output in cell.outputs):
            continue
        assert "fig-alt:" in flags(cell), f"no alt text: {cell.source[:80]}"
        labelled = "xlabel" in cell.source and "ylabel" in cell.source
        pictures = "imshow" in cell.source
        drawn = re.search(PLOTS, cell.source)
        assert labelled or pictures or drawn, f"no axis labels: {cell.source[:80]}"
        after = [c for c in everything[i + 1 : i + 3] if c.cell_type == "markdown"]
        assert after, f"no sentence after the figure: {cell.source[:80]}"


@chapters
def test_structure_of_a_chapter(path):
    everything = cells(path)
    text = "\n".join(c.source for c in everything if c.cell_type == "markdown")
    assert re.search(r"^# .+\n\n> .+", text), "title and claim"
    missing = [needed for needed in NEEDED if needed not in text]
    assert not missing
    for cell in everything:
        assert "def check_" not in cell.source, "checks live in ressa.course.checks"


@pytest.mark.parametrize("path", REFERENCE + STUDIES, ids=name_of)
def test_structure_of_a_reference_page(path):
    text = "\n".join(c.source for c in cells(path) if c.cell_type == "markdown")
    assert re.search(r"^# .+\n\n> .+", text), "title and inventory"
    assert "## Exercises" not in text, "exercises belong to chapters"


@pytest.mark.parametrize("path", REFERENCE, ids=name_of)
def test_a_reference_page_begins_with_a_table_of_what_is_in_it(path):
    if not any(is_exported(cell) for cell in cells(path)):
        return
    text = "\n".join(c.source for c in cells(path) if c.cell_type == "markdown")
    table = re.search(r"^\|.+\|\n\| *-+", text, re.M)
    assert table and table.start() < 2500, "no table of what is in the page"


def public_definitions(path):
    "The functions and classes that a page exports."
    for cell in cells(path):
        if not is_exported(cell):
            continue
        for node in ast.parse(cell.source).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                if not node.name.startswith("_"):
                    yield node


@every_page
def test_exported_names_are_explained(path):
    "Each public name has a docstring, and its page says what it is for or uses it."
    page = [cell for cell in cells(path) if not is_exported(cell)]
    text = "\n".join(cell.source for cell in page)
    missing = []
    for node in public_definitions(path):
        assert ast.get_docstring(node), f"{node.name} has no docstring"
        if path not in CHECKS and not re.search(rf"\b{node.name}\b", text):
            missing.append(node.name)
    assert not missing, f"not on their page: {missing}"


# Each module of a command has these two; its page runs the command itself.
OF_EACH_COMMAND = {"add_options", "run"}
ONE_RUN = {"command_main_job"}  # its functions are the steps of a run, which is shown


@pytest.mark.parametrize(
    "path", [path for path in REFERENCE if path.stem not in ONE_RUN], ids=name_of
)
def test_a_reference_page_shows_an_example_of_each_function(path):
    "A cell that is read calls it or hands it on; to be named in the text is not enough."
    used = set()
    for cell in cells(path, "code"):
        if is_exported(cell) or "hide" in flags(cell):
            continue
        for node in ast.walk(ast.parse(cell.source)):
            used.add(getattr(node, "id", getattr(node, "attr", None)))
    functions = {
        node.name
        for node in public_definitions(path)
        if isinstance(node, ast.FunctionDef)
    }
    if path.stem.startswith("command_"):
        functions -= OF_EACH_COMMAND
    assert functions <= used, f"no example of {sorted(functions - used)}"


@every_page
def test_parameters_are_documented(path):
    for cell in cells(path, "code"):
        if not is_exported(cell):
            continue
        source = cell.source.splitlines()
        for node in ast.parse(cell.source).body:
            if not isinstance(node, ast.FunctionDef) or node.name.startswith("_"):
                continue
            arguments = node.args.args + node.args.kwonlyargs
            if not arguments or arguments[0].lineno == node.lineno:
                continue  # one line: the docstring says it
            bare = [a.arg for a in arguments if "#" not in source[a.lineno - 1]]
            few = len(bare) <= len(arguments) // 2
            assert few, f"{node.name}: undocumented {bare}"


@every_page
def test_what_a_gpu_cell_does_has_run_on_a_cpu(path):
    "A cell that is skipped without a GPU only calls, in another size, what another cell has called."
    code = cells(path, "code")
    run = "\n".join(c.source for c in code if not flags(c) & {"gpu", "slow"})
    for cell in (cell for cell in code if "gpu" in flags(cell)):
        for name in re.findall(r"\b([a-z_]\w*)\(", cell.source):
            called = re.search(rf"\b{name}\(", run)
            assert called, f"{name} is called only on a GPU: {cell.source[:80]}"


def test_one_notebook_owns_one_module():
    modules = [module_of(read(path)) for path in PATHS]
    modules = [module for module in modules if module]
    assert len(modules) == len(set(modules))
    assert not [
        path
        for path in (NBS.parent / "ressa").rglob("*.py")
        if path.name not in ("__init__.py", "_modidx.py")
        and ".".join(path.relative_to(NBS.parent / "ressa").with_suffix("").parts)
        not in modules
    ]
