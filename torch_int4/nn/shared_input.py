"""Linears that get the same input run as one operator call: q, k and v, or gate and up.

Each stays a module of its own, which PEFT, hooks and users see and call; nothing is copied. The first of them to see
an input computes the outputs of all, and the others hand out theirs when they are called with the very same tensor.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torch_int4.nn.linear import Int4Linear
from torch_int4.ops.calls import call


class SharedInput:
    """Runs several `Int4Linear` modules on one input."""

    def __init__(self, members: Sequence[Int4Linear]) -> None:
        self.members = tuple(members)
        # (x, its version, outputs by member): one tuple, replaced and never changed, so that another thread sees
        # either its own input in it or somebody else's, and never a mixture.
        self._pending: tuple[Tensor, int, dict[int, Tensor]] | None = None

    def forward(self, member: Int4Linear, x: Tensor) -> Tensor:
        """The output of one member; the same bits as `member.forward_alone(x)`."""
        if torch.compiler.is_compiling() or (torch.is_grad_enabled() and self._wants_gradient(x)):
            return member.forward_alone(x)
        if x.dtype is torch.float64:
            return member.forward_alone(x)
        pending = self._pending
        if pending is not None and pending[0] is x and pending[1] == _version(x):
            y = pending[2].pop(id(member), None)
            if y is not None:
                if not pending[2]:
                    self._pending = None
                return y
        if x.shape[-1] != member.in_features:
            return member.forward_alone(x)  # which says what is wrong
        outputs = dict(zip(map(id, self.members), self._run(x), strict=True))
        y = outputs.pop(id(member))
        self._pending = (x, _version(x), outputs)
        return y

    def _wants_gradient(self, x: Tensor) -> bool:
        return x.requires_grad or any(m.bias is not None and m.bias.requires_grad for m in self.members)

    def _run(self, x: Tensor) -> list[Tensor]:
        first = self.members[0]
        held = [m._buffers for m in self.members]  # asking modules takes longer, see Int4Linear.forward_alone
        outputs: list[Tensor] = call(
            torch.ops.torch_int4.int4_linears.default,
            x,
            [buffers["packed"] for buffers in held],
            [buffers["packed_scales"] for buffers in held],
            [buffers["packed_offsets"] for buffers in held],
            [m._parameters["bias"] for m in self.members],
            held[0]["perm"],
            out_features=[m.out_features for m in self.members],
            group_size=[m.group_size for m in self.members],
            weight_type=",".join([m.weight_type for m in self.members]),
            compute=first.compute,
        )
        return outputs

    def __getstate__(self) -> dict[str, object]:
        return {"members": self.members, "_pending": None}


def _version(x: Tensor) -> int:
    """Counts writes to x; tensors of inference mode have no counter."""
    return -1 if x.is_inference() else x._version


def merge_inputs(linears: Sequence[Int4Linear]) -> bool:
    """Lets linears that always get the same input share one operator call. Returns whether that was possible.

    They must agree in their inputs' number and order (perm) and in how they compute; their weights may differ.
    """
    if any(type(linear) is not Int4Linear for linear in linears):  # others compute more than the product
        return False
    first = linears[0]
    for other in linears[1:]:
        if other.compute != first.compute or not first.packed_weight.shares_input_with(other.packed_weight):
            return False
    if len(linears) < 2 or len(set(map(id, linears))) < len(linears):
        return False
    shared = SharedInput(linears)
    for linear in linears:
        linear._shared = shared
    return True
