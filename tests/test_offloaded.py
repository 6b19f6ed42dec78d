"""A model whose weights accelerate keeps on the CPU or on disk: each call works on it, or is refused by name."""

import copy

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from datasets import Dataset
from tiny_models import examples, tiny

from ressa.adaptation.adapters import (
    ADAPTERS,
    adapt,
    remask,
    trainable_weights,
    zero_masks,
    zeros_filled,
)
from ressa.adaptation.repair import repair
from ressa.adaptation.teachers import ModelTeacher, SelfTeacher, cache_targets
from ressa.allocation.rules import by_modality, ecoflap, owl, uniform
from ressa.allocation.search import search
from ressa.checkpoints.semi_structured import convert_where_faster
from ressa.checkpoints.sparse import load_sparse, pack, save_sparse
from ressa.data.collate import calibration_batch
from ressa.devices import input_device, is_placed
from ressa.evaluation.answers import evaluate, exact_match
from ressa.parts import modality_map
from ressa.pruning.engine import input_statistics, prune
from ressa.pruning.masks import sparsity_of
from ressa.pruning.placement import stored_parameters

NAME = "InstructBLIP, Llama"
CPU = torch.device("cpu")


class Case:
    def __init__(self, folder):
        self.model, self.processor = tiny(NAME, folder)
        rows = examples(NAME, self.processor)
        rows = [row | {"question_type": "color"} for row in rows]
        self.rows = Dataset.from_list(rows)
        self.batch = calibration_batch(self.rows, self.processor, n=3)
        prune(self.model, self.batch, sparsity=0.5, progress=False)


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return Case(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(params=["cpu", "disk"])
def offloaded(case, tmp_path, request):
    model = copy.deepcopy(case.model)
    if request.param == "cpu":
        return cpu_offload(model, execution_device=CPU)
    return disk_offload(model, tmp_path / "offload", execution_device=CPU)


WORKS = {  # on a model and a case; what comes out is compared
    "exact_match": lambda model, case: torch.as_tensor(
        exact_match(model, [case.batch])
    ).tolist(),
    "ModelTeacher": lambda model, case: ModelTeacher(model)(None, case.batch).tolist(),
    "owl": lambda model, case: owl(model, case.batch, 0.5),
    "uniform": lambda model, case: uniform(model, 0.5),
    "by_modality": lambda model, case: by_modality(model, language=0.5),
    "statistics": lambda model, case: {
        name: stats.square_sum.tolist()
        for name, stats in input_statistics(model, case.batch).items()
    },
    "zero_masks": lambda model, case: {
        name: mask.tolist() for name, mask in zero_masks(model).items()
    },
    "zeros_filled": lambda model, case: zeros_filled(zero_masks(case.model), model),
    "trainable_weights": lambda model, case: [
        weights for _, weights in trainable_weights(model).values()
    ],
    "stored_parameters": lambda model, case: [
        weight.sum().item() for weight in stored_parameters(model)
    ],
}
REFUSED = {
    "answer": lambda model, case: evaluate(
        model, case.rows, case.processor, progress=False
    ),
    "repair": lambda model, case: repair(
        model, case.rows, case.processor, distill_weight=0, steps=1
    ),
    "search": lambda model, case: search(model, case.batch, 0.5),
    "ecoflap": lambda model, case: ecoflap(model, case.batch, 0.5),
    "SelfTeacher": lambda model, case: SelfTeacher(model, case.model),
    "2:4": lambda model, case: convert_where_faster(model, lambda weight: weight),
    "placeholder": lambda model, case: sparsity_of(
        next(iter(modality_map(model).layers.values())).weight
    ),
}


@pytest.mark.parametrize("call", WORKS)
def test_works_as_in_memory(case, offloaded, call):
    assert is_placed(offloaded) and input_device(offloaded) == CPU
    assert WORKS[call](offloaded, case) == WORKS[call](case.model, case)


@pytest.mark.parametrize("call", REFUSED)
def test_is_refused_by_name(case, offloaded, call):
    with pytest.raises(ValueError, match=f"{call}.*"):
        REFUSED[call](offloaded, case)
    with torch.no_grad():  # and nothing has happened to it
        found = offloaded(**case.batch).logits
        assert torch.equal(found, case.model(**case.batch).logits)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_no_adapter_is_put_on_placeholders(offloaded, adapter):
    with pytest.raises(ValueError, match="all weights in memory.*device_map"):
        adapt(offloaded, adapter)


def test_a_model_whose_first_weights_are_in_memory_answers(case, tmp_path):
    "What `device_map='auto'` makes: it fills the card from the front."
    model = copy.deepcopy(case.model)
    disk_offload(
        model.language_model.model.layers[1], tmp_path / "off", execution_device=CPU
    )
    found = evaluate(model, case.rows, case.processor, progress=False)
    wanted = evaluate(case.model, case.rows, case.processor, progress=False)
    assert found.answers == wanted.answers


def test_masks_are_put_back_where_the_weights_are(case, offloaded):
    masks = {name: ~mask for name, mask in zero_masks(case.model).items()}
    wanted = remask(copy.deepcopy(case.model), masks)
    remask(offloaded, masks)
    with torch.no_grad():
        found = offloaded(**case.batch).logits
        assert torch.equal(found, wanted(**case.batch).logits)


def test_an_offloaded_teacher_has_the_same_cache(case, offloaded, tmp_path):
    file = tmp_path / "targets.arrow"
    made = cache_targets(case.model, case.rows, case.processor, file)
    read = cache_targets(offloaded, case.rows, case.processor, file)
    assert read["teacher_words"][:] == made["teacher_words"][:]


def test_packing_of_an_offloaded_model_goes_by_a_folder(case, tmp_path):
    case.model.save_pretrained(tmp_path / "dense")
    places = {name: "cpu" for name, _ in case.model.named_children()}
    offloaded = type(case.model).from_pretrained(
        tmp_path / "dense",
        device_map=places | {"query_tokens": "cpu", "language_model": "disk"},
        offload_folder=tmp_path / "offload",
    )
    with pytest.raises(ValueError, match="save_sparse.*save_pretrained.*pack"):
        save_sparse(offloaded, case.processor, tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
    offloaded.save_pretrained(tmp_path / "ordinary")
    pack(tmp_path / "ordinary", tmp_path / "packed")
    loaded, _ = load_sparse(tmp_path / "packed")
    for name, tensor in case.model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
