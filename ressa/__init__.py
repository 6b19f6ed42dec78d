"""Prune a vision-language model, repair what pruning broke, and keep every zero.

The public names below are loaded when they are first used, so that `import ressa` is quick and needs no torch.
"""
__version__ = "0.2.0"

from importlib import import_module
from typing import TYPE_CHECKING

_HOME = {  # public name → the module that defines it
    "load_model": "models.load_model",
    "load_bundled": "models.bundled",
    "modality_map": "parts",
    "load_easy_vqa": "data.easy_vqa",
    "load_data": "data.load_data",
    "collate": "data.collate",
    "calibration_batch": "data.collate",
    "prune": "pruning.engine",
    "prune_layers": "pruning.engine",
    "PruneReport": "pruning.report",
    "Statistics": "pruning.statistics",
    "select": "pruning.masks",
    "magnitude": "pruning.scores",
    "wanda": "pruning.scores",
    "ria": "pruning.scores",
    "sparsegpt": "pruning.sparsegpt",
    "dsnot": "pruning.dsnot",
    "uniform": "allocation.rules",
    "by_modality": "allocation.rules",
    "owl": "allocation.rules",
    "ecoflap": "allocation.rules",
    "search": "allocation.search",
    "SparseLoraConfig": "adaptation.sparse_lora",
    "distillation_loss": "adaptation.distillation",
    "repair": "adaptation.repair",
    "RepairReport": "adaptation.repair",
    "RessaTrainer": "adaptation.trainer",
    "RessaArguments": "adaptation.trainer",
    "cache_targets": "adaptation.teachers",
    "SelfTeacher": "adaptation.teachers",
    "evaluate": "evaluation.answers",
    "answer": "evaluation.answers",
    "won_back": "evaluation.intervals",
    "save_sparse": "checkpoints.sparse",
    "load_sparse": "checkpoints.sparse",
    "pack": "checkpoints.sparse",
    "unpack": "checkpoints.sparse",
}
__all__ = list(_HOME)


def __getattr__(name):
    if name not in _HOME:
        raise AttributeError(f"module 'ressa' has no attribute {name!r}")
    value = getattr(import_module(f"ressa.{_HOME[name]}"), name)
    globals()[name] = value  # the next use finds it without coming here
    return value


def __dir__():
    return [*globals(), *__all__]


if TYPE_CHECKING:  # what type checkers and editors read
    from .adaptation.distillation import distillation_loss
    from .adaptation.repair import RepairReport, repair
    from .adaptation.sparse_lora import SparseLoraConfig
    from .adaptation.teachers import SelfTeacher, cache_targets
    from .adaptation.trainer import RessaArguments, RessaTrainer
    from .allocation.rules import by_modality, ecoflap, owl, uniform
    from .allocation.search import search
    from .checkpoints.sparse import load_sparse, pack, save_sparse, unpack
    from .data.collate import calibration_batch, collate
    from .data.easy_vqa import load_easy_vqa
    from .data.load_data import load_data
    from .evaluation.answers import answer, evaluate
    from .evaluation.intervals import won_back
    from .models.bundled import load_bundled
    from .models.load_model import load_model
    from .parts import modality_map
    from .pruning.dsnot import dsnot
    from .pruning.engine import prune, prune_layers
    from .pruning.masks import select
    from .pruning.report import PruneReport
    from .pruning.scores import magnitude, ria, wanda
    from .pruning.sparsegpt import sparsegpt
    from .pruning.statistics import Statistics
