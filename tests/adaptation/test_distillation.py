"""The RESSA loss against its definition, in chunks and in few words; what it refuses."""

import pytest
import torch
from torch.nn import functional as F

from ressa.adaptation.distillation import (
    Targets,
    answer_logits,
    answer_places,
    distillation_loss,
    flat_logits,
    kl_sum,
    loss_terms,
    sum_in_chunks,
    top_targets,
)


def kl(student, teacher, temperature=1.0):
    "The definition, summed over positions."
    p = (teacher / temperature).softmax(-1)
    q = (student / temperature).softmax(-1)
    return (p * (p.log() - q.log())).sum()


def logits_and_labels(rows=3, tokens=7, vocabulary=11, dtype=torch.float64):
    student = torch.randn(rows, tokens, vocabulary, dtype=dtype) * 2
    teacher = torch.randn(rows, tokens, vocabulary, dtype=dtype) * 2
    labels = torch.randint(vocabulary, (rows, tokens))
    labels[:, :4] = -100
    labels[0, 5:] = -100
    return student, teacher, labels


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
def test_value_and_gradient_are_those_of_the_definition(shift):
    student, teacher, labels = logits_and_labels()
    student.requires_grad_()
    student_answers, words = answer_logits(student, labels, shift)
    teacher_answers, _ = answer_logits(teacher, labels, shift)
    task = F.nll_loss(student_answers.log_softmax(-1), words)
    divergence = kl(student_answers, teacher_answers, 2.0) / len(words)
    want = 0.7 * task + 0.3 * 2.0**2 * divergence
    got = distillation_loss(student, teacher, labels, 0.3, 2.0, shift=shift)
    torch.testing.assert_close(got, want)
    (got_gradient,) = torch.autograd.grad(got, student)
    (want_gradient,) = torch.autograd.grad(want, student)
    torch.testing.assert_close(got_gradient, want_gradient)


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


def test_prompt_and_padding_get_no_gradient():
    student, teacher, labels = logits_and_labels()
    student.requires_grad_()
    distillation_loss(student, teacher, labels).backward()
    predicts = F.pad(labels[:, 1:] != -100, (0, 1))
    assert (student.grad[~predicts] == 0).all()
    assert (student.grad[predicts] != 0).any()


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


def test_huge_logits_stay_finite():
    student, teacher, labels = logits_and_labels(dtype=torch.float32)
    assert distillation_loss(1e4 * student, 1e4 * teacher, labels).isfinite()


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


def test_low_precision_is_computed_in_float32():
    student, teacher, labels = logits_and_labels(dtype=torch.float32)
    student = student.bfloat16().requires_grad_()
    teacher = teacher.bfloat16()
    low = distillation_loss(student, teacher, labels)
    high = distillation_loss(student.float(), teacher.float(), labels)
    assert low == high
    assert low.dtype == torch.float32
    targets = top_targets(answer_logits(teacher, labels)[0], 4)
    low = distillation_loss(student, targets, labels)
    high = distillation_loss(student.float(), targets, labels)
    assert low == high


def test_nothing_is_kept_between_forward_and_backward_but_what_there_was():
    "No copy of the logits, whole or in pieces."
    student, teacher, labels = logits_and_labels(vocabulary=500)
    student.requires_grad_()
    held = {}

    def pack(tensor):
        held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        distillation_loss(student, teacher, labels)
    assert held.pop(student.untyped_storage().data_ptr()) == student.nbytes
    assert sum(held.values()) < 1000 < student.nbytes


# Refusals


def test_what_cannot_be_meant_is_refused():
    student, teacher, labels = logits_and_labels()
    answers = len(answer_logits(student, labels)[1])
    targets = top_targets(answer_logits(teacher, labels)[0], 2)
    fewer = Targets(targets.values[1:], targets.words[1:])
    cases = [
        ("no answer token", dict(labels=torch.full_like(labels, -100))),
        ("do not fit", dict(labels=labels[:, 1:])),
        ("labels must be -100, or words", dict(labels=labels.clamp(min=-7))),
        ("labels must be -100, or words", dict(labels=labels + 99)),
        ("share a vocabulary", dict(teacher=teacher[..., 1:])),
        ("examples and tokens", dict(teacher=teacher[:, 1:])),
        (f"targets are of {answers - 1}", dict(teacher=fewer)),
        ("targets are of 7 tokens", dict(teacher=targets, positions="all")),
        ("must be one of", dict(positions="some")),
        ("needs to be told where the text is", dict(positions="text")),
        ("True or False for each of", dict(positions=labels)),
        ("mark no token", dict(positions=labels > 99)),
        ("temperature must be above 0", dict(temperature=-1.0)),
        ("weight must be in", dict(weight=-0.1)),
    ]
    right = dict(student_logits=student, teacher=teacher, labels=labels)
    for message, wrong in cases:
        with pytest.raises(ValueError, match=message):
            distillation_loss(**right | wrong)
    with pytest.raises(ValueError, match="k must be at least 1, not 0"):
        top_targets(teacher[0], 0)
    with pytest.raises(ValueError, match="temperature must be above 0"):
        top_targets(teacher[0], 2, torch.inf)
