"""Who is measured: this package's operator, and other libraries' products with the same weight.

A contestant holds enough copies of a weight that no cache keeps them, and one call is a pass over all copies. Every
one of them does that, so figures are of weights that come from memory, as those of a whole model do. Peers are found
by what is installed; a class here is all that a new one needs.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from torch_int4 import Int4Linear, Int4Weight, ops


class Contestant(Protocol):
    """Copies of one weight in some library's form."""

    name: str
    nbytes: int  # of one copy, scales and zero points included
    copies: int
    tolerance: float  # norm of the error over the norm of the product: what its arithmetic may lose

    def bind(self, x: Tensor) -> None:
        """Takes the input, float32 `[M, K]`, in whatever form the library wants."""

    def run(self) -> Tensor:
        """Multiplies x with every copy, and returns a result `[M, N]`."""

    def kernels(self) -> str:
        """The kernel set that ran, or the version of the library."""


class Ours:
    """`Int4Linear` on one kernel set. Copies are shared among kernel sets and arithmetics: the layout is one."""

    tolerance = 0.02

    def __init__(self, layers: list[Int4Linear], isa: str, compute: str) -> None:
        self.name, self.isa, self.compute = f"torch_int4 {isa}", isa, compute
        self.layers, self.copies, self.nbytes = layers, len(layers), layers[0].nbytes

    def bind(self, x: Tensor) -> None:
        """Also selects the kernel set and the arithmetic, outside of what is timed."""
        self.x = x
        ops.set_isa(self.isa)
        for layer in self.layers:
            layer.compute = self.compute

    def run(self) -> Tensor:
        """One call of the module for each copy."""
        for layer in self.layers:
            y = layer(self.x)
        return y

    def kernels(self) -> str:
        """What the dispatcher has active, asked after the run."""
        return ops.isa()


class Dense:
    """`nn.functional.linear` with the dequantized weight."""

    def __init__(self, weight: Int4Weight, rotate: int, dtype: torch.dtype) -> None:
        self.name = "torch " + {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
        self.dtype, self.tolerance = dtype, 1e-4 if dtype == torch.float32 else 0.02
        dense = weight.dequantize(dtype)
        self.nbytes = dense.nbytes
        self.copies = copies_of(self.nbytes, rotate)
        self.weights = [dense.clone() for _ in range(self.copies)]

    def bind(self, x: Tensor) -> None:
        """Rounds x to the weight's type."""
        self.x = x.to(self.dtype)

    def run(self) -> Tensor:
        """One product for each copy."""
        for weight in self.weights:
            y = F.linear(self.x, weight)
        return y

    def kernels(self) -> str:
        """The version of torch."""
        return torch.__version__


class AtenInt4:
    """torch's own int4 product for CPUs, which torchao uses: bf16 activations, w = (code - 8) * scale + zero."""

    name, tolerance = "torch int4 (ATen)", 0.02

    def __init__(self, weight: Int4Weight, rotate: int) -> None:
        self.group = weight.group_size
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(weight.codes.int(), 1)
        scales = weight.scales.float()
        zeros = torch.zeros_like(scales) if weight.zeros is None else (8 - weight.zeros.float()) * scales
        streams = torch.stack([scales, zeros], -1).transpose(0, 1).to(torch.bfloat16).contiguous()
        self.nbytes = packed.nbytes + streams.nbytes
        self.copies = copies_of(self.nbytes, rotate)
        self.weights = [(packed.clone(), streams.clone()) for _ in range(self.copies)]

    @staticmethod
    def takes(weight: Int4Weight) -> bool:
        """Whether the operator has a kernel for this weight."""
        return weight.group_size in (32, 64, 128, 256) and weight.out_features % 16 == 0 and _whole_groups(weight)

    def bind(self, x: Tensor) -> None:
        """Rounds x to bf16."""
        self.x = x.to(torch.bfloat16)

    def run(self) -> Tensor:
        """One product for each copy."""
        for packed, streams in self.weights:
            y = torch.ops.aten._weight_int4pack_mm_for_cpu(self.x, packed, self.group, streams)
        return y

    def kernels(self) -> str:
        """The version of torch."""
        return torch.__version__


class OnnxRuntime:
    """ONNX Runtime's MatMulNBits with int8 activations (accuracy level 4).

    The copies are nodes of one graph, since ONNX Runtime runs all of a graph; each has its rows in another order, or
    equal nodes would be merged and run once. One call from Python covers them all,
    where others need one each, about 10 microseconds: that favours this peer at small shapes. Input and output are
    bound, so nothing is copied or allocated.
    """

    name, tolerance = "onnxruntime acc4", 0.02

    def __init__(self, weight: Int4Weight, rotate: int) -> None:
        import onnxruntime

        self.N, self.version = weight.out_features, onnxruntime.__version__
        tensors = _onnx_tensors(weight)
        self.nbytes = sum(values.nbytes for values in tensors.values())
        self.copies = copies_of(self.nbytes, rotate)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        model = _onnx_model(weight, tensors, self.copies)
        self.session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])

    @staticmethod
    def takes(weight: Int4Weight) -> bool:
        """Blocks are powers of two; larger ones than 256 have no kernel of this accuracy level."""
        return weight.group_size in (16, 32, 64, 128, 256) and _whole_groups(weight)

    def bind(self, x: Tensor) -> None:
        """Binds x, a buffer for the result of the first copy, and one for those of all others."""
        import numpy

        self.x, self.y = x.contiguous(), torch.empty(x.shape[0], self.N)
        self.others = torch.empty_like(self.y)
        self.binding = self.session.io_binding()
        self.binding.bind_input("x", "cpu", 0, numpy.float32, tuple(self.x.shape), self.x.data_ptr())
        for i in range(self.copies):
            target = self.others if i else self.y
            self.binding.bind_output(f"y{i}", "cpu", 0, numpy.float32, tuple(target.shape), target.data_ptr())

    def run(self) -> Tensor:
        """One run of the graph."""
        self.session.run_with_iobinding(self.binding)
        return self.y

    def kernels(self) -> str:
        """The version of ONNX Runtime."""
        return self.version


def copies_of(nbytes: int, rotate: int) -> int:
    """How many copies make at least `rotate` bytes, and at least two."""
    return max(2, -(-rotate // nbytes))


def ours(weight: Int4Weight, rotate: int) -> list[Int4Linear]:
    """Copies of a weight as this package packs it, each in storage of its own."""
    first = Int4Linear.from_weight(weight)
    return [first, *(Int4Linear.from_weight(weight) for _ in range(copies_of(first.nbytes, rotate) - 1))]


def builders(weight: Int4Weight, rotate: int) -> dict[str, Callable[[], Contestant]]:
    """By name, what makes each peer that is installed and takes this weight."""
    found: dict[str, Callable[[], Contestant]] = {}
    if _has("onnxruntime") and _has("onnx") and OnnxRuntime.takes(weight):
        found[OnnxRuntime.name] = lambda: OnnxRuntime(weight, rotate)
    if hasattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu") and AtenInt4.takes(weight):
        found[AtenInt4.name] = lambda: AtenInt4(weight, rotate)
    found["torch bf16"] = lambda: Dense(weight, rotate, torch.bfloat16)
    found["torch fp32"] = lambda: Dense(weight, rotate, torch.float32)
    return found


def missing() -> list[str]:
    """Peers that the bench could ask if their packages were installed."""
    return [name for name in ("onnxruntime", "onnx") if not _has(name)]


def _has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _whole_groups(weight: Int4Weight) -> bool:
    return weight.in_features % weight.group_size == 0


def _onnx_tensors(weight: Int4Weight) -> dict[str, Any]:
    """The operator's inputs, by row of the weight: codes (two a byte, even ones low), scales, zeros."""
    N, groups = weight.scales.shape
    pairs = weight.codes.view(N, groups, -1, 2)
    tensors = {"B": (pairs[..., 0] | pairs[..., 1] << 4).numpy(), "scales": weight.scales.float().numpy()}
    if weight.zeros is not None:
        padded = F.pad(weight.zeros, (0, groups % 2)).view(N, -1, 2)
        tensors["zeros"] = (padded[..., 0] | padded[..., 1] << 4).numpy()
    return tensors


def _onnx_model(weight: Int4Weight, tensors: dict[str, Any], copies: int) -> bytes:
    """A graph of `copies` products of one input; in copy i, the rows are rotated by i."""
    import numpy
    from onnx import TensorProto, helper, numpy_helper

    N, K = weight.codes.shape
    nodes, initializers, outputs = [], [], []
    for i in range(copies):
        for name, values in tensors.items():
            rotated = numpy.roll(values, i, axis=0)
            initializers.append(numpy_helper.from_array(rotated if name == "B" else rotated.ravel(), f"{name}{i}"))
        inputs = ["x", *(f"{name}{i}" for name in tensors)]
        attributes: dict[str, Any] = {"K": K, "N": N, "bits": 4, "block_size": weight.group_size, "accuracy_level": 4}
        nodes.append(helper.make_node("MatMulNBits", inputs, [f"y{i}"], domain="com.microsoft", **attributes))
        outputs.append(helper.make_tensor_value_info(f"y{i}", TensorProto.FLOAT, ["M", N]))
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["M", K])
    graph = helper.make_graph(nodes, "products", [x], outputs, initializers)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
