"""Loops over layers that are not the model's own: each layer runs by itself unless they hand on and do nothing else."""

import pytest
import torch
from torch import nn

from torch_int4.patching import fuse_stack as _stack


class Loop(nn.Module):
    def forward(self, x, mask, **others):
        for layer in self.blocks[: self.config.num_hidden_layers]:
            x = layer(x, mask=mask, **others)
        return x


class Whole(nn.Module):
    def forward(self, x):
        for layer in self.blocks:
            x = layer(x)
        return x


class Between(Loop):
    def forward(self, x):
        for layer in self.blocks:
            x = layer(x)
            x = x + 1
        return x


class Typed(Loop):
    def forward(self, x, masks):
        for i, layer in enumerate(self.blocks[: self.config.num_hidden_layers]):
            x = layer(x, mask=masks[self.config.layer_types[i]])
        return x


class Indexed(Loop):
    def forward(self, x, masks):
        for i, layer in enumerate(self.blocks):
            x = layer(x, mask=masks[i])
        return x


class OfTheLayer(Loop):
    def forward(self, x, masks):
        for layer in self.blocks:
            x = layer(x, mask=masks[layer.kind])
        return x


class OfTheState(Loop):
    def forward(self, x):
        for layer in self.blocks:
            x = layer(x, before=x)
        return x


class Twice(Loop):
    def forward(self, x):
        for layer in self.blocks:
            x = layer(x)
        return self.blocks[0](x)


class Some(Loop):
    def forward(self, x):
        for layer in self.blocks[:2]:
            x = layer(x)
        return x


class Drawn(Loop):
    def forward(self, x):
        for layer in self.blocks:
            x = layer(x, seed=torch.rand(1))
        return x


class Kept(Loop):
    def forward(self, x):
        for layer in self.blocks:
            y = layer(x)
        return y


LOOPS = [Loop, Whole, Between, Typed, Indexed, OfTheLayer, OfTheState, Twice, Some, Drawn, Kept]


@pytest.mark.parametrize("kind", LOOPS)
def test_loops_that_hand_on_and_do_nothing_else(kind):
    assert _stack.runs_in_turn(kind, "blocks") == (kind in (Loop, Whole, Typed))
    assert not _stack.runs_in_turn(kind, "layers")
