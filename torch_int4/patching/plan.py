"""The way of a model to int4: one walk over its modules (`Survey`), and what is decided by it (`Plan`).

A model that is patched is surveyed and planned at once. One that is loaded is surveyed while it has no weights yet;
the linears that a loader makes int4 itself leave the survey, and the plan for the rest is made when there are values.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from torch import Tensor, nn

from torch_int4 import formats
from torch_int4.config import Int4Config
from torch_int4.layouts.family import Family
from torch_int4.nn.dense import is_conv1d, is_linear
from torch_int4.nn.embedding import Bf16Embedding
from torch_int4.nn.linear import Int4Linear
from torch_int4.patching import families
from torch_int4.patching import left as _left
from torch_int4.patching import scan as _scan
from torch_int4.weights.arena import Arena, Size
from torch_int4.weights.types import INT8, WeightType


@dataclass
class Held:
    """All names of a module, and the (parent, attribute) places that hold it."""

    names: list[str] = field(default_factory=list)
    places: list[tuple[nn.Module, str]] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The first of its names."""
        return self.names[0]


class Survey:
    """The findings of a walk over a model.

    Attributes:
        model: the model.
        given: the family that the user named for it, if one was.
        families: {id of a module: the family that it belongs to}.
        head: the projection onto the vocabulary, if there is one.
        names: of all modules.
        left: {id of a linear: why the model needs it in float}.
        linears: the linears that are not int4, in the order of the model.
        foreign: the linears of other quantization backends.
        embeddings: the embeddings that are not ours.
        holds_int4: whether there are linears that are int4 already.
    """

    def __init__(self, model: nn.Module, given: Family | None = None) -> None:
        self.model, self.given, self.holds_int4 = model, given, False
        self.families = families.of_modules(model, given)
        self.linears: dict[nn.Module, Held] = {}
        self.foreign: dict[nn.Module, Held] = {}
        self.embeddings: dict[nn.Module, Held] = {}
        modules: dict[str, nn.Module] = {}
        for name, module in model.named_modules(remove_duplicate=False):
            modules[name] = module
            holder, _, attribute = name.rpartition(".")
            for kind in self._kinds(module) if name else ():
                held = kind.setdefault(module, Held())
                held.names.append(name)
                if (modules[holder], attribute) not in held.places:
                    held.places.append((modules[holder], attribute))
        self.names = list(modules)
        self.left = _left.reasons_of(model)
        self.head = _scan.find_head(model, self.families[id(model)], modules)

    def _kinds(self, module: nn.Module) -> list[dict[nn.Module, Held]]:
        if isinstance(module, Int4Linear):
            self.holds_int4 = True
            return []
        kinds = [self.linears] if is_linear(module) else []
        if formats.holds(module):
            kinds.append(self.foreign)
        if isinstance(module, nn.Embedding) and not isinstance(module, Bf16Embedding):
            kinds.append(self.embeddings)
        return kinds

    def reason_to_skip(self, module: nn.Module, config: Int4Config) -> str | None:
        """Why one of the linears stays in float; None if nothing speaks against replacing it."""
        held = self.linears[module]
        reason = _scan.reason_to_skip(module, held.names, held.places, config, module is self.head)
        left = self.left.get(id(module))
        wanted = left == _left.TASK_HEAD and _scan.match(config.int8, held.names) is not None
        return reason or (None if wanted else left)

    def release(self) -> None:
        """Let go of the modules that were found, for the float weights to be freed as they are replaced."""
        for found in (self.linears, self.foreign, self.embeddings):
            found.clear()

    def holds(self) -> bool:
        """Whether every module that was found is still where it was."""
        found = (*self.linears.items(), *self.foreign.items(), *self.embeddings.items())
        return all(parent._modules.get(name) is module for module, held in found for parent, name in held.places)


@dataclass
class Target(Held):
    """A float linear to replace, and the type of weight that it gets.

    `module` is emptied once it has been replaced, so that its float weight is freed.
    """

    module: nn.Module | None = None
    kind: WeightType = INT8
    shared: bool = False  # a module that stays in float holds the same Parameter

    @property
    def bits(self) -> int:
        """Bits of its codes."""
        return self.kind.bits


@dataclass
class Foreign(Held):
    """A linear of another backend to take over; `module` is emptied once it has been."""

    module: nn.Module | None = None


@dataclass
class Plan:
    """The conversions in the order in which they are done: foreign linears, float linears, embeddings.

    Attributes:
        survey: of the model.
        config: by which it was decided.
        foreign: linears of other backends that are taken over.
        targets: float linears that are quantized.
        embeddings: embeddings that are stored in bf16.
        skipped: (name, reason) of linears that stay in float.
        kept: (name, reason) of embeddings that do.
    """

    survey: Survey
    config: Int4Config
    foreign: list[Foreign]
    targets: list[Target]
    embeddings: list[tuple[nn.Embedding, Held]]
    skipped: list[tuple[str, str]]
    kept: list[tuple[str, str]]

    @property
    def changes_nothing(self) -> bool:
        """Whether no module is replaced."""
        return not (self.foreign or self.targets or self.embeddings)

    def arena(self) -> Arena:
        """Memory for the weights that will be packed."""
        taken = [size for entry in self.foreign if (size := _foreign_size(entry.module, self.config)) is not None]
        return Arena([*taken, *(size_of(t.module, t.kind, self.config) for t in self.targets if t.module is not None)])


def decide(survey: Survey, config: Int4Config) -> Plan:
    """The conversions of the modules of a survey, which the plan alone holds from then on.

    Raises:
        Int4Error: naming a module that should be replaced and cannot be.
    """
    _warn_of_patterns(survey, config)
    foreign = [
        Foreign(held.names, held.places, module)
        for module, held in survey.foreign.items()
        if _scan.skip_pattern(config, held.names) is None
    ]
    users = _scan.parameter_users(survey.model)
    targets, skipped = _targets(survey, config, users)
    taken = {name for entry in foreign for name in entry.names}
    going = {id(target.module) for target in targets}
    embeddings, kept = [], []
    for module, held in survey.embeddings.items() if config.embeddings != "float" else ():
        reason = _scan.reason_to_keep(module, held.name, config, users, going)
        if reason is None:
            assert isinstance(module, nn.Embedding)
            embeddings.append((module, held))
        elif reason:
            kept.append((held.name, reason))
    left = [entry for entry in skipped if entry[0] not in taken]
    survey.release()
    return Plan(survey, config, foreign, targets, embeddings, left, kept)


def targets_of(model: nn.Module, config: Int4Config) -> list[Target]:
    """The float linears of a model that `patch` would replace, for those who change them one at a time."""
    return decide(Survey(model), config).targets


def size_of(module: nn.Module, kind: WeightType, config: Int4Config) -> Size:
    """The size that the packed weight of a float linear will have."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    rows, inputs = reversed(weight.shape) if is_conv1d(module) else weight.shape
    return Size(int(rows), int(inputs), config.group_size, kind.name, offsets_of(kind, config))


def offsets_of(kind: WeightType, config: Int4Config) -> str | None:
    """The kind of offsets of weights that recipes make, see `Size`; those of 8 bits have none."""
    return None if config.symmetric or kind is INT8 else config.zeros


def _targets(
    survey: Survey, config: Int4Config, users: dict[int, set[int]]
) -> tuple[list[Target], list[tuple[str, str]]]:
    targets, skipped = [], []
    for module, held in survey.linears.items():
        reason = survey.reason_to_skip(module, config)
        if reason is not None:
            skipped.append((held.name, reason))
            continue
        _scan.refuse(module, held.name)
        kind = _scan.type_of(held.names, config, module is survey.head)
        targets.append(Target(held.names, held.places, module, kind))
    going = {id(target.module) for target in targets}
    for target in targets:
        assert target.module is not None
        target.shared = bool(users[id(target.module.weight)] - going)
    return targets, skipped


def _warn_of_patterns(survey: Survey, config: Int4Config) -> None:
    for name in ("skip", "int8"):
        for pattern in getattr(config, name):
            if not any(fnmatchcase(module, pattern) for module in survey.names):
                kind = type(survey.model).__name__
                warnings.warn(f"Int4Config.{name}: {pattern!r} matches no module of {kind}", stacklevel=4)


def _foreign_size(module: nn.Module | None, config: Int4Config) -> Size | None:
    """About what a foreign linear will take: its groups are known when it has been read."""
    rows, inputs = getattr(module, "out_features", None), getattr(module, "in_features", None)
    if not isinstance(rows, int) or not isinstance(inputs, int) or rows < 1 or inputs < 1:
        return None
    return Size(rows, inputs, 32, _scan.type_of([], config, False).name)
