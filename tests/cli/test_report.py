"""The report page: whole, self-contained, true to its shares, and safe with any text that data may hold."""

import copy
import json
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest
from datasets import Dataset, Features, Image, List, Value
from matplotlib.figure import Figure
from PIL import Image as Pictures

import ressa
from ressa.cli import report
from ressa.cli.report import (
    FATES,
    RIGHT_FROM,
    RIGHT_MEANINGS,
    fates_of,
    html_report,
    layer_place,
    picture_uri,
    places_for,
)
from ressa.cli.results import METRIC_TEXTS, plain_row
from ressa.evaluation.answers import score
from ressa.evaluation.metrics import METRICS

RESULTS = Path(__file__).parents[2] / "nbs" / "results" / "walk.json"
EVIL = "<script>alert(1)</script> & \"quotes\" 'single'"
FEATURES = Features(
    {
        "image": Image(),
        "prompt": Value("string"),
        "answer": Value("string"),
        "answers": List(Value("string")),
        "question_type": Value("string"),
    }
)


class Page(HTMLParser):
    "Tags, and the text of each cell of the page's tables and lists."

    TEXTS = ("td", "th", "dd", "p", "strong", "caption", "h1")

    def __init__(self, page):
        super().__init__()
        self.tags, self.cells, self.open = [], [], []
        self.feed(page)
        self.cells = [cell.strip() for cell in self.cells]

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag in self.TEXTS:
            self.cells.append("")
        if tag not in ("img", "meta", "source"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in self.TEXTS:
            self.cells[-1] += data


def examples(rows, kind="other"):
    "A data set of (prompt, right answers), each with a picture of its own."
    return Dataset.from_list(
        [
            {
                "image": Pictures.new("RGB", (8, 8), (i % 256, i // 256, 9)),
                "prompt": prompt,
                "answer": right[0],
                "answers": right,
                "question_type": kind,
            }
            for i, (prompt, right) in enumerate(rows)
        ],
        features=FEATURES,
    )


@pytest.fixture(scope="module")
def stored():
    return json.loads(RESULTS.read_text())["runs"]["80 %"]


@pytest.fixture(autouse=True)
def without_drawings(request, monkeypatch):
    "Drawings take a second each, so only the tests that look at them make them."
    if "real_drawings" not in request.fixturenames:
        blank = picture_uri(Pictures.new("RGB", (1, 1)))
        uris = {"light": blank, "dark": blank}
        monkeypatch.setattr(report, "two_uris", lambda *options: uris)


def page_of(stored, data, metric=None, **texts):
    "The page of a run that answered a data set as `texts` say: row → answers."
    results = {key: value for key, value in stored.items() if key != "plain_lora"}
    results["training"] = {"repaired": stored["training"]["repaired"]}
    for row in ("dense", "pruned", "repaired", "blind"):
        answers = texts.get(row, texts["dense"])
        results[row] = plain_row(score(answers, data, metric))
    done = {
        row: {"answers": texts[row], "captions": []}
        for row in ("dense", "pruned", "repaired")
    }
    return html_report(copy.deepcopy(results), done, data, [])


@pytest.fixture
def real_drawings():
    "Named by the tests that need the drawings of the page."


@pytest.mark.slow
def test_the_page_is_whole_and_alone(stored, real_drawings):
    data = examples([("which?", ["red"])])
    captions = examples([("what?", ["a cat"])], kind="caption")
    done = {
        "dense": {"answers": ["red"], "captions": ["a cat"]},
        "pruned": {"answers": ["no"], "captions": ["a"]},
        "repaired": {"answers": ["red"], "captions": ["a cat"]},
    }
    text = html_report(stored, done, data, captions)
    page = Page(text)
    assert text.startswith("<!doctype html>") and text.endswith("</html>")
    assert not page.open  # every tag is closed
    tags = [tag for tag, _ in page.tags]
    assert "main" in tags and "script" not in tags and "link" not in tags
    assert tags.count("picture") == 4 and tags.count("source") == 4  # light and dark
    assert tags.count("table") == tags.count("caption") == tags.count("thead")
    for tag, attributes in page.tags:
        if tag == "img":
            assert attributes["src"].startswith("data:image/") and attributes["alt"]
        if tag == "th":
            assert attributes["scope"] in ("row", "col")
    for cell in ("bundled: 80 % of vision and language pruned, then repaired", "a cat"):
        assert cell in page.cells
    assert "98.24%" in text and "n = 9,673" in text and "n = 888" in text
    alts = [attributes["alt"] for tag, attributes in page.tags if tag == "img"]
    assert "A picture. A right caption of it is: a cat" in alts
    assert "The picture of the question: which? The right answer is: red" in alts
    assert "never sees" not in text and "are from before its zeros are put back" in text


@pytest.mark.parametrize("n", [3, 40])
@pytest.mark.parametrize("right", [True, False])
def test_perfect_and_zero(stored, n, right):
    data = examples([(f"question {i}?", ["red"]) for i in range(n)])
    said = ["red" if right else "no"] * n
    text = page_of(stored, data, dense=said, pruned=said, repaired=said)
    page = Page(text)
    assert not page.open
    assert "100.00% to 100.00%" not in text and "0.00% to 0.00%" not in text
    edge = "to 100.00%" if right else "0.00% to"
    assert text.count(edge) >= 4  # an interval for each model
    assert f"n = {n}" in text
    fate = "always right" if right else "still wrong"
    shown = [cell for cell in page.cells if cell == fate]
    assert len(shown) == 1 + min(n, 8)  # a row of the table, and each example


@pytest.mark.parametrize("metric", METRICS)
def test_each_metric_is_named_and_explained(stored, metric):
    data = examples([("what?", ["a red circle", "a circle"])] * 4)
    said = ["a red circle"] * 4
    text = page_of(stored, data, metric, dense=said, pruned=["x"] * 4, repaired=said)
    name = METRIC_TEXTS[metric].name
    page = Page(text)
    assert METRIC_TEXTS[metric].meaning in page.cells
    assert f'<th scope="col">{name} <small>n = 4</small></th>' in text
    others = {METRIC_TEXTS[other].meaning for other in METRICS if other != metric}
    assert not others & set(page.cells)


def test_every_metric_has_its_texts():
    assert set(METRIC_TEXTS) == set(METRICS) == set(RIGHT_FROM) == set(RIGHT_MEANINGS)


def test_examples_show_fates_in_their_true_shares(stored):
    n = 80  # 50 % mended, 25 % still wrong, 12.5 % broken, 12.5 % always right
    data = examples([(f"question {i}?", ["r"]) for i in range(n)])
    pruned = ["x"] * 60 + ["r"] * 20
    repaired = ["r"] * 40 + ["x"] * 20 + ["x"] * 10 + ["r"] * 10
    text = page_of(stored, data, dense=["r"] * n, pruned=pruned, repaired=repaired)
    page = Page(text)
    counts = Counter(cell for cell in page.cells if cell in FATES.values())
    in_table = {fate: counts[fate] - 1 for fate in counts}
    assert in_table == {"mended": 4, "still wrong": 2, "broken": 1, "always right": 1}
    shown = [cell for cell in page.cells if cell.startswith("question ")]
    assert len(set(shown)) == 8 and shown != [f"question {i}?" for i in range(8)]
    again = page_of(stored, data, dense=["r"] * n, pruned=pruned, repaired=repaired)
    assert text == again  # drawn by a seed


def test_examples_show_different_pictures(stored):
    data = examples([("which?", ["r"])] * 3)
    same = Dataset.from_list([data[0]] * 5 + [data[1]], features=FEATURES)
    said = ["r"] * 6
    page = Page(page_of(stored, same, dense=said, pruned=said, repaired=said))
    assert len([cell for cell in page.cells if cell == "which?"]) == 2


def test_fates_and_places():
    right = [["r"]] * 4
    fates = fates_of(list("xxrr"), list("rxxr"), right, "exact match")
    assert fates == ["mended", "still wrong", "broken", "always right"]
    assert places_for({"mended": 99, "broken": 1}, 8) == {"mended": 8, "broken": 0}
    for counts in ({"mended": 5, "broken": 3}, {"mended": 1}, {"a": 7, "b": 7, "c": 7}):
        assert sum(places_for(counts, 8).values()) == min(8, sum(counts.values()))


def test_any_text_is_only_text(stored):
    data = examples([(EVIL, [EVIL])])
    results = stored | {"settings": stored["settings"] | {"model": EVIL}}
    text = page_of(results, data, dense=[EVIL], pruned=["no"], repaired=[EVIL])
    page = Page(text)
    assert not page.open and "script" not in [tag for tag, _ in page.tags]
    assert page.cells.count(EVIL) == 1 + 4  # the heading; prompt, right and two answers
    assert "<script" not in text


def test_tests_that_were_seen_in_training_are_said(stored):
    data = examples([("which?", ["r"])] * 4)
    said = dict(dense=["r"] * 4, pruned=["r"] * 4, repaired=["r"] * 4)
    assert "None of the 4 test examples" in page_of(stored, data, **said)
    seen = stored | {"tests_seen_in_training": 3}
    assert "3 of the 4 test examples occur in training" in page_of(seen, data, **said)


def test_layers_are_named(stored):
    assert layer_place("model.layers.11.mlp.fc1") == ("model.layers", 11, "mlp.fc1")
    assert layer_place("vision.head.out_proj") == ("vision.head", -1, "out_proj")
    data = examples([("which?", ["r"])])
    encoder_and_decoder = [
        layer | {"name": f"t5.{stack}.block.{i}.q", "part": "language"}
        for i, layer in enumerate(stored["layers"][:2])
        for stack in ("encoder", "decoder")
    ]
    results = stored | {"layers": encoder_and_decoder}
    text = page_of(results, data, dense=["r"], pruned=["r"], repaired=["r"])
    assert "t5.decoder.block.1.q" in text
    figure = Figure()
    report.draw_layers(figure, results)
    names = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    assert names == ["encoder: q", "decoder: q"]


def test_rows_without_a_picture_and_with_two(stored):
    images = [[], [Pictures.new("RGB", (8, 8), "red"), Pictures.new("L", (8, 8), 7)]]
    rows = [
        dict(image=image, prompt="?", answer="r", answers=["r"], question_type="x")
        for image in images
    ]
    data = Dataset.from_list(
        rows, features=Features(FEATURES | {"image": List(Image())})
    )
    said = ["r", "r"]
    page = Page(page_of(stored, data, dense=said, pruned=said, repaired=said))
    pictures = [a for tag, a in page.tags if tag == "img" and "question" in a["alt"]]
    assert len(pictures) == 2


def test_pictures_as_text():
    def draw(figure):
        figure.subplots().plot([1, 2])

    assert picture_uri(draw).startswith("data:image/svg+xml;base64,")
    assert picture_uri(draw) != picture_uri(draw, dark=True)
    assert picture_uri(Pictures.new("RGBA", (2, 2))).startswith("data:image/png;")


def test_the_template_is_shipped():
    assert (Path(ressa.__file__).parent / "assets" / "report.html.jinja").is_file()
