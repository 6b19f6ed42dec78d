"""Which devices a training uses: several cards without torchrun, a CPU beside a card, placed models, shapes that are compiled."""

import types

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import nn
from torch._dynamo.testing import CompileCounter

from ressa.adaptation import fast_mask, masked_update
from ressa.adaptation.repair import repair
from ressa.adaptation.trainer import RessaArguments
from ressa.data.collate import collate


def test_one_process_uses_one_of_several_gpus(tmp_path):
    "transformers would wrap the model in DataParallel, and hand over two token counts."
    args = RessaArguments(str(tmp_path), use_cpu=True, per_device_train_batch_size=4)
    args._n_gpu = 2
    assert args.n_gpu == 1
    assert args.train_batch_size == 4


def test_idle_gpus_are_said(trainer_of, monkeypatch):
    trainer = trainer_of()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    trainer.args = types.SimpleNamespace(device=torch.device("cuda", 0))
    with pytest.warns(UserWarning, match="one of 2 GPUs.*torchrun --nproc-per-node 2"):
        trainer._warn_of_idle_gpus()


def test_a_model_on_the_cpu_beside_a_gpu_is_said(case, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with (
        pytest.warns(UserWarning, match="trains on the CPU.*model.to"),
        pytest.raises(ValueError, match="needs a teacher"),
    ):
        repair(case.pruned, case.train, case.processor)


def test_a_placed_teacher_stays_where_it_is(case, trainer_of, monkeypatch):
    add_hook_to_module(case.dense, ModelHook())

    def refuse(*args, **kwargs):
        raise RuntimeError("You can't move a model that is spread over devices")

    monkeypatch.setattr(case.dense, "to", refuse)
    assert trainer_of().teacher.model is case.dense


def test_an_offloaded_teacher_teaches(case, trainer_of):
    batch = collate([case.train[0]], case.processor)
    trainer = trainer_of()
    student = trainer.model.eval()
    wanted = trainer.compute_loss(student, dict(batch))
    cpu_offload(case.dense, execution_device=torch.device("cpu"))
    assert torch.equal(trainer.compute_loss(student, dict(batch)), wanted)


@pytest.mark.parametrize("shared", [True, False])
def test_the_mean_over_processes_is_taken_once(case, trainer_of, monkeypatch, shared):
    "Two processes with the same batch: DDP's mean of both is the loss of one."
    trainer = trainer_of(average_tokens_across_devices=shared)
    batch = collate([case.train[i] for i in range(4)], case.processor)
    tokens = int((batch["labels"][:, 1:] != -100).sum())
    model = trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    alone = trainer.compute_loss(model, dict(batch), num_items_in_batch=tokens)
    state = trainer.accelerator.state._shared_state
    monkeypatch.setitem(state, "num_processes", 2)
    counted = 2 * tokens if shared else tokens  # of all processes, or of this one
    of_two = trainer.compute_loss(model, dict(batch), num_items_in_batch=counted)
    torch.testing.assert_close(of_two, alone)


def test_twelve_shapes_are_one_or_two_kernels(monkeypatch):
    "As parameters each would be one of its own, and from the ninth on none at all."
    counter = CompileCounter()
    compiled = torch.compile(fast_mask.masked_weight, dynamic=True, backend=counter)
    monkeypatch.setattr(fast_mask, "_compiled_devices", {"cpu"})
    monkeypatch.setattr(fast_mask, "_compiled_masked_weight", lambda: compiled)
    torch._dynamo.reset()
    for n in range(12):
        weight = nn.Parameter(torch.randn(20 + n, 50 + 2 * n), requires_grad=False)
        A = nn.Parameter(torch.randn(2 + n % 3, weight.shape[1]))
        B = nn.Parameter(torch.randn(len(weight), len(A)))
        x = torch.randn(3, weight.shape[1])
        y = masked_update.sparse_lora_linear(x, weight, None, A, B, 2.0)
        y.sum().backward()
        assert A.grad is not None
    assert counter.frame_count <= 2
