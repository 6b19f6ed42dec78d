"""The RESSA loss against its definition; what it refuses."""

import pytest
import torch
from loss_examples import kl, logits_and_labels
from torch.nn import functional as F

from ressa.adaptation.distillation import distillation_loss
from ressa.adaptation.loss_terms import Targets, answer_logits, top_targets


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


def test_prompt_and_padding_get_no_gradient():
    student, teacher, labels = logits_and_labels()
    student.requires_grad_()
    distillation_loss(student, teacher, labels).backward()
    predicts = F.pad(labels[:, 1:] != -100, (0, 1))
    assert (student.grad[~predicts] == 0).all()
    assert (student.grad[predicts] != 0).any()


def test_huge_logits_stay_finite():
    student, teacher, labels = logits_and_labels(dtype=torch.float32)
    assert distillation_loss(1e4 * student, 1e4 * teacher, labels).isfinite()


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
        ("are False everywhere", dict(positions=labels > 99)),
        ("temperature must be above 0", dict(temperature=-1.0)),
        ("weight must be in", dict(weight=-0.1)),
    ]
    right = dict(student_logits=student, teacher=teacher, labels=labels)
    for message, wrong in cases:
        with pytest.raises(ValueError, match=message):
            distillation_loss(**right | wrong)
