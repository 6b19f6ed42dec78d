"""What the tests of adaptation share."""

import copy
from typing import Any, NamedTuple

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from same_repair import pruned_and_dense
from torch import nn

from ressa.adaptation.repair import repair
from ressa.adaptation.sparse_lora import SparseLoraConfig
from ressa.adaptation.trainer import RessaArguments, RessaTrainer


class Case(NamedTuple):
    "The bundled model pruned at 70 %, what it was before, and what it is repaired with."

    pruned: nn.Module
    dense: nn.Module
    processor: Any
    train: Dataset


@pytest.fixture
def case():
    "Fresh copies of both models in each test."
    pruned, dense, processor, train = pruned_and_dense()
    return Case(pruned, copy.deepcopy(dense), processor, train)


@pytest.fixture
def repaired_copy(case):
    "A function that repairs a copy of the pruned model."

    def run(**options):
        model = copy.deepcopy(case.pruned)
        options = dict(teacher=case.dense) | options
        return repair(model, case.train, case.processor, **options)

    return run


@pytest.fixture
def trainer_of(case, tmp_path):
    "A function that makes a trainer for a student of rank 2."

    def make(teacher=case.dense, model=None, train=None, held_out=None, **arguments):
        torch.manual_seed(0)
        student = case.pruned if model is None else model
        args = RessaArguments(
            str(tmp_path),
            disable_tqdm=True,
            use_cpu=True,
            save_strategy="no",
            **arguments,
        )
        return RessaTrainer(
            get_peft_model(student, SparseLoraConfig(r=2)),
            args,
            teacher=teacher,
            processor=case.processor,
            train_dataset=case.train.select(range(16)) if train is None else train,
            eval_dataset=held_out,
        )

    return make
