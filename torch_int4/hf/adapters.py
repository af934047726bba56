"""LoRA adapters of PEFT on int4 linears: merging them into the weights.

Adding, training, saving and loading adapters needs nothing from here: PEFT takes an `Int4Linear` for the linear that it
is. Merging is different, because the sum of weight and adapter has to be quantized again.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from torch_int4.errors import Int4Error
from torch_int4.nn.extended import extras_of
from torch_int4.nn.linear import Int4Linear
from torch_int4.patching.resize import requantize

ModelT = TypeVar("ModelT", bound=nn.Module)


def mergeable(model: ModelT) -> ModelT:
    """Let the LoRA layers of a PEFT model merge into int4 linears, in place, and return the model.

    `merge_and_unload()`, `merge_adapter()` and `unmerge_adapter()` then work: weight + adapters is rounded to nearest
    on a grid of the weight's own kind. That rounding is an error of the size of the first quantization's. Adapters that
    are not merged have none.
    """
    layer: Any
    for layer in model.modules():
        if type(layer) is LoraLinear and isinstance(layer.get_base_layer(), Int4Linear):
            layer.__class__ = Int4LoraLinear
    return model


class Int4LoraLinear(LoraLinear):
    """PEFT's LoRA layer over an `Int4Linear`. Unmerging gives the weight back bit by bit."""

    _before: tuple[dict[str, Tensor | None], Tensor | None] | None = None  # weight and bias, while merged

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Adds adapters to the weight. All that are merged are added to the original at once and rounded once.

        Raises:
            Int4Error: an adapter is no plain LoRA, or is not finite; the weight stays what it was.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.lora_A]
        if not names:
            return
        current = self._state()
        before = self._before or current
        self._restore(before)
        try:
            self._add([*self.merged_adapters, *names])
        except Int4Error:
            self._restore(current)
            raise
        self._before = before
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Takes all adapters out of the weight again."""
        if self._before is not None:
            self._restore(self._before)
        self._before = None
        self.merged_adapters.clear()

    def _state(self) -> tuple[dict[str, Tensor | None], Tensor | None]:
        base = self.get_base_layer()
        return base.packed_state(), None if base.bias is None else base.bias.detach().clone()

    def _restore(self, state: tuple[dict[str, Tensor | None], Tensor | None]) -> None:
        base = self.get_base_layer()
        base.set_packed_state(state[0])
        if base.bias is not None and state[1] is not None:
            base.bias.data = state[1].clone()

    @torch.no_grad()
    def _add(self, names: list[str]) -> None:
        base = self.get_base_layer()
        if extras_of(base):
            extras = ", ".join(extras_of(base))
            raise Int4Error(f"the linear has extras ({extras}) beside its int4 weight; use its adapters unmerged")
        dense, bias = base.dequantize(), base.bias
        for name in names:
            if name in self.lora_variant:
                kind = type(self.lora_variant[name]).__name__
                raise Int4Error(f"adapter {name!r} is a {kind}, which cannot be merged into int4; use it unmerged")
            dense += self.get_delta_weight(name).float()
            if self.lora_bias[name]:
                if bias is None:
                    raise Int4Error(f"adapter {name!r} has a bias and its linear has none; use it unmerged")
                bias = bias + (self.lora_B[name].bias * self.scaling[name]).to(bias.dtype)
        where = f"weight with adapters {', '.join(map(repr, names))}"
        if bias is not None and not bool(torch.isfinite(bias).all()):
            raise Int4Error(f"{where}: the bias holds NaN or infinity; train the adapter again")
        base.set_weight(requantize(dense, base, name=where))
        if bias is not None:
            base.bias.data = bias.detach()
