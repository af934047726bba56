"""The facts that decide the result of a module that operators run, which the operators are told.

Checks, arguments of operators, and the list of what a prepared layer watches all come from here, so that none of them
can leave out what another one has.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple


class Fact(NamedTuple):
    """A tensor or an attribute of a module that operators are given.

    Attributes:
        many: the argument of operators that take several such modules.
        one: the argument of operators that take one.
        place: "_parameters" or "_buffers" of the module, or "" for its attributes.
        name: of the tensor or attribute.
    """

    many: str
    one: str
    place: str
    name: str

    def of(self, module: Any) -> Any:
        """The tensor, None where there is none; or the attribute."""
        return getattr(module, self.place).get(self.name) if self.place else getattr(module, self.name)

    def of_several(self, modules: Sequence[Any]) -> Any:
        """The same of each module: a list, or of names one text with commas in between."""
        values = [self.of(module) for module in modules]
        return ",".join(values) if isinstance(values[0], str) else values


class Role(NamedTuple):
    """The facts that decide the results of modules of one kind.

    Attributes:
        own: facts of each module.
        common: attributes that modules of one call have in common.
    """

    own: tuple[Fact, ...]
    common: tuple[Fact, ...]

    def agree(self, modules: Sequence[Any]) -> bool:
        """Whether one call can run these modules."""
        first = modules[0]
        for fact in self.common:  # plain loops: where gradients are recorded this runs for every layer and token
            name = fact.name
            value = getattr(first, name)
            for module in modules:
                if getattr(module, name) != value:
                    return False
        return True

    def several(self, modules: Sequence[Any]) -> dict[str, Any]:
        """The arguments of an operator that takes several modules, which agree."""
        given = {fact.many: fact.of_several(modules) for fact in self.own}
        for fact in self.common:
            given[fact.many] = fact.of(modules[0])
        return given

    def single(self, module: Any) -> dict[str, Any]:
        """The arguments of an operator that takes one module."""
        return {fact.one: fact.of(module) for fact in (*self.own, *self.common)}

    @property
    def attributes(self) -> list[str]:
        """Names of the attributes among the facts."""
        return [fact.name for fact in (*self.own, *self.common) if not fact.place]

    @property
    def places(self) -> list[str]:
        """Names of the dictionaries of a module that hold the others."""
        return sorted({fact.place for fact in self.own if fact.place})


def _attribute(argument: str, name: str | None = None) -> Fact:
    return Fact(argument, argument, "", name or argument)


LINEAR = Role(
    own=(
        Fact("weights", "weight", "_buffers", "packed"),
        Fact("scales", "scales", "_buffers", "packed_scales"),
        Fact("offsets", "offsets", "_buffers", "packed_offsets"),
        Fact("biases", "bias", "_parameters", "bias"),
        Fact("perms", "perm", "_buffers", "perm"),
        _attribute("out_features"),
        _attribute("group_size"),
        _attribute("weight_type"),
    ),
    common=(_attribute("compute"),),
)


def norm_role(eps: str) -> Role:
    """The role of norms that keep under this name what they add to the variance."""
    return Role(
        own=(
            Fact("norm_weights", "norm_weight", "_parameters", "weight"),
            Fact("norm_biases", "norm_bias", "_parameters", "bias"),
        ),
        common=(_attribute("eps", eps),),
    )
