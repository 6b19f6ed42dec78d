"""A stopped repair goes on to the same bits, and the checkpoints of another one are refused."""

import copy
import shutil
import signal
import time

import pytest
import torch
from same_repair import equal, repaired
from warm_processes import started

from ressa.adaptation.repair import repair
from ressa.adaptation.resume import settings_of, weights_hash

EVERY_STEP_KEPT = dict(
    steps=4, batch_size=4, save_steps=1, save_total_limit=9, disable_tqdm=True, r=2
)


def test_one_changed_weight_is_another_model(case):
    known = weights_hash(case.dense)
    layer = case.dense.get_output_embeddings()
    with torch.no_grad():
        layer.weight[-1, -1] *= 2
    assert weights_hash(case.dense) != known
    swapped = weights_hash(case.dense)
    with torch.no_grad():
        layer.weight[[-1, -2]] = layer.weight[[-2, -1]]
    assert weights_hash(case.dense) != swapped


def losses_of(log):
    "Step, loss and held-out loss of every line that has one."
    return [
        (line["step"], line.get("loss"), line.get("eval_loss"))
        for line in log
        if "loss" in line or "eval_loss" in line
    ]


KINDS_OF_EXAMPLES = {
    "a list": list,
    "without answers": lambda rows: rows.remove_columns("answer"),
    "another name": lambda rows: rows.rename_columns({"image": "photo", "answer": "a"}),
    "tuples": lambda rows: [(row["image"], row["prompt"]) for row in rows],
}


@pytest.mark.parametrize("kind", KINDS_OF_EXAMPLES)
def test_equal_examples_are_the_same_run_whatever_holds_them(case, kind, trainer_of):
    "A picture is named by its pixels, not by where its object lies in memory."
    args = trainer_of().args

    def name(first):
        rows = KINDS_OF_EXAMPLES[kind](case.train.select(range(first, first + 3)))
        return settings_of(case.pruned, rows, None, None, args)["data"]

    assert name(0) == name(0)
    assert name(0) != name(1)


def test_a_run_that_is_given_in_epochs_goes_on(case, repaired_copy, tmp_path):
    options = dict(steps=None, num_train_epochs=2, max_steps=-1, save_strategy="epoch")
    options |= dict(batch_size=4, disable_tqdm=True, r=2, save_total_limit=9)
    small = case._replace(train=case.train.select(range(8)))

    def run(folder):
        model = copy.deepcopy(small.pruned)
        train, reader = small.train, small.processor
        return repair(
            model, train, reader, teacher=case.dense, folder=folder, **options
        )

    whole = run(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")  # after the first epoch
    assert equal(run(tmp_path / "run").model, whole.model)
    assert (tmp_path / "run" / "checkpoint-4").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "adapter,patience",
    [("sparselora", None), ("bias", None), ("sparselora", 9), ("full", 9)],
)
def test_resumed_at_any_step_equals_uninterrupted(
    case, repaired_copy, tmp_path, adapter, patience
):
    "What a kill after each step would have left is gone on with, to the same bits and the same log."
    options = EVERY_STEP_KEPT | dict(adapter=adapter)
    if patience:
        options |= dict(
            patience=patience,
            held_out=case.train.select(range(20, 26)),
            learning_rate=0.05,
        )
    whole = repaired_copy(folder=tmp_path / "run", **options)
    kept = (tmp_path / "run").rename(tmp_path / "kept")
    for last in (1, 3, 4):
        (tmp_path / "run").mkdir()
        shutil.copy(kept / "repair.json", tmp_path / "run")
        for step in range(1, last + 1):
            name = f"checkpoint-{step}"
            shutil.copytree(kept / name, tmp_path / "run" / name)
        resumed = repaired_copy(folder=tmp_path / "run", **options)
        assert equal(resumed.model, whole.model), f"after step {last}"
        assert losses_of(resumed.log) == losses_of(whole.log), f"after step {last}"
        shutil.rmtree(tmp_path / "run")
    assert whole.logged("task_loss").keys() == whole.losses.keys()
    assert whole.logged("distillation_loss").keys() == whole.losses.keys()


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [dict(adapter="sparselora"), dict(adapter="full", patience=9)]
)
def test_killed_at_a_random_moment_equals_uninterrupted(tmp_path, options):
    "SIGKILL, wherever it hits, and the same call again."
    options |= dict(steps=5, batch_size=4, disable_tqdm=True, r=2, save_steps=1)
    folder = tmp_path / "killed"
    clock = torch.Generator().manual_seed(time.time_ns() % 2**31)
    longest = 0.5  # seconds after the second checkpoint
    while True:
        child = started(repaired, folder, **options)
        while not list(folder.glob("checkpoint-2*")) and child.is_alive():
            time.sleep(0.005)
        time.sleep(longest * float(torch.rand(1, generator=clock)))
        child.kill()
        child.join()
        if child.exitcode == -signal.SIGKILL:
            break
        assert child.exitcode == 0, "it was to be killed, or to end by itself"
        shutil.rmtree(folder)  # a fast machine had finished: kill it earlier
        longest /= 2
    resumed = repaired(folder, **options)
    assert equal(resumed, repaired(tmp_path / "whole", **options))


@pytest.mark.slow
@pytest.mark.parametrize("broken", ["", '{"glo'])
def test_a_half_written_checkpoint_is_not_taken(repaired_copy, tmp_path, broken):
    options = EVERY_STEP_KEPT | dict(save_steps=2, save_total_limit=2, folder=tmp_path)
    whole = repaired_copy(**options)
    (tmp_path / "checkpoint-4" / "trainer_state.json").write_text(broken)
    (tmp_path / "checkpoint-4" / "optimizer.pt").unlink()
    again = repaired_copy(**options)
    assert equal(again.model, whole.model)


def test_a_checkpoint_that_cannot_be_written_is_an_error_of_the_system(
    repaired_copy, tmp_path, monkeypatch
):
    def full(*args, **kwargs):
        raise RuntimeError(
            "[enforce fail at inline_container.cc:672] . unexpected pos 128 vs 16"
        )

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="checkpoint could not be written"):
        repaired_copy(steps=2, batch_size=4, r=2, folder=tmp_path, save_steps=1)
