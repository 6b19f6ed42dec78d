import pytest
import torch

from ressa.pruning.statistics import Statistics, real_tokens, unusable


def test_statistics_are_what_they_are_named():
    x = torch.randn(3, 5, 4) + torch.tensor([0.0, 1.0, 10.0, -3.0])
    tokens = x.flatten(0, 1).double()
    expected = {
        "norm": tokens.norm(dim=0),
        "mean": tokens.mean(0),
        "var": tokens.var(0, correction=0),
        "hessian": 2 / 15 * tokens.T @ tokens,
    }
    for stats in (Statistics.of(x), Statistics.of(x[:1]).update(x[1:])):
        assert stats.n == 15
        for name, value in expected.items():
            found = getattr(stats, name).double()
            torch.testing.assert_close(found, value, rtol=1e-4, atol=1e-4)


def test_what_is_not_asked_for_is_not_gathered():
    x = torch.randn(15, 4)
    stats = Statistics.of(x, mean=False, gram=False).update(x)
    assert stats.n == 30
    assert stats.mean is None
    assert stats.spread is None
    assert stats.gram is None
    with pytest.raises(ValueError, match=r"no mean.*Statistics\.of\(x, mean=True\)"):
        _ = stats.var
    with pytest.raises(ValueError, match=r"no gram.*Statistics\.of\(x, gram=True\)"):
        _ = stats.hessian


def test_no_token_gives_no_number():
    stats = Statistics.of(torch.rand(0, 4))
    assert stats.n == 0
    assert stats.norm.tolist() == [0, 0, 0, 0]
    assert not stats.var.any()
    assert not stats.hessian.any()
    x = torch.randn(9, 4)
    assert torch.equal(stats.update(x).mean, x.mean(0))


def test_variance_far_from_zero_keeps_its_digits():
    x = torch.randn(90, 6) + 10_000
    stats = Statistics.of(x[:20]).update(x[20:21]).update(x[21:])
    exact = x.double().var(0, correction=0)
    torch.testing.assert_close(stats.var.double(), exact, rtol=1e-2, atol=0)


def test_sums_of_16_bit_inputs_are_kept_in_32():
    x = torch.full((5000, 2), 3.0, dtype=torch.float16)
    stats = Statistics.of(x)
    assert stats.square_sum.tolist() == [45_000, 45_000]
    assert (
        stats.square_sum.dtype == stats.mean.dtype == stats.gram.dtype == torch.float32
    )


@pytest.mark.parametrize("shape", [(), (5, 0)])
def test_inputs_without_a_last_axis_are_refused(shape):
    with pytest.raises(ValueError, match="x must have shape"):
        Statistics.of(torch.rand(shape))


def test_a_batch_of_another_width_is_refused():
    with pytest.raises(ValueError, match="x must have 4 inputs as stats has, not 3"):
        Statistics.of(torch.rand(5, 4)).update(torch.rand(5, 3))


def test_padding_is_left_out_where_the_mask_fits():
    mask = torch.tensor([[True, True, False], [True, False, False]])
    text = torch.randn(2, 3, 6)
    assert torch.equal(real_tokens(text, mask), text[[0, 0, 1], [0, 1, 0]])
    image = torch.randn(2, 5, 6)
    assert real_tokens(image, mask) is image
    assert real_tokens(text, None) is text


def test_why_statistics_are_unusable():
    x = torch.randn(5, 4)
    assert unusable(Statistics.of(x)) is None
    assert "no calibration token" in unusable(Statistics.of(x[:0]))
    x[3, 2] = torch.inf
    assert "NaN or infinity" in unusable(Statistics.of(x))


def test_an_attention_mask_of_numbers_is_a_mask():
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    text = torch.randn(2, 3, 6)
    assert torch.equal(real_tokens(text, mask), text[[0, 0, 1], [0, 1, 0]])
