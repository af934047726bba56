"""Checks of the fields of a config: every message names the field and the values that are accepted."""

from __future__ import annotations

from typing import Any

from torch_int4.errors import Int4Error


def choice(config: Any, name: str, accepted: tuple[str, ...]) -> None:
    """Raise Int4Error unless a field holds one of these words."""
    value = getattr(config, name)
    if not isinstance(value, str) or value not in accepted:
        choices = ", ".join(repr(choice) for choice in accepted)
        raise Int4Error(f"Int4Config.{name} must be one of {choices}; got {value!r}")


def flag(config: Any, name: str) -> None:
    """Raise Int4Error unless a field holds True or False."""
    value = getattr(config, name)
    if not isinstance(value, bool):
        raise Int4Error(f"Int4Config.{name} must be True or False; got {value!r}")


def patterns(config: Any, name: str) -> tuple[str, ...]:
    """The name patterns of a field that holds one of them or several.

    Raises:
        Int4Error: it holds something else.
    """
    value = getattr(config, name)
    found = (value,) if isinstance(value, str) else value
    if not isinstance(found, (tuple, list)) or not all(isinstance(pattern, str) for pattern in found):
        raise Int4Error(f"Int4Config.{name} must be a tuple of name patterns, got {value!r}")
    return tuple(found)
