"""Why modules of a family that has a file could not be fused, for the report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from torch import nn

from torch_int4.patching import families

PASSIVE = (nn.Dropout, nn.Identity)  # modules that hand on what they are given, outside of training


class Refusals:
    """Kinds of modules, each with the reason, and how many there are."""

    def __init__(self) -> None:
        self._counts: Counter[tuple[str, str]] = Counter()

    def add(self, module: nn.Module, reason: str) -> None:
        """Counts a module."""
        self._counts[type(module).__name__, reason] += 1

    def lines(self) -> list[str]:
        """A sentence for each kind and reason."""
        return [
            f"{kind}: {reason}; {count} {'runs as a stock module' if count == 1 else 'run as stock modules'}"
            for (kind, reason), count in self._counts.items()
        ]


def unknown_forward(what: str, family: families.Family) -> str:
    """The reason that the `forward` of something computes what nobody has looked at."""
    from transformers import __version__

    return f"{what} is not one that {families.source_of(family)} knows (transformers {__version__})"


def other_settings(module: nn.Module, when: Iterable[tuple[str, Any]], family: families.Family) -> str | None:
    """The reason that a layout is one of modules with other settings."""
    for name, value in when:
        found = attribute(module, name)
        if found != value:
            return f"has {name} = {found!r}, for which {families.source_of(family)} has no layout"
    return None


def wrong_children(module: nn.Module, named: Iterable[str], what: str = "") -> str | None:
    """The reason that a module lacks one of the modules that a layout names, or holds another one."""
    names = tuple(named)
    for name in names:
        if not isinstance(module._modules.get(name), nn.Module):
            return f"{what}has no {name}"
    for name, child in module._modules.items():
        if child is not None and name not in names and type(child) not in PASSIVE:
            return f"{what}holds {name}, which its family does not name"
    return None


def attribute(module: nn.Module, path: str) -> Any:
    """The object at the end of a dotted path, None where it ends before."""
    found: Any = module
    for name in path.split("."):
        found = getattr(found, name, None)
    return found
