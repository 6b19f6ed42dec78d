"""An error of a loader becomes one line that says what to do."""

import pytest
from datasets.exceptions import DataFilesNotFoundError
from huggingface_hub.errors import LocalEntryNotFoundError

from ressa.data.hub_errors import advice


@pytest.mark.parametrize(
    "message, what_to_do",
    [
        ("You are trying to access a gated repo.\nMake sure.", "ask for access"),
        ("x/y is not a valid model identifier listed on the hub", "check the spelling"),
        (
            "We couldn't connect to 'https://huggingface.co'",
            "go online, or give a folder",
        ),
        ("it contains custom code which must be executed", "take a copy without"),
        ("BuilderConfig 'x' not found", "say which part of the data set: config"),
        ('Unknown split "test". Should be one of [...]', "say which split"),
        ("requires the Torchvision library", "pip install torchvision"),
    ],
)
def test_known_by_its_words(message, what_to_do):
    assert advice(OSError(message)).endswith(f"What to do: {advice_of(what_to_do)}")


def advice_of(words):
    "The whole advice that holds these words."
    from ressa.data.hub_errors import ADVICE

    [whole] = [known.what_to_do for known in ADVICE if words in known.what_to_do]
    return whole


@pytest.mark.parametrize(
    "cause, what_to_do",
    [
        (ConnectionError(), "go online"),
        (LocalEntryNotFoundError("gone"), "go online"),
        (DataFilesNotFoundError(), "check the path"),
    ],
)
def test_known_by_what_caused_it(cause, what_to_do):
    between = RuntimeError("something else")
    between.__cause__ = cause
    error = OSError("new words")
    error.__cause__ = between
    assert advice(error).startswith("new words. What to do: ")
    assert what_to_do in advice(error)


def test_an_unknown_error_keeps_its_first_line():
    assert (
        advice(OSError("Words of the future.\nMore of them.")) == "Words of the future"
    )
    assert advice(RuntimeError()) == "RuntimeError"


def test_an_error_of_a_damaged_file_says_so():
    damaged = "What to do: copy or save its files again: one is damaged"
    assert advice(KeyError("weight_map")) == f"KeyError: 'weight_map'. {damaged}"
    assert advice(KeyError()) == f"KeyError. {damaged}"


def test_names_of_parts_are_kept_from_later_lines():
    error = ValueError("Config name is missing.\nPlease pick one among: ['a',\n 'b']")
    assert advice(error) == (
        "Config name is missing ['a', 'b']. "
        "What to do: say which part of the data set: config"
    )
