"""The duties of a checkpoint format: from the tensors of one linear to `Int4Weight`, and back."""

from __future__ import annotations

import abc
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn

from torch_int4.errors import Int4Error
from torch_int4.weights.canonical import Int4Weight


@dataclass(frozen=True)
class Settings:
    """The settings of weights in the `quantization_config` of a checkpoint, checked.

    Attributes:
        bits: bits of a code, 4 or 8.
        group_size: inputs that share a scale, or -1 for one group per row.
        symmetric: codes around a fixed zero point.
        layout: the variant of the format, in the format's own words ("v1", "gemm", "nf4" ...).
        act_order: columns may be ordered by activation, so that a permutation is expected.
        mixed: single modules may have other bits or groups; what they have is then read off the tensors' shapes.
        skip: modules that the checkpoint leaves in float, in the format's own words. For information and for
            writing: what is quantized is decided by the tensors that the file holds.
    """

    bits: int = 4
    group_size: int = 128
    symmetric: bool = True
    layout: str = ""
    act_order: bool = False
    mixed: bool = False
    skip: tuple[str, ...] = field(default=())


class Format(abc.ABC):
    """A checkpoint format. A file of this folder sets `FORMAT` to an instance of a subclass."""

    name: ClassVar[str]
    writes: ClassVar[bool] = False

    @abc.abstractmethod
    def recognises(self, config: Mapping[str, Any]) -> bool:
        """Whether a `quantization_config` (of config.json) is of this format."""

    @abc.abstractmethod
    def settings(self, config: Mapping[str, Any]) -> Settings:
        """The checked settings of a `quantization_config`.

        Raises:
            Int4Error: naming the field of what cannot be served.
        """

    @abc.abstractmethod
    def suffixes(self, settings: Settings) -> dict[str, bool]:
        """The tensors of one linear: {suffix after "module.name.": whether it must be there}."""

    @abc.abstractmethod
    def read(
        self, tensors: Mapping[str, Tensor], settings: Settings, *, shape: tuple[int, int], name: str
    ) -> Int4Weight:
        """The weight of one linear.

        Args:
            tensors: {suffix: tensor}, on the CPU.
            settings: what `settings` returned.
            shape: (out_features, in_features) of the linear, from the model and not from the file.
            name: the module, for messages.

        Raises:
            Int4Error: naming the tensor and the reason: a dtype, shape, value or combination that is wrong.
        """

    def on_grid(self, settings: Settings) -> bool:
        """Whether kernels have the grid that the codes lie on; if not, `read` refuses and `read_dense` serves."""
        return True

    def read_dense(
        self, tensors: Mapping[str, Tensor], settings: Settings, *, shape: tuple[int, int], name: str
    ) -> Tensor:
        """fp32 `[N, K]` of a linear; also where `read` refuses because the codes lie on no grid of our kernels."""
        return self.read(tensors, settings, shape=shape, name=name).dequantize()

    def write(self, weight: Int4Weight, settings: Settings, *, name: str) -> dict[str, Tensor]:
        """The tensors of one linear, {suffix: tensor}; reading them gives the same weight.

        Raises:
            Int4Error: the format cannot express this weight, or is not written at all.
        """
        raise Int4Error(f"{name}: the format {self.name} is read, not written; save as compressed_tensors")

    def settings_for(self, weight: Int4Weight) -> Settings:
        """The settings by which a weight would be written."""
        symmetric = weight.zeros is None and weight.offsets is None
        return Settings(weight.bits, weight.group_size, symmetric, act_order=weight.perm is not None)

    def describe(self, written: Mapping[str, Settings], skipped: Iterable[str]) -> dict[str, Any]:
        """The `quantization_config` for config.json.

        Args:
            written: {module: the settings it was written with}, not empty.
            skipped: names of the linears that stayed in float.
        """
        raise Int4Error(f"the format {self.name} is read, not written; save as compressed_tensors")

    def describe_extras(self, counts: Mapping[str, int]) -> dict[str, Any]:
        """Additions to the `quantization_config` of a model whose linears have extras beside their weights.

        Args:
            counts: {extra: how many linears have it}, not empty. Their tensors are in the state dict as they are, under
                `<linear>.extras.<extra>.<tensor>`.

        Raises:
            Int4Error: readers of the format would not miss them, and give wrong answers.
        """
        extras = ", ".join(counts)
        raise Int4Error(f"{sum(counts.values())} linears have extras ({extras}), which {self.name} cannot express")

    def extras(self, config: Mapping[str, Any]) -> dict[str, int]:
        """The counts of `describe_extras`, as a `quantization_config` holds them; none in most formats.

        Raises:
            Int4Error: they are damaged.
        """
        return {}

    def holds(self, module: nn.Module) -> bool:
        """Whether a live module was loaded by this format's own backend; no backend is imported to find out."""
        return False

    def convert_module(self, module: nn.Module, *, name: str) -> Int4Weight | None:
        """The weight of a live module that this format's own backend has loaded.

        None for any other module, and for codes that lie on no grid of our kernels (see `dense_module`).

        Raises:
            Int4Error: naming the module: its tensors are damaged, repacked, or not on the CPU.
        """
        return None

    def dense_module(self, module: nn.Module, *, name: str) -> Tensor | None:
        """The float weight [N, K] of a live module of this backend that lies on no grid of ours; else None."""
        return None

    def release(self, model: nn.Module) -> None:
        """Take away what the backend hung onto a model as a whole, once none of its linears is left."""
        return None

    def linears(self, keys: Iterable[str], settings: Settings) -> dict[str, dict[str, str]]:
        """The quantized linears among the tensors of a checkpoint.

        Returns:
            {module: {suffix: key}}, modules in the order of the keys.

        Raises:
            Int4Error: a tensor that its module cannot do without is missing; the message names it.
        """
        suffixes = self.suffixes(settings)
        required = [suffix for suffix, needed in suffixes.items() if needed]
        found: dict[str, dict[str, str]] = {}
        for key in keys:
            for suffix in suffixes:
                if key.endswith("." + suffix):
                    found.setdefault(key[: -len(suffix) - 1], {})[suffix] = key
        marker = required[0]
        linears = {module: have for module, have in found.items() if marker in have}
        for module, have in linears.items():
            for suffix in required:
                if suffix not in have:
                    raise Int4Error(f"{module}.{suffix}: is missing in the checkpoint, which has {module}.{marker}")
        for module, have in found.items():
            for suffix in required:
                if suffix in have and suffix != "weight" and module not in linears:
                    raise Int4Error(f"{module}.{marker}: is missing in the checkpoint, which has {have[suffix]}")
        return linears
