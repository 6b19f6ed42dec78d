"""What one run of the study trains on, at which rate, and what it refuses."""

import pytest
from datasets import Dataset

from ressa.course import ablations
from ressa.course.ablations import (
    RATES,
    RIVALS,
    chosen_examples,
    examples_of,
    pruned_model,
    rate_of,
    repair_run,
)


def source(kind):
    "Forty questions about ten images, and ten captions; the kind is in each answer."
    return Dataset.from_dict(
        {
            "image_id": [i // 4 for i in range(40)] + list(range(10)),
            "question_type": ["color"] * 40 + ["caption"] * 10,
            "answer": [f"{kind} {i}" for i in range(50)],
        }
    )


def numbers(data):
    return [int(answer.split()[-1]) for answer in data["answer"][:]]


def test_examples_of_a_run():
    assert numbers(chosen_examples(source=source)) == list(range(50))
    assert numbers(chosen_examples(source=source, leave=7)) == list(range(7, 50))
    captions = chosen_examples(source=source, task="caption")
    assert numbers(captions) == list(range(40, 50))
    of_images = chosen_examples(source=source, images=3, seed=1)
    assert len(set(of_images["image_id"])) == 3
    pairs = chosen_examples(source=source, pairs=8, seed=1)
    assert len(set(numbers(pairs))) == 8
    assert numbers(pairs) == numbers(chosen_examples(source=source, pairs=8, seed=1))
    assert numbers(pairs) != numbers(chosen_examples(source=source, pairs=8, seed=2))
    with pytest.raises(ValueError, match="pairs must be 1 or more, not 0"):
        chosen_examples(source=source, pairs=0)


def test_the_teacher_answers_what_has_no_label():
    mixed = chosen_examples(source=source, labels=0.2, seed=3)
    known = [answer for answer in mixed["answer"][:] if answer.startswith("true")]
    assert len(mixed) == 50
    assert len(known) == 10
    assert sorted(numbers(mixed)) == list(range(50))
    alone = chosen_examples(source=source, labels=0.2, seed=3, labelled_only=True)
    assert alone["answer"][:] == known


def test_rates_of_rows():
    assert set(RATES) <= set(RIVALS)
    assert rate_of("RESSA", "0.8") == RATES["RESSA"].collapsed
    assert rate_of("RESSA", "2:4") == RATES["RESSA"].hurt
    assert rate_of("RESSA", {"vision": 0.4, "language": 0.6}) == RATES["RESSA"].hurt
    assert rate_of("labels alone", "0.8") == RATES["RESSA"].collapsed


def test_a_smaller_rank_keeps_alpha_over_rank():
    settings = ablations._settings_of("RESSA", "0.8", None, 4)
    assert settings["r"] == {"vision": 4, "language": 4, "interface": 2}
    assert set(settings["lora_alpha"].values()) == {8}
    assert ablations._settings_of("RESSA", "0.8", 0.5, None)["learning_rate"] == 0.5


def test_what_the_study_does_not_have_is_refused():
    with pytest.raises(ValueError, match="row must be one of"):
        repair_run("0.8", "magic")
    with pytest.raises(ValueError, match="kind must be one of"):
        examples_of("blue images")
    with pytest.raises(ValueError, match="sparsity"):
        pruned_model("1.5")


@pytest.mark.slow
def test_one_run(with_targets):
    found = repair_run(
        "0.8",
        "RESSA",
        steps=2,
        rank=1,
        validate=20,
        source=lambda kind: with_targets,
    )
    assert found["zeros_filled"] == 0
    assert 0 <= found["accuracy"] <= 1


@pytest.fixture
def with_targets(tmp_path):
    "A hundred training examples with targets."
    from ressa.adaptation.teachers import cache_targets
    from ressa.data.easy_vqa import training_examples
    from ressa.models.bundled import load_bundled

    dense, processor = load_bundled("auto")
    examples = training_examples().select(range(100))
    file = tmp_path / "targets.arrow"
    return cache_targets(dense, examples, processor, file, k=64, positions="answer")
