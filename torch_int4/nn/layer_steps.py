"""A decoder layer as five operators, which any cache goes with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torch_int4.nn.layer_facts import LayerFacts
from torch_int4.ops.calls import call


class LayerSteps:
    """Norm and projections; rotation and attention; output projection and sum; norm, MLP and sum."""

    def __init__(self, facts: LayerFacts) -> None:
        self._attention, self._parallel = facts.attention, facts.layout.parallel
        self._first, self._output, self._mlp = facts.first_step(), facts.output_step(), facts.mlp_step()

    def run(self, x: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """The layer's output `[batch, tokens, features]` for the arguments of its `forward`."""
        operators, attention = torch.ops.torch_int4, self._attention
        projected = call(operators.norm_linears.default, x, **self._first)
        attended = attention.attend_heads(*attention.split_heads(projected), kwargs)
        total = call(operators.linear_add.default, attended, x, **self._output)
        y: Tensor = call(operators.mlp.default, x if self._parallel else total, total, **self._mlp)
        return y
