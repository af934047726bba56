"""The damage that each linear does when it alone is rounded to int4, and the choice of those to raise to int8."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from torch_int4 import recipes
from torch_int4.config import Int4Config
from torch_int4.patching.plan import targets_of
from torch_int4.support.progress import track
from torch_int4.tuning.scoring import WindowTask
from torch_int4.weights.types import INT4

TOKENS = 512  # of all windows together, that every layer is measured on
MARGIN = 0.8  # share of the limit that is aimed at


@dataclass(frozen=True)
class Layer:
    """A linear, the KL divergence from the float model that rounding it alone causes, and its weights."""

    name: str
    kl: float
    weights: int

    @property
    def per_byte(self) -> float:
        """Damage per byte that int8 costs more than int4."""
        return max(self.kl, 0.0) / (self.weights / 2)


def damage(model: Any, config: Int4Config, windows: Tensor, *, progress: bool | None = False) -> list[Layer]:
    """All 4-bit linears of a float model, those with most damage per byte first; the model is left as it was.

    The weights of one linear at a time are rounded to nearest, whatever the recipe: other recipes do less damage, in
    much the same places.
    """
    length = min(windows.shape[1], 128)
    task = WindowTask(windows[: max(1, TOKENS // length), :length], "damage", "kl")
    task.scores(model)
    rtn, layers = recipes.get("rtn"), []
    chosen = [target for target in targets_of(model, config) if target.kind is INT4]
    for target in track(chosen, "linears", title="damage of", show=progress):
        module = target.module
        assert isinstance(module, nn.Module)
        parameter = module._parameters["weight"]
        assert parameter is not None
        before = parameter.data
        turned = not isinstance(module, nn.Linear)
        rounded = rtn.quantize(before.t() if turned else before, config.weights, name=target.name).dequantize()
        parameter.data = (rounded.t() if turned else rounded).to(before.dtype)
        kl = task.scores(model).values.mean().item()
        parameter.data = before
        layers.append(Layer(target.name, kl if kl == kl else float("inf"), before.numel()))
    return sorted(layers, key=lambda layer: (-layer.per_byte, layer.name))


def choose(layers: list[Layer], already: int, loss: float, max_loss: float) -> int:
    """How many of the layers, in their order, to raise so that the loss should fall within the limit.

    The loss with `already` of them raised is taken to fall in proportion to the damage that is left.
    """
    left = sum(layer.kl for layer in layers[already:])
    wanted = left * MARGIN * max_loss / loss if loss > 0 else left
    for count in range(already, len(layers)):
        if left <= wanted and count > already:
            return count
        left -= layers[count].kl
    return len(layers)
