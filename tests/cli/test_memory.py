"""Memory by formula: which part grows with what, and what is refused."""

import pytest

from ressa.cli.memory import (
    Load,
    TooLittleMemory,
    advice,
    load_of_batch,
    memory_needed,
    require_memory,
    short_size,
)
from ressa.models.load_model import load_empty
from ressa.parts import modality_map

LOAD = Load(
    dtype_bytes=4,
    text_tokens=30,
    picture_tokens=64,
    batch_size=8,
    calibration=16,
    micro_batch=None,
    test_batch=1,
    ranks=8,
    teacher="model",
    sparsity=0.5,
)


@pytest.fixture(scope="module")
def bundled_parts():
    model, processor = load_empty("bundled")
    return model, modality_map(model), processor


def needed(bundled_parts, **changes):
    model, parts, _ = bundled_parts
    return memory_needed(model, parts, LOAD._replace(**changes))


def test_weights_and_adapters_are_counted_exactly(bundled_parts):
    from ressa.adaptation.adapters import adapt
    from ressa.models.bundled import load_bundled

    held = needed(
        bundled_parts, ranks={"vision": 8, "language": 8, "interface": 8}
    ).held
    model, _ = load_bundled("cpu")
    assert held["student"] == held["teacher"]
    assert held["student"] == sum(weight.nbytes for weight in model.parameters())
    adapted = adapt(model, r=8)
    trained = sum(w.numel() for w in adapted.parameters() if w.requires_grad)
    assert held["adapters, AdamW"] == 16 * trained


def test_teachers(bundled_parts):
    model = needed(bundled_parts).held
    cached = needed(bundled_parts, teacher="cached")
    own = needed(bundled_parts, teacher="self").held
    assert "teacher" in model and "teacher" not in cached.held
    assert own["removed values"] * 2 == 4 * 8 * cached.held["masks"]  # half, 4 bytes
    assert "asking the teacher" in cached.phases


def test_what_grows_with_what(bundled_parts):
    before = needed(bundled_parts)
    twice = needed(bundled_parts, batch_size=16)
    assert twice.held["activations"] == 2 * before.held["activations"]
    assert (
        needed(bundled_parts, dtype_bytes=2).held["student"] * 2
        == (before.held["student"])
    )
    assert (
        needed(bundled_parts, micro_batch=1).phases["pruning"]
        < (before.phases["pruning"])
    )
    assert before.peak == max(before.phases.values())


def test_tokens_are_counted_in_a_batch(bundled_parts, data):
    model, _, processor = bundled_parts
    found = load_of_batch(model, data[1].select(range(3)), processor)
    # a picture of 64×64 in patches of 8×8, as floats
    assert found["text_tokens"] > 20 and found["picture_tokens"] == 64
    assert found["picture_bytes"] == 3 * 64 * 64 * 4


def test_a_run_that_cannot_fit_is_refused(bundled_parts):
    model, parts, _ = bundled_parts
    need = needed(bundled_parts)
    hints = advice(model, parts, LOAD)
    assert any(hint.startswith("--teacher cached (saves") for hint in hints)
    with pytest.raises(TooLittleMemory, match="needs .* MB by formula.*--teacher"):
        require_memory(need, 10**6, "cuda", hints)
    require_memory(need, 10**10, "cuda", hints)
    require_memory(need, None, "cuda", hints)


def test_sizes():
    assert short_size(1.5e9) == "1.5 GB" and short_size(2e6) == "2 MB"
