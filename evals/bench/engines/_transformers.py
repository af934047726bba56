"""What engines share that run a model of transformers through its own `generate`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers.generation.streamers import BaseStreamer

from torch_int4.evals.bench.engines import Spec, rows


class Clock(BaseStreamer):
    """Notes when each token arrives; `generate` also puts the prompt, as the first item."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        """Called with the prompt, and with each step's tokens."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Called when all is done."""


class Generating:
    """A model of transformers and the cache that its `generate` made, continued by each call."""

    batches = True

    def __init__(self, model: Any, spec: Spec) -> None:
        self.model, self.spec = model, spec
        self.vocabulary = int(model.config.vocab_size)
        self.weight_bytes = read_bytes(model)
        self.clear(1)

    @staticmethod
    def prepare(spec: Spec) -> None:
        """Nothing to write: the model is made in memory."""

    def clear(self, batch: int) -> None:
        """Starts `batch` empty sequences."""
        self.ids = torch.empty(batch, 0, dtype=torch.int64)
        self.cache: Any = None

    @torch.inference_mode()
    def extend(self, tokens: Sequence[int], new: int) -> list[float]:
        """Generates greedily, the end-of-text token ignored; seconds to each new token."""
        given = torch.tensor(rows(tokens, self.ids.shape[0], self.vocabulary), dtype=torch.int64)
        ids = torch.cat((self.ids, given), dim=1)
        clock = Clock()
        start = time.perf_counter()
        output = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=self.cache,
            max_new_tokens=new,
            do_sample=False,
            eos_token_id=None,
            return_dict_in_generate=True,
            streamer=clock,
        )
        self.cache, self.ids = output.past_key_values, output.sequences
        moments = [start, *clock.times[1:]]
        return [after - before for before, after in pairwise(moments)]

    def version(self) -> str:
        """Of transformers, and the dtype."""
        import transformers

        return f"transformers {transformers.__version__}"


def read_bytes(model: nn.Module) -> int:
    """Bytes of weights that a token reads: of all modules but embeddings that are looked up only, each once."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    found: dict[int, int] = {}
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            continue
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            found |= _pieces(tensor)
    if isinstance(weight := getattr(head, "weight", None), Tensor):  # the embedding too, where it is the head
        found |= _pieces(weight)
    return sum(found.values())


def _pieces(tensor: Tensor) -> dict[int, int]:
    """Bytes by address; a quantized tensor of another library is made of several plain ones."""
    if hasattr(tensor, "__tensor_flatten__"):
        parts: dict[int, int] = {}
        for name in tensor.__tensor_flatten__()[0]:
            parts |= _pieces(getattr(tensor, name))
        return parts
    return {tensor.data_ptr(): tensor.nbytes}
