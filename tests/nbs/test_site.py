"""The site: built once from the notebooks, then read in a real browser that has no network."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote, urlsplit

import nbformat
import pytest
from filelock import FileLock

pytest.importorskip("sphinx", reason="the site needs Sphinx: pip install '.[dev]'")
pytest.importorskip("myst_nb", reason="the site needs MyST-NB: pip install '.[dev]'")

ROOT = Path(__file__).resolve().parents[2]
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))),
    None,
)
IN_FULL = ("index.html", "search.html")  # with their code, and in the dark too
# Pages of the reference are made alike: axe-core looks at one in five.
EVERY_FEW = 5
# of the pages of one style some are enough for colours
COLOURED = ("explorers.html", "report.html", "syllabus.html")
sys.path.append(str(ROOT / "nbs" / "site"))
from make import linked, links, notebooks  # noqa: E402
from pages import NBS, page_name  # noqa: E402

NOTEBOOKS = [path for path in notebooks() if path.stem != "index"]
pytestmark = pytest.mark.browser

LOOK = """async () => {
    if (window.MathJax?.startup) await MathJax.startup.promise;
    const all = selector => [...document.querySelectorAll(selector)];
    return {
        too_wide: document.documentElement.scrollWidth - innerWidth,
        sticks_out: all('body *').filter(e => e.getBoundingClientRect().right > innerWidth + 1
            && !e.parentElement.closest('pre, .highlight, .pst-scrollable-table-container'))
            .slice(0, 3).map(e => e.outerHTML.slice(0, 120)),
        ids: all('[id]').map(e => e.id),
        links: all('a[href]').map(a => a.href),
        pictures: all('main img').map(i => ({alt: i.alt, loaded: i.naturalWidth > 0})),
        formulas: all('.math').length,
        drawn: all('.math mjx-container > svg').length,
        wrong: all('.math [data-mjx-error]').map(e => e.dataset.mjxError),
        unfolded: all('main details[open]:not(.source)').length,
        solutions: all('main details:not(.source, .hide)').length,
        folded: all('main details.hide').length,
        prose: (() => { const copy = document.querySelector('main')?.cloneNode(true); if (!copy) return '';
            copy.querySelectorAll('dt, pre, code, .highlight, .math, script, style, .output.text_plain').forEach(e => e.remove());
            return copy.textContent; })(),
        widgets: all('.jupyter-widgets').length,
        empty: all('.jupyter-widgets img').filter(i => !i.naturalWidth).length}}"""

# The first lines of code that are longer than their column.
SCROLLED_CODE = """() => [...document.querySelectorAll('main .highlight pre')]
    .filter(code => code.scrollWidth > code.clientWidth && !code.closest('.cell_output'))
    .map(code => code.textContent.slice(0, 80))"""


def page_of(notebook):
    return page_name(notebook) + ".html"


def shared(tmp_path_factory):
    "A folder that all workers of a run share."
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    "The folder of the built site."
    out = shared(tmp_path_factory) / "site"
    with FileLock(out.with_suffix(".lock")):
        if not (out / "index.html").exists():
            made = subprocess.run(
                [sys.executable, ROOT / "nbs" / "site" / "make.py", out],
                cwd=ROOT,
                capture_output=True,
                text=True,
            )
            assert not made.returncode, (
                f"the site was not built:\n{made.stdout[-2000:]}{made.stderr[-4000:]}"
            )
    return out


@pytest.fixture(scope="session")
def browser():
    sync_api = pytest.importorskip(
        "playwright.sync_api", reason="the site's tests need playwright"
    )
    if not CHROMIUM:
        pytest.skip("the site's tests need Chromium: apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox"]
        )
        yield browser
        browser.close()


@pytest.fixture
def tab(browser):
    "A page of a desktop's size, offline; `tab.errors` gathers what went wrong on it."
    with browser.new_context(
        viewport={"width": 1300, "height": 900}, offline=True
    ) as context:
        yield watched(context.new_page())


def watched(tab):
    "A page that notes its errors, and each wish for the network."
    tab.set_default_timeout(120_000)
    tab.errors = []
    tab.on("console", lambda m: m.type == "error" and tab.errors.append(m.text))
    tab.on("pageerror", lambda error: tab.errors.append(str(error)))
    tab.on(
        "request",
        lambda r: r.url.startswith("http") and tab.errors.append(f"asks for {r.url}"),
    )
    return tab


def axe(tab, but=(), colours=True):
    "Serious and critical violations that axe-core finds, on the page or on what is left without some elements."
    from axe_playwright_python.base import AXE_SCRIPT

    if not tab.evaluate("typeof axe === 'object'"):
        tab.evaluate(AXE_SCRIPT)
    for selector in but:
        tab.evaluate(
            "s => document.querySelectorAll(s).forEach(e => e.remove())", selector
        )
    rules = {
        name: {"enabled": colours} for name in ("color-contrast", "link-in-text-block")
    }
    found = tab.evaluate(
        "options => axe.run(options)",
        {"resultTypes": ["violations"], "preload": False, "rules": rules},
    )["violations"]
    return [
        f"{v['id']}: {node['html'][:160]} ({node['failureSummary'][:160]})"
        for v in found
        if v["impact"] in ("serious", "critical")
        for node in v["nodes"]
    ]


@pytest.fixture(scope="session")
def pages(site, tmp_path_factory, request):
    "What each page looks like on a telephone, and what axe-core says of it, light and dark."
    stored = site.with_suffix(".json")
    with FileLock(site.with_suffix(".pages.lock")):
        if not stored.exists():
            browser = request.getfixturevalue("browser")
            files = sorted(p for p in site.rglob("*.html") if "_static" not in p.parts)
            found = {}
            for number, path in enumerate(files):
                found[str(path.relative_to(site))] = look(browser, path, number)
            stored.write_text(json.dumps(found))
    return json.loads(stored.read_text())


def look(browser, path, number):
    with browser.new_context(
        viewport={"width": 390, "height": 844}, offline=True
    ) as context:
        tab = watched(context.new_page())
        tab.goto(path.as_uri())
        if "widget-view+json" in path.read_text(encoding="utf-8"):
            tab.wait_for_selector(".jupyter-widgets")
        seen = tab.evaluate(LOOK)
        seen["errors"] = tab.errors
        tab.set_viewport_size({"width": 1300, "height": 900})
        seen["scrolled_code"] = tab.evaluate(SCROLLED_CODE)
        if path.name in IN_FULL:
            seen["light"] = axe(tab)
            tab.add_style_tag(content="* {transition: none !important}")
            tab.emulate_media(color_scheme="dark")
            seen["dark"] = axe(tab)
        elif "reference" not in path.parts or number % EVERY_FEW == 0:
            seen["light"] = axe(
                tab,
                [".highlight", "mjx-container", ".bd-sidebar"],
                path.name in COLOURED,
            )
        return seen


def each(pages, key):
    "{page: finding} where there is one."
    return {name: page[key] for name, page in pages.items() if page.get(key)}


def broken(pages, site):
    "Links inside the site that lead nowhere: (page, link)."
    for name, page in pages.items():
        for link in page["links"]:
            url = urlsplit(link)
            if url.scheme != "file":
                continue
            path = Path(unquote(url.path))
            if not path.exists():
                yield name, link
            elif path.suffix == ".html" and url.fragment:
                ids = pages[str(path.relative_to(site))]["ids"]
                if unquote(url.fragment) not in ids:
                    yield name, link


def test_every_notebook_has_a_page(site):
    missing = [n.name for n in NOTEBOOKS if not (site / page_of(n)).exists()]
    assert not missing


def test_links_and_anchors(pages, site):
    assert not list(broken(pages, site))
    planted = {
        "index.html": {
            "ids": [],
            "links": [
                (site / "index.html").as_uri() + "#nowhere",
                (site / "nowhere.html").as_uri(),
            ],
        }
    }
    assert len(list(broken(planted, site))) == 2


def test_no_errors_and_no_network(pages):
    assert not each(pages, "errors")


def test_ids_are_unique(pages):
    twice = {
        name: {i for i in page["ids"] if page["ids"].count(i) > 1}
        for name, page in pages.items()
    }
    assert not {name: ids for name, ids in twice.items() if ids}


def test_mathematics_is_drawn(pages):
    assert pages["course/sparse_lora.html"]["formulas"] > 0
    assert not each(pages, "wrong")
    assert not {
        name: (page["formulas"], page["drawn"])
        for name, page in pages.items()
        if page["formulas"] != page["drawn"]
    }


def test_fits_a_telephone(pages):
    assert not {
        name: (page["too_wide"], page["sticks_out"])
        for name, page in pages.items()
        if page["too_wide"] > 0
    }


def test_code_fits_its_column(pages):
    "Beside both sidebars of a laptop's screen; what a cell prints may be wider."
    assert not each(pages, "scrolled_code")


@pytest.mark.parametrize("mode", ["light", "dark"])
def test_accessible(pages, mode):
    assert any(mode in page for page in pages.values())
    assert not each(pages, mode)


def test_figures_have_their_words(pages):
    for notebook in NOTEBOOKS:
        seen = pages[page_of(notebook)]
        assert all(picture["loaded"] for picture in seen["pictures"]), notebook.name
        words = {picture["alt"] for picture in seen["pictures"]}
        for cell in nbformat.read(notebook, 4).cells:
            alt = re.search(r"^#\| fig-alt: (.+)", cell.source, re.M)
            if not alt or cell.cell_type != "code" or "#| hide\n" in cell.source:
                continue
            if any("image/png" in o.get("data", {}) for o in cell.outputs):
                assert alt[1].strip() in words, f"{notebook.name}: {alt[1]}"


def test_solutions_are_folded(pages):
    for notebook in NOTEBOOKS:
        text = "".join(
            c.source
            for c in nbformat.read(notebook, 4).cells
            if c.cell_type == "markdown"
        )
        seen = pages[page_of(notebook)]
        assert seen["solutions"] == text.count("<details"), notebook.name
        assert not seen["unfolded"], notebook.name


def test_code_that_only_draws_is_folded_not_lost(pages):
    for notebook in NOTEBOOKS:
        if notebook.stem == "index":
            continue
        cells = [c for c in nbformat.read(notebook, 4).cells if c.cell_type == "code"]
        folded = [
            c
            for c in cells
            if re.search(r"^#\| hide_input$", c.source, re.M)
            and "#| export" not in c.source  # these are counted as sources
        ]
        assert pages[page_of(notebook)]["folded"] == len(folded), notebook.name


def test_widgets_show_their_state(pages):
    with_widgets = [n for n in NOTEBOOKS if "widgets" in nbformat.read(n, 4).metadata]
    if not with_widgets:
        pytest.skip("no notebook stores widgets")
    for notebook in with_widgets:
        assert pages[page_of(notebook)]["widgets"], notebook.name
        assert not pages[page_of(notebook)]["empty"], notebook.name


def test_entries_of_the_library(pages):
    scope = {}
    exec((ROOT / "ressa" / "_modidx.py").read_text(), scope)
    known = {name: page["ids"] for name, page in pages.items()}
    for module, names in scope["d"]["syms"].items():
        if module.startswith("ressa.course.checks"):
            continue  # checks have no page: they tell the solutions
        for name, (address, _) in names.items():
            inside = name.removeprefix(f"{module}.")
            if "." in inside or inside.startswith("_"):
                continue
            assert name in known[address.partition("#")[0]], f"no entry of {name}"
    # a property that a class binds to a function has one too
    statistics = known["reference/statistics.html"]
    assert "ressa.pruning.statistics.Statistics.norm" in statistics


def test_an_entry(tab, site):
    "Signature, docments, the source under it; prose links to it."
    name = "ressa.pruning.engine.prune"
    tab.goto((site / "reference" / "engine.html").as_uri())
    entry = tab.locator("dl.py.function", has=tab.locator(f"[id='{name}']"))
    assert "method='wanda'" in entry.locator("dt").first.inner_text().replace(" ", "")
    assert "model" in entry.locator("td").first.inner_text()
    assert tab.locator(f"main a[href='#{name}']").count()
    source = entry.locator("xpath=following::details[contains(@class, 'source')]").first
    assert source.get_attribute("open") is not None
    assert "def prune(" in source.inner_text()


def test_source_cells_have_no_directives(site):
    assert not [
        p.name
        for p in site.rglob("*.html")
        if re.search(
            r"#\|\s*(export|hide|fig-alt)",
            re.sub("<[^>]+>", "", p.read_text(encoding="utf-8")),
        )
    ]


def test_search(tab, site):
    tab.goto((site / "index.html").as_uri())
    tab.keyboard.press("Control+k")
    tab.keyboard.type("SparseLoRA")
    tab.keyboard.press("Enter")
    tab.wait_for_selector("#search-results li a")
    found = tab.locator("#search-results li a").evaluate_all(
        "links => links.map(a => a.href)"
    )
    assert any("/sparse_lora.html" in link for link in found)
    assert not tab.errors


def test_dark_mode(tab, site):
    tab.goto((site / "index.html").as_uri())
    tab.emulate_media(color_scheme="light")
    shade = "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).slice(0, 3).every(x => x < 60)"
    assert not tab.evaluate(shade)
    tab.locator("button.theme-switch-button:visible").first.click()
    tab.locator("button.dropdown-item:visible", has_text="Dark").click()
    tab.wait_for_function(shade)
    tab.reload()
    tab.wait_for_function(shade)  # the choice is remembered


def test_copy_button(tab, site):
    tab.goto((site / "reference" / "engine.html").as_uri())
    cell = tab.locator("main .cell_input").first
    cell.hover()
    cell.locator("button.copybtn").click()
    tab.keyboard.press("Control+k")
    tab.keyboard.press("Control+v")
    pasted = tab.locator("dialog input").input_value()
    assert pasted and pasted.split() == cell.inner_text().split()


def test_open_in_colab_needs_an_address():
    path = NBS / "course" / "03_masks.ipynb"
    there = dict(branch="main", nbs_path=Path("nbs"))
    assert "Colab" not in links(path, SimpleNamespace(git_url="", **there))
    github = SimpleNamespace(git_url="https://github.com/a/b", **there)
    address = "https://colab.research.google.com/github/a/b/blob/main/nbs"
    assert f"{address}/course/03_masks.ipynb" in links(path, github)


def test_links_between_sections():
    text = "See [Masks](../course/03_masks.ipynb#ties) and `select`."
    names = {"select": "pruning.masks"}
    assert linked(text, names, "reference/engine") == (
        "See [Masks](../course/masks.ipynb#ties) and "
        "{py:obj}`select <ressa.pruning.masks.select>`."
    )


# What is left of markup in the text of a page, code taken out, if it was not rendered.
RAW_MARKUP = {
    "table": r"^\s*\|.*\|\s*$|\|\s*:?-{3,}",
    "code fence": r"```|~~~",
    "heading": r"^\s*#{1,6}\s",
    "link": r"\]\(|\]\[|^\s*\[[^\]]+\]:\s",
    # not the arguments of a call, such as `model(**batch)`
    "emphasis": r"(?<!\()(?<!, )\*\*|(?<![\w.])__|(?<!\w)\*\w[^*]*\w\*(?!\w)",
    "HTML": r"</?(details|summary|div|span|img|br|p|a|table|sub|sup)\b[^>]*>",
    "directive": r":::|\{[\w:-]+\}(?=`|\s|$)",
    "list": r"^\s*[-*+] \w",
    "formula": r"\$\$|\\(frac|odot|lVert|sum|mathbf|text)\b",
}


def raw_markup(prose):
    "The lines of a text that hold markup, each with its kind."
    return [
        (kind, line.strip())
        for line in prose.splitlines()
        for kind, pattern in RAW_MARKUP.items()
        if re.search(pattern, line)
    ]


@pytest.mark.parametrize(
    ("kind", "line"),
    [
        ("table", "| name | what it does |"),
        ("table", "Two of them: | --- | --- |"),
        ("code fence", "```python"),
        ("heading", "## Limits"),
        ("link", "See [the chapter](03_masks.ipynb)."),
        ("link", "See [the chapter][masks]."),
        ("emphasis", "A word that is **bold and not closed"),
        ("emphasis", "It asks *why*."),
        ("HTML", "<details><summary>Solution</summary>"),
        ("directive", "{py:obj}"),
        ("list", "- the first point"),
        ("formula", "$$W + s(BA)\\odot M$$"),
    ],
)
def test_markup_that_is_not_rendered_is_found(kind, line):
    assert kind in dict(raw_markup(f"A sentence.\n{line}\nAnother."))


def test_plain_text_holds_no_markup():
    text = "A mask [0, 1) of 2:4 weights, W * x | y, cost ≤ 3 (of 5), #1, s_v, $5, f(a, **b)."
    assert not raw_markup(text)


def test_no_raw_markup_is_read(pages):
    "What a reader sees is rendered."
    found = {name: raw_markup(page["prose"])[:3] for name, page in pages.items()}
    found.pop("search.html")  # it tells browsers without JavaScript so
    assert not {name: lines for name, lines in found.items() if lines}


def test_the_contents_have_three_sections(tab, site):
    tab.goto((site / "index.html").as_uri())
    captions = tab.locator(".bd-sidebar-primary .caption-text").all_inner_texts()
    assert captions == ["Course", "Reference", "Studies"]


def test_docments_are_read():
    import ast

    from interface import entry

    source = """def f(x: "a | b",  # rows, *all* of them
      *,
      # how many
      # of them
      n=3) -> int:  # a number
    "Do `it` as *Them, All* do (`x*y*z`), with f(a*b, *c, **d)."
"""
    text = entry(ast.parse(source).body[0], source, "ressa.f")
    assert r"Do `it` as *Them, All* do (`x*y*z`), with f(a\*b, \*c, \*\*d)." in text
    assert "f(x, *, n=3)" in text and "| `n` |  | `3` | how many of them |" in text
    assert (
        r"rows, \*all\* of them" in text and "| returns | `int` |  | a number |" in text
    )
