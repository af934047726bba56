"""Putting a module into the places of another, hooks and all."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

# Moved as the same objects: a handle that a user keeps can then still remove its hook.
HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)


def replace(old: nn.Module, new: nn.Module, places: Iterable[tuple[nn.Module, str]]) -> None:
    """Put `new` where `old` is an attribute, with its hooks and its mode."""
    for name in HOOKS:
        setattr(new, name, getattr(old, name))
    new.train(old.training)
    for parent, attribute in places:
        setattr(parent, attribute, new)
