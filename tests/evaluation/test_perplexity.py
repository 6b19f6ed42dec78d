"""Perplexity is the exponential of the mean loss on the chosen windows."""

import math

import pytest
import torch
from torch.nn import functional as F

from ressa.course.real_training import tiny_real
from ressa.evaluation.perplexity import perplexity, topics_text


@pytest.fixture(scope="module")
def model_and_tokenizer():
    model, processor = tiny_real()
    return model, processor.tokenizer


def test_topics_are_long_real_text():
    first, second = topics_text()
    assert len(first) > 30 and len(second) > 30
    assert sum(map(len, first + second)) > 100_000
    assert len(set(first) & set(second)) <= 3  # one text may have several names


def test_equals_a_loop_over_windows(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    texts = ["abcdefgh" * 3, "ijklmnop" * 2]
    ids = tokenizer("\n\n".join(texts), return_tensors="pt").input_ids
    losses = []
    for start in range(0, ids.shape[1] - 9, 10):
        window = ids[:, start : start + 10]
        with torch.no_grad():
            logits = model(input_ids=window).logits[0, :-1]
        losses.append(F.cross_entropy(logits, window[0, 1:], reduction="none"))
    wanted = math.exp(torch.cat(losses).mean())
    for batch_size in (1, 3):
        options = {"length": 10, "windows": None, "batch_size": batch_size}
        assert perplexity(model, tokenizer, texts, **options) == pytest.approx(wanted)


def test_windows_are_spread_over_the_text(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    texts = ["a" * 10 + "b" * 10 + "c" * 10]
    chosen = perplexity(model, tokenizer, texts, length=10, windows=2)
    ends = ["a" * 10, "c" * 10]
    both = [perplexity(model, tokenizer, [text], length=10) for text in ends]
    assert chosen == pytest.approx(math.sqrt(both[0] * both[1]))


def test_the_mode_of_the_model_stays(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    model.train()
    perplexity(model, tokenizer, ["a text of some letters"], length=4)
    assert model.training
    model.eval()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 512}, "3 tokens, fewer than one window of 512"),
        ({"length": 1}, "length must be 2 or more"),
        ({"length": 2, "windows": 0}, "windows must be 1 or more"),
        ({"length": 2, "batch_size": 0}, "batch_size must be 1 or more"),
    ],
)
def test_impossible_numbers_are_refused(model_and_tokenizer, options, message):
    with pytest.raises(ValueError, match=message):
        perplexity(*model_and_tokenizer, ["abc"], **options)
