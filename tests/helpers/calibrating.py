"""Small problems with correlated inputs, and what tests of calibrated recipes ask about them."""

import copy
import dataclasses

import torch
from decoders import decoder

from torch_int4 import patch, recipes
from torch_int4.calibration.data import Calibration
from torch_int4.recipes.parts.block import Inputs

KINDS = {
    "symmetric": {"symmetric": True},
    "integer": {"symmetric": False, "zeros": "integer"},
    "float": {"symmetric": False, "zeros": "float"},
}


def weights(n=24, k=200, seed=0):
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed)) * 0.02


def rows(k=200, count=600, seed=1, outliers=3):
    """Inputs that are correlated and have a few large features, as those of language models have."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(count, k // 4, generator=g) @ torch.randn(k // 4, k, generator=g) / k**0.5
    x += 0.1 * torch.randn(count, k, generator=g)
    x[:, :outliers] *= 12
    return x


def statistics(x):
    inputs = Inputs(x.shape[1])
    inputs.add(x)
    return inputs


def product_error(w, weight, x):
    """Mean squared error of the products, relative to their mean square."""
    want = x.double() @ w.double().t()
    got = x.double() @ weight.dequantize().double().t()
    return ((got - want).square().mean() / want.square().mean()).item()


def tokens(count=16 * 24, seed=0):
    return torch.randint(2, 99, (count,), generator=torch.Generator().manual_seed(seed))


def small(data=None, **options):
    """A calibration that takes no time."""
    return Calibration(tokens() if data is None else data, **{"samples": 16, "length": 24, "batch": 4, **options})


def patched(name, recipe, calibration=None, **options):
    """(float model, patched copy) of a tiny decoder."""
    model = decoder(name)
    options = {"compute": "fp32", "kv_cache": "fp32", "head": "float", "symmetric": False, **options}
    return model, patch(copy.deepcopy(model), recipe=recipe, calibration=calibration or small(), **options)


def output_error(model, other, ids=None):
    """Squared distance of logits on the calibration tokens, relative to their square."""
    ids = tokens().view(16, 24) if ids is None else ids
    with torch.no_grad():
        want, got = model(ids).logits, other(ids).logits
    return ((got - want).square().sum() / want.square().sum()).item()


def few_steps(monkeypatch):
    """Let training last long enough to show that it runs, no longer."""
    for stage in map(recipes.get, recipes.available()):
        if hasattr(stage, "PRESETS"):
            light = stage.PRESETS["light"]
            monkeypatch.setitem(stage.PRESETS, "light", dataclasses.replace(light, steps=6))
