"""Errors raised inside of torch_int4 at any call of any of its functions, found by watching a run."""

import random
import sys
from pathlib import Path
from types import CodeType
from typing import NamedTuple

import torch_int4

ROOT = f"{Path(torch_int4.__file__).parent}/"


class BrokenError(Exception):
    """Raised where a test wants an error to be."""


class Step(NamedTuple):
    """A call: the function, and how many calls of it go before."""

    code: CodeType
    before: int

    def __str__(self):
        place = self.code.co_filename.removeprefix(ROOT).removesuffix(".py").replace("/", ".")
        return f"{place}.{getattr(self.code, 'co_qualname', self.code.co_name)}, after {self.before} calls"


def steps_of(run, most=100):
    """A sample of the calls of functions of torch_int4 that `run()` makes, in the order of the functions' first calls.

    Of each function that the sample takes, it has the first call or the last one. A second run is watched, so that
    functions which a process calls once and then remembers are left out.
    """
    run()
    counts = {}

    def watch(frame, event, argument):
        if event == "call" and frame.f_code.co_filename.startswith(ROOT):
            counts[frame.f_code] = counts.get(frame.f_code, 0) + 1

    sys.setprofile(watch)
    try:
        run()
    finally:
        sys.setprofile(None)
    chosen = random.Random(0).sample(list(counts), min(most, len(counts)))
    last = set(chosen[::2])
    return [Step(code, count - 1 if code in last else 0) for code, count in counts.items() if code in chosen]


class broken:  # noqa: N801
    """Inside of the block the call of a step raises `BrokenError`, once.

    Attributes:
        reached: whether it was called.
    """

    def __init__(self, step):
        self.step, self.reached, self._left = step, False, step.before

    def _profile(self, frame, event, argument):
        if event != "call" or frame.f_code is not self.step.code or self.reached:
            return
        if self._left == 0:
            self.reached = True
            raise BrokenError(str(self.step))  # the interpreter raises it in the frame, and drops the profile
        self._left -= 1

    def __enter__(self):
        sys.setprofile(self._profile)
        return self

    def __exit__(self, *raised):
        sys.setprofile(None)
