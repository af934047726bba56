"""Tokens per second through ``model.generate``.

One `time_generate` call is one repeat, so a caller can interleave repeats of several models: on a shared or
throttling machine only figures taken alternately in one run may be compared.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer


@dataclass(frozen=True)
class Timing:
    """One greedy generation: seconds until the first new token, and for the tokens after it."""

    prompt_tokens: int
    new_tokens: int
    prefill_s: float
    decode_s: float
    output_ids: tuple[int, ...]

    @property
    def prefill_tps(self) -> float:
        """Prompt tokens per second."""
        return self.prompt_tokens / self.prefill_s

    @property
    def decode_tps(self) -> float:
        """New tokens per second after the first one."""
        return (self.new_tokens - 1) / self.decode_s


@dataclass(frozen=True)
class Speed:
    """Tokens per second over repeats: the best one (least disturbed by other work) and the median."""

    decode_best: float
    decode_median: float
    prefill_best: float
    prefill_median: float
    repeats: int


class Clock(BaseStreamer):
    """Notes when each token arrives; `generate` also puts the prompt, as the first item."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        """Called with the prompt, and with each step's tokens."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Called when all is done."""


@torch.inference_mode()
def time_generate(model: Any, input_ids: torch.Tensor, new_tokens: int) -> Timing:
    """Generates exactly `new_tokens` (>= 2) tokens greedily from `input_ids` [1, T] and times them.

    The end-of-text token is ignored, so that every model does the same number of steps.
    """
    clock = Clock()
    start = time.perf_counter()
    output = model.generate(
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        max_new_tokens=new_tokens,
        do_sample=False,
        eos_token_id=None,
        streamer=clock,
    )
    prompt_tokens = input_ids.shape[1]
    _, first, *_, last = clock.times
    return Timing(
        prompt_tokens=prompt_tokens,
        new_tokens=output.shape[1] - prompt_tokens,
        prefill_s=first - start,
        decode_s=last - first,
        output_ids=tuple(output[0, prompt_tokens:].tolist()),
    )


def alternate(
    models: Sequence[Any], input_ids: torch.Tensor, new_tokens: int, *, repeats: int = 3
) -> list[list[Timing]]:
    """Timings of each model, taken in turns after a short warm-up (first calls allocate and start threads).

    Other work on the machine then slows neighbouring repeats of all models, and `decode_ratios` stays fair where
    a comparison of one model's minute with another model's minute would be off by any factor.
    """
    for model in models:
        time_generate(model, input_ids, min(new_tokens, 4))
    rounds = [[time_generate(model, input_ids, new_tokens) for model in models] for _ in range(repeats)]
    return [list(timings) for timings in zip(*rounds, strict=True)]


def decode_ratios(base: Sequence[Timing], other: Sequence[Timing]) -> list[float]:
    """Decode speed of `other` over `base`, repeat by repeat."""
    return [b.decode_tps / a.decode_tps for a, b in zip(base, other, strict=True)]


def summarize(timings: Sequence[Timing]) -> Speed:
    """Best and median of several repeats."""
    decode = [timing.decode_tps for timing in timings]
    prefill = [timing.prefill_tps for timing in timings]
    return Speed(
        decode_best=max(decode),
        decode_median=statistics.median(decode),
        prefill_best=max(prefill),
        prefill_median=statistics.median(prefill),
        repeats=len(timings),
    )
