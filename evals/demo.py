"""The main job, end to end: one model in float and in INT4, on one machine, in one run.

`run` measures and returns figures; `show` prints them. Perplexity decides whether the run passed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import torch_int4
from torch_int4.evals import models
from torch_int4.evals.accuracy.perplexity import Comparison, Perplexity, compare, perplexity
from torch_int4.evals.speed import generation as speed
from torch_int4.evals.speed.memory import Memory, linear_bytes, patched_memory
from torch_int4.tuning.footprint import weight_bytes

PROMPT = "Write a two-sentence story about a small robot."


@dataclass(frozen=True)
class Side:
    """The figures of one of the two models."""

    text: str
    speed: speed.Speed
    ppl: float
    weight_bytes: int


@dataclass(frozen=True)
class Result:
    """Everything one demo run found out; `same_tokens` counts equal leading tokens of the two generations."""

    model: str
    prompt: str
    new_tokens: int
    config: dict[str, Any]
    info: dict[str, Any]
    float_side: Side
    int4_side: Side
    memory: Memory
    comparison: Comparison
    ppl_tokens: int
    same_tokens: int
    decode_ratios: list[float]
    max_loss: float
    seconds: dict[str, float]

    @property
    def speedup(self) -> float:
        """Decode speed of INT4 over float: the median of ratios of neighbouring repeats."""
        return statistics.median(self.decode_ratios)

    @property
    def disturbed(self) -> bool:
        """Whether repeats disagree so much that the speeds should not be quoted."""
        speeds = (self.float_side.speed, self.int4_side.speed)
        uneven = any(speed.decode_median < 0.8 * speed.decode_best for speed in speeds)
        return uneven or max(self.decode_ratios) > 1.25 * min(self.decode_ratios)

    @property
    def passed(self) -> bool:
        """Whether perplexity moved by at most `max_loss`; false for NaN."""
        return abs(self.comparison.relative) <= self.max_loss


class _Steps:
    """Times named steps and shows which one runs."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        with self.console.status(f"{name} ..."):
            yield
        self.seconds[name] = round(time.perf_counter() - start, 2)


def run(
    model_dir: str | Path | None = None,
    *,
    prompt: str = PROMPT,
    new_tokens: int = 64,
    repeats: int = 3,
    ppl_tokens: int = 2048,
    max_loss: float = 0.02,
    console: Console | None = None,
    **overrides: Any,
) -> Result:
    """Measures a model in float32, patches it in place, and measures it again.

    For the timing the float model is loaded once more, so that repeats of both can alternate: the peak of memory
    is the float model plus the patched one.

    Args:
        model_dir: directory written by ``save_pretrained``; None for the default model.
        prompt: what to answer; wrapped in the tokenizer's chat template if it has one.
        new_tokens: tokens to generate per repeat, at least 2.
        repeats: timed generations of each model.
        ppl_tokens: tokens of built-in English to measure perplexity on (at most 3000 or so exist by default).
        max_loss: accepted relative change of perplexity.
        console: where progress is shown.
        overrides: fields of `Int4Config`.

    Raises:
        Int4Error: if the model cannot be found, loaded or patched.
    """
    step = _Steps(console or Console(quiet=True))
    with step("load float model"):
        model, tokenizer = models.load(model_dir)
        ids = models.encode_prompt(tokenizer, prompt)
    before = linear_bytes(model)
    with step("generate in float"):
        float_ids = speed.time_generate(model, ids, new_tokens).output_ids
    with step("perplexity of float"):
        float_ppl = _perplexity(model, tokenizer, ppl_tokens)
    float_bytes = sum(weight_bytes(model).values())

    config = torch_int4.Int4Config.with_overrides(None, **overrides)
    with step("patch to INT4"):
        torch_int4.patch(model, config)
    with step("generate in INT4"):
        int4_ids = speed.time_generate(model, ids, new_tokens).output_ids
    with step("perplexity of INT4"):
        int4_ppl = _perplexity(model, tokenizer, ppl_tokens)
    int4_bytes = sum(weight_bytes(model).values())
    with step("time both in turns"):
        again, _ = models.load(model_dir)
        float_timings, int4_timings = speed.alternate([again, model], ids, new_tokens, repeats=repeats)
        del again

    return Result(
        model=model.config._name_or_path or type(model).__name__,
        prompt=prompt,
        new_tokens=new_tokens,
        config=dict(vars(config)),
        info=torch_int4.info(),
        float_side=_side(tokenizer, float_ids, float_timings, float_ppl, float_bytes),
        int4_side=_side(tokenizer, int4_ids, int4_timings, int4_ppl, int4_bytes),
        memory=patched_memory(model, before),
        comparison=compare(float_ppl, int4_ppl),
        ppl_tokens=float_ppl.tokens,
        same_tokens=_same_prefix(float_ids, int4_ids),
        decode_ratios=speed.decode_ratios(float_timings, int4_timings),
        max_loss=max_loss,
        seconds=step.seconds,
    )


def _perplexity(model: Any, tokenizer: Any, tokens: int) -> Perplexity:
    return perplexity(model, models.encode_text(tokenizer, None, tokens), window=512)


def _side(
    tokenizer: Any, output_ids: tuple[int, ...], timings: list[speed.Timing], score: Perplexity, size: int
) -> Side:
    ids = list(output_ids)
    if tokenizer.eos_token_id in ids:  # generation ran on; a user would see the answer end here
        ids = ids[: ids.index(tokenizer.eos_token_id)]
    return Side(
        text=tokenizer.decode(ids, skip_special_tokens=True).strip(),
        speed=speed.summarize(timings),
        ppl=score.ppl,
        weight_bytes=size,
    )


def _same_prefix(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))


def _mb(size: int) -> str:
    return f"{size / 1e6:.1f} MB"


def show(result: Result, console: Console) -> None:
    """Prints a result as two answers and one table."""
    left, right = result.float_side, result.int4_side
    said = {"Prompt": result.prompt, "float32 answers": left.text, "INT4 answers": right.text}
    for title, text in said.items():
        console.print(f"[bold]{title}[/bold]")
        console.print(text, "\n", sep="", highlight=False, markup=False)  # a model may write [/brackets]
    table = Table(box=None, pad_edge=False)
    for column in ("", "float32", "INT4", "INT4 / float32"):
        table.add_column(column, justify="left" if not column else "right")
    for row in _rows(result):
        table.add_row(*row)
    console.print(table, "")
    for line in _notes(result):
        console.print(line, highlight=False, soft_wrap=True)


def _rows(result: Result) -> list[tuple[str, str, str, str]]:
    left, right, memory = result.float_side, result.int4_side, result.memory

    def pair(name: str, get: Callable[[Side], float], form: str) -> tuple[str, str, str, str]:
        a, b = get(left), get(right)
        return name, format(a, form), format(b, form), f"{b / a:.3f}"

    return [
        pair("decode, tokens/s (best)", lambda side: side.speed.decode_best, ".1f"),
        pair("decode, tokens/s (median)", lambda side: side.speed.decode_median, ".1f"),
        pair("prefill, tokens/s (best)", lambda side: side.speed.prefill_best, ".1f"),
        pair("perplexity", lambda side: side.ppl, ".4f"),
        (
            f"weights of {memory.linears} linears",
            _mb(memory.float_bytes),
            _mb(memory.int4_bytes),
            f"{memory.int4_bytes / memory.float_bytes:.3f}",
        ),
        (
            "weights of the whole model",
            _mb(left.weight_bytes),
            _mb(right.weight_bytes),
            f"{right.weight_bytes / left.weight_bytes:.3f}",
        ),
    ]


def _notes(result: Result) -> Iterator[str]:
    memory, versus, info, config = result.memory, result.comparison, result.info, result.config
    yield (
        f"linears  {memory.bits_per_weight:.2f} bits per weight, {memory.ratio_to_bf16:.3f} of bf16 "
        f"({_mb(memory.bf16_bytes)})"
    )
    if memory.head_bytes:
        yield (
            f"head     {config['head']}, {_mb(memory.head_bytes)} "
            f"(float32 {_mb(memory.head_float_bytes)}, which stays where the input embedding shares it)"
        )
    yield (
        f"text     {result.ppl_tokens} tokens: perplexity {versus.relative:+.2%} +- {versus.stderr:.2%}, "
        f"same most likely token at {versus.agreement:.1%}; "
        f"first {result.same_tokens} of {result.new_tokens} generated tokens equal"
    )
    shown = ("recipe", "group_size", "symmetric", "zeros", "compute", "head")
    yield "config   " + ", ".join(f"{name}={config[name]}" for name in shown if name in config)
    versions = f"torch {info['torch']}, torch_int4 {info['version']}"
    yield f"kernel   {info['isa']}, {info['threads']} threads, {versions}"
    yield f"time     {sum(result.seconds.values()):.0f} s: " + ", ".join(
        f"{name} {seconds:.1f}" for name, seconds in result.seconds.items()
    )
    low, high = min(result.decode_ratios), max(result.decode_ratios)
    yield f"speed    INT4 decodes {result.speedup:.2f}x as fast ({low:.2f} to {high:.2f} over the repeats)"
    if result.disturbed:
        yield "[bold yellow]note[/]     repeats disagree, other work is running here: do not quote these speeds"
    limit = f"perplexity within {result.max_loss:.0%} of float"
    yield f"[bold green]passed[/]   {limit}" if result.passed else f"[bold red]FAILED[/]   not {limit}"
