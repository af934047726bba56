"""A decoder layer as a few operators, which any cache goes with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torch_int4.nn.layer_facts import LayerFacts
from torch_int4.ops.calls import call


class LayerSteps:
    """Norm and projections; rotation and attention; output projection and sum; norm, MLP and sum.

    Where what is added has a norm or a factor of its own, those and the sum are steps by themselves; and so is the
    activation where one linear gives gate and up, or where it is called. An MLP that is called is a step, too, after
    that of its norm.
    """

    def __init__(self, facts: LayerFacts) -> None:
        layout = facts.layout
        self._attention, self._parallel = facts.attention, layout.parallel
        self._first, self._output = facts.first_step(), facts.output_step()
        self._called, self._beside, self._mlp, self._halves = None, None, None, {}
        if layout.calls_mlp:
            self._called, self._given = facts.mlp, facts.given_step()
            self._beside = None if layout.beside_mlp is None else facts.block._modules[layout.beside_mlp]
        elif layout.up is not None and not layout.calls_activation:
            self._mlp = facts.mlp_step()
        else:
            self._halves, self._down, self._activation = facts.halves_step(), facts.down_step(), facts.activation
            self._gated = not layout.calls_activation
        self._attention_norm, self._mlp_norm = facts.norm_step(layout.attention_norm), facts.norm_step(layout.mlp_norm)
        self._scale = None if layout.residual_scale is None else getattr(facts.block, layout.residual_scale)

    def run(self, x: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """The layer's output `[batch, tokens, features]` for the arguments of its `forward`."""
        attention = self._attention
        attended = attention.attend(_linears(x, self._first), kwargs)
        total = self._linear_sum(attended, x, self._output, self._attention_norm)
        given = x if self._parallel else total
        if self._called is not None:
            if self._given:
                given = call(torch.ops.torch_int4.normalize.default, given, **self._given)
            added = self._called(given)
            added = added[0] if isinstance(added, tuple) else added  # with the scores of experts
            added = added if self._beside is None else added + self._beside(given)
            return self._sum(added, total, self._mlp_norm)
        if self._mlp is None:
            inner = _linears(given, self._halves)[0]
            if self._gated:
                gate, up = inner.chunk(2, dim=-1)
                inner = up * self._activation(gate)
            else:
                inner = self._activation(inner)
            return self._linear_sum(inner, total, self._down, self._mlp_norm)
        mlp = torch.ops.torch_int4.mlp.default
        if self._adds(self._mlp_norm):
            y: Tensor = call(mlp, given, total, **self._mlp)
            return y
        return self._sum(call(mlp, given, None, **self._mlp), total, self._mlp_norm)

    def _linear_sum(self, x: Tensor, residual: Tensor, linear: dict[str, Any], norm: dict[str, Any]) -> Tensor:
        """The residual plus what a linear makes of x."""
        operators = torch.ops.torch_int4
        if self._adds(norm):
            y: Tensor = call(operators.linear_add.default, x, residual, **linear)
            return y
        return self._sum(call(operators.int4_linear.default, x, **linear), residual, norm)

    def _adds(self, norm: dict[str, Any]) -> bool:
        """Whether something is added as it is, which operators do themselves."""
        return not norm and self._scale is None

    def _sum(self, y: Tensor, residual: Tensor, norm: dict[str, Any]) -> Tensor:
        """The residual plus y after its norm and times the factor, each step rounded as the stock layer rounds it."""
        if norm:
            y = call(torch.ops.torch_int4.normalize.default, y, **norm)
        if self._scale is not None:
            y = y * self._scale
        return residual + y


def _linears(x: Tensor, arguments: dict[str, Any]) -> list[Tensor]:
    """The outputs of linears for x, after a norm if the arguments have one."""
    operators = torch.ops.torch_int4
    operator = operators.norm_linears if "norm" in arguments else operators.int4_linears
    outputs: list[Tensor] = call(operator.default, x, **arguments)
    return outputs
