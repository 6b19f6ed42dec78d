"""Options of the command: their names are those of the library, and values are checked."""

from argparse import Namespace

import pytest

from ressa.cli import options
from ressa.cli.options import pruning_target, validate_options

ALL = {
    option.flag: option
    for table in (options.LOADING, options.TESTING, options.PRUNING, options.REPAIR)
    for option in table
}


def test_names_are_those_of_the_library():
    "They are repeated, because the modules that define them import torch."
    from ressa.devices import DTYPES
    from ressa.parts import PARTS
    from ressa.pruning.methods import METHODS

    assert options.METHODS == tuple(METHODS)
    assert options.PARTS == tuple(PARTS)
    assert options.DTYPES == tuple(DTYPES)
    for part in PARTS:
        assert f"--{part}" in ALL


def test_defaults_are_those_of_the_library():
    import inspect

    from ressa.adaptation.repair import repair

    parameters = inspect.signature(repair).parameters
    for flag, name in (
        ("--steps", "steps"),
        ("--batch-size", "batch_size"),
        ("--lr", "learning_rate"),
        ("--seed", "seed"),
    ):
        assert ALL[flag].default == parameters[name].default, flag


def test_every_default_is_of_its_type():
    for option in ALL.values():
        assert option.default is None or type(option.default) is option.type
        assert option.help and option.flag.startswith("--")


def target(sparsity=0.8, pattern=None, vision=None, language=None, interface=None):
    return pruning_target(
        Namespace(
            sparsity=sparsity,
            pattern=pattern,
            vision=vision,
            language=language,
            interface=interface,
        )
    )


def test_the_target_of_pruning():
    assert target() == {"sparsity": {"vision": 0.8, "language": 0.8}}
    assert target(vision=0.0) == {"sparsity": {"vision": 0.0, "language": 0.8}}
    assert target(interface=0.3)["sparsity"] == {
        "vision": 0.8,
        "language": 0.8,
        "interface": 0.3,
    }
    assert target(pattern="2:4") == {"pattern": "2:4"}
    with pytest.raises(ValueError, match="--pattern cannot go with --language"):
        target(pattern="2:4", language=0.5)


@pytest.mark.parametrize(
    "wrong, said",
    [
        (dict(limit=0), "--limit must be 1 or more, not 0"),
        (dict(steps=0), "--steps must be 1 or more"),
        (dict(batch_size=0), "--batch-size must be 1 or more"),
        (dict(calibration=-1), "--calibration must be 1 or more"),
        (dict(train_limit=0), "--train-limit must be 1 or more"),
        (dict(test_batch=0), "--test-batch must be 1 or more"),
        (dict(lr=-1), "--lr must be above 0"),
        (dict(lr=float("nan")), "--lr must be above 0"),
        (dict(temperature=0), "--temperature must be above 0"),
        (dict(temperature=float("inf")), "--temperature must be above 0"),
        (dict(distill_weight=2), "--distill-weight must be in"),
        (dict(distill_weight=float("nan")), "--distill-weight must be in"),
    ],
)
def test_numbers_that_make_no_sense(wrong, said):
    with pytest.raises(ValueError, match=said):
        validate_options(Namespace(**wrong))


def test_what_is_not_given_is_not_checked():
    validate_options(Namespace())
    validate_options(Namespace(limit=None, lr=1e-4, distill_weight=0.0, steps=1))
