"""A Llama-shaped ONNX graph with random 4-bit weights, in the form that ONNX Runtime GenAI loads.

The operators are those that GenAI's model builder emits for CPUs (MatMulNBits, GroupQueryAttention with the rotation
inside, SkipSimplifiedLayerNormalization), with q/k/v packed into one product. The weights go to a file of their own,
a tensor at a time, so that a 7B model needs no memory here; the builder would load it in float first.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy

from torch_int4.evals.bench.shapes import Shape
from torch_int4.support.atomic import replaced_folder

BLOCK = 32
DATA = "model.onnx.data"
_CHUNK = 16 << 20
MS = "com.microsoft"


def estimate(shape: Shape) -> int:
    """Bytes of the weights, roughly: 4 bits and an fp32 scale for 32, and an fp32 embedding."""
    config = shape.config()
    return sum(rows * columns * 5 // 8 for rows, columns in _products(config)) + 4 * config.vocab_size * (
        config.hidden_size
    )


def read_bytes(folder: Path) -> int:
    """Bytes that a token reads: all weights but the embedding."""
    embedding: int = json.loads((folder / "bench.json").read_text())["embedding_bytes"]
    return (folder / DATA).stat().st_size - embedding


def write(shape: Shape, folder: Path, threads: int) -> Path:
    """The folder of a shape's model, written if it is not there; the number of threads is put into its config."""
    target = folder / f"{shape.name}-onnx"
    if not target.is_dir():
        with replaced_folder(target) as partial:
            _Graph(shape.config(), partial).save()
    (target / "genai_config.json").write_text(json.dumps(_genai_config(shape.config(), threads), indent=1))
    return target


def _products(config: Any) -> list[tuple[int, int]]:
    """(rows, columns) of every product of the model."""
    hidden, inner = config.hidden_size, config.intermediate_size
    head = hidden // config.num_attention_heads
    merged = (config.num_attention_heads + 2 * config.num_key_value_heads) * head
    layer = [(merged, hidden), (hidden, hidden), (inner, hidden), (inner, hidden), (hidden, inner)]
    return layer * config.num_hidden_layers + [(config.vocab_size, hidden)]


class _Graph:
    """Nodes and initializers of a model; the values of initializers go straight to the data file."""

    def __init__(self, config: Any, folder: Path) -> None:
        self.config, self.folder = config, folder
        self.nodes: list[Any] = []
        self.initializers: list[Any] = []
        self.data = (folder / DATA).open("wb")
        random = numpy.random.default_rng(0)
        self.codes = random.integers(0, 256, _CHUNK, dtype=numpy.uint8)

    def save(self) -> None:
        """Writes the graph, its data and a note of what the embedding takes."""
        import onnx
        from onnx import helper

        inputs, outputs = self._layers()
        self.data.close()
        graph = helper.make_graph(self.nodes, "llama", inputs, outputs, self.initializers)
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid(MS, 1)]
        onnx.save_model(helper.make_model(graph, opset_imports=opsets, ir_version=10), self.folder / "model.onnx")
        embedding = 4 * self.config.vocab_size * self.config.hidden_size
        (self.folder / "bench.json").write_text(json.dumps({"embedding_bytes": embedding}))

    def node(self, kind: str, inputs: list[str], outputs: int | list[str] = 1, domain: str = "", **fields: Any) -> Any:
        """Adds a node; returns the name of its output, or the names of several."""
        from onnx import helper

        name = f"{kind}_{len(self.nodes)}"
        names = [f"{name}.{i}" for i in range(outputs)] if isinstance(outputs, int) else outputs
        self.nodes.append(helper.make_node(kind, inputs, names, name=name, domain=domain, **fields))
        return names[0] if len(names) == 1 else names

    def constant(self, name: str, values: Any) -> str:
        """A small initializer inside of the graph."""
        from onnx import numpy_helper

        self.initializers.append(numpy_helper.from_array(numpy.asarray(values), name))
        return name

    def stored(self, name: str, size: tuple[int, ...], values: Any) -> str:
        """An initializer in the data file; `values`, of the dtype that it gets, are repeated until it is full."""
        from onnx import TensorProto, helper

        kind = helper.np_dtype_to_tensor_dtype(values.dtype)
        self.data.write(b"\0" * (-self.data.tell() % 4096))
        length = int(numpy.prod(size)) * values.dtype.itemsize
        tensor = TensorProto(name=name, data_type=kind, dims=size, data_location=TensorProto.EXTERNAL)
        for key, value in (("location", DATA), ("offset", self.data.tell()), ("length", length)):
            tensor.external_data.add(key=key, value=str(value))
        self.data.write(numpy.resize(values.reshape(-1), int(numpy.prod(size))).data)
        self.initializers.append(tensor)
        return name

    def product(self, x: str, name: str, rows: int, columns: int) -> str:
        """x times a random 4-bit weight."""
        blocks = columns // BLOCK
        codes = self.stored(f"{name}.codes", (rows, blocks, BLOCK // 2), self.codes)
        scales = self.stored(f"{name}.scales", (rows * blocks,), numpy.full(1, 0.02 / 4.6, dtype=numpy.float32))
        sizes = {"K": columns, "N": rows, "bits": 4, "block_size": BLOCK, "accuracy_level": 4}
        return str(self.node("MatMulNBits", [x, codes, scales], domain=MS, **sizes))

    def _layers(self) -> tuple[list[Any], list[Any]]:
        """The whole model; returns its inputs and outputs."""
        from onnx import TensorProto, helper

        config = self.config
        hidden, layers = config.hidden_size, config.num_hidden_layers
        self.head = hidden // config.num_attention_heads
        self.norm = self.constant("norm", numpy.ones(hidden, dtype=numpy.float32))
        self._rotation()
        self._lengths()
        table = self.stored(
            "embedding", (config.vocab_size, hidden), numpy.tile(numpy.array([0.02, -0.02], dtype=numpy.float32), 4096)
        )
        residual = self.node("Gather", [table, "input_ids"])
        options = {"axis": -1, "epsilon": config.rms_norm_eps, "stash_type": 1}
        x = self.node("SimplifiedLayerNormalization", [residual, self.norm], **options)
        for i in range(layers):
            x, residual = self._layer(i, x, residual)
        last = self.node("Gather", [x, self.constant("last", numpy.array([-1]))], axis=1)
        logits = self.product(last, "lm_head", config.vocab_size, hidden)
        self.node("Identity", [logits], ["logits"])
        ids = [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "tokens"])]
        mask = [helper.make_tensor_value_info("attention_mask", TensorProto.INT64, ["batch", "total"])]
        results = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 1, config.vocab_size])]
        return ids + mask + self._cache("past_key_values", "past"), results + self._cache("present", "total")

    def _cache(self, prefix: str, length: str) -> list[Any]:
        from onnx import TensorProto, helper

        size = ["batch", self.config.num_key_value_heads, length, self.head]
        names = [f"{prefix}.{i}.{part}" for i in range(self.config.num_hidden_layers) for part in ("key", "value")]
        return [helper.make_tensor_value_info(name, TensorProto.FLOAT, size) for name in names]

    def _layer(self, i: int, x: str, residual: str) -> tuple[str, str]:
        config = self.config
        heads, kv_heads, hidden = config.num_attention_heads, config.num_key_value_heads, config.hidden_size
        merged = self.product(x, f"{i}.qkv", (heads + 2 * kv_heads) * self.head, hidden)
        past = [f"past_key_values.{i}.key", f"past_key_values.{i}.value"]
        present = [f"present.{i}.key", f"present.{i}.value"]
        attended = self.node(
            "GroupQueryAttention",
            [merged, "", "", *past, "seqlens_k", "total_length", "cos", "sin"],
            [f"attention.{i}", *present],
            MS,
            num_heads=heads,
            kv_num_heads=kv_heads,
            scale=self.head**-0.5,
            do_rotary=1,
            rotary_interleaved=0,
        )[0]
        output = self.product(attended, f"{i}.o", hidden, heads * self.head)
        x, residual = self._skip_norm(residual, output)
        gate = self.product(x, f"{i}.gate", config.intermediate_size, hidden)
        up = self.product(x, f"{i}.up", config.intermediate_size, hidden)
        activated = self.node("Mul", [gate, self.node("Sigmoid", [gate])])
        inner = self.node("Mul", [activated, up])
        return self._skip_norm(residual, self.product(inner, f"{i}.down", hidden, config.intermediate_size))

    def _skip_norm(self, residual: str, x: str) -> tuple[str, str]:
        """(norm of the sum, the sum)."""
        names = [f"normed_{len(self.nodes)}", "", "", f"residual_{len(self.nodes)}"]
        epsilon = self.config.rms_norm_eps
        self.node("SkipSimplifiedLayerNormalization", [residual, x, self.norm], names, MS, epsilon=epsilon)
        return names[0], names[3]

    def _rotation(self) -> None:
        frequencies = 1e4 ** (-numpy.arange(0, self.head, 2) / self.head)
        angles = numpy.outer(numpy.arange(max(self.config.max_position_embeddings, 8192)), frequencies)
        self.constant("cos", numpy.cos(angles).astype(numpy.float32))
        self.constant("sin", numpy.sin(angles).astype(numpy.float32))

    def _lengths(self) -> None:
        """Tokens before the last one by sequence, and the length of the mask: what the attention wants to know."""
        one = self.constant("one", numpy.array([1]))
        summed = self.node("ReduceSum", ["attention_mask", one], keepdims=0)
        self.node("Cast", [self.node("Sub", [summed, one])], ["seqlens_k"], to=6)
        shape = self.node("Shape", ["attention_mask"])
        total = self.node("Gather", [shape, self.constant("second", numpy.array(1))], axis=0)
        self.node("Cast", [total], ["total_length"], to=6)


def _genai_config(config: Any, threads: int) -> dict[str, Any]:
    inputs = {"past_key_names": "past_key_values.%d.key", "past_value_names": "past_key_values.%d.value"}
    outputs = {"present_key_names": "present.%d.key", "present_value_names": "present.%d.value"}
    options = {"log_id": "bench", "provider_options": [], "intra_op_num_threads": threads}
    decoder = {
        "session_options": options,
        "filename": "model.onnx",
        "head_size": config.hidden_size // config.num_attention_heads,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "num_hidden_layers": config.num_hidden_layers,
        "num_key_value_heads": config.num_key_value_heads,
        "inputs": {"input_ids": "input_ids", "attention_mask": "attention_mask", **inputs},
        "outputs": {"logits": "logits", **outputs},
    }
    context = max(config.max_position_embeddings, 8192)
    tokens = {"bos_token_id": 1, "eos_token_id": [2], "pad_token_id": 0}
    model = {"type": "llama", "vocab_size": config.vocab_size, "context_length": context, "decoder": decoder, **tokens}
    search = {"max_length": context, "past_present_share_buffer": True, "do_sample": False}
    return {"model": model, "search": search}
