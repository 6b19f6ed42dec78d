"""`ressa ask`: one question to any kind of model folder, and clear words for what is wrong."""

import pytest
from PIL import Image

from ressa.checkpoints.sparse import save_sparse
from ressa.cli.app import main
from ressa.cli.ask import ask


@pytest.fixture
def red(tmp_path):
    Image.new("RGB", (64, 64), "red").save(tmp_path / "red.png")
    return tmp_path / "red.png"


def run(capsys, *args):
    "The command without a process of its own: exit code, output and errors."
    try:
        code = main([*map(str, args)])
    except SystemExit as end:
        code = end.code
    return code, *capsys.readouterr()


@pytest.mark.slow
def test_bundled_packed_and_adapter_folders_answer_the_same(
    bundled, red, tmp_path, capsys
):
    from peft import get_peft_model

    from ressa.adaptation.sparse_lora import SparseLoraConfig

    model, processor = bundled
    save_sparse(model, processor, tmp_path / "packed")
    adapted = get_peft_model(model, SparseLoraConfig())  # changes nothing yet
    adapted.peft_config["default"].base_model_name_or_path = str(tmp_path / "packed")
    adapted.save_pretrained(tmp_path / "adapter")
    said = set()
    for name in ("bundled", tmp_path / "packed", tmp_path / "adapter"):
        code, text, error = run(capsys, "ask", name, red, "what color is the image?")
        assert code == 0, error
        said.add(text)
    assert said == {"red\n"}


def test_the_model_is_asked_as_in_an_evaluation(bundled, data):
    model, processor = bundled
    example = data[1][3]
    question = (
        example["prompt"].removeprefix("Question: ").removesuffix(" Short answer:")
    )
    assert ask(model, processor, [example["image"]], question) == example["answer"]


def test_a_language_model_is_asked_without_a_picture():
    from types import SimpleNamespace

    from transformers import PreTrainedTokenizerFast

    from ressa.cli.ask import _as_data

    tokenizer = PreTrainedTokenizerFast.__new__(PreTrainedTokenizerFast)
    tokenizer.chat_template = None
    data = _as_data(tokenizer, [], "What is a mask?")
    assert data.column_names == ["prompt"] and "What is a mask?" in data["prompt"][0]
    with pytest.raises(ValueError, match="reads no pictures"):
        _as_data(tokenizer, [SimpleNamespace()], "What is a mask?")


@pytest.mark.parametrize(
    "line, said",
    [
        ("ask bundled no.png what?", "picture no.png: cannot be opened: No such file"),
        ("ask bundled pyproject.toml what?", "it is no picture, or broken"),
        ("ask bundled what?", "name a file with a picture before the question"),
        ("ask bundled", "arguments are required: question"),
        ("ask no-such-folder/x/y RED what?", "there is no such folder"),
        ("ask bundled RED what? --max-new-tokens 0", "must be 1 or more, not 0"),
        ("ask bundled RED RED what?", "2 images"),
        ("ask bundled RED what? --device abacus", "device 'abacus' is unknown"),
    ],
)
def test_what_is_wrong_is_one_line(red, capsys, line, said):
    code, _, error = run(capsys, *line.replace("RED", str(red)).split())
    assert code == 2 and said in error.splitlines()[-1]
