"""The walk of every class of models: map, prune, adapt, train, merge, use, save.

python tests/tools/walk_any.py           walk all, and write nbs/results/any_vlm.json
python tests/tools/walk_any.py LLaVA     walk one, and print what went wrong
"""

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
from torch import nn
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

RESULTS = Path(__file__).parents[2] / "nbs" / "results" / "any_vlm.json"


class Walk:
    "One model on its way; each step is a method that raises where something is wrong."

    def __init__(self, name, folder):
        self.name = name
        self.folder = Path(folder)
        self.retrieves = name in tiny_models.RETRIEVING
        self.dense, self.processor = tiny_models.tiny(name, folder)
        self.examples = tiny_models.examples(name, self.processor)
        self.causal = is_causal(self.dense)
        self.parts = modality_map(self.dense)
        self.batch = collate(
            self.examples,
            self.processor,
            answers=not self.retrieves,
            causal=self.causal,
        )

    def logits(self, model):
        out = model(**self.batch)
        return out.logits_per_image if self.retrieves else out.logits

    def layers(self, model):
        "Layers of vision and language, by name."
        linears = modality_map(model).linears
        return linears["vision"] | linears["language"]

    def pruned(self, **how):
        "A pruned copy; every layer of vision and language must have been reached."
        model = copy.deepcopy(self.dense)
        report = prune(model, self.batch, progress=False, **how)
        assert not report.left_dense
        assert len(report.layers) == len(self.layers(model))
        return model

    def map(self):
        "Each weight is in one part or left dense, and the logits depend on each layer."
        model, parts = self.dense, self.parts
        modules = dict(model.named_modules()) | {type(model).__name__: model}
        known = [p for layer in parts.layers.values() for p in layer.parameters()]
        for name in parts.left_dense:
            known += modules[name].parameters(recurse=False)
        missing = {id(p) for p in model.parameters()} - {id(p) for p in known}
        assert not missing, "a weight is in no part"
        assert len(parts.layers) == sum(map(len, parts.linears.values())), (
            "a layer is in two parts"
        )
        assert parts.linears["vision"]
        assert parts.linears["language"]
        linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
        read = read_layers(model, self.batch, linears)
        mapped = set(parts.layers)
        assert mapped <= read, f"mapped, but no output depends on it: {mapped - read}"
        for name in (set(linears) - mapped) & read:
            assert parts.left_dense[name] != "output never read", name

    def wanda(self):
        self.model = self.pruned(sparsity=0.5)
        for name, layer in self.layers(self.model).items():
            assert sparsity_of(layer.weight) == 0.5, name

    def sparsegpt(self):
        model = self.pruned(method="sparsegpt", sparsity=0.5)
        layers = self.layers(model)
        weights = torch.cat([layer.weight.flatten() for layer in layers.values()])
        # Layers that share an input share a threshold, so only their sum is exact.
        assert abs(sparsity_of(weights) - 0.5) < 1e-3
        for name, layer in layers.items():
            dense = self.dense.get_submodule(name).weight
            kept = layer.weight != 0
            changed = layer.weight[kept] != dense[kept]
            assert changed.any(), f"{name}: no kept weight was updated"

    def two_of_four(self):
        for name, layer in self.layers(self.pruned(pattern="2:4")).items():
            assert has_pattern(layer.weight, "2:4"), name

    def adapt(self):
        before = self.logits(self.model)
        self.masks = zero_masks(self.model)
        ranks = {"vision": 2, "language": 2, "interface": 2}
        config = SparseLoraConfig(r=ranks, lora_alpha=4)
        self.student = get_peft_model(copy.deepcopy(self.model), config)
        modules = self.student.modules()
        adapters = [m for m in modules if isinstance(m, SparseLoraLinear)]
        assert len(adapters) == len(self.parts.layers)
        after = self.logits(self.student.eval())
        assert torch.allclose(after, before, atol=1e-5), "a new adapter changes nothing"

    def train(self):
        if self.retrieves:
            self.train_pairs()
        else:
            self.train_answers()
        for name, module in self.student.get_base_model().named_modules():
            is_adapter = isinstance(module, SparseLoraLinear)
            if is_adapter and self.parts.part_of(name) != "interface":
                trained = module.lora_B["default"].weight.any()  # zero at the start
                assert trained, f"{name} was not trained"

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
        teacher = copy.deepcopy(self.dense)
        trainer = RessaTrainer(
            self.student,
            args,
            teacher,
            self.processor,
            train_dataset=self.examples,
        )
        trainer.train()
        losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
        assert len(losses) == 2
        assert torch.tensor(losses).isfinite().all(), losses
        seen = looks_ahead(self.student.train(), self.batch, self.causal)
        assert not seen, "the answer is seen before it is written"

    def train_pairs(self):
        trained = [p for p in self.student.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-2)
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
            pruned = self.merged.get_submodule(name).weight[~mask]
            assert not pruned.view(torch.int32).any(), f"{name}: a zero is not +0.0"
        after = self.logits(self.merged)
        assert torch.allclose(after, before, atol=1e-4), "merging changed the logits"

    @torch.no_grad()
    def use(self):
        if self.retrieves:
            each_image_against_each_text = (3, 3)
            assert self.logits(self.merged).shape == each_image_against_each_text
            return
        batch = collate(self.examples, self.processor, answers=False)
        ids = self.merged.generate(**batch, max_new_tokens=3, do_sample=False)
        texts = self.processor.batch_decode(ids, skip_special_tokens=False)
        assert len(texts) == 3
        assert all(texts)

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
    outcome = dict.fromkeys(STEPS, "not reached")
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = Walk(name, folder)
        for step, act in STEPS.items():
            try:
                outcome[step] = act(model)
            except Exception:
                outcome[step] = traceback.format_exc(limit=-4)
    one_image = name in tiny_models.ONE_IMAGE
    return outcome, {
        "class": type(model.dense).__name__,
        "weights": model.dense.num_parameters(),
        "layers": {part: len(found) for part, found in model.parts.linears.items()},
        "rows": "one image" if one_image else "one, two and no image",
    }


def default_model(kind):
    "What the map says of one class of transformers, at its default size, without weights."
    class_name = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[kind]
    try:
        config = transformers.CONFIG_MAPPING[kind]()
        with torch.device("meta"):
            model = getattr(transformers, class_name)(config)
    except Exception as error:  # defaults that do not fit, or a package that is missing
        return {"not built": type(error).__name__}
    try:
        parts = modality_map(model)
    except ValueError as error:
        return {"refused": str(error)}
    sizes = {
        part: sum(layer.weight.numel() for layer in layers.values())
        for part, layers in parts.linears.items()
    }
    return {"class": class_name, "parts": sizes, "roots": parts.roots}


def main(names):
    transformers.utils.logging.disable_progress_bar()
    models = {}
    for name in names or tiny_models.TINY:
        outcome, about = walk(name)
        passed = {step: wrong is None for step, wrong in outcome.items()}
        models[name] = about | {"steps": passed}
        print(name, about)
        for step, wrong in outcome.items():
            if wrong is not None:
                print(f"--- {step}\n{wrong}", flush=True)
    if names:
        return
    kinds = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    table = dict(
        device="cpu",
        seed=0,
        command="python tests/tools/walk_any.py",
        torch=torch.__version__,
        transformers=transformers.__version__,
        models=models,
        defaults={kind: default_model(kind) for kind in kinds},
    )
    RESULTS.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
