"""The two terms of the loss against their definitions, in chunks and in few words."""

import pytest
import torch
from loss_examples import kl, logits_and_labels
from torch.nn import functional as F

from ressa.adaptation.loss_terms import (
    Targets,
    answer_places,
    flat_logits,
    kl_sum,
    loss_terms,
    sum_in_chunks,
    top_targets,
)

# Places of answers


def test_places_are_those_that_predict_the_labels():
    labels = torch.tensor([[-100, 5, 6], [-100, -100, 7]])
    places, answers = answer_places(labels)
    assert places.tolist() == [0, 1, 4]
    assert answers.tolist() == [5, 6, 7]
    places, answers = answer_places(labels, shift=False)
    assert places.tolist() == [1, 2, 5]
    assert answers.tolist() == [5, 6, 7]
    logits = torch.randn(2, 3, 9)
    assert torch.equal(flat_logits(logits, labels)[places], logits[labels != -100])


@pytest.mark.parametrize(
    "labels, message",
    [
        (torch.zeros(3, dtype=torch.long), "labels must be whole numbers"),
        (torch.zeros(2, 3), "labels must be whole numbers"),
        (torch.full((2, 3), -100), "no answer token"),
        # The first label of a causal model is predicted by nothing.
        (torch.tensor([[1, -100, -100]]), "no answer token"),
    ],
)
def test_labels_without_an_answer_are_refused(labels, message):
    with pytest.raises(ValueError, match=message):
        answer_places(labels)


# Values and gradients


@pytest.mark.parametrize("k", [None, 1, 3, 99])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_gradcheck_in_chunks(k, temperature):
    student, teacher = torch.randn(2, 5, 4, dtype=torch.float64).unbind()
    targets = Targets(teacher) if k is None else top_targets(teacher, k, temperature)
    places = torch.tensor([4, 0, 3])
    answers = places % 4

    def both_terms(logits, chunk):
        task = F.cross_entropy(logits, answers[chunk], reduction="sum")
        divergence = kl_sum(logits, targets.at(places[chunk]), temperature)
        return torch.stack([task, divergence])

    def in_chunks(logits, size):
        return sum_in_chunks(both_terms, logits, places, size)

    whole = both_terms(student[places], slice(None))
    for size in (1, 2, 3, 50, None):
        inputs = student.clone().requires_grad_(), size
        assert torch.autograd.gradcheck(in_chunks, inputs)
        torch.testing.assert_close(in_chunks(student, size), whole)


def test_a_chunk_of_nothing_is_refused():
    with pytest.raises(ValueError, match="size must be 1 or more, not 0"):
        sum_in_chunks(lambda logits, chunk: logits.sum(), torch.ones(3, 4), size=0)


@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_terms_against_plain_loops(shift, temperature):
    student, teacher, labels = logits_and_labels(dtype=torch.float32)
    task, divergence, count = 0.0, 0.0, 0
    for row in range(3):
        for t in range(7):
            at = t - 1 if shift else t
            if labels[row, t] == -100 or at < 0:
                continue
            z, z_teacher = student[row, at].double(), teacher[row, at].double()
            p = (z_teacher / temperature).softmax(0)
            q = (z / temperature).softmax(0)
            task -= z.log_softmax(0)[labels[row, t]]
            divergence += (p * (p.log() - q.log())).sum()
            count += 1
    got_task, got_divergence = loss_terms(
        student, teacher, labels, temperature=temperature, shift=shift
    )
    torch.testing.assert_close(got_task.double(), task / count, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        got_divergence.double(),
        temperature**2 * divergence / count,
        rtol=1e-4,
        atol=1e-6,
    )


def test_options_of_the_terms():
    student, teacher, labels = logits_and_labels()
    task, divergence = loss_terms(student, teacher, labels)
    count = int((labels[:, 1:] != -100).sum())
    halves = loss_terms(student, teacher, labels, tokens=2 * count)
    torch.testing.assert_close(halves[0], task / 2)
    torch.testing.assert_close(halves[1], divergence / 2)
    everywhere = loss_terms(student, teacher, labels, positions="all")[1]
    torch.testing.assert_close(everywhere, kl(student, teacher) / len(labels))
    where = torch.rand(labels.shape) < 0.5
    somewhere = loss_terms(student, teacher, labels, positions=where)[1]
    torch.testing.assert_close(somewhere, kl(student[where], teacher[where]) / 3)
    targets = Targets(teacher[where])
    cached = loss_terms(student, targets, labels, positions=where)[1]
    torch.testing.assert_close(cached, somewhere)
    alone, nothing = loss_terms(student, None, labels)
    assert alone == task
    assert nothing == 0


# A few words and the rest


@pytest.mark.parametrize("seed", range(4))
def test_few_words_give_a_lower_bound_that_grows_to_the_full_divergence(seed):
    torch.manual_seed(seed)
    logits = torch.randn(2, 20, 9, dtype=torch.float64) * (1 + 2 * seed)
    student, teacher = logits.unbind()
    for temperature in (0.5, 1.0, 4.0):
        full = kl_sum(student, Targets(teacher), temperature)
        torch.testing.assert_close(full, kl(student, teacher, temperature))
        found = [
            kl_sum(student, top_targets(teacher, k, temperature), temperature)
            for k in range(1, 12)
        ]
        found = torch.stack(found)
        assert (found >= 0).all()
        assert (found <= full * (1 + 1e-12)).all()
        assert (found.diff() >= -1e-9 * full).all()
        assert found[0] < 0.999 * full
        # Eight of nine words; the ninth is the rest.
        torch.testing.assert_close(found[7:], full.expand(4))


def test_gradient_of_few_words_is_that_of_the_coarse_distribution():
    "On a listed word q - p; the rest shares its own difference as the student has it."
    student, teacher = torch.randn(2, 6, 9, dtype=torch.float64).unbind()
    student = student.clone().requires_grad_()
    targets = top_targets(teacher, 3)
    (got,) = torch.autograd.grad(kl_sum(student, targets), student)
    p, words = targets.values.exp(), targets.words
    q = student.detach().softmax(-1)
    is_rest = torch.ones_like(q).scatter(1, words, 0.0).bool()
    q_rest = q.masked_fill(~is_rest, 0).sum(1, keepdim=True)
    want = torch.where(is_rest, q - q / q_rest * p[:, 3:], 0.0)
    want = want.scatter(1, words, q.gather(1, words) - p[:, :3])
    torch.testing.assert_close(got, want)
    zero = torch.zeros((), dtype=torch.float64)
    torch.testing.assert_close(kl_sum(teacher, targets), zero)


# Precision and memory


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("k", [1, 3, 10])
def test_finite_when_the_listed_words_hold_all(dtype, k):
    "The rest has a probability below what float32 holds, by teacher, student or both."
    small = torch.randn(8, 11)
    huge = torch.randn(8, 11) * (1e4 if dtype is torch.float16 else 1e6)
    pairs = [(small, huge), (huge, small), (huge, huge.roll(1, 1)), (huge, huge)]
    for student, teacher in pairs:
        logits = student.to(dtype).requires_grad_()
        few = top_targets(teacher.to(dtype), k)
        assert few.values.isfinite().all()
        assert few.values.dtype == torch.float32
        for targets in (few, Targets(teacher.to(dtype))):
            loss = kl_sum(logits, targets)
            (gradient,) = torch.autograd.grad(loss, logits)
            assert loss.isfinite()
            assert gradient.isfinite().all()
            assert gradient.dtype == dtype


def test_a_list_of_no_words_and_an_infinite_temperature_are_refused():
    logits = torch.randn(5, 7)
    with pytest.raises(ValueError, match="k must be at least 1, not 0"):
        top_targets(logits, 0)
    with pytest.raises(ValueError, match="temperature must be above 0"):
        top_targets(logits, 2, torch.inf)
