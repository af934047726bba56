"""ONNX Runtime GenAI, on a graph that `onnx_llama` writes as its own model builder would."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from torch_int4.evals.bench import onnx_llama
from torch_int4.evals.bench.engines import Spec, not_installed, rows


class OnnxGenAI:
    """MatMulNBits of 4 bits in blocks of 32 with int8 activations, GroupQueryAttention, an fp32 cache."""

    name, batches = "onnxruntime-genai", True

    def __init__(self, spec: Spec) -> None:
        import onnxruntime_genai

        folder = onnx_llama.write(spec.model, spec.folder, spec.threads)
        self.api, self.spec = onnxruntime_genai, spec
        self.model = onnxruntime_genai.Model(str(folder))
        self.vocabulary = spec.model.config().vocab_size
        self.weight_bytes = onnx_llama.read_bytes(folder)
        self.clear(1)

    @staticmethod
    def missing(spec: Spec) -> str | None:
        """The packages; families that GenAI's builder has none for; real weights, which are in GGUF only."""
        if spec.model.file:
            return "the real weights are a GGUF Q4_1 file, which it does not read"
        if spec.model.model_type != "llama":
            return f"ONNX Runtime GenAI has no {spec.model.model_type} models"
        return not_installed("onnxruntime_genai", "onnx", install="pip install onnxruntime-genai onnx")

    @staticmethod
    def memory(spec: Spec) -> int:
        """The weights, twice while they are packed for its kernels, and the cache."""
        return 2 * onnx_llama.estimate(spec.model) + (1 << 30)

    @staticmethod
    def prepare(spec: Spec) -> None:
        """Writes the graph and its weights."""
        onnx_llama.write(spec.model, spec.folder, spec.threads)

    def clear(self, batch: int) -> None:
        """A new generator, the library's only way to an empty cache."""
        self.generator: Any = None
        parameters = self.api.GeneratorParams(self.model)
        longest = self.spec.context  # and the shortest: the end-of-text token never comes
        parameters.set_search_options(
            max_length=longest, min_length=longest, batch_size=batch, do_sample=False, early_stopping=False
        )
        self.batch = batch
        self.generator = self.api.Generator(self.model, parameters)

    def extend(self, tokens: Sequence[int], new: int) -> list[float]:
        """Appends the tokens, which runs them, and generates."""
        import numpy

        start = time.perf_counter()
        if tokens:
            given = numpy.array(rows(tokens, self.batch, self.vocabulary), dtype=numpy.int32)
            self.generator.append_tokens(given)
        times = []
        for _ in range(new):
            self.generator.generate_next_token()
            now = time.perf_counter()
            times.append(now - start)
            start = now
        return times

    def version(self) -> str:
        """Of GenAI and of the runtime."""
        import onnxruntime

        return f"{self.api.__version__}, onnxruntime {onnxruntime.__version__}, accuracy level 4"


ENGINES = (OnnxGenAI,)
