"""The extras of linears in a checkpoint: tensors called `<linear>.extras.<extra>.<tensor>`."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch_int4.errors import Int4Error
from torch_int4.formats.parts.files import Checkpoint
from torch_int4.weights.result import Extra

_KEY = re.compile(r"(?P<linear>.+)\.extras\.(?P<extra>[^.]+)\.(?P<tensor>[^.]+)")


@dataclass
class StoredExtras:
    """Where the extras of a model's linears are.

    Attributes:
        keys: {linear: {extra: {tensor: name in the checkpoint}}}.
        shapes: (outputs, inputs) of the linears.
        kinds: {extra: its class}, of the recipe.
    """

    keys: dict[str, dict[str, dict[str, str]]]
    shapes: Mapping[str, tuple[int, int]]
    kinds: Mapping[str, type[Extra]]

    @classmethod
    def find(
        cls,
        source: Checkpoint,
        target: Callable[[str], str | None],
        shapes: Mapping[str, tuple[int, int]],
        kinds: Mapping[str, type[Extra]],
        counts: Mapping[str, int],
    ) -> StoredExtras:
        """The extras among the tensors of a checkpoint.

        Args:
            source: the tensors.
            target: gives the model's name of one.
            shapes: of the linears that are int4.
            kinds: of the recipe.
            counts: how many linears have each extra, as config.json says.

        Raises:
            Int4Error: naming a tensor that is missing or that no linear takes, or an extra of fewer linears.
        """
        found: dict[str, dict[str, dict[str, str]]] = {}
        for key in source:
            match = _KEY.fullmatch(key)
            if match is None:
                continue
            linear = (target(match["linear"] + ".weight") or "").removesuffix(".weight")
            kind = kinds.get(match["extra"])
            if linear not in shapes or kind is None or match["tensor"] not in kind.TENSORS:
                raise Int4Error(f"{key} in {source.file(key)}: belongs to no int4 linear of the model and its recipe")
            found.setdefault(linear, {}).setdefault(match["extra"], {})[match["tensor"]] = key
        for linear, extras in found.items():
            for extra, keys in extras.items():
                missing = [name for name in kinds[extra].TENSORS if name not in keys]
                if missing:
                    where = next(iter(keys.values()))
                    raise Int4Error(f"{linear}.extras.{extra}.{missing[0]}: is missing in the checkpoint, with {where}")
        have = Counter(extra for extras in found.values() for extra in extras)
        for extra, count in counts.items():
            if have[extra] != count:
                raise Int4Error(
                    f"quantization_config.extras: {count} linears have {extra}, but {have[extra]} are in "
                    f"{', '.join(source.files)}; a shard may be missing"
                )
        return cls(found, shapes, kinds)

    def read(self, linear: str, source: Checkpoint) -> dict[str, Extra]:
        """The extras of one linear.

        Raises:
            Int4Error: naming tensors of another shape, and their files.
        """
        extras: dict[str, Extra] = {}
        have = self.keys.get(linear, {})
        for extra in have:
            made = self.kinds[extra](**{name: source.read(key) for name, key in have[extra].items()})
            try:
                made.check(*self.shapes[linear], f"{linear}.extras.{extra}")
            except Int4Error as error:
                files = sorted({source.file(key) for key in have[extra].values()})
                raise Int4Error(f"{error} (in {', '.join(files)})") from error
            extras[extra] = made
        return extras

    def all_keys(self) -> list[str]:
        """Names of all tensors in the checkpoint."""
        return [key for extras in self.keys.values() for keys in extras.values() for key in keys.values()]
