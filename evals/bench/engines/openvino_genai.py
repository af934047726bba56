"""OpenVINO GenAI, which reads GGUF files itself."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from torch_int4.evals.bench import gguf_file
from torch_int4.evals.bench.engines import Spec, not_installed


class OpenVino:
    """Its LLM pipeline on the file of a real model. It keeps no cache between calls: each prompt is computed anew."""

    name, batches = "openvino-genai", False

    def __init__(self, spec: Spec) -> None:
        import openvino_genai

        path = spec.model.gguf()
        assert path is not None
        self.api: Any = openvino_genai
        self.weight_bytes = gguf_file.read_bytes(path)  # it may hold more: it converts what it does not support
        self.pipeline: Any = openvino_genai.LLMPipeline(str(path), "CPU", INFERENCE_NUM_THREADS=spec.threads)
        self.clear(1)

    @staticmethod
    def missing(spec: Spec) -> str | None:
        """The package; shapes with random weights, whose files have no vocabulary."""
        from torch_int4.evals.bench.engines.ours import Ours

        if not spec.model.file:
            return "OpenVINO GenAI needs a vocabulary in the GGUF file, and files of random weights have none"
        return not_installed("openvino_genai", install="pip install openvino-genai") or Ours.missing(spec)

    @staticmethod
    def memory(spec: Spec) -> int:
        """The file, twice while it is converted."""
        path = spec.model.gguf()
        return 2 * path.stat().st_size + (1 << 30) if path else 0

    @staticmethod
    def prepare(spec: Spec) -> None:
        """Nothing: the file is there."""

    def clear(self, batch: int) -> None:
        """Forgets the tokens."""
        self.ids: list[int] = []

    def extend(self, tokens: Sequence[int], new: int) -> list[float]:
        """Generates after all tokens so far."""
        import numpy
        import openvino

        self.ids += tokens
        clock = self._clock()
        config = self.api.GenerationConfig(max_new_tokens=new, do_sample=False, ignore_eos=True)
        given = openvino.Tensor(numpy.array([self.ids], dtype=numpy.int64))
        start = time.perf_counter()
        found = self.pipeline.generate(given, config, clock)
        self.ids += found.tokens[0]
        moments = [start, *clock.times]
        return [after - before for before, after in pairwise(moments)]

    def _clock(self) -> Any:
        api = self.api

        class Clock(api.StreamerBase):  # type: ignore[name-defined]
            def __init__(self) -> None:
                super().__init__()
                self.times: list[float] = []

            def write(self, token: Any) -> Any:
                count = len(token) if isinstance(token, list) else 1
                self.times += [time.perf_counter()] * count
                return api.StreamingStatus.RUNNING

            def end(self) -> None:
                pass

        return Clock()

    def version(self) -> str:
        """Of the package."""
        return f"openvino-genai {self.api.__version__}"


ENGINES = (OpenVino,)
