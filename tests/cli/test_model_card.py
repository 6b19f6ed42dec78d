"""The model card: its front matter is YAML, it says what was measured, and its code runs."""

import json
from pathlib import Path

import pytest
import yaml
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError
from PIL import Image

from ressa.cli.model_card import (
    find_licence,
    loading_code,
    model_card,
    push_to_hub,
    recipe_text,
    write_products,
)

RESULTS = Path(__file__).parents[2] / "nbs" / "results" / "walk.json"


@pytest.fixture
def run():
    return json.loads(RESULTS.read_text())["runs"]["2:4"]


TEMPLATE = (
    "{% for turn in messages %}{% for part in turn.content %}"
    "{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endfor %}"
)


class Prompted:
    "A processor without a chat template."

    image_token = ""
    num_query_tokens = 8


def front_matter(card):
    "The lines in YAML at the beginning of a card."
    _, lines, _ = card.split("---\n", 2)
    return yaml.safe_load(lines)


def test_the_front_matter_is_yaml(run):
    settings = run["settings"] | {"model": "owner/a-vlm", "data": "owner/questions"}
    card = model_card(run | {"settings": settings}, Prompted(), licence="mit")
    data = front_matter(card)
    assert data["base_model"] == "owner/a-vlm" and data["license"] == "mit"
    assert data["library_name"] == "transformers" and "ressa" in data["tags"]
    result = ModelCard(card).data.eval_results[0]  # as the hub reads it
    assert result.metric_value == round(run["repaired"]["accuracy"], 4)
    assert result.dataset_name == "questions" and result.metric_name == "exact match"


@pytest.mark.parametrize("name", ["a: b # c", 'it\'s "quoted"', "[list]", "- x\n- y"])
def test_any_name_stays_yaml(run, name):
    settings = run["settings"] | {"model": name, "data": name}
    card = model_card(run | {"settings": settings}, Prompted())
    assert name.split("/")[-1] in front_matter(card)["model-index"][0]["name"]
    assert yaml.safe_load(recipe_text(run | {"settings": settings}))["model"] == name


def test_what_the_card_says(run):
    card = model_card(run, Prompted(), licence="mit")
    for said in (
        "bundled, 2:4 of vision and language pruned and repaired",
        "| repaired | 9,673 | 99.72% | 99.62% to 99.82% |",
        "| pruned | 9,673 |",
        "| vision | 2:4 | 50.00% | 166,656 |",
        "| whole model |",
        "no server runs\nunstructured sparsity faster today",
        "to_sparse_semi_structured",
        "None of the test examples occurs in training",
        "pattern: '2:4'",
    ):
        assert said in card, said
    assert "Fill in the licence" not in card
    assert "Fill in the licence" in model_card(run, Prompted())
    assert "license" not in front_matter(model_card(run, Prompted()))
    seen = model_card(run | {"tests_seen_in_training": 5}, Prompted())
    assert "5 of the 9,673 test examples occur in training too" in seen


def test_a_path_of_this_machine_is_no_base_model(run, tmp_path):
    settings = run["settings"] | {"model": str(tmp_path / "my-vlm")}
    (tmp_path / "my-vlm").mkdir()
    card = model_card(run | {"settings": settings}, Prompted())
    head = card.partition("## The recipe")[0]
    assert "base_model" not in front_matter(card) and str(tmp_path) not in head


def test_licences(tmp_path):
    assert find_licence("bundled") == "apache-2.0"
    assert find_licence(str(tmp_path)) is None
    assert find_licence("owner/model") is None  # the tests are offline
    readme = tmp_path / "README.md"
    for text, licence in (
        ("---\nlicense: mit\n---\n", "mit"),
        ("# no front matter", None),
        ("---\nlicense: [\n---\n", None),
        ("---\nlicense: [mit, bsd]\n---\n", None),
    ):
        readme.write_text(text)
        assert find_licence(str(tmp_path)) == licence


def test_the_lines_that_load_it_run(bundled, tmp_path, capsys):
    model, processor = bundled
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    Image.new("RGB", (64, 64), "red").save(tmp_path / "picture.png")
    code = loading_code(processor, str(tmp_path / "model"))
    exec(code.replace("picture.png", str(tmp_path / "picture.png")), {})
    assert capsys.readouterr().out.strip()


@pytest.mark.slow
def test_the_lines_with_a_chat_template_run(tmp_path, capsys):
    from tiny_models import tiny

    _, processor = tiny("Idefics3", tmp_path / "model")
    processor.chat_template = TEMPLATE
    processor.save_pretrained(tmp_path / "model")
    Image.new("RGB", (64, 64), "red").save(tmp_path / "picture.png")
    code = loading_code(processor, str(tmp_path / "model"))
    exec(code.replace("picture.png", str(tmp_path / "picture.png")), {})
    assert capsys.readouterr().out.strip()


def finished(run, out):
    "The folder of a run with its card and recipe."
    (out / "model" / "qformer_tokenizer").mkdir(parents=True)
    (out / "model" / "qformer_tokenizer" / "tokenizer.json").write_text("{}")
    (out / "model" / "config.json").write_text("{}")
    (out / "report.html").write_text("page")
    (out / "results.json").write_text("{}")
    write_products(out, run, Prompted())
    return out


def test_upload_is_one_commit_of_everything(run, tmp_path, monkeypatch):
    out = finished(run, tmp_path / "my-model")
    commits, asked = [], []

    class Repository(str):
        repo_id = "me/my-model"

    def create_repo(self, name, **options):
        asked.append((name, options))
        return Repository("the page")

    def create_commit(self, repo_id, operations, **options):
        commits.append((repo_id, sorted(o.path_in_repo for o in operations)))

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "create_commit", create_commit)
    assert push_to_hub(out, {"hub_private_repo": True}) == "the page"
    assert asked == [("my-model", {"private": True, "exist_ok": True})]
    model = ["README.md", "config.json", "qformer_tokenizer/tokenizer.json"]
    names = [*model, "recipe.yaml", "report.html", "results.json"]
    assert commits == [("me/my-model", names)]
    push_to_hub(out, {"hub_model_id": "team/other"})
    assert asked[1][0] == "team/other"

    def refuse(self, name, **options):
        raise OSError("401 Unauthorized\nmore")

    monkeypatch.setattr(HfApi, "create_repo", refuse)
    with pytest.raises(ValueError, match="my-model could not be uploaded: 401"):
        push_to_hub(out, {})
    assert issubclass(HfHubHTTPError, OSError)  # so they are caught


def test_only_a_run_that_asks_for_it_is_uploaded(tmp_path, monkeypatch, capsys):
    "And no token of the hub is stored. The run has ended, so nothing is computed."
    from ressa.cli import main_job
    from ressa.cli.app import parse
    from ressa.cli.read_recipe import read_options
    from ressa.cli.repair import KEYS

    uploads = []
    monkeypatch.setattr(
        main_job, "push_to_hub", lambda out, keys: uploads.append(out) or "the page"
    )
    out = tmp_path / "out"
    line = ["repair", "--out", str(out)]

    def read(*more):
        return read_options(parse([*line, *more]), *KEYS, training=True)

    settings = main_job.settings_of(read())
    main_job.open_out(out, settings)
    (out / "results.json").write_text('{"seed": 0}')
    assert main_job.main_job(read()) == {"seed": 0} and not uploads
    asked = read("--push-to-hub", "true", "--hub-token", "secret")
    assert main_job.settings_of(asked) == settings
    assert main_job.main_job(asked) == {"seed": 0} and uploads == [out]
    assert "uploaded: the page" in capsys.readouterr().err
    assert "secret" not in (out / "run.json").read_text()
    assert not main_job._arguments_of(asked, out).push_to_hub  # not while it trains
