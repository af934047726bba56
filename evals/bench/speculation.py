"""Decoding with guessed tokens: prompt lookup and an assistant model, through transformers' own arguments."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch

GUESSES = (4, 8, 16)
ROUNDS = 3
TEXT = """Notes of the meeting on the storage cluster. The storage cluster lost two of its nine nodes on Monday night,
after the power supply of rack four failed. The remaining seven nodes of the storage cluster kept serving reads, but
writes were rejected for forty minutes, because the write quorum was set to eight nodes. Ana will lower the write
quorum to five nodes this week. Boris will order two power supplies for rack four, and a spare one for rack five. Chen
will write a script that moves replicas away from a rack before its power supply is serviced. Until then nobody
services the power supply of a rack without asking Chen. The next meeting on the storage cluster is on Thursday."""
QUESTION = "Repeat these notes as a list, one sentence a line, then summarise them:\n\n"


@dataclass(frozen=True)
class Row:
    """One way to decode; seconds for all new tokens, the best and the median of the rounds."""

    how: str
    new_tokens: int
    min_s: float
    median_s: float
    same: bool  # whether the tokens are those of plain decoding
    speedup: float  # over plain decoding, medians


def measure(model: Any, new: int) -> list[Row]:
    """Plain decoding, prompt lookup with several numbers of guesses, in turns, on a prompt to be repeated.

    The end-of-text token is ignored, so that each way makes `new` tokens. The model needs its real weights: guesses
    say nothing about random ones.
    """
    ids = _prompt()
    ways: dict[str, dict[str, Any]] = {"plain": {}}
    ways |= {f"prompt lookup, {count} tokens": {"prompt_lookup_num_tokens": count} for count in GUESSES}
    times: dict[str, list[float]] = {name: [] for name in ways}
    outputs: dict[str, Any] = {}
    for round_ in range(ROUNDS + 1):
        for name, arguments in ways.items():
            seconds, outputs[name] = _generate(model, ids, new if round_ else 4, arguments)
            if round_:  # the first one warms up
                times[name].append(seconds)
    plain = sorted(times["plain"])[ROUNDS // 2]
    rows = []
    for name, taken in times.items():
        median = sorted(taken)[ROUNDS // 2]
        same = torch.equal(outputs[name], outputs["plain"])
        rows.append(Row(name, new, min(taken), median, same, plain / median))
    return rows


@torch.inference_mode()
def _generate(model: Any, ids: torch.Tensor, new: int, arguments: dict[str, Any]) -> tuple[float, torch.Tensor]:
    """Seconds of a whole call but for its prompt, which every way computes alike, and the tokens."""
    options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "eos_token_id": None}
    start = time.perf_counter()
    model.generate(ids, max_new_tokens=1, **options)
    prefill = time.perf_counter() - start
    start = time.perf_counter()
    output = model.generate(ids, max_new_tokens=new, **options, **arguments)
    return max(time.perf_counter() - start - prefill, 1e-9), output


def _prompt() -> torch.Tensor:
    from transformers import AutoTokenizer

    from torch_int4.evals import models

    tokenizer = AutoTokenizer.from_pretrained(models.default_model_dir(), local_files_only=True)
    return models.encode_prompt(tokenizer, QUESTION + TEXT)
