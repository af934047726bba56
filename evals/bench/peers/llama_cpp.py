"""llama.cpp's product, with the weight repacked as llama.cpp does when it loads a model; `ggml` finds the library."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from ctypes import CDLL, c_int, c_void_p
from typing import Any

import numpy
import torch
from torch import Tensor

from torch_int4 import Int4Error, Int4Weight
from torch_int4.evals.bench import ggml as binding
from torch_int4.evals.bench.contestants import Contestant, copies_of
from torch_int4.evals.bench.ggml import VARIABLE, library
from torch_int4.weights import nibbles
from torch_int4.weights.types import INT4

BLOCK = 32  # weights of a row that share a scale


class LlamaCpp:
    """A weight in llama.cpp's blocks of 32: Q4_0, or Q4_1 (with a minimum) for one with zero points.

    Larger groups repeat their scale in every block, so llama.cpp reads more bytes for the same numbers: it has no
    such format. The buffer is the first that the CPU backend offers beside its plain one and that takes the product,
    llama.cpp's own rule; `kernels` names it: CPU_REPACK is the fast path, CPU the plain one (all of Q4_1). The copies
    are nodes of one graph, so that one call from Python covers them all, which favours this peer at small shapes.
    """

    tolerance = 0.02

    def __init__(self, weight: Int4Weight, rotate: int, ggml: CDLL) -> None:
        self.name, self.N, self.ggml = contestant_name(weight), weight.out_features, ggml
        blocks = q4_blocks(weight)
        self.nbytes, self.copies = blocks.nbytes, copies_of(blocks.nbytes, rotate)
        self._kept, self._graph_kept = ExitStack(), ExitStack()
        device = ggml.ggml_backend_dev_by_type(binding.CPU_DEVICE)
        self.backend = self._keep(ggml.ggml_backend_dev_init(device, None), ggml.ggml_backend_free)
        set_threads = binding.procedure(ggml, device, b"ggml_backend_set_n_threads", None, c_void_p, c_int)
        set_threads(self.backend, torch.get_num_threads())
        shape = binding.TYPES[self.name.split()[-1]], weight.in_features, weight.out_features
        context = self._keep(binding.context(ggml, self.copies), ggml.ggml_free)
        self.weights = [ggml.ggml_new_tensor_2d(context, *shape) for _ in range(self.copies)]
        place = binding.best_buffer_type(ggml, device, shape)
        self.buffer = ggml.ggml_backend_alloc_ctx_tensors_from_buft(context, place)
        if not self.buffer:
            raise Int4Error(f"{self.name}: no memory for {self.copies} copies of {self.nbytes} bytes; use --no-peers")
        self._keep(self.buffer, ggml.ggml_backend_buffer_free)
        ggml.ggml_backend_buffer_set_usage(self.buffer, binding.USAGE_WEIGHTS)
        for tensor in self.weights:
            ggml.ggml_backend_tensor_set(tensor, blocks.ctypes.data, 0, blocks.nbytes)

    def __del__(self) -> None:
        for stack in ("_graph_kept", "_kept"):
            getattr(self, stack, ExitStack()).close()

    def bind(self, x: Tensor) -> None:
        """Builds the graph over x, a buffer for the result of the first copy, and one for those of all others."""
        ggml = self.ggml
        self._graph_kept.close()
        self.x, self.y = x.clone(memory_format=torch.contiguous_format), torch.empty(x.shape[0], self.N)
        self.others = torch.empty_like(self.y)
        context = binding.context(ggml, 2 * self.copies + 1)
        self._graph_kept.callback(ggml.ggml_free, context)
        source = ggml.ggml_new_tensor_2d(context, binding.F32, x.shape[1], x.shape[0])
        self._place(source, self._wrap(self.x))
        first, others = self._wrap(self.y), self._wrap(self.others)
        self.graph = ggml.ggml_new_graph_custom(context, 2 * self.copies + 1, False)
        for i, weight in enumerate(self.weights):
            product = ggml.ggml_mul_mat(context, weight, source)
            self._place(product, others if i else first)
            ggml.ggml_build_forward_expand(self.graph, product)

    def run(self) -> Tensor:
        """One run of the graph."""
        if status := self.ggml.ggml_backend_graph_compute(self.backend, self.graph):
            raise Int4Error(f"{self.name}: ggml failed with status {status}; leave it out with --no-peers")
        return self.y

    def kernels(self) -> str:
        """The version of ggml and the kind of buffer that holds the weights."""
        version = self.ggml.ggml_version() if hasattr(self.ggml, "ggml_version") else b"ggml"
        return f"{version.decode()} {self.ggml.ggml_backend_buffer_name(self.buffer).decode()}"

    def _keep(self, handle: int, free: Callable[[int], None]) -> int:
        self._kept.callback(free, handle)
        return handle

    def _wrap(self, memory: Tensor) -> tuple[int, int]:
        """A buffer of ggml around the memory of a tensor, and its address."""
        buffer = self.ggml.ggml_backend_cpu_buffer_from_ptr(memory.data_ptr(), memory.nbytes)
        self._graph_kept.callback(self.ggml.ggml_backend_buffer_free, buffer)
        return buffer, memory.data_ptr()

    def _place(self, tensor: int, at: tuple[int, int]) -> None:
        self.ggml.ggml_backend_tensor_alloc(at[0], tensor, at[1])


def weight_type(weight: Int4Weight) -> str | None:
    """The type of llama.cpp that holds this weight without loss (but for fp16 scales); None if there is none."""
    columns = weight.in_features if weight.group_size == -1 else weight.group_size
    plain = weight.type is INT4 and weight.offsets is None and weight.perm is None
    if not plain or columns % BLOCK or weight.in_features % columns:
        return None
    return "Q4_0" if weight.zeros is None else "Q4_1"


def contestant_name(weight: Int4Weight) -> str:
    """Names the type, because its groups are of 32 whatever the weight's are."""
    return f"llama.cpp {weight_type(weight)}"


def q4_blocks(weight: Int4Weight) -> numpy.ndarray[Any, numpy.dtype[numpy.uint8]]:
    """uint8 `[N, K / 32, 18 or 20]`: the fp16 scale, for Q4_1 the fp16 minimum, and 16 bytes of codes.

    Byte i has code i in its low and code i + 16 in its high nibble: w = scale * (code - 8), or scale * code + minimum.
    """
    N, K = weight.codes.shape
    scales = weight.scales.float()
    header = [scales] if weight.zeros is None else [scales, -scales * weight.zeros.float()]
    repeated = [t.repeat_interleave(K // BLOCK // t.shape[1], dim=1).half().unsqueeze(-1) for t in header]
    codes = weight.codes.view(N, K // BLOCK, 2, BLOCK // 2)
    pairs = nibbles.pair(codes[:, :, 0], codes[:, :, 1])
    return torch.cat([*(t.view(torch.uint8) for t in repeated), pairs], dim=-1).contiguous().numpy()


def builders(weight: Int4Weight, rotate: int) -> dict[str, Callable[[], Contestant]]:
    """One contestant, if the library is found and has a type for the weight."""
    ggml = library()
    if ggml is None or weight_type(weight) is None:
        return {}
    return {contestant_name(weight): lambda: LlamaCpp(weight, rotate, ggml)}


def missing() -> str | None:
    """How to make llama.cpp known."""
    return None if library() is not None else f"llama.cpp ({VARIABLE}=folder with libggml.so)"
