"""All decoder layers of a model in one operator call, where a few tokens are decoded.

A model hands the output of each layer to the next. Where nothing else happens in between, the call of the first layer
runs all of them, and the others hand on what they are given: Python then costs a fifth of what it costs layer by layer.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.module import _has_any_global_hook

from torch_int4.cache import Int4Cache
from torch_int4.errors import Int4Error
from torch_int4.prepared import PreparedLayer, Watched, layers, run_layers, watch
from torch_int4.subclass import Mixin, data_of

MOST_TOKENS = 32  # in a row; of more, Python's part is small, and an operator call cannot be interrupted


class FusedStack(Mixin):
    """Mixed into modules whose `forward` runs a list of fused layers, each on what the one before gave.

    Its data is the list's name.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the stock module gives."""
        if torch.compiler.is_compiling() or torch.is_grad_enabled():
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        outer, running.turn = running.turn, Turn(self)
        try:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        finally:
            running.turn = outer

    def extra_repr(self) -> str:
        """What `print(model)` adds."""
        return "layers in one call, by torch_int4"


class Turn:
    """One call of a model: which of its layers are done."""

    def __init__(self, model: Any) -> None:
        self.model = model
        kind: Any = type(model)
        self.blocks = list(model._modules[data_of(kind, FusedStack)])
        self.done = 0
        self.output: Tensor | None = None

    def run(self, block: Any, x: Tensor, kwargs: dict[str, Any]) -> Tensor | None:
        """What a layer gives, or None where it has to run by itself."""
        if self.output is not None and self.done < len(self.blocks):
            if x is not self.output or block is not self.blocks[self.done]:
                raise Int4Error(
                    f"{type(self.model).__name__}: its layers were to run in their order, each on what the one before "
                    f"gave; layer {self.done} was called otherwise. Set torch_int4.stack.MOST_TOKENS = 0"
                )
            self.done += 1
            return x
        if block is not self.blocks[0] or x.dim() != 3 or x.shape[1] > MOST_TOKENS:
            return None
        stack = stacks.get(self.model)
        if stack is None or not stack.serves(self.blocks, x, kwargs):
            stacks.pop(self.model, None)
            stack = PreparedStack.of(self.model, self.blocks)
            if stack is None or not stack.serves(self.blocks, x, kwargs):
                return None
            stacks[self.model] = stack
        self.output, self.done = stack.run(x, kwargs), 1
        return self.output


class PreparedStack:
    """Prepared layers that take the same arguments.

    Args:
        config: of the model, which says how many layers run.
        blocks: the layers.
        prepared: the same, prepared.
    """

    def __init__(self, config: Any, blocks: list[Any], prepared: list[PreparedLayer]) -> None:
        self._config, self._blocks, self._prepared = config, blocks, prepared
        self._watched: list[Watched] = [entry for layer in prepared for entry in layer.watched]
        self._hooks: list[Any] = [hooks for layer in prepared for hooks in layer.hooks]
        self._classes = [pair for layer in prepared for pair in layer.classes]
        for block, layer in zip(blocks, prepared, strict=True):
            attention = layer.attention
            layout = attention.torch_int4_data
            names = (layout.head_dim, layout.scale, layout.softcap, "config", "is_causal", "layer_idx", "training")
            self._watched += watch(vars(attention), *filter(None, names))
            self._watched += watch(vars(layer.mlp), "training")
            self._watched += watch(vars(block), "forward", "training")
            self._hooks += [block._forward_hooks, block._forward_pre_hooks]
            self._classes.append((block, type(block)))
        self._scales = [scale for layer in prepared for scale in layer.scales]

    @classmethod
    def of(cls, model: Any, blocks: Iterable[Any]) -> PreparedStack | None:
        """The stack of these layers, if all are prepared and alike, and none of them is in training."""
        blocks = list(blocks)
        prepared = [layers[block] for block in blocks if block in layers]
        if len(prepared) < len(blocks) or len({id(block) for block in blocks}) < len(blocks):
            return None
        first = prepared[0].attention
        layout, scoring, sizes = first.torch_int4_data, first.scoring(), first.kv_sizes()
        if layout.repeats_kv is not None or layout.positions is not None or layout.unrotated is not None:
            return None
        for block, layer in zip(blocks, prepared, strict=True):
            other = layer.attention
            if other.torch_int4_data != layout or other.config is not first.config or type(other) is not type(first):
                return None
            if other.scoring() != scoring or other.kv_sizes() != sizes or other.is_causal != first.is_causal:
                return None
            if layer.dtype is not prepared[0].dtype or block.training or other.training or layer.mlp.training:
                return None
        return cls(model.config, blocks, prepared)

    def serves(self, blocks: list[Any], x: Tensor, kwargs: dict[str, Any]) -> bool:
        """Whether nothing has changed, all layers are going to run, and with arguments that the operators take."""
        first = self._prepared[0]
        if torch.is_grad_enabled() or type(x) is not Tensor or x.dtype is not first.dtype or _has_any_global_hook():
            return False
        config = vars(self._config)
        if blocks != self._blocks or config["num_hidden_layers"] != len(blocks):
            return False
        if len(set(config.get("layer_types") or ())) > 1:  # which may have masks of their own
            return False
        if not isinstance(kwargs.get(first.cache), Int4Cache) or not first.attention.serves(x, kwargs):
            return False
        for owner, name, value in self._watched:
            if owner.get(name) is not value:
                return False
        for hooks in self._hooks:
            if hooks:
                return False
        for module, kind in self._classes:
            if type(module) is not kind:
                return False
        for scale in self._scales:  # noqa: SIM110 (a generator takes twice as long)
            if scale.dtype is not first.dtype:
                return False
        return True

    def run(self, x: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """The last layer's output `[batch, tokens, features]`; the `Int4Cache` takes all keys and values."""
        return run_layers(self._prepared, x, kwargs)


class _Running(threading.local):
    """The model that is in its `forward`, in this thread."""

    turn: Turn | None = None


running = _Running()
# By the models themselves, as `layers` is.
stacks: weakref.WeakKeyDictionary[Any, PreparedStack] = weakref.WeakKeyDictionary()
