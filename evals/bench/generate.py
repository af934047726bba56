"""Whole models, next to other engines: every engine in turn, again and again, each in a process of its own."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from torch_int4 import Int4Error
from torch_int4.evals.bench import engines, roofline, run
from torch_int4.evals.bench.engines import Spec
from torch_int4.evals.bench.shapes import Shape
from torch_int4.evals.bench.token_profile import Profile
from torch_int4.evals.bench.worker import Loaded, Worker

SHORT = 32  # tokens before those whose decoding is timed
PAUSE = 0.1  # seconds in which the threads of who ran before go to sleep
RESERVE = 1 << 30  # bytes of memory that stay free

Note = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """The measurements of a run.

    Attributes:
        tokens: decoded in each round.
        rounds: through all engines, after one to warm up.
        prefill: tokens of the prompt whose time to the first token is measured; 0 for none.
        prefill_rounds: of that.
        batches: sequences decoded at once, besides 1.
        contexts: lengths at which decoding is measured besides; they are reached by prefill, which takes its time.
        profile: tokens to profile on this package's engine; 0 for none.
        speculate: new tokens to decode with guesses, on real weights; 0 for none.
    """

    tokens: int = 32
    rounds: int = 5
    prefill: int = 512
    prefill_rounds: int = 2
    batches: tuple[int, ...] = ()
    contexts: tuple[int, ...] = ()
    profile: int = 0
    speculate: int = 0

    def context(self) -> int:
        """Tokens that a sequence reaches."""
        return max(SHORT + self.tokens, self.prefill, *(length + self.tokens for length in self.contexts), 0) + 8


@dataclass
class Row:
    """One engine: seconds of a token, of the prompt, and bytes. Lists have a number per round."""

    engine: str
    loaded: Loaded
    decode: list[float] = field(default_factory=list)  # mean seconds of a token
    read: list[float] = field(default_factory=list)  # bytes/s read around it: the better of just before and just after
    prefill: list[float] = field(default_factory=list)  # seconds to the first token of `Plan.prefill`
    batches: dict[int, list[float]] = field(default_factory=dict)  # seconds of a step of all sequences
    contexts: dict[int, list[float]] = field(default_factory=dict)  # seconds of a token at that length
    peak: int = 0  # bytes resident at most while running
    failed: str = ""

    def decode_tps(self) -> tuple[float, float]:
        """Tokens per second: of the best round, and of the median one."""
        return 1 / min(self.decode), 1 / statistics.median(self.decode)

    def of_bandwidth(self) -> float:
        """The time that its weights take to be read at the bandwidth of each round, over a token's; the median."""
        size = self.loaded.weight_bytes
        return statistics.median(size / read / token for read, token in zip(self.read, self.decode, strict=True))


@dataclass
class Result:
    """A whole run on one shape."""

    machine: dict[str, Any]
    shape: str
    plan: Plan
    rows: list[Row]
    left_out: dict[str, str]
    profile: Profile | None = None
    speculation: list[Any] = field(default_factory=list)

    def bandwidths(self) -> tuple[float, float]:
        """Bytes per second that were read around the rounds, at least and at most."""
        speeds = [speed for row in self.rows for speed in row.read]
        return min(speeds, default=0.0), max(speeds, default=0.0)


def spec_of(shape: Shape, plan: Plan, threads: int, folder: Path, options: dict[str, Any]) -> Spec:
    """The settings of the engines."""
    return Spec(shape.name, threads, plan.context(), max((1, *plan.batches)), folder, options)


def choose(names: Sequence[str], spec: Spec) -> tuple[list[str], dict[str, str]]:
    """Names of the engines that can run, and why the others cannot.

    Raises:
        Int4Error: for an unknown name.
    """
    found = engines.available()
    if unknown := [name for name in names if name not in found]:
        raise Int4Error(f"engine {unknown[0]!r} is not known; take one of {', '.join(found)}")
    chosen, left_out = [], {}
    for name in names or found:
        reason = found[name].missing(spec)
        if reason is None:
            chosen.append(name)
        else:
            left_out[name] = reason
    return chosen, left_out


def prepare(names: Sequence[str], spec: Spec, note: Note = lambda text: None) -> None:
    """Writes the files that the engines load: minutes and gigabytes for large shapes, once."""
    for name in names:
        note(f"{name}: writing files of {spec.shape}")
        engines.available()[name].prepare(spec)


def measure(spec: Spec, plan: Plan, names: Sequence[str] = (), note: Note = lambda text: None) -> Result:
    """Runs a plan on one shape with the engines named, or all that there are.

    Raises:
        Int4Error: if no engine can run, or one is unknown. An engine that fails is told in its row.
    """
    chosen, left_out = choose(names, spec)
    prepare(chosen, spec, note)
    note("measuring what the machine can do")
    machine = run.machine(0)
    limits = roofline.Roofline().start(repeats=3)
    with ExitStack() as stack:
        workers = _start(chosen, left_out, spec, stack, note)
        if not workers:
            raise Int4Error("no engine can run: " + "; ".join(f"{name}: {why}" for name, why in left_out.items()))
        rows = {row.engine: row for row, _ in workers}
        _rounds(workers, plan, limits.read_now, note)
        _contexts(workers, plan, note)
        _batches(workers, plan, note)
        for row, worker in workers:
            if not row.failed:
                row.peak = worker.ask("peak")
        result = Result(machine, spec.shape, plan, list(rows.values()), left_out)
        _extras(workers, spec, plan, result, note)
    return result


def _start(
    chosen: list[str], left_out: dict[str, str], spec: Spec, stack: ExitStack, note: Note
) -> list[tuple[Row, Worker]]:
    """Loads one engine after the other, as long as there is memory."""
    workers = []
    for name in chosen:
        needed, free = engines.available()[name].memory(spec), available_memory()
        if needed + RESERVE > free:
            left_out[name] = f"needs about {needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free"
            continue
        note(f"{name}: loading {spec.shape}")
        worker = stack.enter_context(Worker(name, spec))
        try:
            workers.append((Row(name, worker.ask("load")), worker))
        except Int4Error as error:
            left_out[name] = str(error)
            worker.close()
    return workers


def available_memory() -> int:
    """Bytes that can be had without swapping, as Linux counts them."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


def prompt(tokens: int) -> list[int]:
    """Token ids that every vocabulary has, not all the same."""
    return [3 + (7 * i) % 251 for i in range(tokens)]


def _rounds(workers: list[tuple[Row, Worker]], plan: Plan, read: Callable[[], float], note: Note) -> None:
    """Decoding after a short prompt, and the time of a long one, with the engines in another order each round.

    `read` gives the bytes that this process reads in a second at that moment.
    """
    order, shuffle = list(workers), random.Random(0)
    for round_ in range(plan.rounds + 1):
        shuffle.shuffle(order)
        for row, worker in order:
            note(f"round {round_} of {plan.rounds}: {row.engine}")
            _guarded(row, partial(_round, row, worker, plan, read, round_))


def _round(row: Row, worker: Worker, plan: Plan, read: Callable[[], float], round_: int) -> None:
    time.sleep(PAUSE)
    before = read()
    time.sleep(PAUSE)
    worker.ask("clear", 1)
    times = worker.ask("extend", prompt(SHORT), 1 + (plan.tokens if round_ else 2))
    if round_:
        time.sleep(PAUSE)
        row.read.append(max(before, read()))
        row.decode.append(statistics.fmean(times[1:]))
    if plan.prefill and 0 < round_ <= plan.prefill_rounds:
        worker.ask("clear", 1)
        row.prefill.append(worker.ask("extend", prompt(plan.prefill), 1)[0])


def _contexts(workers: list[tuple[Row, Worker]], plan: Plan, note: Note) -> None:
    """Decoding at growing lengths; every engine reaches one before any goes on to the next."""
    length = dict.fromkeys((row.engine for row, _ in workers), 0)
    for at, context in enumerate(sorted(plan.contexts)):
        for row, worker in workers:
            note(f"context {context}: {row.engine}")

            def step(row: Row = row, worker: Worker = worker, at: int = at, context: int = context) -> None:
                if at == 0:
                    worker.ask("clear", 1)
                times = worker.ask("extend", prompt(context - length[row.engine]), 1 + plan.tokens)
                length[row.engine] = context + 1 + plan.tokens
                row.contexts[context] = times[1:]

            _guarded(row, step)


def _batches(workers: list[tuple[Row, Worker]], plan: Plan, note: Note) -> None:
    for batch in plan.batches:
        for _ in range(2):
            for row, worker in workers:
                note(f"{batch} sequences: {row.engine}")

                def step(row: Row = row, worker: Worker = worker, batch: int = batch) -> None:
                    if row.loaded.batches:
                        time.sleep(PAUSE)
                        worker.ask("clear", batch)
                        times = worker.ask("extend", prompt(SHORT), 1 + plan.tokens)
                        row.batches.setdefault(batch, []).append(statistics.fmean(times[1:]))

                _guarded(row, step)


def _guarded(row: Row, step: Callable[[], None]) -> None:
    """Does a step unless the engine has failed before, and keeps why it fails."""
    if row.failed:
        return
    try:
        step()
    except Int4Error as error:
        row.failed = str(error)


def _extras(workers: list[tuple[Row, Worker]], spec: Spec, plan: Plan, result: Result, note: Note) -> None:
    """The measurements on this package's engine alone."""
    for row, worker in workers:
        if row.engine != "torch_int4" or row.failed:
            continue
        if plan.profile:
            note("profiling")
            result.profile = worker.ask("profile", plan.profile)
        if plan.speculate and spec.model.file:
            note("decoding with guesses")
            result.speculation = worker.ask("speculate", plan.speculate)
