"""A small block whose inputs have outliers, as stages of a recipe see it."""

import torch
import torch.nn.functional as F
from calibrating import statistics
from torch import nn

from torch_int4.layouts.scales import ScaleFold
from torch_int4.recipes import rtn
from torch_int4.recipes.parts.block import Block, Linear
from torch_int4.recipes.parts.folds import find


class Layer(nn.Module):
    """A norm and two linears that read it, after each other; outliers come from the norm's weight."""

    def __init__(self, k=96, n=64):
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.LayerNorm(k)
        self.a, self.b = nn.Linear(k, n), nn.Linear(k, n)
        self.out = nn.Linear(n, k)
        self.norm.weight.data[:4] = 25.0
        self.norm.bias.data.normal_()

    def forward(self, x):
        y = self.norm(x)
        return x + self.out(self.a(y) * self.b(y).sigmoid())


def block_of(layer, config, batches=3, statistics_too=True):
    g = torch.Generator().manual_seed(3)
    data = [torch.randn(4, 6, 96, generator=g) for _ in range(batches)]
    linears = [Linear(f"x.{n}", n, m) for n, m in layer.named_modules() if isinstance(m, nn.Linear)]
    with torch.no_grad():
        targets = [layer(x) for x in data]
        if statistics_too:
            inputs = statistics(torch.cat([layer.norm(x) for x in data]).flatten(0, 1))
            y = torch.cat([layer.norm(x) for x in data])
            linears[0].inputs = linears[1].inputs = inputs
            linears[2].inputs = statistics((layer.a(y) * layer.b(y).sigmoid()).flatten(0, 1))

    def run(batch, parameters):
        return torch.func.functional_call(layer, parameters, (data[batch],))

    folds = find(layer, "x", (ScaleFold("norm", ("a", "b")), ScaleFold("a", ("out",))))
    assert len(folds) == 2
    generator = torch.Generator().manual_seed(0)
    return Block("x", layer, linears, folds, run, lambda batch: targets[batch], batches, generator)


def rounded_error(block, config, stage=rtn):
    """Error of the block's output after rounding all its linears."""
    found = {
        linear.key: stage.quantize(linear.weight, config, inputs=linear.inputs).dequantize() for linear in block.linears
    }
    with torch.no_grad():
        pairs = [(block.run(batch, found), block.targets(batch)) for batch in range(block.batches)]
    return sum(F.mse_loss(*pair).item() for pair in pairs)
