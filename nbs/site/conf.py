"""How Sphinx makes the site. Every script comes out of an installed package: pages need no network."""

import re
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

from nbdev.config import get_config
from sphinx import addnodes
from sphinx.pycode import ModuleAnalyzer

settings = get_config()
project, author, release = settings.title, settings.author, settings.version
copyright = settings.copyright


def package(name, *parts):
    return Path(find_spec(name).origin).parent.joinpath(*parts)


extensions = [
    "myst_nb",
    "sphinx_copybutton",
    "sphinx.ext.mathjax",
    # The source of an entry stands under it; an address leads to the whole file as well.
    *(["sphinx.ext.linkcode"] if settings.git_url else []),
]
exclude_patterns = ["notebooks"]
highlight_language = "text"
python_display_short_literal_types = True
add_module_names = False
copybutton_selector = "div.highlight pre"
copybutton_exclude = ".linenos, .gp, .go"

nb_execution_mode = "off"  # the notebooks' stored outputs, of which the tests make sure
nb_merge_streams = True
nb_code_prompt_show = "Show the code"
nb_code_prompt_hide = "Hide the code"
nb_render_markdown_format = "gfm"  # tables in what a cell displays
nb_ipywidgets_js = {"require.min.js": {}, "libembed-amd.js": {}, "widgets.js": {}}
myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence", "attrs_block"]
myst_heading_anchors = 3

mathjax_path = "tex-svg.js"
html_title = project
html_theme = "sphinx_book_theme"
widgets = package("shinywidgets", "static")
html_static_path = [
    "static",
    *map(
        str,
        [
            package("sphinx-mathjax-offline", "static", "mathjax", "tex-svg.js"),
            package("shiny", "www", "shared", "requirejs", "require.min.js"),
            widgets / "libembed-amd.js",
            *widgets.glob("*.woff2"),
        ],
    ),
]
html_css_files = ["ressa.css"]
html_js_files = [("ressa.js", {"priority": 250})]
html_copy_source = html_show_sourcelink = False
html_context = {"default_mode": "auto"}
html_theme_options = {
    "repository_url": settings.git_url or "",
    "use_repository_button": bool(settings.git_url),
    "use_download_button": False,
    "use_fullscreen_button": False,
    "show_navbar_depth": 1,
    "navigation_depth": 1,  # pages without their headings: each page lists its own
    "show_toc_level": 2,
    "home_page_in_toc": True,
    "navbar_persistent": [],
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
}


@lru_cache
def places_in(module):
    "Where the names of one of our modules are: {name: (kind, first line, last line)}."
    path = settings.config_path / f"{module.replace('.', '/')}.py"
    code = path.read_text(encoding="utf-8")
    return ModuleAnalyzer.for_string(code, module).find_tags()


def linkcode_resolve(domain, info):
    "The address of a name's source, once the project has one."
    _, first, last = places_in(info["module"])[info["fullname"]]
    path = info["module"].replace(".", "/")
    return f"{settings.git_url.rstrip('/')}/blob/{settings.branch}/{path}.py#L{first}-L{last}"


def nbdev_anchors(app, doctree):
    "nbdev's own anchors, `prune.html#prune`, lead to the entries too."
    taken = set(doctree.ids)
    for node in doctree.findall(addnodes.desc_signature):
        anchor = node.get("fullname", "").lower()
        if anchor and anchor not in taken:
            node["ids"].append(anchor)
        taken.add(anchor)


def local_fonts(app, error):
    "The widgets' script asks a server for its icon font by address: let it look beside the page."
    if error:
        return
    script = Path(app.outdir, "_static", "libembed-amd.js")
    text = script.read_text(encoding="utf-8")
    script.write_text(
        re.sub(
            r"https://unpkg\.com/@jupyter-widgets/html-manager@[\d.]+/dist/",
            "_static/",
            text,
        ),
        encoding="utf-8",
    )


def setup(app):
    app.connect("doctree-read", nbdev_anchors)
    app.connect("build-finished", local_fonts)
