"""The report page: whole, self-contained, and safe with any text that data may hold."""

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

import ressa
from ressa.cli.report import html_report, picture_uri

RESULTS = Path(__file__).parents[2] / "nbs" / "results" / "walk.json"
EVIL = "<script>alert(1)</script> & \"quotes\" 'single'"


class Page(HTMLParser):
    "Tags, and the text of each cell of the page's tables."

    def __init__(self, page):
        super().__init__()
        self.tags, self.cells, self.open = [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag in ("td", "th"):
            self.cells.append("")
        if tag not in ("img", "meta"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.cells[-1] += data


def example(prompt, answer):
    return dict(image=Image.new("RGB", (8, 8), "red"), prompt=prompt, answer=answer)


@pytest.fixture(scope="module")
def run():
    return json.loads(RESULTS.read_text())["runs"]["80 %"]


def answers(dense, pruned, repaired, captions=(("a",), ("a",), ("a",))):
    rows = zip(("dense", "pruned", "repaired"), (dense, pruned, repaired), captions)
    return {row: {"answers": [*said], "captions": [*told]} for row, said, told in rows}


def test_the_page_is_whole_and_alone(run):
    done = answers(["red"], ["no"], ["red"], (["a cat"], ["a"], ["a cat"]))
    text = html_report(
        run, done, [example("which?", "red")], [example("what?", "a cat")]
    )
    page = Page(text)
    assert text.startswith("<!doctype html>") and text.endswith("</html>")
    assert not page.open  # every tag is closed
    tags = [tag for tag, _ in page.tags]
    assert tags.count("img") == 3 + 2 and "script" not in tags and "link" not in tags
    for tag, attributes in page.tags:
        if tag == "img":
            assert attributes["src"].startswith("data:image/png;base64,")
            assert attributes["alt"]
    for text in ("RESSA", "98.24%", "which?", "a cat"):
        assert text in page.cells


def test_any_text_is_only_text(run):
    done = answers([EVIL], ["no"], [EVIL])
    settings = {"settings": run["settings"] | {"model": EVIL}}
    text = html_report(
        run | settings, done, [example(EVIL, EVIL)], [example("what?", "a")]
    )
    page = Page(text)
    assert not page.open and "script" not in [tag for tag, _ in page.tags]
    assert page.cells.count(EVIL) == 4  # prompt, dense, repaired, right
    assert EVIL in [attributes.get("alt") for _, attributes in page.tags]
    assert "<script" not in text


def test_examples_that_the_repair_corrected_come_first(run):
    dense = [f"d{i}" for i in range(10)]
    pruned = ["d0", *(f"p{i}" for i in range(1, 10))]  # the first is unchanged
    repaired = [*pruned[:8], "d8", "d9"]
    rows = [example(f"question {i}", dense[i]) for i in range(10)]
    page = Page(html_report(run, answers(dense, pruned, repaired), rows, []))
    shown = [cell for cell in page.cells if cell.startswith("question ")]
    assert shown == [f"question {i}" for i in (8, 9, 1, 2, 3, 4)]


def test_a_run_without_captions_or_changes(run):
    same = answers(["red"], ["red"], ["red"], ((), (), ()))
    page = Page(html_report(run, same, [example("which?", "red")], []))
    assert [tag for tag, _ in page.tags].count("img") == 3 and not page.open


def test_pictures_as_text():
    def draw(figure):
        figure.subplots().plot([1, 2])

    for picture in (draw, Image.new("RGB", (2, 2))):
        assert picture_uri(picture).startswith("data:image/png;base64,iVBOR")


def test_the_template_is_shipped():
    assert (Path(ressa.__file__).parent / "assets" / "report.html.jinja").is_file()
