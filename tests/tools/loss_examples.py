"""Random logits and labels, and the definition of the divergence, for tests of the loss."""

import torch


def kl(student, teacher, temperature=1.0):
    "The definition, summed over positions."
    p = (teacher / temperature).softmax(-1)
    q = (student / temperature).softmax(-1)
    return (p * (p.log() - q.log())).sum()


def logits_and_labels(examples=3, tokens=7, vocabulary=11, dtype=torch.float64):
    student = torch.randn(examples, tokens, vocabulary, dtype=dtype) * 2
    teacher = torch.randn(examples, tokens, vocabulary, dtype=dtype) * 2
    labels = torch.randint(vocabulary, (examples, tokens))
    labels[:, :4] = -100
    labels[0, 5:] = -100
    return student, teacher, labels
