"""`ressa recipe`: what it prints is a recipe that means the same."""

import yaml


def test_the_printed_recipe_has_every_key_that_was_given(run):
    code, said, _ = run("recipe", "--pattern", "2:4", "--lr", "3e-4")
    assert code == 0
    printed = yaml.load(said, Loader=yaml.BaseLoader)
    assert printed["pattern"] == "2:4" and "sparsity" not in printed
    assert printed["learning_rate"] == "3e-4" and printed["model"] == "bundled"


def test_all_keys(run):
    _, few, _ = run("recipe")
    _, everything, _ = run("recipe", "--all")
    assert "neftune_noise_alpha" in everything and "neftune" not in few


def test_errors(run):
    code, _, error = run("recipe", "no-such")
    assert code == 2 and "no such file" in error
    code, _, error = run("recipe", "--sparsty", "1")
    assert code == 2 and "Did you mean --sparsity" in error
