"""Options of the command: their names are those of the library, and values are checked."""

import dataclasses
from argparse import ArgumentParser, Namespace

import pytest

from ressa.cli import options
from ressa.cli.options import (
    DataOptions,
    ModelOptions,
    OutOptions,
    PruneOptions,
    RepairOptions,
    TestOptions,
    TrainOptions,
    add_fields,
    canonical,
    pruning_target,
    ranks_of,
    rivals_of,
    stored_in,
    validate_options,
    validate_training,
)

CLASSES = (
    ModelOptions,
    DataOptions,
    TrainOptions,
    TestOptions,
    PruneOptions,
    RepairOptions,
    OutOptions,
)
FIELDS = [field for cls in CLASSES for field in dataclasses.fields(cls)]


def test_names_are_those_of_the_library():
    "They are repeated, because the modules that define them import torch."
    from ressa.adaptation.adapters import ADAPTERS
    from ressa.devices import DTYPES
    from ressa.parts import PARTS
    from ressa.pruning.methods import METHODS

    assert options.METHODS == tuple(METHODS)
    assert options.PARTS == tuple(PARTS)
    assert options.DTYPES == tuple(DTYPES)
    assert options.ADAPTERS == tuple(ADAPTERS)
    for rival in options.RIVALS.values():
        assert rival.get("adapter", "lora") in ADAPTERS


def test_each_key_stands_in_one_class_and_has_a_help():
    names = [field.name for field in FIELDS]
    assert len(names) == len(set(names))
    for field in FIELDS:
        assert field.metadata["help"]


@pytest.mark.parametrize(
    "name, key",
    [
        ("--batch-size", "per_device_train_batch_size"),
        ("lr", "learning_rate"),
        ("steps", "max_steps"),
        ("--train-split", "train_split"),
        ("output-dir", "out"),
    ],
)
def test_shorter_and_older_names(name, key):
    assert canonical(name) == key


def test_both_spellings_are_options():
    parser = ArgumentParser()
    add_fields(parser, *CLASSES)
    for field in FIELDS:
        for flag in (field.name, field.name.replace("_", "-")):
            found = vars(parser.parse_args([f"--{flag}", "7"]))
            assert found == {field.name: "7"}


def test_the_target_of_pruning():
    assert pruning_target(PruneOptions()) == {
        "sparsity": {"vision": 0.8, "language": 0.8}
    }
    own = PruneOptions(sparsity=0.5, vision=0.0, interface=0.3)
    assert pruning_target(own)["sparsity"] == {
        "vision": 0.0,
        "language": 0.5,
        "interface": 0.3,
    }
    assert pruning_target(PruneOptions(pattern="2:4")) == {"pattern": "2:4"}


@pytest.mark.parametrize("beside", ["sparsity", "vision", "language", "interface"])
def test_a_pattern_stands_alone(beside):
    with pytest.raises(ValueError, match=f"--pattern cannot go with --{beside}"):
        pruning_target(PruneOptions(pattern="2:4", **{beside: 0.5}))


def test_rivals_and_ranks():
    assert rivals_of(RepairOptions()) == []
    assert rivals_of(RepairOptions(compare="labels,hira, labels")) == ["labels", "hira"]
    with pytest.raises(ValueError, match="--compare: 'pissa' is unknown"):
        rivals_of(RepairOptions(compare="hira,pissa"))
    assert ranks_of(None) is None and ranks_of("4") == 4
    assert ranks_of('{"vision": 4}') == {"vision": 4}
    for wrong in ("0", "four", "{}", "[4]", '{"vision": 0.5}', "true"):
        with pytest.raises(ValueError, match="--alpha must be a number, 1 or more"):
            ranks_of(wrong, "--alpha")


@pytest.mark.parametrize(
    "wrong, said",
    [
        (dict(limit=0), "--limit must be 1 or more, not 0"),
        (dict(calibration=-1), "--calibration must be 1 or more"),
        (dict(train_limit=0), "--train-limit must be 1 or more"),
        (dict(test_batch=0), "--test-batch must be 1 or more"),
        (dict(micro_batch=0), "--micro-batch must be 1 or more"),
        (dict(sparsity=100.0), "all weights of the part would be zero"),
        (dict(sparsity=80.0), "--sparsity must be in .* 80 % is 0.8"),
        (dict(vision=-0.1), "--vision must be in"),
        (dict(language=float("nan")), "--language must be in"),
        (dict(model=""), "--model is empty"),
        (dict(out=""), "--out is empty"),
        (dict(pattern="4:2"), "--pattern must be N:M with 0 < N < M"),
        (dict(pattern="0.5"), "--pattern must be N:M"),
        (dict(seed=-1), "--seed must be in 0"),
        (dict(seed=2**32), "--seed must be in 0"),
        (dict(method="wander"), "--method must be one of"),
        (dict(patience=2), "--patience needs --held-out"),
        (dict(offload_folder="x"), "--offload-folder needs --device-map"),
        (dict(device="cpu", device_map="auto"), "leave --device out"),
        (dict(model="bundled", revision="main"), "--revision is for other models"),
        (dict(data="easy-vqa", config="x"), "--config is for other data sets"),
        (dict(data="easy-vqa", split="validation"), "--split of easy-vqa must be test"),
        (dict(data="easy-vqa", train_split="test"), "--train-split of easy-vqa must"),
    ],
)
def test_what_makes_no_sense(wrong, said):
    with pytest.raises(ValueError, match=said):
        validate_options(Namespace(**wrong))


@pytest.mark.parametrize(
    "wrong, said",
    [
        (dict(max_steps=0), "--max-steps must be above 0, not 0"),
        (dict(max_steps=-1), "--max-steps must be above 0, not -1"),
        (dict(num_train_epochs=0.0), "--num-train-epochs must be above 0"),
        (dict(per_device_train_batch_size=0), "--per-device-train-batch-size must be"),
        (dict(learning_rate=float("nan")), "--learning-rate must be above 0"),
        (dict(warmup_steps=-3), "--warmup-steps must be 0 or more"),
        (dict(distill_weight=2.0), "--distill-weight must be in"),
    ],
)
def test_what_no_training_can_have(wrong, said):
    with pytest.raises(ValueError, match=said):
        validate_training(wrong)


def test_epochs_may_decide_the_steps():
    validate_training(dict(max_steps=-1, num_train_epochs=2.0))


def test_what_makes_sense():
    validate_options(*(cls() for cls in CLASSES))
    validate_options(Namespace(data="easy-vqa", split="test[:9]", method="ria+dsnot"))


def test_folders_of_packing():
    assert stored_in(Namespace(), "packed") == ("ressa-out/model", "ressa-out/packed")
    assert stored_in(Namespace(model="a", out="b"), "unpacked") == ("a", "b")
