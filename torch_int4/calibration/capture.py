"""The calls of a model's blocks: inputs captured once, and run through block after block."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torch_int4.errors import Int4Error


class _StopForward(Exception):  # noqa: N818
    """Ends a forward pass at the first block."""


class Tape:
    """Hidden states `[samples, T, H]` in front of the next block, and the other arguments of every block.

    Samples are run in batches of one size, the last one may be smaller. The states of a batch are overwritten by its
    outputs when the tape advances. While arguments are taken, `tell` is given how many blocks a pass has reached.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[nn.Module],
        windows: Tensor,
        batch: int,
        tell: Callable[[int], None] = lambda reached: None,
    ) -> None:
        self.blocks = list(blocks)
        self.spans = [slice(i, min(i + batch, len(windows))) for i in range(0, len(windows), batch)]
        self.calls: list[list[tuple[tuple[Any, ...], dict[str, Any]]]] = []  # by batch, by block
        self.hidden = torch.empty(0)
        with evaluating(model):
            self._capture(model, windows, tell)

    @property
    def batches(self) -> int:
        """How many batches there are."""
        return len(self.spans)

    def offload(self, folder: str | Path, name: str) -> None:
        """Keep the states in a file, whose pages the system can take back, instead of in memory."""
        self.hidden = in_file(self.hidden, Path(folder) / name)

    def run(self, index: int, batch: int, module: Any, hidden: Tensor | None = None) -> Tensor:
        """The output of block `index`, computed by `module` (called like it), for one batch of states in fp32."""
        args, kwargs = self.calls[batch][index]
        states = (self.hidden if hidden is None else hidden)[self.spans[batch]].float()
        if args:
            return first(module(states, *_cast(args[1:]), **_cast(kwargs)))
        return first(module(**{**_cast(kwargs), "hidden_states": states}))

    @torch.no_grad()
    def advance(self, index: int, module: nn.Module) -> None:
        """Replace the states by the outputs of block `index`."""
        for batch, span in enumerate(self.spans):
            self.hidden[span] = self.run(index, batch, module).to(self.hidden.dtype)

    @torch.no_grad()
    def _capture(self, model: nn.Module, windows: Tensor, tell: Callable[[int], None]) -> None:
        """States in front of the first block for all batches, and the arguments of all blocks.

        Where the first block is given the same for other tokens, the arguments of all blocks are taken from one pass
        through the model per batch size; else from a pass per batch.
        """
        by_size: dict[int, list[Any]] = {}
        depends = False
        for span in self.spans:
            size = span.stop - span.start
            states, calls = _record(model, self.blocks, windows[span], tell, full=depends or size not in by_size)
            if not depends and size in by_size and not _same(by_size[size][0], calls[0]):
                depends = True
                states, calls = _record(model, self.blocks, windows[span], tell, full=True)
            if self.hidden.numel() == 0:
                self.hidden = torch.empty(len(windows), *states.shape[1:], dtype=states.dtype)
            self.hidden[span] = states
            by_size.setdefault(size, calls)
            self.calls.append(calls if depends else by_size[size])


def _record(
    model: nn.Module, blocks: list[nn.Module], ids: Tensor, tell: Callable[[int], None], *, full: bool
) -> tuple[Tensor, list[Any]]:
    """States in front of the first block and, of a full pass, the arguments of each block without its states.

    Blocks run in fp32: processors without arithmetic for half precision take minutes for a pass through a 7B model.
    """
    states: list[Tensor] = []
    calls: list[Any] = []
    last: list[Any] = [None]
    running = contextlib.ExitStack()

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden = args[0] if args else kwargs.get("hidden_states")
        if not isinstance(hidden, Tensor) or module is not blocks[len(calls) % len(blocks)]:
            raise Int4Error(_NO_CHAIN.format(type(module).__name__))
        if calls and not (hidden is last[0] or torch.equal(hidden, last[0])):
            raise Int4Error(_NO_CHAIN.format(type(module).__name__))
        if not calls:
            states.append(hidden.detach().clone())
        calls.append(((None, *args[1:]) if args else (), dict(kwargs)))
        if not full:
            raise _StopForward
        tell(len(calls))
        running.enter_context(_weights_in_fp32(module))
        return _cast(args), _cast(kwargs)

    def after(module: nn.Module, args: Any, output: Any) -> Any:
        running.close()
        output = _cast(output, states[0].dtype)
        last[0] = first(output)
        return output

    def stop(module: nn.Module, args: Any) -> None:
        raise _StopForward  # the head over the vocabulary is not needed

    handles = [block.register_forward_pre_hook(before, with_kwargs=True) for block in blocks]
    handles += [block.register_forward_hook(after) for block in blocks]
    head = head_of(model)
    handles += [] if head is None else [head.register_forward_pre_hook(stop)]
    try:
        with contextlib.suppress(_StopForward):
            call_model(model, ids)
    finally:
        running.close()
        for handle in handles:
            handle.remove()
    if not states or (full and len(calls) != len(blocks)):
        raise Int4Error(_NO_CHAIN.format(type(blocks[0]).__name__))
    return states[0], calls


_NO_CHAIN = (
    "calibration: the blocks of type {} do not run one after the other, once each, on the output of the one before; "
    "use a recipe without calibration, such as recipe='rtn'"
)


def head_of(model: nn.Module) -> nn.Module | None:
    """The projection onto the vocabulary of a model of transformers; None of any other, and where it has none."""
    getter = getattr(model, "get_output_embeddings", None)
    try:
        return getter() if callable(getter) else None
    except (AttributeError, NotImplementedError):
        return None


def call_model(model: nn.Module, ids: Tensor) -> Any:
    """The forward pass of a causal language model over token ids, without a cache."""
    try:
        parameters = inspect.signature(model.forward).parameters
    except (TypeError, ValueError):  # a forward without a signature
        return model(ids)
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    return model(ids, use_cache=False) if "use_cache" in parameters or takes_any else model(ids)


def first(output: Any) -> Tensor:
    """The hidden states of a block's output."""
    states = output[0] if isinstance(output, (tuple, list)) and output else output
    if not isinstance(states, Tensor):
        raise Int4Error(f"calibration: a block returns {type(output).__name__} instead of its hidden states")
    return states


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode for a while; modules get back the mode that they had, each its own. None is kept from being freed."""
    modes = [(weakref.ref(module), module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for reference, mode in modes:
            module = reference()
            if module is not None:
                module.training = mode


def in_file(tensor: Tensor, path: Path) -> Tensor:
    """A copy of a tensor whose storage is a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    mapped = torch.from_file(str(path), shared=True, size=max(tensor.numel(), 1), dtype=tensor.dtype)
    return mapped[: tensor.numel()].view(tensor.shape).copy_(tensor)


def _cast(value: Any, dtype: torch.dtype = torch.float32) -> Any:
    """Arguments or outputs of a block with their floating-point tensors in one dtype."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, tuple) and type(value) is tuple:
        return tuple(_cast(part, dtype) for part in value)
    if isinstance(value, dict):
        return {key: _cast(part, dtype) for key, part in value.items()}
    return value


@contextlib.contextmanager
def _weights_in_fp32(module: nn.Module) -> Iterator[None]:
    """Parameters and buffers of half precision in fp32 for a while; then each has its own storage again."""
    tensors = [t for t in itertools.chain(module.parameters(), module.buffers()) if t.is_floating_point()]
    own = [tensor.data for tensor in tensors]
    try:
        for tensor in tensors:
            tensor.data = tensor.data.float()
        yield
    finally:
        for tensor, data in zip(tensors, own, strict=True):
            tensor.data = data


def _same(a: Any, b: Any) -> bool:
    """Whether two records of arguments agree; what cannot be compared counts as equal if the type is the same."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a is b or torch.equal(a, b)
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(value, b[key]) for key, value in a.items())
    return type(a) is type(b)
