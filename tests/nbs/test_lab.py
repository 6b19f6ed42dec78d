"""JupyterLab in a real browser: a page keeps its widget, runs without an error, and a slider moves the picture."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
from nbformat.sign import NotebookNotary
from notebooks import ENVIRONMENT, NBS

playwright = pytest.importorskip(
    "playwright.sync_api", reason="playwright is not installed"
)
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))),
    None,
)
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed"),
]
MINUTES = 60_000  # milliseconds; generous, since a test must not fail on a busy machine
# Pages, the number of the slider that is moved, and what the picture's words say then.
LOOKED_AT = [("reference/explorers", 0, "share = 0.625")]
OFF = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def settings(folder):
    "No news from the network, and all cells in the page, also those out of sight."
    for name, content in (
        (
            "labconfig/page_config.json",
            {
                "disabledExtensions": {
                    "@jupyterlab/apputils-extension:announcements": True
                }
            },
        ),
        (
            "settings/@jupyterlab/notebook-extension/tracker.jupyterlab-settings",
            {"windowingMode": "none"},
        ),
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(content))
    places = {
        f"JUPYTER_{kind}_DIR": str(folder) for kind in ("CONFIG", "DATA", "RUNTIME")
    }
    return places | {"JUPYTERLAB_SETTINGS_DIR": str(folder / "settings")}


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    "The address of a JupyterLab over a copy of the notebooks; nothing of it is left afterwards."
    folder = tmp_path_factory.mktemp("lab")
    (folder / "jupyter").mkdir()
    shutil.copytree(
        NBS, folder / "nbs", ignore=shutil.ignore_patterns("site", ".ipynb_checkpoints")
    )
    trusted = NotebookNotary(
        data_dir=str(folder / "jupyter")
    )  # as a reader does who wants to see stored widgets
    for name, _, _ in LOOKED_AT:
        trusted.sign(nbformat.read(folder / "nbs" / f"{name}.ipynb", 4))
    with open(folder / "log", "w") as log:
        server = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "jupyterlab",
                "--no-browser",
                "--allow-root",
                "--IdentityProvider.token=t",
                "--ServerApp.ip=127.0.0.1",
                f"--ServerApp.port={free_port()}",
                f"--ServerApp.root_dir={folder / 'nbs'}",
            ],
            env=os.environ | ENVIRONMENT | settings(folder / "jupyter"),
            stdout=log,
            stderr=log,
        )
    while not (
        told := list((folder / "jupyter").glob("jpserver-*.json"))
    ):  # another port, if ours was taken meanwhile
        assert server.poll() is None, (folder / "log").read_text()
        time.sleep(0.2)
    yield json.loads(told[0].read_text())["url"]
    server.send_signal(signal.SIGTERM)  # the server ends its kernels
    server.wait(60)
    kin = [
        p
        for p in Path("/proc").glob("[0-9]*/cmdline")
        if str(folder).encode() in read(p)
    ]
    assert not kin, "a kernel is left running"


def read(path):
    try:
        return path.read_bytes()
    except OSError:
        return b""  # it ended meanwhile


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as p:
        chromium = p.chromium.launch(executable_path=CHROMIUM, args=OFF)
        yield chromium
        chromium.close()


def opened(browser, lab, name):
    "The page of a notebook, with a kernel and without a panel beside it."
    page = browser.new_page(viewport=dict(width=1300, height=1000))
    page.set_default_timeout(3 * MINUTES)
    page.goto(f"{lab}lab/tree/{name}.ipynb?token=t&reset")
    page.wait_for_selector(".jp-Notebook .jp-CodeCell")
    page.wait_for_selector(".jp-Notebook-ExecutionIndicator[data-status=idle]")
    return page


def run_all(page, name):
    "Run all cells of the page; no cell may show an error."
    code = [  # a folded cell shows no number
        c
        for c in nbformat.read(NBS / f"{name}.ipynb", 4).cells
        if c.cell_type == "code" and c.source.strip() and "jupyter" not in c.metadata
    ]
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_text("Run All Cells", exact=True).click()
    failed = '.jp-OutputArea-output[data-mime-type="application/vnd.jupyter.error"]'
    ran = "[...document.querySelectorAll('.jp-InputPrompt')].filter(e => /\\[\\d+\\]/.test(e.textContent)).length"
    page.wait_for_function(
        f"{ran} >= {len(code)} || document.querySelector('{failed}')",
        timeout=5 * MINUTES,
        polling=500,  # milliseconds; by default it asks at each frame
    )
    errors = page.locator(failed).all_inner_texts()
    assert not errors, errors[0]


def move(box, slider):
    "Press the right arrow on a slider of an explorer: the picture before and after, and the words for it."
    picture = box.locator("img")
    before = picture.get_attribute("src")
    handle = box.locator(".widget-slider").nth(slider).get_by_role("slider")
    handle.scroll_into_view_if_needed()
    handle.press("ArrowRight")
    playwright.expect(picture).not_to_have_attribute("src", before, timeout=MINUTES)
    return before, picture.get_attribute("src"), picture.get_attribute("alt")


@pytest.mark.parametrize("name, slider, words", LOOKED_AT)
def test_a_slider_moves_the_picture(lab, browser, name, slider, words):
    page = opened(browser, lab, name)
    thrown = []
    page.on("pageerror", lambda error: thrown.append(str(error)))
    box = page.locator(".jp-OutputArea-output .widget-vbox").first
    assert "=" in box.locator("img").get_attribute(
        "alt"
    )  # as it was stored, before anything has run
    stored = box.locator("img").get_attribute("src")
    run_all(page, name)
    assert box.locator("img").get_attribute("src") == stored
    before, after, alt = move(box, slider)
    assert before == stored and after != before and words in alt
    assert re.match("data:image/png;base64,iVBOR", after)
    assert not thrown
    page.close()
