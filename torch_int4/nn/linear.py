"""`Int4Linear`: an `nn.Linear` whose weight lives in packed panels."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from torch_int4 import ops
from torch_int4.errors import Int4Error
from torch_int4.ops.calls import call
from torch_int4.weights import nibbles, types
from torch_int4.weights.canonical import TENSORS, Int4Weight
from torch_int4.weights.packed import FIELDS, PackedWeight

if TYPE_CHECKING:
    from torch_int4.nn.shared_input import SharedInput

COMPUTE = ("int8", "int8x2", "bf16", "fp32")
PACKED = FIELDS[:3]  # names of the buffers that `perm` is no part of


class Int4Linear(nn.Linear):
    """y = x Wᵀ + b for x `[..., in_features]` (any float type), with W in INT4 (or INT8) panels.

    A product with x in float64 is that with x in float32.

    A subclass of `nn.Linear`, so that walks over a model, PEFT and accelerate find it; its `weight` is None. Only the
    packed form stays in memory. `state_dict()` holds the canonical form (`codes`, two per byte for int4; `scales`;
    `zeros` or `offsets`; `multipliers`; `perm`), and loading it packs again, bit by bit the same.
    """

    packed: Tensor
    packed_scales: Tensor
    packed_offsets: Tensor | None
    perm: Tensor | None

    def __init__(
        self,
        weight: Int4Weight | PackedWeight,
        bias: Tensor | None = None,
        *,
        compute: str = "int8",
        dtype: torch.dtype | None = None,
    ) -> None:
        """Packs a canonical weight, or takes over a packed one as it is.

        Args:
            weight: of the linear.
            bias: `[out_features]`, float; a parameter stays the same parameter.
            compute: arithmetic of the products, see `Int4Config.compute`.
            dtype: of the activations that adapters are made for; by default the bias's, or float32.

        Raises:
            Int4Error: `compute` is none, or the tensors of a packed weight are not those of one.
        """
        if compute not in COMPUTE:
            raise Int4Error(f"compute must be one of {', '.join(COMPUTE)}, not {compute!r}")
        nn.Module.__init__(self)  # not nn.Linear's: it would allocate a dense weight
        held = weight.check() if isinstance(weight, PackedWeight) else PackedWeight.pack(weight)
        self.out_features, self.in_features = held.out_features, held.in_features
        self.group_size, self.weight_type, self.compute = held.group_size, held.weight_type, compute
        # The dtype that PEFT gives its adapters.
        self.compute_dtype = dtype or (torch.float32 if bias is None else bias.dtype)
        self._shared: SharedInput | None = None
        self.register_parameter("weight", None)
        if bias is not None and not isinstance(bias, nn.Parameter):
            bias = nn.Parameter(bias)
        self.register_parameter("bias", bias)
        for name, tensor in held.tensors().items():
            self.register_buffer(name, tensor, persistent=False)

    @classmethod
    def from_weight(
        cls,
        weight: Int4Weight | PackedWeight,
        bias: Tensor | None = None,
        *,
        compute: str = "int8",
        dtype: torch.dtype = torch.float32,
    ) -> Int4Linear:
        """The same as the constructor, for activations in float32 unless `dtype` says otherwise."""
        return cls(weight, bias, compute=compute, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Returns `[..., out_features]` in the dtype of x."""
        if self._shared is not None:
            return self._shared.forward(self, x)
        return self.forward_alone(x)

    def forward_alone(self, x: Tensor) -> Tensor:
        """The product without the linears that share this input."""
        if x.shape[-1] != self.in_features:
            raise Int4Error(f"Int4Linear takes {self.in_features} features, but x has shape {tuple(x.shape)}")
        if x.dtype is torch.float64:
            return self._in_float32(x)
        return self._product(x, self._parameters["bias"])

    def _product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        # Asking the module takes Python code for each of them, which a large weight has pushed out of the caches.
        held = self._buffers
        y: Tensor = call(
            torch.ops.torch_int4.int4_linear.default,
            x,
            held["packed"],
            held["packed_scales"],
            held["packed_offsets"],
            bias,
            held["perm"],
            out_features=self.out_features,
            group_size=self.group_size,
            weight_type=self.weight_type,
            compute=self.compute,
        )
        return y

    def _in_float32(self, x: Tensor) -> Tensor:
        """The product for x in float64, `[..., out_features]` in float64 too, plus the bias, which may be."""
        y, bias = self._product(x.float(), None).double(), self._parameters["bias"]
        return y if bias is None else y + bias

    @property
    def packed_weight(self) -> PackedWeight:
        """The packed weight that this module holds; the same tensors."""
        held = self._buffers
        return PackedWeight(
            held["packed"],  # type: ignore[arg-type]
            held["packed_scales"],  # type: ignore[arg-type]
            held["packed_offsets"],
            held["perm"],
            self.out_features,
            self.in_features,
            self.group_size,
            self.weight_type,
        )

    def to_weight(self) -> Int4Weight:
        """The canonical form, bit by bit as it was packed."""
        return self.packed_weight.to_weight()

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight as a dense `[out_features, in_features]` tensor."""
        return self.packed_weight.dequantize(dtype)

    @property
    def qweight(self) -> Tensor:
        """The packed codes, under the names by which PEFT finds the device of a linear whose `weight` is None."""
        return self.packed

    W_q = qweight  # and by which it asks for `dequantize()`

    @property
    def nbytes(self) -> int:
        """Bytes of the packed weight, without the bias."""
        return self.packed_weight.nbytes

    def set_weight(self, weight: Int4Weight) -> None:
        """Packs another canonical weight in place of this one.

        Raises:
            Int4Error: its shape, group size, type or permutation is another one, which linears that share an input
                rely on.
        """
        if not self.packed_weight.replaceable_by(weight):
            raise Int4Error(
                f"{weight.type.name} weight {list(weight.codes.shape)} with groups of {weight.group_size} cannot "
                f"replace Int4Linear({self.extra_repr()}); make a new one with Int4Linear.from_weight"
            )
        self._pack(weight.validate())

    def packed_state(self) -> dict[str, Tensor | None]:
        """The packed tensors themselves, which `set_weight` replaces and never writes."""
        return {name: self._buffers[name] for name in PACKED}

    def set_packed_state(self, state: dict[str, Tensor | None]) -> None:
        """Puts back what `packed_state` of this module was."""
        for name in PACKED:
            self._buffers[name] = state[name]

    def extra_repr(self) -> str:
        """The text that `print(model)` shows of this layer."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"{self.weight_type}, group_size={self.group_size}, compute={self.compute}"
        )

    def _pack(self, weight: Int4Weight) -> None:
        self._buffers.update(PackedWeight.pack(weight).tensors())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Int4Linear:
        """`.to(dtype)`, `.half()` and the like concern activations: the scales keep the type they were packed in."""
        before = {name: self._buffers[name] for name in PACKED}
        super()._apply(fn, recurse)
        self.compute_dtype = fn(torch.empty(0, dtype=self.compute_dtype)).dtype
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        writer = _writer.get()
        if writer is not None:
            destination.update({prefix + suffix: t for suffix, t in writer(self, prefix[:-1]).items()})
            return
        weight = self.to_weight()
        destination[prefix + "codes"] = nibbles.stored(weight.codes, weight.bits)
        for name in TENSORS[1:]:
            if (value := getattr(weight, name)) is not None:
                destination[prefix + name] = value

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        found = {name: state_dict[prefix + name] for name in TENSORS if prefix + name in state_dict}
        rest = {key: value for key, value in state_dict.items() if key not in {prefix + name for name in TENSORS}}
        super()._load_from_state_dict(rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        absent = [prefix + name for name in ("codes", "scales") if name not in found]
        if absent:
            missing_keys.extend(absent if strict else [])
            return
        try:
            kind = types.named(self.weight_type)
            codes = nibbles.restored(found.pop("codes"), kind.bits, self.in_features)
            weight = Int4Weight(
                codes=codes, group_size=self.group_size, bits=kind.bits, codebook=kind.codebook, **found
            )
            weight.validate(prefix + "codes")
            if codes.shape != (self.out_features, self.in_features):
                raise Int4Error(f"{prefix}codes has shape {tuple(codes.shape)}")
            self._pack(weight)
        except (Int4Error, RuntimeError) as error:
            error_msgs.append(f"while loading {prefix[:-1]!r} into Int4Linear: {error}")


_writer: ContextVar[Callable[[Int4Linear, str], dict[str, Tensor]] | None] = ContextVar("_writer", default=None)


@contextlib.contextmanager
def written_by(writer: Callable[[Int4Linear, str], dict[str, Tensor]]) -> Iterator[None]:
    """Inside the block, `state_dict()` holds of each linear what `writer(linear, name)` returns, {suffix: tensor}."""
    token = _writer.set(writer)
    try:
        yield
    finally:
        _writer.reset(token)


# ops is imported for its side effect: it registers what forward() calls.
_ = ops


class Fp32Linear(Int4Linear):
    """An `Int4Linear` whose input, products and output are in fp32, whatever it is given.

    Of models in half precision that keep some of their linears in fp32.
    """

    def forward_alone(self, x: Tensor) -> Tensor:
        """`[..., out_features]` in float32, or in float64 where x is."""
        return super().forward_alone(x.float() if x.itemsize < 4 else x)
