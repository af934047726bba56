"""ONNX Runtime's MatMulNBits."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torch_int4 import Int4Weight
from torch_int4.evals.bench.contestants import Contestant, copies_of
from torch_int4.weights import nibbles


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
        return weight.group_size in (16, 32, 64, 128, 256) and weight.in_features % weight.group_size == 0

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


def builders(weight: Int4Weight, rotate: int) -> dict[str, Callable[[], Contestant]]:
    """The operator, if its packages are installed and it takes the weight."""
    if missing() is not None or not OnnxRuntime.takes(weight):
        return {}
    return {OnnxRuntime.name: lambda: OnnxRuntime(weight, rotate)}


def missing() -> str | None:
    """The packages that are not installed."""
    return ", ".join(name for name in ("onnxruntime", "onnx") if importlib.util.find_spec(name) is None) or None


def _onnx_tensors(weight: Int4Weight) -> dict[str, Any]:
    """The operator's inputs, by row of the weight: codes (two a byte, even ones low), scales, zeros."""
    N, groups = weight.scales.shape
    pairs = nibbles.join(weight.codes.view(N, groups, -1))
    tensors = {"B": pairs.numpy(), "scales": weight.scales.float().numpy()}
    if weight.zeros is not None:
        tensors["zeros"] = nibbles.join(weight.zeros).numpy()
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
