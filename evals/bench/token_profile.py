"""The time of one generated token by its parts: our operators, torch's, Python around them, and generate's own loop."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch

CONTEXT = 32  # tokens before the measured ones
OURS = "torch_int4::"


@dataclass(frozen=True)
class Profile:
    """Seconds of a token; `operators` by name of our operators, with calls a token."""

    token_s: float  # of generate, undisturbed
    forward_s: float  # of the model's forward in it
    operators: dict[str, tuple[float, float]]
    framework_s: float  # torch's own operators, as the profiler sees them, its own cost included
    framework_calls: float

    @property
    def operators_s(self) -> float:
        """All of our operators."""
        return sum(seconds for seconds, _ in self.operators.values())

    @property
    def python_s(self) -> float:
        """The rest of the forward: Python, dispatch, allocation. Not below 0, for the profiler slows operators."""
        return max(self.forward_s - self.operators_s - self.framework_s, 0.0)

    @property
    def loop_s(self) -> float:
        """The work of generate around the forward: preparing inputs, choosing the token, checking for the end."""
        return self.token_s - self.forward_s

    def rows(self) -> list[tuple[str, float, float]]:
        """(what, calls a token, seconds a token), our operators first."""
        ordered = sorted(self.operators.items(), key=lambda item: -item[1][0])
        return [
            *((f"{OURS}{name}", calls, seconds) for name, (seconds, calls) in ordered),
            ("torch's operators", self.framework_calls, self.framework_s),
            ("Python and dispatch in the forward", 0.0, self.python_s),
            ("generate's loop and choosing the token", 0.0, self.loop_s),
        ]


def measure(engine: Any, tokens: int) -> Profile:
    """Profiles `tokens` generated tokens of an engine that runs transformers' generate."""
    prompt = list(range(1, CONTEXT + 1))
    engine.clear(1)
    engine.extend(prompt, 4)
    engine.clear(1)
    engine.extend(prompt, 1)
    token_s, forward_s = _undisturbed(engine, tokens)
    engine.clear(1)
    engine.extend(prompt, 1)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as found:
        engine.extend([1], tokens + 1)
    operators: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    framework, calls = 0.0, 0
    for event in found.key_averages():
        if event.key.startswith(OURS):
            entry = operators[event.key.removeprefix(OURS)]
            entry[0] += event.self_cpu_time_total * 1e-6 / (tokens + 1)
            entry[1] += event.count / (tokens + 1)
        elif event.key.startswith("aten::"):
            framework += event.self_cpu_time_total * 1e-6 / (tokens + 1)
            calls += event.count
    return Profile(
        token_s=token_s,
        forward_s=forward_s,
        operators={name: (seconds, count) for name, (seconds, count) in operators.items()},
        framework_s=framework,
        framework_calls=calls / (tokens + 1),
    )


def _undisturbed(engine: Any, tokens: int) -> tuple[float, float]:
    """Median seconds of a token, and of the forward inside of it, without the profiler."""
    spent: list[float] = []
    stock = engine.model.forward

    def timed(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        result = stock(*args, **kwargs)
        spent.append(time.perf_counter() - start)
        return result

    # transformers reads the signature of forward to see what the model takes.
    timed.__wrapped__ = stock  # type: ignore[attr-defined]
    engine.model.forward = timed
    try:
        times = engine.extend([1], tokens + 1)
    finally:
        del engine.model.forward
    return statistics.median(times[1:]), statistics.median(spent[1:])
