"""A repair that is refused or fails changes nothing; a folder belongs to one repair."""

import copy
import dataclasses
import subprocess
import sys

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from torch import nn
from transformers import TrainerCallback, TrainingArguments

from ressa.adaptation.adapters import adapt
from ressa.adaptation.kept_masks import KeepsMask
from ressa.adaptation.repair import repair
from ressa.adaptation.sparse_lora import SparseLoraConfig
from ressa.adaptation.teachers import examples_hash
from ressa.adaptation.trainer import RessaArguments, RessaTrainer
from ressa.pruning.engine import prune

SHORT = dict(steps=2, batch_size=4, r=2, disable_tqdm=True, save_steps=1)


def bits(model):
    return {name: weight.clone() for name, weight in model.state_dict().items()}


def assert_unchanged(model, before):
    after = model.state_dict()
    assert list(after) == list(before)
    for name, weight in before.items():
        assert torch.equal(after[name], weight), name


def test_a_folder_of_another_repair_is_refused_by_what_differs(case, tmp_path):
    given = dict(teacher=case.dense, folder=tmp_path, **SHORT)
    data = case.train.select(range(16))

    def again(model=case.pruned, data=data, **changes):
        return repair(copy.deepcopy(model), data, case.processor, **given | changes)

    first = again()
    assert_unchanged(again().model, bits(first.model))  # the same call: its result
    sparser = copy.deepcopy(case.pruned)
    name, layer = next(
        (n, m)
        for n, m in sparser.named_modules()
        if isinstance(m, nn.Linear) and (m.weight == 0).any()
    )
    layer.weight.data[0] = 0
    other_teacher = copy.deepcopy(case.dense)
    other_teacher.get_submodule(name).weight.data.mul_(2)
    changes = {
        "pruned model": dict(model=sparser),
        "data": dict(data=case.train.select(range(1, 17))),
        "teacher": dict(teacher=other_teacher),
        "adapter": dict(adapter="full"),
        "r": dict(r=3),
        "lora_alpha": dict(lora_alpha=8),
        "seed": dict(seed=1),
        "max_steps": dict(steps=3),
        "per_device_train_batch_size": dict(batch_size=8),
        "learning_rate": dict(learning_rate=1e-5),
        "distill_weight": dict(distill_weight=0.25),
        "temperature": dict(temperature=2.0),
        "positions": dict(positions="all"),
        "weight_decay": dict(weight_decay=0.1),
        "lr_scheduler_type": dict(lr_scheduler_type="constant"),
        "gradient_accumulation_steps": dict(gradient_accumulation_steps=2),
    }
    for differing, change in changes.items():
        with pytest.raises(ValueError, match=f"[(; ]{differing} was .* and is"):
            again(**change)
    (tmp_path / "repair.json").unlink()
    with pytest.raises(ValueError, match="no repair.json"):
        again()


class Fails(TrainerCallback):
    def __init__(self, error):
        self.error = error

    def on_step_end(self, *args, **kwargs):
        raise self.error


@pytest.mark.parametrize(
    "error, adapter",
    [
        (RuntimeError("no memory"), "sparselora"),
        (KeyboardInterrupt(), "sparselora"),
        (RuntimeError("no memory"), "full"),
        (KeyboardInterrupt(), "bias"),
    ],
)
def test_a_repair_that_fails_leaves_the_model_as_it_was(
    case, monkeypatch, error, adapter
):
    before = bits(case.pruned)
    needed = [weight.requires_grad for weight in case.pruned.parameters()]
    train = RessaTrainer.train

    def with_error(self, *args, **kwargs):
        self.add_callback(Fails(error))
        return train(self, *args, **kwargs)

    monkeypatch.setattr(RessaTrainer, "train", with_error)
    with pytest.raises(type(error)):
        repair(
            case.pruned,
            case.train,
            case.processor,
            teacher=case.dense,
            adapter=adapter,
            learning_rate=0.1,
            **SHORT,
        )
    assert_unchanged(case.pruned, before)
    assert not any(weight._backward_hooks for weight in case.pruned.parameters())
    assert [w.requires_grad for w in case.pruned.parameters()] == needed
    assert not hasattr(case.pruned, "peft_config")
    monkeypatch.undo()
    report = repair(
        case.pruned, case.train, case.processor, teacher=case.dense, **SHORT
    )
    assert report.zeros_filled == 0


class Spoils(TrainerCallback):
    "Makes the last trained weight NaN, as training that diverges does."

    def on_train_end(self, args, state, control, model=None, **kwargs):
        trained = [weight for weight in model.parameters() if weight.requires_grad]
        trained[-1].data[0] = torch.nan


class FailsWhileMerging:
    "The merge of an adapter, which fails at its third layer."

    def __init__(self, merge):
        self.merge = merge
        self.layers = 0

    def __call__(self, *args, **kwargs):
        self.layers += 1
        if self.layers == 3:
            raise KeyboardInterrupt
        return self.merge(*args, **kwargs)


@pytest.mark.parametrize("keep", [True, False, None])
def test_a_merge_that_fails_is_undone_or_said_to_be_half_done(case, monkeypatch, keep):
    before = bits(case.pruned)
    fails = FailsWhileMerging(KeepsMask.merge)
    monkeypatch.setattr(KeepsMask, "merge", lambda *args, **more: fails(*args, **more))
    data = case.train.select(range(8))
    options = dict(SHORT, learning_rate=0.1, keep_pruned=keep)
    with pytest.raises(KeyboardInterrupt if keep is not False else RuntimeError) as it:
        repair(case.pruned, data, case.processor, teacher=case.dense, **options)
    if keep is False:
        assert "load the pruned model anew" in str(it.value)
        assert isinstance(it.value.__cause__, KeyboardInterrupt)
        with pytest.raises(AssertionError):
            assert_unchanged(case.pruned, before)
    else:
        assert_unchanged(case.pruned, before)


@pytest.mark.parametrize("adapter", ["sparselora", "lora", "full"])
def test_an_update_of_nan_is_not_merged_into_any_layer(case, monkeypatch, adapter):
    before = bits(case.pruned)
    train = RessaTrainer.train

    def diverging(self, *args, **kwargs):
        self.add_callback(Spoils())
        return train(self, *args, **kwargs)

    monkeypatch.setattr(RessaTrainer, "train", diverging)
    with pytest.raises(ValueError, match="NaN or infinite.*learning rate"):
        repair(
            case.pruned,
            case.train,
            case.processor,
            distill_weight=0,
            adapter=adapter,
            keep_pruned=False,  # nothing was merged, so nothing is half done
            **SHORT,
        )
    assert_unchanged(case.pruned, before)


def test_weights_that_were_trained_themselves_can_be_trained_freely_afterwards(case):
    repair(
        case.pruned,
        case.train,
        case.processor,
        distill_weight=0,
        adapter="full",
        **SHORT,
    )
    weights = list(case.pruned.parameters())
    assert not any(weight._backward_hooks for weight in weights)


def wrapped(model):
    "The model in each wrapper that a user may still have around it."
    yield "merge", get_peft_model(copy.deepcopy(model), SparseLoraConfig(r=1))
    yield (
        "merge",
        get_peft_model(copy.deepcopy(model), LoraConfig(target_modules=["q_proj"])),
    )
    # What `model.add_adapter` of transformers does: the model's class stays.
    config = LoraConfig(target_modules=["q_proj"])
    yield "merge", inject_adapter_in_model(config, copy.deepcopy(model))
    yield "model.module", nn.DataParallel(copy.deepcopy(model))


def test_a_wrapped_model_is_refused_clearly(case):
    for remedy, model in wrapped(case.pruned):
        with pytest.raises(ValueError, match=remedy):
            repair(model, case.train, case.processor, teacher=case.dense, **SHORT)
        with pytest.raises(ValueError, match=remedy):
            adapt(model)
        with pytest.raises(ValueError, match=remedy):
            prune(model, {}, sparsity=0.5)


def test_the_trainer_refuses_a_wrapped_student_and_another_loss(case, tmp_path):
    args = RessaArguments(str(tmp_path), use_cpu=True, distill_weight=0)
    data = case.train.select(range(4))
    with pytest.raises(ValueError, match="model.module"):
        RessaTrainer(
            nn.DataParallel(case.pruned), args, None, case.processor, train_dataset=data
        )
    with pytest.raises(ValueError, match="compute_loss_func"):
        RessaTrainer(
            case.pruned,
            args,
            None,
            case.processor,
            train_dataset=data,
            compute_loss_func=print,
        )


def test_held_out_examples_say_which_columns_they_want(case):
    held_out = case.train.select(range(4))
    for column in ("question_type", "prompt", "answer"):
        with pytest.raises(ValueError, match=f"held_out has no column {column}"):
            repair(
                case.pruned,
                case.train,
                case.processor,
                teacher=case.dense,
                held_out=held_out.remove_columns(column),
                **SHORT,
            )


# Every option of the trainer ------------------------------------------------------

FIXED = {
    "label_smoothing_factor": 0.1,
    "use_liger_kernel": True,
    "label_names": ["answer"],
    "remove_unused_columns": True,
    "train_sampling_strategy": "group_by_length",
    "deepspeed": {},
}
# Options that touch the loss, and are obeyed.
OBEYED = set(
    """
    max_steps num_train_epochs per_device_train_batch_size gradient_accumulation_steps
    learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps optim optim_args
    optim_target_modules weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm
    average_tokens_across_devices bf16 fp16 bf16_full_eval fp16_full_eval tf32
    neftune_noise_alpha seed data_seed full_determinism dataloader_drop_last
    auto_find_batch_size activation_checkpointing activation_checkpointing_kwargs
    gradient_checkpointing gradient_checkpointing_kwargs torch_compile
    torch_compile_backend torch_compile_mode use_cache liger_kernel_config
    """.split()
)
# Options of logs, evaluation, saving, loading and devices.
ASIDE = set(
    """
    output_dir torch_empty_cache_steps logging_strategy logging_steps
    logging_first_step log_on_each_node logging_nan_inf_filter
    include_num_input_tokens_seen log_level log_level_replica disable_tqdm report_to
    run_name project trackio_space_id trackio_bucket_id trackio_static_space_id
    eval_strategy eval_steps eval_delay per_device_eval_batch_size
    prediction_loss_only eval_on_start eval_do_concat_batches eval_use_gather_object
    eval_accumulation_steps include_for_metrics batch_eval_metrics save_only_model
    save_strategy save_steps save_on_each_node save_total_limit enable_jit_checkpoint
    push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push
    hub_revision load_best_model_at_end metric_for_best_model greater_is_better
    ignore_data_skip restore_callback_states_from_checkpoint use_cpu
    accelerator_config parallelism_config dataloader_num_workers dataloader_pin_memory
    dataloader_persistent_workers dataloader_prefetch_factor
    dataloader_multiprocessing_context dataloader_in_order length_column_name
    ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers
    ddp_static_graph ddp_backend ddp_timeout fsdp fsdp_config debug
    skip_memory_metrics do_train do_eval do_predict resume_from_checkpoint local_rank
    """.split()
)


def test_every_option_of_the_trainer_is_known():
    names = {option.name for option in dataclasses.fields(TrainingArguments)}
    assert names == set(FIXED) | OBEYED | ASIDE


@pytest.mark.parametrize("name", FIXED)
def test_an_option_that_the_loss_does_not_obey_is_refused_by_name(tmp_path, name):
    with pytest.raises(ValueError, match=name):
        RessaArguments(str(tmp_path), **{name: FIXED[name]})


def test_noise_on_embeddings_is_obeyed(case):
    losses = []
    for alpha in (None, 50.0):
        report = repair(
            copy.deepcopy(case.pruned),
            case.train,
            case.processor,
            teacher=case.dense,
            neftune_noise_alpha=alpha,
            **SHORT,
        )
        losses.append(report.losses)
    assert losses[0] != losses[1]


# Caches ---------------------------------------------------------------------------

HASH = """
from datasets import Dataset
from ressa.adaptation.teachers import examples_hash
rows = [dict(image=None, prompt=str(i), answer="a") for i in range(5)]
print(examples_hash(Dataset.from_list(rows)))
"""


def test_rows_without_pictures_have_the_same_name_in_each_process():
    rows = [dict(image=None, prompt=str(i), answer="a") for i in range(5)]
    here = examples_hash(Dataset.from_list(rows))
    assert examples_hash(Dataset.from_list(rows).remove_columns("image")) == here
    there = subprocess.run(
        [sys.executable, "-c", HASH], capture_output=True, text=True, check=True
    )
    assert there.stdout.strip() == here


def test_examples_with_other_pictures_have_another_name(case):
    rows = case.train.select(range(0, 400, 100))
    pictures = rows["image"][:]
    texts = dict(prompt=["p"] * 4, answer=["a"] * 4)

    class Rows(list):
        def __getitem__(self, key):
            return texts[key] if isinstance(key, str) else super().__getitem__(key)

    def name(images):
        return examples_hash(Rows(dict(image=image) for image in images))

    assert name(pictures) == name([p.copy() for p in pictures])
    assert name(pictures) != name(pictures[::-1])
    several = [[p, pictures[0]] for p in pictures]
    assert name(several) == name([[p.copy() for p in row] for row in several])
    assert name(several) != name([row[::-1] for row in several])
    assert name([dict(path="x", bytes=b"1")] * 4) != name(
        [dict(path="x", bytes=b"2")] * 4
    )
