"""Recipes: read as they stand, merged with the command line, written and read again."""

import argparse
import dataclasses

import pytest

from ressa.cli.read_recipe import (
    COMMON,
    REFUSED,
    TRAINING_DEFAULTS,
    add_recipe_options,
    describe_training,
    given_keys,
    read_options,
    read_recipe,
    recipe_names,
    training_keys,
    written,
)
from ressa.cli.repair import KEYS


@pytest.fixture
def parser():
    made = argparse.ArgumentParser()
    add_recipe_options(made, *KEYS, training=True)
    return made


@pytest.fixture
def recipe(tmp_path):
    "A function that writes a recipe and returns its file."

    def write(text):
        (tmp_path / "recipe.yaml").write_text(text)
        return str(tmp_path / "recipe.yaml")

    return write


def test_stored_keys_are_those_of_the_class():
    "The stored listing is there so that help needs no torch: page command_read_recipe."
    assert training_keys() == describe_training()


def test_keys_that_are_shown_or_refused_exist():
    known = set(training_keys())
    assert set(REFUSED) <= known and set(TRAINING_DEFAULTS) <= known
    assert set(COMMON) - known <= {"preset"}
    own = {field.name for cls in KEYS for field in dataclasses.fields(cls)}
    assert not own & known  # no key with two meanings


def test_values_are_read_as_they_stand(recipe):
    file = recipe("pattern: 2:4\nlr: 1e-4\nsplit: no\nrank: {vision: 4, language: 8}")
    assert read_recipe(file) == {
        "pattern": "2:4",
        "lr": "1e-4",
        "split": "no",
        "rank": '{"vision": 4, "language": 8}',
    }
    assert read_recipe(recipe("")) == {}


@pytest.mark.parametrize(
    "text, said",
    [
        ("seed: 1\nseed: 2", "the key seed comes twice"),
        ("- seed", "lines of the form 'key: value'"),
        ("seed: [1", "is not YAML"),
        ("just words", "lines of the form"),
        ("[" * 5000, "is not YAML"),
        ("a: &a [x, x]\nb: [*a, *a]", "write out what it stands for"),
    ],
)
def test_what_is_no_recipe(recipe, text, said):
    with pytest.raises(ValueError, match=said):
        read_recipe(recipe(text))


def test_a_recipe_that_is_not_there():
    with pytest.raises(ValueError, match="no such file.*bundled"):
        read_recipe("smolvml")


def test_a_folder_that_is_meant_as_a_model(tmp_path):
    with pytest.raises(ValueError, match=f"it is a folder.*--model {tmp_path}"):
        read_recipe(str(tmp_path))


@pytest.mark.parametrize(
    "text, said",
    [
        ("sparsty: 0.5", "unknown key sparsty. Did you mean sparsity"),
        ("learning_rte: 1", "unknown key learning_rte. Did you mean learning_rate"),
        ("lr: 1\nlearning-rate: 2", "are the same key"),
        ("do_train: true", "do_train: ressa repair always trains"),
        ("use_cpu: true", "use_cpu: use device: cpu"),
    ],
)
def test_keys_that_are_refused(parser, recipe, text, said):
    with pytest.raises(ValueError, match=said):
        given_keys(parser.parse_args([recipe(text)]), *KEYS, training=True)


def test_the_command_line_wins(parser, recipe):
    file = recipe("seed: 1\nsparsity: 0.5\nvision: 0.4\nlimit: null")
    line = parser.parse_args([file, "--seed", "2", "--pattern", "2:4"])
    assert given_keys(line, *KEYS, training=True) == {"seed": "2", "pattern": "2:4"}


def test_the_bundled_recipe_is_for_the_bundled_model_alone(parser):
    given = given_keys(parser.parse_args([]), *KEYS, training=True)
    assert given["per_device_train_batch_size"] == "64"
    other = parser.parse_args(["--model", "other"])
    assert given_keys(other, *KEYS, training=True) == {"model": "other"}


def test_values_have_the_types_of_their_fields(parser, recipe):
    file = recipe(
        "sparsity: 0.5\nlr: 1e-4\nbf16: no\nexact: yes\nwarmup_steps: 3\nseed: 4\n"
        "lr_scheduler_kwargs: {min_lr: 1e-6}\nreport_to: none\nmodel: mine"
    )
    read = read_options(parser.parse_args([file]), *KEYS, training=True)
    assert (read.sparsity, read.exact, read.calibration) == (0.5, True, None)
    assert read.training == {
        "learning_rate": 1e-4,
        "bf16": False,
        "warmup_steps": 3.0,
        "seed": 4,
        "lr_scheduler_kwargs": '{"min_lr": 1e-06}',
        "report_to": "none",
    }


@pytest.mark.parametrize(
    "line, said",
    [
        ("--steps three", "max_steps: invalid int value: 'three'"),
        ("--calibration 1.5", "calibration: invalid int value"),
        ("--teacher model2", "teacher: invalid choice: 'model2'"),
        ("--bf16 perhaps", "bf16"),
        ("--lr fast", "learning_rate: invalid float value"),
        ("--seed -1", "--seed must be in 0"),
    ],
)
def test_values_that_do_not_fit(parser, line, said):
    with pytest.raises(ValueError, match=said):
        read_options(parser.parse_args(line.split()), *KEYS, training=True)


@pytest.mark.parametrize("name", recipe_names())
def test_shipped_recipes_say_what_they_need_and_can_be_read(parser, name):
    from ressa.cli.read_recipe import RECIPES

    head = (RECIPES / f"{name}.yaml").read_text().split("\nmodel:")[0]
    assert "Memory" in head and "run" in head
    read_options(parser.parse_args([name]), *KEYS, training=True)


@pytest.mark.parametrize("name", recipe_names())
def test_what_is_written_means_the_same(parser, recipe, name):
    line = parser.parse_args(
        [name, "--data", "a: b # c", "--columns", '{"image": "i"}']
    )
    given = given_keys(line, *KEYS, training=True)
    again = parser.parse_args([recipe(written(given, *KEYS, all_keys=True))])
    expected = read_options(line, *KEYS, training=True)
    found = read_options(again, *KEYS, training=True)
    for key in ("recipe", "training"):
        expected.__dict__.pop(key, None)
        training = found.__dict__.pop(key, None)
    assert vars(found) == vars(expected)
    assert training["seed"] == 0
