"""Giving a module more behaviour in place: its class becomes a subclass, made once, of the class that it had.

The subclass carries the name of the stock class, by which transformers and its neighbours recognise modules.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from typing import Any

from torch import nn


class Mixin:
    """Base of what is mixed in. Such modules can be pickled and copied, which classes made on the fly cannot."""

    torch_int4_base: type  # the stock class
    torch_int4_mixin: type
    torch_int4_data: Any  # what the mixin needs to know of all modules of this class; hashable
    shows_signature = False  # whether `forward` of the subclass has the signature of the stock one

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(protocol)
        base: type = type(self)
        layers: list[tuple[type[Mixin], Any]] = []
        while "torch_int4_base" in vars(base):  # one may be mixed into what another was mixed into
            layers.insert(0, (base.torch_int4_mixin, base.torch_int4_data))  # type: ignore[attr-defined]
            base = base.torch_int4_base  # type: ignore[attr-defined]
        return _restore, (base, tuple(layers)), *reduced[2:]


_made: dict[tuple[type[Mixin], type, Any], Any] = {}


def mixed(mixin: type[Mixin], base: type, data: Any = None) -> Any:
    """The subclass of a stock class that behaves as the mixin says."""
    key = (mixin, base, data)
    if key not in _made:
        _made[key] = _make(*key)
    return _made[key]


def _make(mixin: type[Mixin], base: type, data: Any) -> Any:
    fields = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "torch_int4_base": base,
        "torch_int4_mixin": mixin,
        "torch_int4_data": data,
    }
    if mixin.shows_signature:
        fields["forward"] = _as(base, mixin)
    return type(base.__name__, (mixin, base), fields)


def _as(base: Any, mixin: Any) -> Callable[..., Any]:
    """The mixin's `forward` with the signature of the stock one, for callers that inspect which arguments it takes."""

    @functools.wraps(base.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return mixin.forward(self, *args, **kwargs)

    return forward


def mix_in(mixin: type[Mixin], module: nn.Module, data: Any = None) -> bool:
    """Mixes into a module. Returns False where that has been done already."""
    if isinstance(module, mixin):
        return False
    module.__class__ = mixed(mixin, type(module), data)
    return True


@functools.cache
def data_of(kind: Hashable, mixin: type[Mixin]) -> Any:
    """The data that a class was given with a mixin, also where another one was mixed in after it."""
    classes: tuple[type, ...] = kind.__mro__  # type: ignore[attr-defined]
    return next(vars(base)["torch_int4_data"] for base in classes if vars(base).get("torch_int4_mixin") is mixin)


def _restore(base: Any, layers: tuple[tuple[type[Mixin], Any], ...]) -> Any:
    for mixin, data in layers:
        base = mixed(mixin, base, data)
    return base.__new__(base)
