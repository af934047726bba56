"""One engine in a process of its own: its memory is its own, and its threads sleep while others are timed."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch_int4 import Int4Error
from torch_int4.evals.bench import engines
from torch_int4.evals.bench.engines import Spec
from torch_int4.evals.speed.process import peak_bytes, reset_peak, resident_bytes


@dataclass(frozen=True)
class Loaded:
    """An engine's description of itself once it is there; sizes in bytes."""

    version: str
    weight_bytes: int
    batches: bool
    resident: int
    peak_loading: int


class Worker:
    """A process that holds one engine and does what it is told, one thing at a time."""

    def __init__(self, name: str, spec: Spec) -> None:
        self.name = name
        context = multiprocessing.get_context("spawn")  # a forked child would inherit OpenMP's state
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, name, spec), daemon=True)
        with _environment(spec.threads):
            self._process.start()
        theirs.close()

    def ask(self, what: str, *arguments: Any) -> Any:
        """Has a function of this module run in the process, and returns its result.

        Raises:
            Int4Error: with what went wrong there, or that the process ended.
        """
        try:
            self._pipe.send((what, arguments))
            error, result = self._pipe.recv()
        except (EOFError, OSError) as gone:
            self._process.join(5)
            raise Int4Error(
                f"{self.name}: its process ended with code {self._process.exitcode} (-9: out of memory) at {what!r}"
            ) from gone
        if error:
            raise Int4Error(f"{self.name}: {error}")
        return result

    def close(self) -> None:
        """Ends the process."""
        self._pipe.close()
        self._process.join(5)
        if self._process.is_alive():
            self._process.terminate()
            self._process.join(5)

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


@contextlib.contextmanager
def _environment(threads: int) -> Iterator[None]:
    """The variables that libraries read as they start: the number of threads. Waiting ones spin a while, as they do for
    users; the pauses between turns are longer than that."""
    wanted = {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name)
            else:
                os.environ[name] = value


def _serve(pipe: Any, name: str, spec: Spec) -> None:
    """The loop of the process."""
    import torch

    torch.set_num_threads(spec.threads)
    engine: Any = None
    while True:
        try:
            what, arguments = pipe.recv()
        except (EOFError, KeyboardInterrupt):
            return
        try:
            if what == "load":
                engine = engines.available()[name](spec)
                pipe.send(("", _loaded(engine)))
            else:
                pipe.send(("", _ANSWERS[what](engine, *arguments)))
        except Int4Error as error:
            pipe.send((str(error), None))
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            pipe.send((f"{type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})", None))


def _loaded(engine: Any) -> Loaded:
    found = Loaded(engine.version(), engine.weight_bytes, engine.batches, resident_bytes(), peak_bytes())
    reset_peak()  # from here on it is the peak of running
    return found


def _profile(engine: Any, tokens: int) -> Any:
    from torch_int4.evals.bench import token_profile

    return token_profile.measure(engine, tokens)


def _speculate(engine: Any, new: int) -> Any:
    from torch_int4.evals.bench import speculation

    return speculation.measure(engine.model, new)


_ANSWERS: dict[str, Any] = {
    "clear": lambda engine, batch: engine.clear(batch),
    "extend": lambda engine, tokens, new: engine.extend(tokens, new),
    "peak": lambda engine: peak_bytes(),
    "profile": _profile,
    "speculate": _speculate,
}
