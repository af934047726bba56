"""All decoder layers of a model in one operator call, where a few tokens are decoded.

A model hands the output of each layer to the next. Where nothing else happens in between, the call of the first layer
runs all of them, and the model's loop over them ends there.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from torch_int4.cache.int4_cache import Int4Cache
from torch_int4.nn.guard import Guard
from torch_int4.nn.prepared import PreparedLayer, layers, run_layers
from torch_int4.support.mixins import Mixin, data_of

MOST_TOKENS = 32  # in a row; of more, Python's part is small, and an operator call cannot be interrupted


class FusedStack(Mixin):
    """Mixed into modules whose `forward` runs a list of fused layers, each on what the one before gave.

    Its data is the list's name.
    """

    shows_signature = True  # transformers asks models what they take

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The output of the stock module."""
        if torch.compiler.is_compiling() or torch.is_grad_enabled():
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        outer, running.turn = running.turn, Turn(self)
        try:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        finally:
            running.turn = outer

    def extra_repr(self) -> str:
        """The text that `print(model)` adds."""
        return "layers in one call, by torch_int4"


class FusedLayers(Mixin):
    """Mixed into the list of those layers: the model's loop over it ends with the first layer if that ran them all."""

    def __iter__(self) -> Iterator[Any]:
        turn = _turn_of(self)
        if turn is None or turn.blocks:  # this loop is not the one that runs the layers
            return super().__iter__()  # type: ignore[misc]
        return turn.loop()

    def __getitem__(self, index: Any) -> Any:
        """As of any list, but that a slice of everything needs no new list while the model runs."""
        if isinstance(index, slice) and _turn_of(self) is not None:
            every = range(len(self))  # type: ignore[arg-type]
            if every[index] == every:
                return self
        return super().__getitem__(index)  # type: ignore[misc]


class Turn:
    """One call of a model: its loop over the layers, and what they gave together, if they did."""

    def __init__(self, model: Any) -> None:
        self.model = model
        kind: Any = type(model)
        self.layers = model._modules[data_of(kind, FusedStack)]
        self.blocks: list[Any] = []
        self.output: Tensor | None = None
        self._first: Any = None  # the first layer, while it is its turn

    def loop(self) -> Iterator[Any]:
        """The layers one by one, or the first one alone."""
        self.blocks = list(self.layers._modules.values())
        for block in self.blocks:
            self._first = block if block is self.blocks[0] else None
            yield block
            self._first = None
            if self.output is not None:
                return

    def run(self, block: Any, x: Tensor, kwargs: dict[str, Any]) -> Tensor | None:
        """The output of all layers, or None where this one has to run by itself."""
        if block is not self._first or x.dim() != 3 or x.shape[1] > MOST_TOKENS:
            return None
        stack = stacks.get(self.model)
        if stack is None or not stack.serves(self.blocks, x, kwargs):
            stacks.pop(self.model, None)
            stack = PreparedStack.of(self.model, self.blocks)
            if stack is None or not stack.serves(self.blocks, x, kwargs):
                return None
            stacks[self.model] = stack
        self._first, self.output = None, stack.run(x, kwargs)
        return self.output


def _turn_of(layers: Any) -> Turn | None:
    """The call that a list of layers runs in."""
    turn = None if torch.compiler.is_compiling() else running.turn
    return turn if turn is not None and turn.layers is layers else None


class PreparedStack:
    """Prepared layers that take the same arguments.

    Args:
        config: of the model, which says how many layers run.
        blocks: the layers.
        prepared: the same, prepared.
    """

    def __init__(self, config: Any, blocks: list[Any], prepared: list[PreparedLayer]) -> None:
        self._config, self._blocks, self._prepared = config, blocks, prepared
        self._guard = Guard(prepared[0].guard.dtype, blocks)
        for layer in prepared:
            self._guard.include(layer.guard)

    @classmethod
    def of(cls, model: Any, blocks: Iterable[Any]) -> PreparedStack | None:
        """The stack of these layers, if all are prepared and alike."""
        blocks = list(blocks)
        prepared = [layers[block] for block in blocks if block in layers]
        if not all(layer.is_whole for layer in prepared):
            return None
        if len(prepared) < len(blocks) or len({id(block) for block in blocks}) < len(blocks):
            return None
        layout = prepared[0].attention.torch_int4_data.layout
        if layout.repeats_kv is not None or layout.positions is not None or layout.unrotated is not None:
            return None
        kinds = [_kind(layer) for layer in prepared]
        if any(kind != kinds[0] for kind in kinds) or any("forward" in vars(block) for block in blocks):
            return None  # the model's loop would call that `forward`
        return cls(model.config, blocks, prepared)

    def serves(self, blocks: list[Any], x: Tensor, kwargs: dict[str, Any]) -> bool:
        """Whether nothing has changed, all layers are going to run, and with arguments that the operators take."""
        config, first = vars(self._config), self._prepared[0]
        if blocks != self._blocks or config["num_hidden_layers"] != len(blocks) or not self._guard.holds(x):
            return False
        if len(set(config.get("layer_types") or ())) > 1:  # which may have masks of their own
            return False
        return isinstance(kwargs.get(first.cache), Int4Cache) and bool(first.attention.serves(x, kwargs))

    def run(self, x: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """The last layer's output `[batch, tokens, features]`; the `Int4Cache` takes all keys and values."""
        return run_layers(self._prepared, x, kwargs)


def _kind(layer: PreparedLayer) -> tuple[Any, ...]:
    """The facts that must be the same for layers to share one list of arguments."""
    attention = layer.attention
    settings = (attention.is_causal, attention.kv_sizes(), attention.scoring(), layer.guard.dtype)
    return type(attention), attention.torch_int4_data, id(attention.config), *settings


class _Running(threading.local):
    """The model that is in its `forward`, in this thread."""

    turn: Turn | None = None


running = _Running()
# By the models themselves, as `layers` is.
stacks: weakref.WeakKeyDictionary[Any, PreparedStack] = weakref.WeakKeyDictionary()
