"""The base of engines that run a model of transformers through its own `generate`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch

from torch_int4.evals.bench.engines import Spec, rows
from torch_int4.evals.speed.generation import Clock
from torch_int4.support.forwards import cache_keyword
from torch_int4.tuning.footprint import read_bytes


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
        held = cache_keyword(self.model, self.cache)
        clock = Clock()
        start = time.perf_counter()
        output = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            **held,
            max_new_tokens=new,
            do_sample=False,
            eos_token_id=None,
            return_dict_in_generate=True,
            streamer=clock,
        )
        (name,) = held
        self.cache, self.ids = output[name], output.sequences
        moments = [start, *clock.times[1:]]
        return [after - before for before, after in pairwise(moments)]

    def version(self) -> str:
        """Of transformers, and the dtype."""
        import transformers

        return f"transformers {transformers.__version__}"
