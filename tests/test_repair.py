"""The loss and the trainer: exact means, exact resuming, honest refusals."""
import shutil

import pytest
import torch
from peft import get_peft_model
from torch.nn import functional as F

from ressa.data import calibration_batch, collate
from ressa.distillation import distillation_loss, loss_terms
from ressa.prune import prune
from ressa.repair import RessaArguments, RessaTrainer, remask, repair, zero_masks, zeros_filled
from ressa.sparselora import SparseLoraConfig


def logits_and_labels(rows=3, tokens=7, vocabulary=11):
    labels = torch.randint(0, vocabulary, (rows, tokens))
    labels[torch.rand(rows, tokens) < 0.5] = -100
    labels[0, -1] = 0
    return torch.randn(rows, tokens, vocabulary), torch.randn(rows, tokens, vocabulary), labels


@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_loss_against_plain_loops(shift, temperature):
    student, teacher, labels = logits_and_labels()
    task, divergence, n = 0.0, 0.0, 0
    for row in range(3):
        for t in range(7):
            at = t - 1 if shift else t
            if labels[row, t] == -100 or at < 0: continue
            p = (teacher[row, at].double() / temperature).softmax(0)
            q = (student[row, at].double() / temperature).softmax(0)
            task -= student[row, at].double().log_softmax(0)[labels[row, t]]
            divergence, n = divergence + (p * (p.log() - q.log())).sum(), n + 1
    got = loss_terms(student, teacher, labels, temperature, shift)
    torch.testing.assert_close(got[0].double(), task / n, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got[1].double(), temperature ** 2 * divergence / n, rtol=1e-4, atol=1e-6)


def test_the_papers_variant_sums_over_every_position():
    student, teacher, labels = logits_and_labels()
    p, q = teacher.log_softmax(-1), student.log_softmax(-1)
    got = loss_terms(student, teacher, labels, positions="all")[1]
    torch.testing.assert_close(got, (p.exp() * (p - q)).sum() / 3)


def test_prompt_and_padding_get_no_gradient():
    student, teacher, labels = logits_and_labels()
    student.requires_grad_()
    distillation_loss(student, teacher, labels).backward()
    predicts = F.pad(labels[:, 1:] != -100, (0, 1))
    assert (student.grad[~predicts] == 0).all() and (student.grad[predicts] != 0).any()


def test_huge_logits_stay_finite():
    student, teacher, labels = (t * 1e4 if t.is_floating_point() else t for t in logits_and_labels())
    assert distillation_loss(student, teacher, labels).isfinite()


@pytest.fixture
def patient(bundled, data):
    "A pruned model, its teacher, its processor and the training rows."
    from ressa.bundled import load_bundled
    model, processor = bundled
    prune(model, calibration_batch(data[0], processor, n=8), sparsity=0.7, progress=False)
    return model, load_bundled("cpu")[0], processor, data[0]


def trainer_of(patient, tmp_path, **arguments):
    model, dense, processor, train = patient
    student = get_peft_model(model, SparseLoraConfig(r=2))
    args = RessaArguments(str(tmp_path), disable_tqdm=True, use_cpu=True, save_strategy="no", **arguments)
    return RessaTrainer(student, args, teacher=dense, processor=processor, train_dataset=train.select(range(16)))


def test_gradient_accumulation_is_one_large_batch(patient, tmp_path, data):
    "Accumulated gradients are the mean over all answer tokens, though batches have different numbers of them."
    rows = [data[0][i] for i in range(4)]
    rows[0] = rows[0] | {"answer": "red red red red red"}
    trainer = trainer_of(patient, tmp_path)
    batches = [collate(part, patient[2]) for part in (rows, rows[:2], rows[2:])]
    tokens = [(batch["labels"] != -100).sum() for batch in batches]
    model, grads = trainer.model.train(), []
    for part in (batches[:1], batches[1:]):
        model.zero_grad()
        for batch in part: trainer.compute_loss(model, batch, num_items_in_batch=tokens[0]).backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]))
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-6)


def test_only_adapters_are_trained_and_the_teacher_stays(patient, tmp_path):
    dense_before = {name: p.clone() for name, p in patient[1].named_parameters()}
    trainer = trainer_of(patient, tmp_path, max_steps=2, per_device_train_batch_size=4, learning_rate=1e-2)
    trained = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    trainer.train()
    for name, p in patient[1].named_parameters(): assert torch.equal(p, dense_before[name])


def test_resumed_equals_uninterrupted(patient, tmp_path):
    import copy
    model, dense, processor, train = patient
    small = dict(steps=4, batch_size=4, save_steps=2, save_total_limit=2, disable_tqdm=True, r=2)
    whole, log = repair(copy.deepcopy(model), dense, train, processor, tmp_path / "a", **small)
    shutil.copytree(tmp_path / "a" / "checkpoint-2", tmp_path / "b" / "checkpoint-2")
    resumed, _ = repair(copy.deepcopy(model), dense, train, processor, tmp_path / "b", **small)
    for (name, a), (_, b) in zip(whole.named_parameters(), resumed.named_parameters()): assert torch.equal(a, b), name
    assert all({"task_loss", "distillation_loss"} <= set(row) for row in log if "loss" in row)


@pytest.mark.parametrize("adapter", ["sparselora", "lora"])
def test_repair_returns_a_plain_model_with_every_zero(patient, tmp_path, adapter):
    model, dense, processor, train = patient
    masks, name = zero_masks(model), type(model).__name__
    repaired, _ = repair(model, dense, train, processor, tmp_path, steps=2, batch_size=4, adapter=adapter,
                         r=2, learning_rate=1e-2, disable_tqdm=True)
    assert type(repaired).__name__ == name and not any("lora" in key for key in repaired.state_dict())
    assert zeros_filled(masks, repaired) == 0


def test_a_half_written_checkpoint_is_not_taken(patient, tmp_path):
    import copy
    model, dense, processor, train = patient
    small = dict(steps=4, batch_size=4, save_steps=2, save_total_limit=2, disable_tqdm=True, r=2)
    whole, _ = repair(copy.deepcopy(model), dense, train, processor, tmp_path, **small)
    for broken in ("", "{\"glo"):
        (tmp_path / "checkpoint-4" / "trainer_state.json").write_text(broken)
        (tmp_path / "checkpoint-4" / "optimizer.pt").unlink()
        again, _ = repair(copy.deepcopy(model), dense, train, processor, tmp_path, **small)
        for a, b in zip(whole.parameters(), again.parameters()): assert torch.equal(a, b)


def test_remask_restores_zeros_and_nothing_else(patient):
    model, masks = patient[0], zero_masks(patient[0])
    name, mask = next(iter(masks.items()))
    torch.nn.init.ones_(model.get_submodule(name).weight)
    remask(model, masks)
    assert torch.equal(model.get_submodule(name).weight, mask.float())


def test_refusals(patient, tmp_path):
    model, dense, processor, train = patient
    with pytest.raises(ValueError, match="adapter"):
        repair(model, dense, train, processor, tmp_path, adapter="dora")
    with pytest.raises(ValueError, match="train_dataset is empty"):
        repair(model, dense, train.select([]), processor, tmp_path)
    for wrong in (dict(distill_weight=1.5), dict(temperature=0.0), dict(positions="some")):
        with pytest.raises(ValueError, match=next(iter(wrong))): RessaArguments(str(tmp_path), **wrong)
    with pytest.raises(ValueError, match="teacher"):
        RessaTrainer(model, RessaArguments(str(tmp_path)), train_dataset=train)
