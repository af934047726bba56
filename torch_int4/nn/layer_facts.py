"""The modules of a decoder layer by their roles: what operators are told of them, and what must not change for that."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from torch_int4.layouts.layer import BlockLayout
from torch_int4.layouts.roles import LINEAR
from torch_int4.nn.guard import Guard


@dataclass
class LayerFacts:
    """The modules of a decoder layer that the operators can run.

    Attributes:
        block: the layer.
        norms: by the names that the layout gives them.
        head_norms: norms of the heads of queries and keys, if any; None where they have to be called.
        linears: projections, output projection, gate where there is one, up, down; the MLP's only if it is not called.
        activation: the module between up and down; None where the MLP is called.
        kind: the operators' name for it.
    """

    block: Any
    attention: Any
    mlp: Any
    norms: dict[str, Any]
    head_norms: list[Any] | None
    linears: list[Any]
    activation: Any
    kind: str | None

    @property
    def layout(self) -> BlockLayout:
        """Where a layer of this family keeps things."""
        layout: BlockLayout = self.block.torch_int4_data.layout
        return layout

    @property
    def projections(self) -> int:
        """How many linears give query, key and value."""
        return len(self.attention.torch_int4_data.layout.linears)

    @property
    def is_whole(self) -> bool:
        """Whether one operator can run all of the layer."""
        plain = self.layout.is_plain and self.attention.torch_int4_data.layout.is_plain
        return plain and self.head_norms is not None and LINEAR.agree(self.linears)

    def whole(self) -> dict[str, Any]:
        """Arguments of operators of whole layers, besides the input, positions and the cache."""
        norm = self.layout.norm_role
        return {
            **norm.several(list(self.norms.values())),
            "head_norms": norm.several(self.head_norms)["norm_weights"] if self.head_norms else [],
            **LINEAR.several(self.linears),
            **self._norm_kind(),
            "activation": self.kind,
            "projections": self.projections,
            "parallel_residual": self.layout.parallel,
            "interleaved": self.attention.torch_int4_data.layout.interleaved,
        }

    def first_step(self) -> dict[str, Any]:
        """Arguments of `norm_linears` of the first norm and the projections, besides the input; without a norm of
        `int4_linears`."""
        return {**self.norm_step(self.layout.input_norm), **_shared(self.linears[: self.projections])}

    def output_step(self) -> dict[str, Any]:
        """Arguments of `linear_add` or `int4_linear` of the output projection, besides the input and the residual."""
        return LINEAR.single(self.linears[self.projections])

    def mlp_step(self) -> dict[str, Any]:
        """Arguments of `mlp`, besides the input and the residual."""
        linears = self.linears[self.projections + 1 :]
        down = LINEAR.single(linears[-1])["perm"]
        norm = self.given_step() or {"norm_weight": None, "norm_bias": None}
        return {**norm, **_shared(linears), "down_perm": down, "activation": self.kind}

    def halves_step(self) -> dict[str, Any]:
        """Arguments of `norm_linears` or `int4_linears` of the linear before down, which gives gate and up or up alone,
        besides the input."""
        return {**self.given_step(), **_shared([self.linears[-2]])}

    def down_step(self) -> dict[str, Any]:
        """Arguments of `linear_add` or `int4_linear` of down, besides the input and the residual."""
        return LINEAR.single(self.linears[-1])

    def given_step(self) -> dict[str, Any]:
        """Arguments of `normalize` of the norm before the MLP, besides the input; none where there is no such norm."""
        return self.norm_step(self.layout.post_norm or self.layout.input_norm)

    def norm_step(self, name: str | None) -> dict[str, Any]:
        """Arguments of `normalize` of the norm of that name, besides the input; none without a name."""
        if name is None:
            return {}
        return {**self.layout.norm_role.single(self.norms[name]), **self._norm_kind()}

    def guard(self, dtype: torch.dtype) -> Guard:
        """Everything that the arguments rest on, and that the layer is one that takes them.

        Args:
            dtype: of the layer's input, and of the parameters of norms.
        """
        norms, layout = [*self.norms.values(), *(self.head_norms or ())], self.layout
        inside = not layout.calls_mlp and self.mlp is not self.block
        holders = (self.attention, self.mlp) if inside else (self.attention,)
        activations = () if layout.calls_mlp or layout.calls_activation else (self.activation,)
        modules = [*holders, *activations, *norms, *self.linears]
        guard = Guard(dtype, modules, [norm._parameters["weight"] for norm in norms])
        for module in (self.block, *holders):
            guard.watch_all(module._modules)
            guard.watch(vars(module), "training")
        if layout.residual_scale is not None:
            guard.watch(vars(self.block), layout.residual_scale)
        guard.watch(vars(self.attention), *self.attention.torch_int4_data.layout.attributes)
        for role, modules in ((layout.norm_role, norms), (LINEAR, self.linears)):
            for module in modules:
                for place in role.places:
                    guard.watch_all(getattr(module, place))
                guard.watch(vars(module), *role.attributes)
        return guard

    def _norm_kind(self) -> dict[str, Any]:
        return {"norm": self.layout.norm, "norm_offset": self.layout.norm_offset}


def _shared(linears: list[Any]) -> dict[str, Any]:
    """The arguments of an operator for linears of which the first ones take one input in one form."""
    given = LINEAR.several(linears)
    given["perm"] = given.pop("perms")[0]
    return given
