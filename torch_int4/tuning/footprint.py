"""Bytes of a model's weights: those that it holds, and those that a token reads."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator

from torch import Tensor, nn


def weight_bytes(model: nn.Module) -> dict[str, int]:
    """Bytes of parameters and buffers by module class, each piece of memory counted once, at its first owner.

    Counting pieces keeps tied weights honest: what is shared is paid for once. Their storages would not do: weights of
    several modules may lie in one.
    """
    return _count((type(module).__name__, tensor) for module in model.modules() for tensor in _own(module))


def read_bytes(model: nn.Module) -> int:
    """Bytes that a token reads: of all modules but embeddings that are looked up only, each piece once."""
    read = [t for module in model.modules() if not isinstance(module, nn.Embedding) for t in _own(module)]
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if isinstance(weight := getattr(head, "weight", None), Tensor):  # the embedding too, where it is the head
        read.append(weight)
    return sum(_count(("", tensor) for tensor in read).values())


def _own(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters(recurse=False)
    yield from module.buffers(recurse=False)


def _count(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, int]:
    """Bytes by owner; what has no memory, on the meta device, is left out."""
    seen: set[tuple[str, int]] = set()
    totals: dict[str, int] = defaultdict(int)
    for owner, tensor in tensors:
        for piece in _pieces(tensor):
            if not piece.is_meta and (key := (str(piece.device), piece.data_ptr())) not in seen:
                seen.add(key)
                totals[owner] += piece.nbytes
    return dict(totals)


def _pieces(tensor: Tensor) -> Iterator[Tensor]:
    """The tensor, or the plain ones that a quantized tensor of another library is made of."""
    if hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            yield from _pieces(getattr(tensor, name))
    else:
        yield tensor
