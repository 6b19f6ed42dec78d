"""Hooks, groups, blocks and pieces of a forward pass."""

from collections import OrderedDict

import pytest
import torch
from torch import nn

from ressa.data.collate import calibration_batch
from ressa.parts import modality_map
from ressa.pruning.passes import (
    before_first_call,
    blocks_of,
    in_pieces,
    inputs_of,
    join_examples,
    number_of_examples,
    pieces_of,
    shared_inputs,
    take_examples,
)


class Gated(nn.Module):
    "Two layers read the input, one reads what they make of it; `extra` is not called."

    def __init__(self):
        super().__init__()
        self.gate, self.up = nn.Linear(6, 8), nn.Linear(6, 8)
        self.down, self.extra = nn.Linear(8, 6), nn.Linear(6, 6)

    def forward(self, x):
        return self.down(self.gate(x).relu() * self.up(x))


class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.blocks = nn.ModuleList([Gated(), Gated()])

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = x + block(x)
        return x


def linears_of(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}


def test_a_layer_called_twice_is_noted_once():
    shared, calls = nn.Linear(4, 4), []
    x = torch.randn(3, 4)
    with before_first_call({"shared": shared}, lambda *call: calls.append(call)) as met:
        shared(shared(x))
        assert met == {"shared"}
    ((name, module, given),) = calls
    assert name == "shared"
    assert module is shared
    assert given is x


def test_hooks_are_removed_after_an_error():
    layer = nn.Linear(4, 4)

    def fails(name, module, x):
        raise RuntimeError("no")

    with pytest.raises(RuntimeError), before_first_call({"layer": layer}, fails):
        layer(torch.randn(3, 4))
    assert not layer._forward_pre_hooks


def test_what_the_hook_changes_is_what_the_layer_computes_with():
    layer = nn.Linear(4, 4, bias=False)

    def zero(name, module, x):
        module.weight.data.zero_()

    with before_first_call({"layer": layer}, zero):
        assert not layer(torch.randn(3, 4)).any()


def test_layers_that_read_the_same_tensor():
    groups = shared_inputs(Gated(), {"x": torch.randn(2, 6)}, linears_of(Gated()))
    assert groups == []  # layers of another model
    model = Gated()
    groups = shared_inputs(model, {"x": torch.randn(2, 6)}, linears_of(model))
    assert groups == [["gate", "up"], ["down"]]


def test_equal_tensors_are_not_the_same_tensor():
    class Copying(Gated):
        def forward(self, x):
            return self.down(self.gate(x.clone()).relu() * self.up(x.clone()))

    model = Copying()
    groups = shared_inputs(model, {"x": torch.randn(2, 6)}, linears_of(model))
    assert groups == [["gate"], ["up"], ["down"]]


def test_blocks_are_the_outermost_entries_of_lists():
    model = nn.ModuleDict({"tower": Stack(), "outer": nn.ModuleList([Stack()])})
    blocks = blocks_of(model, linears_of(model))
    assert blocks["tower.first"] == ["tower.first"]
    assert len(blocks["tower.blocks.1"]) == 4
    assert len(blocks["outer.0"]) == 9
    assert set(blocks) == {
        "tower.first",
        "tower.blocks.0",
        "tower.blocks.1",
        "outer.0",
    }


def test_only_what_has_examples_is_cut():
    class Outputs(OrderedDict):
        pass

    states, mask = torch.randn(5, 3), torch.ones(5)
    angles, scalar = torch.randn(1, 3), torch.tensor(2.0)
    value = (states, [mask, None, "flag"], {"angles": angles, "scalar": scalar})
    first = take_examples(value, 5, 0, 2)
    assert torch.equal(first[0], states[:2])
    assert torch.equal(first[1][0], mask[:2])
    assert first[1][1:] == [None, "flag"]
    assert first[2]["angles"] is angles
    assert first[2]["scalar"] is scalar
    rest = take_examples(value, 5, 2, 5)
    joined = join_examples(
        [Outputs(a=each[0], b=each[1][:1]) for each in (first, rest)]
    )
    assert isinstance(joined, Outputs)
    assert torch.equal(joined["a"], states)
    assert torch.equal(joined["b"][0], mask)


def test_number_of_examples():
    batch = {"pixel_values": torch.zeros(7, 2), "input_ids": torch.zeros(3, 4)}
    assert number_of_examples(batch) == 3
    assert number_of_examples({"x": torch.zeros(5, 2)}) == 5
    with pytest.raises(ValueError, match="empty"):
        number_of_examples({})
    with pytest.raises(ValueError, match="pieces is empty"):
        join_examples([])


@pytest.mark.parametrize("size, ends", [(1, 5), (2, 3), (5, 1), (9, 1)])
def test_pieces_cover_the_examples(size, ends):
    x, flag = torch.randn(5, 3), "flag"
    pieces = pieces_of((x,), {"flag": flag}, n=5, size=size)
    assert len(pieces) == ends
    assert torch.equal(torch.cat([piece.args[0] for piece in pieces]), x)
    assert pieces[0].start == 0
    assert pieces[-1].end == 5
    assert all(piece.kwargs == {"flag": flag} for piece in pieces)


def test_a_block_without_examples_is_one_piece():
    "As in a tower that packs the patches of all images into one row."
    packed = torch.randn(77, 3)
    (piece,) = pieces_of((packed,), {"mask": torch.ones(5)}, n=5, size=2)
    assert piece.args[0] is packed
    with pytest.raises(ValueError, match="size must be 1 or more, not 0"):
        pieces_of((packed,), {}, n=5, size=0)


def test_in_pieces_the_output_is_the_same():
    model, x = Stack(), torch.randn(5, 6)
    whole = model(x)
    visited = []

    def visit(name, forward, pieces):
        visited.append((name, [(piece.start, piece.end) for piece in pieces]))

    with in_pieces(model, ["blocks.0", "blocks.1"], n=5, size=2, visit=visit):
        cut = model(x)
    ends = [(0, 2), (2, 4), (4, 5)]
    assert visited == [("blocks.0", ends), ("blocks.1", ends)]
    assert torch.allclose(cut, whole, atol=1e-6)


def test_a_forward_that_another_tool_wrapped_is_put_back():
    model, x = Stack(), torch.randn(5, 6)
    block = model.blocks[0]
    own = block.forward
    wrapped = lambda x: own(x) * 2  # noqa: E731
    block.forward = wrapped
    doubled = model(x)
    with pytest.raises(RuntimeError), in_pieces(model, ["blocks.0"], n=5, size=2):
        assert torch.allclose(model(x), doubled, atol=1e-6)
        raise RuntimeError("no")
    assert block.forward is wrapped
    assert "forward" not in vars(model.blocks[1])


def test_a_block_is_left_once_the_wanted_inputs_are_known():
    block, x = Gated(), torch.randn(5, 6)
    ran = []
    block.down.register_forward_hook(lambda *call: ran.append("down"))
    inputs = inputs_of({"up": block.up}, block.forward, (x,), {})
    assert inputs["up"] is x
    assert not ran
    layers = {"down": block.down, "extra": block.extra}
    inputs = inputs_of(layers, block.forward, (), {"x": x})
    assert list(inputs) == [
        "down"
    ]  # `extra` is not called, so the block ran to its end
    assert ran == ["down"]


def test_the_bundled_model_in_pieces(bundled, data):
    model, processor = bundled
    batch = calibration_batch(data[0], processor, n=8)
    parts = modality_map(model)
    groups = shared_inputs(model, batch, parts.linears["language"])
    one = take_examples(dict(batch), 8, 0, 1)
    assert shared_inputs(model, one, parts.linears["language"]) == groups
    assert [len(group) for group in groups] == [3, 1, 2, 1] * 3
    blocks = blocks_of(model, parts.layers)
    with torch.no_grad():
        whole = model(**batch, use_cache=False).logits
        with in_pieces(model, blocks, n=8, size=3):
            cut = model(**batch, use_cache=False).logits
    assert torch.allclose(cut, whole, atol=1e-4)
