"""Where weights are, which layers the logits depend on, and whether a model looks ahead."""

from types import SimpleNamespace

import pytest
import tiny_models
import torch
import transformers
from torch import nn

from ressa.course.anatomy import anatomy, looks_ahead, read_layers
from ressa.data.collate import collate
from ressa.parts import modality_map


def built(name):
    "A small model without weights."
    config, _ = tiny_models.TINY[name]()
    auto_class = transformers.AutoModelForImageTextToText
    if name in tiny_models.RETRIEVING:
        auto_class = transformers.AutoModel
    with torch.device("meta"):
        return auto_class.from_config(config)


@pytest.mark.parametrize("name", tiny_models.TINY)
def test_each_weight_is_counted_once(name):
    model = built(name)
    counts = anatomy(model)
    assert sum(counts.values()) == model.num_parameters()
    for part, layers in modality_map(model).linears.items():
        weights = sum(layer.weight.numel() for layer in layers.values())
        assert counts.get(part, 0) == weights


def test_a_shared_weight_counts_where_it_is_met_first():
    config, _ = tiny_models.llava()
    config.text_config.tie_word_embeddings = config.tie_word_embeddings = True
    with torch.device("meta"):
        model = transformers.AutoModelForImageTextToText.from_config(config)
    model.tie_weights()
    embedding = model.get_input_embeddings().weight
    assert model.get_output_embeddings().weight is embedding
    counts = anatomy(model)
    assert "output head" not in counts
    assert counts["embedding"] >= embedding.numel()
    assert sum(counts.values()) == sum(p.numel() for p in model.parameters())


class Reader(nn.Module):
    "Its logits are made of `first` and `second`; `vain` is computed and dropped."

    def __init__(self):
        super().__init__()
        self.first, self.second, self.vain = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x):
        hidden = x + self.first(x)  # two branches, of which one has no weight
        self.vain(hidden)
        return SimpleNamespace(logits=hidden + self.second(hidden))


def test_layers_that_the_logits_depend_on():
    model = Reader()
    layers = dict(model.named_children())
    batch = {"x": torch.randn(2, 4)}
    with torch.no_grad():  # it needs the graph all the same
        assert read_layers(model, batch, layers) == {"first", "second"}
    model.first.requires_grad_(False)
    assert read_layers(model, batch, layers) == {"second"}
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="requires a gradient"):
        read_layers(model, batch, layers)


def test_a_model_that_retrieves(tmp_path):
    model, processor = tiny_models.tiny("CLIP", tmp_path)
    examples = tiny_models.examples("CLIP", processor)
    batch = collate(examples, processor, answers=False)
    layers = modality_map(model).layers
    assert read_layers(model, batch, layers) == set(layers)


class Summing(nn.Module):
    "Logits are sums over the tokens up to each place, or over all of them."

    def __init__(self, key, ahead):
        super().__init__()
        self.key, self.ahead = key, ahead

    def forward(self, **batch):
        assert ("labels" in batch) == (self.key == "labels")
        x = nn.functional.one_hot(batch[self.key].clamp_min(0), 10).float()
        total = x.sum(1, keepdim=True).expand_as(x) if self.ahead else x.cumsum(1)
        return SimpleNamespace(logits=total)


@pytest.mark.parametrize("ahead", [True, False])
@pytest.mark.parametrize("key, causal", [("input_ids", True), ("labels", False)])
@pytest.mark.parametrize("last", [0, 7])
def test_a_model_that_looks_ahead(key, causal, ahead, last):
    ids = torch.tensor([[3, 4, 5, last, 9], [1, 1, 1, 1, 1]])
    labels = torch.tensor([[-100, -100, 5, last, -100], [1, 1, 1, 1, 1]])
    batch = {"input_ids": ids, "labels": labels}
    model = Summing(key, ahead)
    assert looks_ahead(model, batch, causal) == ahead
    assert list(batch) == ["input_ids", "labels"]  # as it was


@pytest.mark.parametrize("marked", [True, False])
def test_paligemma_looks_ahead_without_marks(tmp_path, marked):
    model, processor = tiny_models.tiny("PaliGemma", tmp_path)
    batch = collate(tiny_models.examples("PaliGemma", processor), processor)
    if not marked:
        batch["token_type_ids"] = torch.zeros_like(batch["token_type_ids"])
    assert looks_ahead(model.train(), batch) != marked
