"""The inputs of layers are those that the layers get, without padding."""

import torch
from torch import nn

from ressa.course.layer_inputs import inputs_of_layers


class TwoTowers(nn.Module):
    "A layer for patches, one for tokens, and one that no pass calls."

    def __init__(self):
        super().__init__()
        self.see, self.read, self.idle = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, pixels, tokens, attention_mask):
        return self.see(pixels).sum() + self.read(tokens).sum()


def test_inputs_without_padding_and_without_layers_that_do_not_run():
    model = TwoTowers()
    batch = {
        "pixels": torch.randn(2, 5, 4),
        "tokens": torch.randn(2, 3, 4),
        "attention_mask": torch.tensor([[1, 1, 0], [1, 1, 1]]),
    }
    inputs = inputs_of_layers(model, dict(model.named_children()), batch)
    assert inputs.keys() == {"see", "read"}
    assert torch.equal(inputs["see"], batch["pixels"].reshape(10, 4))
    without_padding = torch.cat([batch["tokens"][0, :2], batch["tokens"][1]])
    assert torch.equal(inputs["read"], without_padding)
    assert not any(module._forward_pre_hooks for module in model.children())
