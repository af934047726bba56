"""Experts of a sparse layer whose weights are linears: one operator for all that the rows of x were sent to.

Transformers keeps the experts of a layer in one tensor. Here each has its linears, as their checkpoints have: recipes,
saving, adapters and users treat them as any other linear.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from torch_int4.layouts.experts import ExpertsLayout
from torch_int4.nn.guard import Guard
from torch_int4.nn.linear import PACKED, Int4Linear
from torch_int4.ops.calls import call
from torch_int4.support.mixins import Mixin

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class Expert(nn.Module):
    """The linears of one expert, by the names that `ExpertsLayout.linears` has. Its experts module runs them."""

    def __init__(self, linears: dict[str, nn.Module]) -> None:
        super().__init__()
        for name, linear in linears.items():
            self.add_module(name, linear)


class LinearExperts(Mixin):
    """Mixed into experts modules of transformers; their children "0", "1", ... are of class `Expert`."""

    torch_int4_data: ExpertsLayout
    torch_int4_prepared: PreparedExperts | None = None

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The weighted sums of what the experts of each row give for it.

        Args:
            hidden_states: `[rows, features]`.
            top_k_index: int64 `[rows, experts of a row]`; the number of experts stands for none.
            top_k_weights: floats of that shape.
        """
        prepared = self.torch_int4_prepared
        if prepared is not None and not torch.compiler.is_compiling() and not prepared.serves(hidden_states):
            prepared = None if torch.is_grad_enabled() else prepare(self)
        if prepared is None or hidden_states.dim() != 2 or hidden_states.dtype not in FLOATS:
            return sum_of_experts(self, hidden_states, top_k_index, top_k_weights)
        return prepared.run(hidden_states, top_k_index, top_k_weights)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        module: Any = super()._apply(fn, recurse)  # type: ignore[misc]
        prepare(module)
        return module

    def extra_repr(self) -> str:
        """The text that `print(model)` adds."""
        return "as linears by torch_int4"


def sum_of_experts(module: Any, x: Tensor, chosen: Tensor, shares: Tensor) -> Tensor:
    """The same by the linears one after the other, whatever they have become, with gradients where asked for."""
    layout: ExpertsLayout = module.torch_int4_data
    y = torch.zeros_like(x)
    for number in torch.unique(chosen).tolist():
        if number == layout.count:
            continue
        rows, places = torch.where(chosen == number)
        given = run_expert(module, layout, module._modules[str(number)], x[rows])
        y.index_add_(0, rows, (given * shares[rows, places, None]).to(y.dtype))
    return y


def run_expert(module: Any, layout: ExpertsLayout, expert: Any, x: Tensor) -> Tensor:
    """The output of one expert, with the activation of the module that it is of."""
    if not layout.gated:
        return expert.down_proj(module.act_fn(expert.up_proj(x)))
    gate, up = expert.gate_proj(x), expert.up_proj(x)
    both = torch.cat((gate, up), dim=-1) if layout.concatenated else torch.stack((gate, up), dim=-1).flatten(-2)
    return expert.down_proj(module._apply_gate(both))


class PreparedExperts:
    """Experts whose arguments one operator has checked, for as long as their linears are the same.

    Args:
        module: of class `LinearExperts`, with an activation that operators have.
        experts: its children.
    """

    def __init__(self, module: Any, experts: list[Any]) -> None:
        layout: ExpertsLayout = module.torch_int4_data
        assert layout.activation is not None
        linears: list[Any] = [expert._modules[name] for expert in experts for name in layout.linears]
        first = linears[0]
        self.number = int(
            torch.ops.torch_int4.prepare_experts(
                *([linear._buffers[name] for linear in linears] for name in PACKED),
                [linear._parameters["bias"] for linear in linears],
                [expert._modules[name]._buffers["perm"] for expert in experts for name in ("up_proj", "down_proj")],
                in_features=first.in_features,
                out_features=[linear.out_features for linear in linears[: len(layout.linears)]],
                group_size=[linear.group_size for linear in linears[: len(layout.linears)]],
                weight_type=",".join([linear.weight_type for linear in linears[: len(layout.linears)]]),
                compute=first.compute,
                activation=layout.activation,
            )
        )
        self.out_features = linears[len(layout.linears) - 1].out_features
        weakref.finalize(self, torch.ops.torch_int4.release_experts, self.number).atexit = False
        self._watched = (vars(module)["_modules"], experts, linears)
        self._guards: dict[torch.dtype, Guard] = {}

    def serves(self, x: Tensor) -> bool:
        """Whether nothing has changed, and x is what the operator takes."""
        guard = self._guards.get(x.dtype)
        if guard is None:
            if x.dtype not in FLOATS:
                return False
            self._guards[x.dtype] = guard = self._guard(x.dtype)
        return guard.holds(x)

    def _guard(self, dtype: torch.dtype) -> Guard:
        children, experts, linears = self._watched
        guard = Guard(dtype, [*experts, *linears])
        guard.watch_all(children)
        for expert in experts:
            guard.watch_all(expert._modules)
        for linear in linears:
            guard.watch_all(linear._buffers)
            guard.watch(linear._parameters, "bias")
        return guard

    def run(self, x: Tensor, chosen: Tensor, shares: Tensor) -> Tensor:
        """The output `[rows, features]`."""
        y: Tensor = call(
            torch.ops.torch_int4.prepared_experts.default, x, chosen, shares, self.number, self.out_features
        )
        return y

    def __deepcopy__(self, memo: Any) -> None:
        """Copies of the module are prepared anew."""

    def __reduce__(self) -> Any:
        return type(None), ()


def prepare(module: Any) -> PreparedExperts | None:
    """Prepares an experts module for one operator; None where its linears are not served by one."""
    module.torch_int4_prepared = None
    layout: ExpertsLayout = module.torch_int4_data
    experts: list[Any] = [module._modules.get(str(number)) for number in range(layout.count)]
    if layout.activation is None or any(type(expert) is not Expert for expert in experts):
        return None
    linears = [expert._modules.get(name) for expert in experts for name in layout.linears]
    if any(type(linear) is not Int4Linear or _is_touched(linear) for linear in linears) or not _agree(linears, layout):
        return None
    module.torch_int4_prepared = made = PreparedExperts(module, experts)
    return made


def _is_touched(linear: Any) -> bool:
    return bool(linear._forward_hooks or linear._forward_pre_hooks or "forward" in vars(linear))


def _agree(linears: list[Any], layout: ExpertsLayout) -> bool:
    """Whether the linears have one arithmetic, and the same sizes and types in every expert, and gate and up take the
    same input in the same groups."""
    each = len(layout.linears)
    kinds = [_kind(linear) for linear in linears]
    if len({linear.compute for linear in linears[:each]}) > 1 or kinds != kinds[:each] * (len(linears) // each):
        return False
    if not layout.gated:
        return True
    pairs = zip(linears[0::each], linears[1::each], strict=True)
    return linears[0].group_size == linears[1].group_size and all(
        gate.packed_weight.shares_input_with(up.packed_weight) for gate, up in pairs
    )


def _kind(linear: Any) -> tuple[Any, ...]:
    """All that is the same of this linear in every expert."""
    return (linear.out_features, linear.in_features, linear.group_size, linear.weight_type, linear.compute)
