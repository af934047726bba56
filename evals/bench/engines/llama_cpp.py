"""llama.cpp through the C functions of the package llama-cpp-python: no Python between steps but the loop itself."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy

from torch_int4 import Int4Error
from torch_int4.evals.bench import gguf_file
from torch_int4.evals.bench.engines import Spec, not_installed, rows

BATCH = 512  # tokens of a prompt at once, llama.cpp's own default
INSTALL = "pip install llama-cpp-python (compiles llama.cpp; CMAKE_ARGS=-DGGML_NATIVE=ON for this processor)"


class LlamaCpp:
    """A GGUF model: random Q4_0 weights of a shape, or the very file of a real model. The KV cache is fp16."""

    name, batches = "llama.cpp", True

    def __init__(self, spec: Spec) -> None:
        import llama_cpp

        self.api: Any = llama_cpp
        path = _path(spec)
        self.weight_bytes = gguf_file.read_bytes(path)
        self._quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self._quiet, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        self.loaded = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        if not self.loaded:
            raise Int4Error(f"llama.cpp does not load {path}; delete it, or update llama-cpp-python")
        self.vocabulary = int(llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.loaded)))
        self.context = self._context(spec)
        self.batch = llama_cpp.llama_batch_init(max(BATCH, spec.batch), 0, 1)
        self.clear(1)

    @staticmethod
    def missing(spec: Spec) -> str | None:
        """The package, or the family in llama.cpp, or the file of real weights."""
        from torch_int4.evals.bench.engines.ours import Ours

        if not spec.model.file and gguf_file.architecture(spec.model) is None:
            return f"llama.cpp has no {spec.model.model_type} models"
        return (
            not_installed("llama_cpp", install=INSTALL)
            or not_installed("gguf", install="pip install gguf")
            or (Ours.missing(spec))
        )

    @staticmethod
    def memory(spec: Spec) -> int:
        """The file, twice where it is repacked from pages that stay mapped, and room to compute in."""
        return 2 * _path(spec).stat().st_size + (1 << 30)

    @staticmethod
    def prepare(spec: Spec) -> None:
        """Writes the file of random weights."""
        if not spec.model.file:
            gguf_file.write(spec.model, spec.folder)

    def _context(self, spec: Spec) -> Any:
        parameters = self.api.llama_context_default_params()
        parameters.n_ctx = spec.context * spec.batch
        parameters.n_batch = parameters.n_ubatch = max(BATCH, spec.batch)
        parameters.n_seq_max = spec.batch
        parameters.n_threads = parameters.n_threads_batch = spec.threads
        context = self.api.llama_init_from_model(self.loaded, parameters)
        if not context:
            raise Int4Error(f"llama.cpp makes no context of {spec.context} tokens for {spec.batch} sequences")
        return context

    def clear(self, batch: int) -> None:
        """Empties the cache."""
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)
        self.sequences, self.length, self.last = batch, 0, [0] * batch

    def extend(self, tokens: Sequence[int], new: int) -> list[float]:
        """Decodes in batches of at most 512 tokens; the likeliest token is taken by numpy."""
        pending = [[last] * (self.length > 0) + row for last, row in zip(self.last, self._rows(tokens), strict=True)]
        times = []
        for _ in range(new):
            start = time.perf_counter()
            self._decode(pending)
            pending = [[token] for token in self.last]
            times.append(time.perf_counter() - start)
        return times

    def _rows(self, tokens: Sequence[int]) -> list[list[int]]:
        return rows(tokens, self.sequences, self.vocabulary)

    def _decode(self, pending: list[list[int]]) -> None:
        """Runs the tokens of every sequence, and keeps the likeliest next one of each."""
        count = len(pending[0])
        flat = [(row, self.length + at) for at in range(count) for row in range(self.sequences)]
        self.length += count
        for first in range(0, len(flat), BATCH):
            part = flat[first : first + BATCH]
            batch, self.batch.n_tokens = self.batch, len(part)
            for i, (row, position) in enumerate(part):
                batch.token[i] = pending[row][position - self.length + count]
                batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = position, 1, row
                batch.logits[i] = position == self.length - 1
            if status := self.api.llama_decode(self.context, batch):
                raise Int4Error(f"llama.cpp: llama_decode of {len(part)} tokens failed with status {status}")
            for i, (row, position) in enumerate(part):
                if position == self.length - 1:
                    logits = self.api.llama_get_logits_ith(self.context, i)
                    self.last[row] = int(numpy.ctypeslib.as_array(logits, (self.vocabulary,)).argmax())

    def version(self) -> str:
        """Of the binding, and the instructions that ggml uses."""
        used = self.api.llama_print_system_info().decode().split("|")
        on = [part.split("=")[0].replace("CPU :", "").strip() for part in used if part.strip().endswith("= 1")]
        picked = [name for name in on if name.startswith(("AVX", "AMX", "REPACK"))]
        return f"llama-cpp-python {self.api.__version__}, {' '.join(picked)}"


def _path(spec: Spec) -> Path:
    return spec.model.gguf() or gguf_file.write(spec.model, spec.folder)


ENGINES = (LlamaCpp,)
