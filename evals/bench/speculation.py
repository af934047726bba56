"""Decoding with guessed tokens: prompt lookup and an assistant model, through transformers' own arguments."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch

GUESSES = (2, 3, 4, 8)
ASSISTED = 4  # guesses of an assistant model
ROUNDS = 3
TEXT = """Notes of the meeting on the storage cluster. The storage cluster lost two of its nine nodes on Monday night,
after the power supply of rack four failed. The remaining seven nodes of the storage cluster kept serving reads, but
writes were rejected for forty minutes, because the write quorum was set to eight nodes. Ana will lower the write
quorum to five nodes this week. Boris will order two power supplies for rack four, and a spare one for rack five. Chen
will write a script that moves replicas away from a rack before its power supply is serviced. Until then nobody
services the power supply of a rack without asking Chen. The next meeting on the storage cluster is on Thursday."""
QUESTION = "Repeat these notes as a list, one sentence a line, then summarise them:\n\n"


@dataclass(frozen=True)
class Way:
    """A way to decode: a model, and arguments of its `generate`; `plain` is what it is compared with."""

    how: str
    model: Any
    arguments: dict[str, Any]
    plain: str


@dataclass(frozen=True)
class Row:
    """How long one way took; seconds for all new tokens, the best and the median of the rounds."""

    how: str
    new_tokens: int
    min_s: float
    median_s: float
    tokens_a_step: float  # that a call of the model made on average, after the one that read the prompt
    same: bool  # whether the tokens are those of plain decoding
    speedup: float  # over plain decoding, medians


def measure(model: Any, new: int) -> list[Row]:
    """Plain decoding and prompt lookup with several numbers of guesses; and the same model in float, alone and with
    this one as its assistant, which makes the float model's own tokens.

    The model needs its real weights: guesses say nothing about random ones.
    """
    from torch_int4.evals import models

    ways = [Way("plain", model, {}, "plain")]
    ways += [Way(f"prompt lookup, {n} tokens", model, {"prompt_lookup_num_tokens": n}, "plain") for n in GUESSES]
    exact, _ = models.load()
    ways.append(Way("float, plain", exact, {}, "float, plain"))
    model.generation_config.num_assistant_tokens = ASSISTED
    model.generation_config.num_assistant_tokens_schedule = "constant"
    guessed = f"float, this model guesses {ASSISTED} tokens"
    ways.append(Way(guessed, exact, {"assistant_model": model}, "float, plain"))
    return compare(_prompt(), new, ways)


def compare(ids: torch.Tensor, new: int, ways: list[Way]) -> list[Row]:
    """The ways in turns. The end-of-text token is ignored, so that each makes `new` tokens."""
    times: dict[str, list[float]] = {way.how: [] for way in ways}
    outputs: dict[str, Any] = {}
    steps: dict[str, int] = {}
    for round_ in range(ROUNDS + 1):
        for way in ways:
            tokens = new if round_ else 4
            seconds, outputs[way.how], steps[way.how] = _generate(way.model, ids, tokens, way.arguments)
            if round_:  # the first one warms up
                times[way.how].append(seconds)
    median = {how: sorted(taken)[ROUNDS // 2] for how, taken in times.items()}
    return [
        Row(
            way.how,
            new,
            min(times[way.how]),
            median[way.how],
            (new - 1) / max(steps[way.how], 1),
            torch.equal(outputs[way.how], outputs[way.plain]),
            median[way.plain] / median[way.how],
        )
        for way in ways
    ]


@torch.inference_mode()
def _generate(model: Any, ids: torch.Tensor, new: int, arguments: dict[str, Any]) -> tuple[float, torch.Tensor, int]:
    """Seconds of a whole call but for its prompt, which every way computes alike, the tokens, and calls of the model
    after the prompt."""
    options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "eos_token_id": None}
    start = time.perf_counter()
    model.generate(ids, max_new_tokens=1, **options)
    prefill = time.perf_counter() - start
    calls: list[None] = []
    counting = model.register_forward_pre_hook(lambda module, args: calls.append(None))
    try:
        start = time.perf_counter()
        output = model.generate(ids, max_new_tokens=new, **options, **arguments)
        seconds = time.perf_counter() - start - prefill
    finally:
        counting.remove()
    return max(seconds, 1e-9), output, len(calls) - 1


def _prompt() -> torch.Tensor:
    from transformers import AutoTokenizer

    from torch_int4.evals import models

    tokenizer = AutoTokenizer.from_pretrained(models.default_model_dir(), local_files_only=True)
    return models.encode_prompt(tokenizer, QUESTION + TEXT)
