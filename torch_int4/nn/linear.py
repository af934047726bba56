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
from torch_int4.weights.canonical import Int4Weight

if TYPE_CHECKING:
    from torch_int4.nn.shared_input import SharedInput

COMPUTE = ("int8", "int8x2", "bf16", "fp32")
PACKED = ("packed", "packed_scales", "packed_offsets")


class Int4Linear(nn.Linear):
    """y = x Wᵀ + b for x `[..., in_features]` (float32, bfloat16 or float16), with W in INT4 (or INT8) panels.

    A subclass of `nn.Linear`, so that walks over a model, PEFT and accelerate find it; its `weight` is None. Only the
    packed form stays in memory. `state_dict()` holds the canonical form (`codes`, two per byte for int4; `scales`;
    `zeros` or `offsets`; `perm`), and loading it packs again, bit by bit the same.
    """

    packed: Tensor
    packed_scales: Tensor
    packed_offsets: Tensor | None
    perm: Tensor | None
    mapped = False  # whether the packed tensors lie in a file, whose pages processes share

    def __init__(self, weight: Int4Weight, bias: Tensor | None = None, *, compute: str = "int8") -> None:
        if compute not in COMPUTE:
            raise Int4Error(f"compute must be one of {', '.join(COMPUTE)}, not {compute!r}")
        nn.Module.__init__(self)  # not nn.Linear's: it would allocate a dense weight
        self.out_features, self.in_features = weight.codes.shape
        self.group_size, self.compute = weight.group_size, compute
        self.weight_type = weight.codebook or f"int{weight.bits}"
        self.compute_dtype = torch.float32 if bias is None else bias.dtype  # what PEFT gives its adapters
        self._shared: SharedInput | None = None
        self.register_parameter("weight", None)
        if bias is not None and not isinstance(bias, nn.Parameter):
            bias = nn.Parameter(bias)
        self.register_parameter("bias", bias)
        for name in PACKED:
            self.register_buffer(name, None, persistent=False)
        self.register_buffer("perm", None, persistent=False)
        self._pack(weight)

    @classmethod
    def from_weight(
        cls,
        weight: Int4Weight,
        bias: Tensor | None = None,
        *,
        compute: str = "int8",
        dtype: torch.dtype = torch.float32,
    ) -> Int4Linear:
        """Packs a canonical weight. `dtype` is that of the layer which it replaces."""
        module = cls(weight, bias, compute=compute)
        module.compute_dtype = dtype
        return module

    @classmethod
    def from_packed(
        cls,
        packed: Tensor | None,
        packed_scales: Tensor | None,
        packed_offsets: Tensor | None = None,
        perm: Tensor | None = None,
        *,
        out_features: int,
        in_features: int,
        group_size: int,
        weight_type: str,
        compute: str = "int8",
        dtype: torch.dtype = torch.float32,
    ) -> Int4Linear:
        """Takes over tensors that another `Int4Linear` has packed, as they are; they are not copied.

        Raises:
            Int4Error: their dtypes or shapes are not those of such a weight.
        """
        if compute not in COMPUTE:
            raise Int4Error(f"compute must be one of {', '.join(COMPUTE)}, not {compute!r}")
        tensors = (packed, packed_scales, packed_offsets, perm)
        ops.check_packed(*tensors, out_features, in_features, group_size, weight_type)
        module = cls.__new__(cls)
        nn.Module.__init__(module)
        module.out_features, module.in_features = out_features, in_features
        module.group_size, module.compute, module.weight_type = group_size, compute, weight_type
        module.compute_dtype, module._shared = dtype, None
        module.register_parameter("weight", None)
        module.register_parameter("bias", None)
        for name, value in zip((*PACKED, "perm"), tensors, strict=True):
            module.register_buffer(name, value, persistent=False)
        return module

    def forward(self, x: Tensor) -> Tensor:
        """Returns `[..., out_features]` in the dtype of x."""
        if self._shared is not None:
            return self._shared.forward(self, x)
        return self.forward_alone(x)

    def forward_alone(self, x: Tensor) -> Tensor:
        """The product without the linears that share this input."""
        if x.shape[-1] != self.in_features:
            raise Int4Error(f"Int4Linear takes {self.in_features} features, but x has shape {tuple(x.shape)}")
        # Asking the module takes Python code for each of them, which a large weight has pushed out of the caches.
        held = self._buffers
        y: Tensor = call(
            torch.ops.torch_int4.int4_linear.default,
            x,
            held["packed"],
            held["packed_scales"],
            held["packed_offsets"],
            self._parameters["bias"],
            held["perm"],
            out_features=self.out_features,
            group_size=self.group_size,
            weight_type=self.weight_type,
            compute=self.compute,
        )
        return y

    def to_weight(self) -> Int4Weight:
        """The canonical form, bit by bit as it was packed."""
        codes, scales, offsets = torch.ops.torch_int4.unpack(
            self.packed,
            self.packed_scales,
            self.packed_offsets,
            out_features=self.out_features,
            in_features=self.in_features,
            group_size=self.group_size,
            weight_type=self.weight_type,
        )
        kept = None if self.packed_offsets is None else offsets
        integer = kept is not None and kept.dtype == torch.uint8
        return Int4Weight(
            codes=codes,
            scales=scales,
            zeros=kept if integer else None,
            offsets=None if integer else kept,
            perm=self.perm,
            group_size=self.group_size,
            bits=8 if self.weight_type == "int8" else 4,
            codebook=self._codebook,
        )

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight as a dense `[out_features, in_features]` tensor."""
        return torch.ops.torch_int4.dequantize(
            self.packed,
            self.packed_scales,
            self.packed_offsets,
            self.perm,
            out_features=self.out_features,
            in_features=self.in_features,
            group_size=self.group_size,
            weight_type=self.weight_type,
            dtype=dtype,
        )

    @property
    def qweight(self) -> Tensor:
        """The packed codes, under the names by which PEFT finds the device of a linear whose `weight` is None."""
        return self.packed

    W_q = qweight  # and by which it asks for `dequantize()`

    @property
    def nbytes(self) -> int:
        """Bytes of the packed weight, without the bias."""
        tensors = (self.packed, self.packed_scales, self.packed_offsets, self.perm)
        return sum(t.nbytes for t in tensors if t is not None)

    def set_weight(self, weight: Int4Weight) -> None:
        """Packs another canonical weight in place of this one.

        Raises:
            Int4Error: its shape, group size, type or permutation is another one, which linears that share an input
                rely on.
        """
        kind = weight.codebook or f"int{weight.bits}"
        own = (self.out_features, self.in_features, self.group_size, self.weight_type)
        same_perm = weight.perm is self.perm or (
            weight.perm is not None and self.perm is not None and torch.equal(weight.perm, self.perm)
        )
        if (*weight.codes.shape, weight.group_size, kind) != own or not same_perm:
            raise Int4Error(
                f"{kind} weight {list(weight.codes.shape)} with groups of {weight.group_size} cannot replace "
                f"Int4Linear({self.extra_repr()}); make a new one with Int4Linear.from_weight"
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
        """What `print(model)` shows of this layer."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"{self.weight_type}, group_size={self.group_size}, compute={self.compute}"
        )

    @property
    def _codebook(self) -> str | None:
        return None if self.weight_type in ("int4", "int8") else self.weight_type

    def _pack(self, weight: Int4Weight) -> None:
        scales, offsets = weight.scales, weight.offsets
        if scales.dtype == torch.bfloat16:  # kernels read fp16 and fp32; fp32 keeps every bfloat16
            scales, offsets = scales.float(), None if offsets is None else offsets.float()
        packed, scales, offsets = torch.ops.torch_int4.pack(
            weight.codes.contiguous(),
            scales.contiguous(),
            None if weight.zeros is None else weight.zeros.contiguous(),
            None if offsets is None else offsets.contiguous(),
            group_size=self.group_size,
            weight_type=self.weight_type,
        )
        self.packed, self.packed_scales = packed, scales
        self.packed_offsets = offsets if offsets.numel() else None
        self.perm = weight.perm

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Int4Linear:
        """`.to(dtype)`, `.half()` and the like concern activations: the scales keep the type they were packed in."""
        before = {name: self._buffers[name] for name in PACKED}
        super()._apply(fn, recurse)
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
        codes = _pair_codes(weight.codes) if weight.bits == 4 else weight.codes
        destination[prefix + "codes"] = codes
        for name in ("scales", "zeros", "offsets", "perm"):
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
        names = ("codes", "scales", "zeros", "offsets", "perm")
        found = {name: state_dict[prefix + name] for name in names if prefix + name in state_dict}
        rest = {key: value for key, value in state_dict.items() if key not in {prefix + name for name in names}}
        super()._load_from_state_dict(rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        absent = [prefix + name for name in ("codes", "scales") if name not in found]
        if absent:
            missing_keys.extend(absent if strict else [])
            return
        try:
            codes = found.pop("codes")
            if self.weight_type != "int8":
                codes = _split_codes(codes, self.in_features)
            bits = 8 if self.weight_type == "int8" else 4
            weight = Int4Weight(codes=codes, group_size=self.group_size, bits=bits, codebook=self._codebook, **found)
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


def _pair_codes(codes: Tensor) -> Tensor:
    """uint8 `[N, K]` codes of 4 bits to `[N, ceil(K/2)]`: even inputs in the low nibble, odd ones in the high."""
    padded = nn.functional.pad(codes, (0, codes.shape[1] % 2))
    return padded[:, 0::2] | (padded[:, 1::2] << 4)


def _split_codes(pairs: Tensor, in_features: int) -> Tensor:
    return torch.stack((pairs & 15, pairs >> 4), dim=-1).flatten(1)[:, :in_features].contiguous()


# ops is imported for its side effect: it registers what forward() calls.
_ = ops
