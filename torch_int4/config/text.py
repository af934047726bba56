"""`Int4Config` as one line of text, for command lines: ``recipe=rtn,group_size=128,skip=*.down_proj;lm_head``."""

from __future__ import annotations

from dataclasses import fields as fields_of
from typing import Any

from torch_int4.config import Int4Config
from torch_int4.errors import Int4Error

_WORDS: dict[str, Any] = {"true": True, "false": False, "none": None}


def parse_config(text: str) -> Int4Config:
    """The default config with the fields that `text` names; an empty text is the default config.

    Raises:
        Int4Error: a part is not ``field=value``, a field is named twice or unknown, or a value is not accepted.
    """
    fields: dict[str, Any] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not (name and equals and value):
            raise Int4Error(f"config {text!r}: {part!r} is not field=value, as in group_size=128,symmetric=False")
        if name in fields:
            raise Int4Error(f"config {text!r}: {name} is given twice")
        fields[name] = patterns(value) if name in pattern_fields() else _value(value)
    return Int4Config.with_overrides(None, **fields)


def pattern_fields() -> set[str]:
    """Names of the fields that hold several patterns."""
    return {entry.name for entry in fields_of(Int4Config) if isinstance(entry.default, tuple)}


def patterns(text: str) -> tuple[str, ...]:
    """Patterns joined by ``;``."""
    return tuple(text.split(";"))


def _value(text: str) -> Any:
    """A bool, None, int or float where the text is one, else the text."""
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
