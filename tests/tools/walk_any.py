"""The walk with any class: map, prune, adapt, train, merge, use, save. `python tests/walk_any.py` writes nbs/results/any_vlm.json."""

import copy
import functools
import json
import sys
import tempfile
import traceback
import warnings
from pathlib import Path

import tiny_models
import torch
import transformers
from peft import get_peft_model
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from ressa.adaptation.adapters import zero_masks, zeros_filled
from ressa.adaptation.sparse_lora import SparseLoraConfig, SparseLoraLinear
from ressa.adaptation.trainer import RessaArguments, RessaTrainer
from ressa.course.anatomy import looks_ahead, read_layers
from ressa.data.collate import collate
from ressa.models.inputs import is_causal
from ressa.parts import modality_map
from ressa.pruning.engine import prune
from ressa.pruning.masks import has_pattern, sparsity_of


class Walk:
    "One model on its way; each step is a method that raises where something is wrong."

    def __init__(self, name, folder):
        self.name, self.folder, self.retrieves = (
            name,
            Path(folder),
            name in tiny_models.RETRIEVING,
        )
        self.dense, self.processor = tiny_models.tiny(name, folder)
        self.rows = tiny_models.rows(name, self.processor)
        self.causal, self.mmap = is_causal(self.dense), modality_map(self.dense)
        self.batch = collate(
            self.rows, self.processor, answers=not self.retrieves, causal=self.causal
        )

    def logits(self, model, batch=None):
        out = model(**(batch or self.batch))
        return out.logits_per_image if self.retrieves else out.logits

    def layers(self, model):
        linears = modality_map(model).linears
        return linears["vision"] | linears["language"]

    def pruned(self, **how):
        "A pruned copy; every layer of vision and language must have been reached."
        model = copy.deepcopy(self.dense)
        report = prune(model, self.batch, progress=False, **how)
        assert not report.left_dense and len(report.layers) == len(
            self.layers(model)
        ), report.left_dense
        return model

    def map(self):
        model, mmap = self.dense, self.mmap
        modules = dict(model.named_modules()) | {type(model).__name__: model}
        own = [
            p
            for name in mmap.left_dense
            for p in modules[name].parameters(recurse=False)
        ]
        own += [p for layer in mmap.layers.values() for p in layer.parameters()]
        assert {id(p) for p in own} == {id(p) for p in model.parameters()}, (
            "a weight is in no part"
        )
        assert len(mmap.layers) == sum(map(len, mmap.linears.values())), (
            "a layer is in two parts"
        )
        assert mmap.linears["vision"] and mmap.linears["language"]
        linears = {
            name: m
            for name, m in model.named_modules()
            if isinstance(m, torch.nn.Linear)
        }
        head = [name for name, why in mmap.left_dense.items() if why == "output head"]
        unread = set(linears) - set(mmap.layers) - set(head)
        read = read_layers(model, self.batch, linears)
        assert set(mmap.layers) <= read, (
            f"mapped, but no output depends on it: {set(mmap.layers) - read}"
        )
        assert all(
            mmap.left_dense[name] != "output never read" for name in unread & read
        ), unread & read

    def wanda(self):
        self.model = self.pruned(sparsity=0.5)
        assert all(
            sparsity_of(layer.weight) == 0.5
            for layer in self.layers(self.model).values()
        )

    def sparsegpt(self):
        model = self.pruned(method="sparsegpt", sparsity=0.5)
        weights = torch.cat(
            [layer.weight.flatten() for layer in self.layers(model).values()]
        )
        assert (
            abs(sparsity_of(weights) - 0.5) < 1e-3
        )  # one threshold for layers that share an input
        for name, layer in self.layers(model).items():
            dense, kept = self.dense.get_submodule(name).weight, layer.weight != 0
            assert (layer.weight[kept] != dense[kept]).any(), (
                f"{name}: no kept weight was updated"
            )

    def two_of_four(self):
        model = self.pruned(pattern="2:4")
        assert all(
            has_pattern(layer.weight, "2:4") for layer in self.layers(model).values()
        )

    def adapt(self):
        before = self.logits(self.model)
        self.masks, ranks = (
            zero_masks(self.model),
            dict(vision=2, language=2, interface=2),
        )
        self.student = get_peft_model(
            copy.deepcopy(self.model), SparseLoraConfig(r=ranks, lora_alpha=4)
        )
        adapters = [
            m for m in self.student.modules() if isinstance(m, SparseLoraLinear)
        ]
        assert len(adapters) == len(self.mmap.layers)
        assert torch.allclose(self.logits(self.student.eval()), before, atol=1e-5), (
            "a new adapter changes nothing"
        )

    def train(self):
        (self.train_pairs if self.retrieves else self.train_answers)()
        parts = self.mmap.part_of
        for name, m in self.student.get_base_model().named_modules():
            if not isinstance(m, SparseLoraLinear) or parts(name) == "interface":
                continue
            assert m.lora_B["default"].weight.any(), f"{name} was not trained"

    def train_answers(self):
        args = RessaArguments(
            str(self.folder / "run"),
            max_steps=2,
            per_device_train_batch_size=3,
            learning_rate=1e-2,
            use_cpu=True,
            save_strategy="no",
            disable_tqdm=True,
            logging_steps=1,
        )
        trainer = RessaTrainer(
            self.student,
            args,
            copy.deepcopy(self.dense),
            self.processor,
            train_dataset=self.rows,
        )
        trainer.train()
        losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
        assert len(losses) == 2 and torch.tensor(losses).isfinite().all(), losses
        assert not looks_ahead(self.student.train(), self.batch, self.causal), (
            "the answer is seen before it is written"
        )

    def train_pairs(self):
        optimizer = torch.optim.AdamW(
            [p for p in self.student.parameters() if p.requires_grad], lr=1e-2
        )
        for _ in range(2):
            optimizer.zero_grad()
            loss = self.student(**self.batch, return_loss=True).loss
            loss.backward()
            optimizer.step()
            assert loss.isfinite()

    @torch.no_grad()
    def merge(self):
        before = self.logits(self.student.eval())
        self.merged = self.student.merge_and_unload(safe_merge=True).eval()
        assert zeros_filled(self.masks, self.merged) == 0
        for name, mask in self.masks.items():
            weight = self.merged.get_submodule(name).weight
            assert not weight[~mask].view(torch.int32).any(), (
                f"{name}: a zero is not +0.0"
            )
        assert torch.allclose(self.logits(self.merged), before, atol=1e-4), (
            "merging changed what is said"
        )

    @torch.no_grad()
    def use(self):
        if self.retrieves:
            assert self.logits(self.merged).shape == (
                3,
                3,
            )  # each image against each text
            return
        batch = collate(self.rows, self.processor, answers=False)
        said = self.merged.generate(**batch, max_new_tokens=3, do_sample=False)
        assert len(said) == 3 and all(
            self.processor.batch_decode(said, skip_special_tokens=False)
        )

    def save(self):
        self.merged.save_pretrained(self.folder / "merged")
        again = type(self.merged).from_pretrained(self.folder / "merged").state_dict()
        for name, value in self.merged.state_dict().items():
            assert torch.equal(value, again[name]), name


STEPS = {
    "map": Walk.map,
    "Wanda": Walk.wanda,
    "SparseGPT": Walk.sparsegpt,
    "2:4": Walk.two_of_four,
    "SparseLoRA": Walk.adapt,
    "train": Walk.train,
    "merge": Walk.merge,
    "use": Walk.use,
    "save": Walk.save,
}


@functools.cache
def walk(name):
    "The whole walk of one model: step → None, or what went wrong; and what the model is."
    done = dict.fromkeys(STEPS, "not reached")
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        it = Walk(name, folder)
        for step, act in STEPS.items():
            try:
                done[step] = act(it)
            except Exception:
                done[step] = traceback.format_exc(limit=-4)
    parts = {part: len(layers) for part, layers in it.mmap.linears.items()}
    return done, {
        "class": type(it.dense).__name__,
        "weights": it.dense.num_parameters(),
        "layers": parts,
        "rows": "one image"
        if name in tiny_models.ONE_IMAGE
        else "one, two and no image",
    }


def defaults():
    "What the map says of each image-and-text class of transformers, at its default size and without weights."
    found = {}
    for kind, cls in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.items():
        try:
            with torch.device("meta"):
                model = getattr(transformers, cls)(transformers.CONFIG_MAPPING[kind]())
        except Exception as error:  # defaults that do not fit each other, or a library that is not there
            found[kind] = {"not built": type(error).__name__}
            continue
        try:
            mmap = modality_map(model)
        except ValueError as error:
            found[kind] = {"refused": str(error)}
        else:
            sizes = {
                part: sum(m.weight.numel() for m in layers.values())
                for part, layers in mmap.linears.items()
            }
            found[kind] = {"class": cls, "parts": sizes, "roots": mmap.roots}
    return found


def main(names):
    transformers.utils.logging.disable_progress_bar()
    models = {}
    for name in names or tiny_models.TINY:
        done, about = walk(name)
        models[name] = about | {
            "steps": {step: wrong is None for step, wrong in done.items()}
        }
        print(
            name,
            about,
            *(f"\n--- {step}\n{wrong}" for step, wrong in done.items() if wrong),
            flush=True,
        )
    table = dict(
        device="cpu",
        seed=0,
        command="python tests/walk_any.py",
        torch=torch.__version__,
        transformers=transformers.__version__,
        models=models,
        defaults={} if names else defaults(),
    )
    path = Path(__file__).parent.parent / "nbs/results/any_vlm.json"
    if not names:
        path.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
