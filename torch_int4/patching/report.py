"""The effect of a patch on a model, measured; kept as `model.torch_int4_report`."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from torch import nn

from torch_int4.config import Int4Config
from torch_int4.nn.linear import Int4Linear
from torch_int4.weights.types import BITS

MB = 1e6
SHARE = 0.01  # of all weights; modules with less are told together


@dataclass(frozen=True)
class PatchedLinear:
    """One linear, and the bytes of its weight before and after, with scales and padding, without bias."""

    name: str
    out_features: int
    in_features: int
    bits: int
    bytes_before: int
    bytes_after: int
    shared: bool = False  # the float weight stays, because an embedding or another module uses it
    extras: tuple[str, ...] = ()  # what it computes besides the product with its weight

    @property
    def weights(self) -> int:
        """How many weights it has."""
        return self.out_features * self.in_features

    def measured(self, nbytes: int, extras: tuple[str, ...]) -> PatchedLinear:
        """The same linear with other bytes after, and other extras."""
        return replace(self, bytes_after=nbytes, extras=extras)


class Floats(NamedTuple):
    """The float parameters of all modules of one class."""

    kind: str
    parameters: int
    nbytes: int


@dataclass
class PatchReport:
    """Linears patched and left, and their memory.

    Attributes:
        config: how the model was quantized.
        linears: one entry per linear that was replaced.
        merged: operator calls that serve several linears with the same input.
        fused: attention modules that run fused.
        blocks: decoder layers that run fused around their attention.
        experts: modules of experts that run in one operator.
        experts_modules: modules of experts whose weights are linears.
        interfaces: decoders that call our attention by transformers' attention interface.
        unfused: what runs in stock modules although its family has a file, and why; a sentence for each kind.
        skipped: (name, reason) of every linear and embedding left in float.
        embeddings: (name, bytes before, bytes after) of embeddings stored in fewer bytes.
        floats: the parameters that are in float, by the classes of the modules that hold them.
        notices: what the recipe could not do.
        complete: False while patching, and when it failed half way.
    """

    config: Int4Config
    linears: list[PatchedLinear] = field(default_factory=list)
    merged: int = 0
    fused: int = 0
    blocks: int = 0
    experts: int = 0
    experts_modules: int = 0
    interfaces: int = 0
    unfused: list[str] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    embeddings: list[tuple[str, int, int]] = field(default_factory=list)
    floats: list[Floats] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    complete: bool = False

    def _chosen(self, bits: int | None) -> list[PatchedLinear]:
        return [entry for entry in self.linears if bits is None or entry.bits == bits]

    def bytes_before(self, bits: int | None = None) -> int:
        """Bytes of the float weights in their own dtype; of linears with that many bits only, if given."""
        return sum(entry.bytes_before for entry in self._chosen(bits))

    def bytes_bf16(self, bits: int | None = None) -> int:
        """Bytes that the same weights take in bf16."""
        return sum(2 * entry.weights for entry in self._chosen(bits))

    def bytes_after(self, bits: int | None = None) -> int:
        """Bytes of the packed weights with scales, offsets and padding."""
        return sum(entry.bytes_after for entry in self._chosen(bits))

    def bits_per_weight(self, bits: int | None = None) -> float:
        """Bits per weight in memory, 0 when there is no such linear."""
        weights = sum(entry.weights for entry in self._chosen(bits))
        return 8 * self.bytes_after(bits) / weights if weights else 0.0

    def __str__(self) -> str:
        lines = []
        for bits in BITS:
            chosen = self._chosen(bits)
            if chosen:
                ratio = self.bytes_after(bits) / self.bytes_bf16(bits)
                lines.append(
                    f"int{bits}: {len(chosen)} linears, {self.bytes_before(bits) / MB:.1f} MB -> "
                    f"{self.bytes_after(bits) / MB:.1f} MB "
                    f"({self.bits_per_weight(bits):.2f} bits per weight, {ratio:.3f} of bf16)"
                )
        if self.merged:
            lines.append(f"merged: {self.merged} operator calls serve linears with a shared input")
        if self.fused:
            lines.append(f"attention: {self.fused} modules fused, KV cache in {self.config.kv_cache}")
            if self.blocks:
                lines.append(f"decoder layers: {self.blocks} fused")
        elif self.interfaces:
            lines.append("attention: by transformers' attention interface")
        if self.experts_modules:
            lines.append(f"experts: {self.experts} of {self.experts_modules} layers run theirs in one operator")
        lines += [f"not fused: {sentence}" for sentence in self.unfused]
        for extra, count in Counter(extra for entry in self.linears for extra in entry.extras).items():
            lines.append(f"{extra}: {count} linears compute it besides their product, outside of fused layers")
        for entry in self.linears:
            if entry.shared:
                lines.append(f"{entry.name}: its float weight stays in memory, because another module uses it")
        for name, before, after in self.embeddings:
            lines.append(f"{name}: embedding in bf16, {before / MB:.1f} MB -> {after / MB:.1f} MB")
        if line := _told(self.floats, sum(entry.weights for entry in self.linears)):
            lines.append(line)
        lines += self.notices
        lines += [f"left in float: {name}: {reason}" for name, reason in self.skipped]
        if not self.complete:
            lines.append("INCOMPLETE: patching failed half way; load the model again")
        return "\n".join(lines)


def count_floats(model: nn.Module) -> list[Floats]:
    """The float parameters of a model by the classes of the modules that hold them, the most bytes first.

    A parameter of several modules counts once, for the first of them. Those of int4 linears (their biases) do not.
    """
    seen: set[int] = set()
    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is None or id(parameter) in seen or not parameter.is_floating_point():
                continue
            seen.add(id(parameter))
            if not isinstance(module, Int4Linear):
                counts[type(module).__name__] += parameter.numel()
                sizes[type(module).__name__] += parameter.numel() * parameter.element_size()
    return [Floats(kind, counts[kind], nbytes) for kind, nbytes in sizes.most_common()]


def _told(floats: list[Floats], weights: int) -> str:
    """One line about them, for a model with so many weights in int4 or int8; "" without any."""
    total = sum(entry.parameters for entry in floats)
    if not total:
        return ""
    least = SHARE * (total + weights)
    named = [f"{entry.kind} {entry.parameters / 1e6:.1f} M" for entry in floats if entry.parameters >= least]
    rest = sum(entry.parameters for entry in floats if entry.parameters < least)
    if rest:
        named.append(f"{'others' if named else 'norms and other small ones'} {rest / 1e6:.2f} M")
    nbytes = sum(entry.nbytes for entry in floats)
    return f"in float: {total / 1e6:.1f} M parameters, {nbytes / 1e6:.1f} MB: {', '.join(named)}"
