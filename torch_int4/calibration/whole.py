"""The stages of a recipe that work on a model as a whole: before its linears are quantized, and after."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import ModuleType

import torch
from torch import Tensor, nn

from torch_int4 import recipes
from torch_int4.calibration.capture import call_model, evaluating
from torch_int4.calibration.run import CalibratedPass
from torch_int4.config import Int4Config
from torch_int4.errors import Int4Error
from torch_int4.recipes.parts.model import Model
from torch_int4.weights.result import Extra


class WholeModel:
    """Runs `prepare` and `after` of a recipe's stages.

    Args:
        model: the float model.
        linears: bits of the linears that are to be quantized, by name.
        config: with the recipe.
        calibrated: the pass over the data, where there is any.
        extend: gives an int4 linear of the model extras, by name.
    """

    def __init__(
        self,
        model: nn.Module,
        linears: Mapping[str, int],
        config: Int4Config,
        calibrated: CalibratedPass | None,
        extend: Callable[[str, Mapping[str, Extra]], None],
    ) -> None:
        self.recipe = recipes.parse(config.recipe)
        self.options = self.recipe.configure(config.weights)
        self._extend = extend
        seed = 0 if calibrated is None else calibrated.calibration.seed
        self.model = Model(model, dict(linears), generator=torch.Generator().manual_seed(seed))
        if calibrated is not None:
            batches = calibrated.windows.split(calibrated.calibration.batch)
            self.model.run, self.model.batches = lambda batch: _logits(model, batches[batch]), len(batches)

    def prepare(self) -> None:
        """Let the stages change the float model.

        Raises:
            Int4Error: naming the stage that failed; the model may have been changed by then.
        """
        self._run(self.recipe.preparing, "prepare")

    def finish(self, linears: Mapping[str, int]) -> None:
        """Let the stages work on the model whose linears, of these names and bits, are int4.

        Raises:
            Int4Error: naming the stage that failed.
        """
        self.model.linears, self.model.extend = dict(linears), self._declared
        self._run(self.recipe.finishing, "after")
        self.model.notes.clear()

    def _run(self, stages: tuple[ModuleType, ...], function: str) -> None:
        module = self.model.module
        known = set(module.modules())
        with evaluating(module):
            for stage in stages:
                try:
                    getattr(stage, function)(self.model, self.options)
                except Exception as error:
                    name = stage.__name__.rpartition(".")[2]
                    raise Int4Error(
                        f"Int4Config.recipe={self.recipe.name!r}: {name!r} failed ({function}), so the model must be "
                        f"loaded again: {error}"
                    ) from error
        for made in set(module.modules()) - known:
            made.training = module.training

    def _declared(self, name: str, extras: Mapping[str, Extra]) -> None:
        self.recipe.check_extras(extras, name)
        self._extend(name, extras)


def _logits(model: nn.Module, windows: Tensor) -> Tensor:
    output = call_model(model, windows)
    logits = output if isinstance(output, Tensor) else output.logits
    assert isinstance(logits, Tensor)
    return logits
