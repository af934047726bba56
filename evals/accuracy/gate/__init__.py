"""The accuracy gate of CI: a small real model in float and in int4 on fixed text, against floors in ``floors.toml``.

It needs neither lm-eval nor data from elsewhere, and runs in well under a minute: `run` measures perplexity, KL
divergence and agreement on ``text.txt``, and the right next words of ``cloze.txt``. Floors lie a little beside what was
measured, so that a kernel or a recipe which gets worse fails, on any instruction set.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

import torch_int4
from torch_int4.config import Int4Config
from torch_int4.errors import Int4Error
from torch_int4.evals import models
from torch_int4.evals.accuracy.perplexity import Perplexity, perplexity

FOLDER = Path(__file__).parent
TOKENS, WINDOW = 640, 160
_LIMITS = {"max_rise": "rise", "max_kl": "kl", "min_agreement": "agreement", "min_cloze": "cloze"}


@dataclass(frozen=True)
class Floor:
    """The floor of one int4 model.

    Attributes:
        name: heading of its table in the file.
        config: how to quantize.
        max_rise: of perplexity, relative to float.
        max_kl: mean KL(float || int4), nats per token.
        min_agreement: share of positions with the same most likely token.
        min_cloze: right next words.
    """

    name: str
    config: Int4Config
    max_rise: float
    max_kl: float
    min_agreement: float
    min_cloze: int


@dataclass(frozen=True)
class Measured:
    """The figures of an int4 model; fields as in `Floor`."""

    rise: float
    kl: float
    agreement: float
    cloze: int

    def below(self, floor: Floor) -> list[str]:
        """Every limit that is not kept, in words; NaN keeps none."""
        found = []
        for limit, name in _LIMITS.items():
            wanted, value = getattr(floor, limit), getattr(self, name)
            kept = value <= wanted if limit.startswith("max") else value >= wanted
            if not kept:
                found.append(f"{floor.name}: {name} is {value:.4g}, {limit} is {wanted:.4g}")
        return found


def floors(path: str | Path = FOLDER / "floors.toml") -> list[Floor]:
    """The floors of a file.

    Raises:
        Int4Error: a table lacks a limit, or holds something unknown.
    """
    found = []
    for name, table in _read(Path(path)).items():
        if set(table) != {"config", *_LIMITS}:
            raise Int4Error(f"{path}: [{name}] must have config, {', '.join(_LIMITS)}; it has {', '.join(table)}")
        limits = {limit: table[limit] for limit in _LIMITS}
        found.append(Floor(name=name, config=Int4Config.with_overrides(None, **table["config"]), **limits))
    return found


class Gate:
    """The float model's answers, against which any number of int4 models are measured.

    Args:
        model_dir: directory of the float model; None for SmolLM2-135M-Instruct, which the floors are of.
    """

    def __init__(self, model_dir: str | Path | None = None) -> None:
        self.model_dir = model_dir
        model, tokenizer = models.load(model_dir)
        text = (FOLDER / "text.txt").read_text(encoding="utf-8")
        self.tokens = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][0, :TOKENS]
        self.cloze = list(_cloze(tokenizer))
        self.float_cloze = self._right(model)
        self._recorded = _Recorded(model)
        self.float_score = perplexity(self._recorded, self.tokens, window=WINDOW)

    def quantized(self, config: Int4Config) -> Any:
        """The model in int4, loaded afresh."""
        model, _ = models.load(self.model_dir)
        return torch_int4.patch(model, config)

    def measure(self, model: Any) -> Measured:
        """The figures of an int4 model of the same tokenizer."""
        self._recorded.rewind()
        score: Perplexity = perplexity(model, self.tokens, window=WINDOW, reference=self._recorded)
        if score.kl is None or score.agreement is None:
            raise AssertionError("a score with a reference has both")
        return Measured(score.ppl / self.float_score.ppl - 1, score.kl, score.agreement, self._right(model))

    @torch.inference_mode()
    def _right(self, model: Any) -> int:
        """How many of the cloze lines continue with the right token."""
        return sum(
            int(model(ids[None], use_cache=False).logits[0, -1].argmax()) == answer for ids, answer in self.cloze
        )


class _Recorded(nn.Module):
    """A model that runs once: later passes over the same windows repeat its logits."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self._model: Any = model
        self._logits: list[torch.Tensor] = []
        self._next = 0

    def forward(self, ids: torch.Tensor, **options: Any) -> Any:
        """Logits of the next window."""
        if self._model is not None:
            self._logits.append(self._model(ids, **options).logits)
            return SimpleNamespace(logits=self._logits[-1])
        self._next += 1
        return SimpleNamespace(logits=self._logits[self._next - 1])

    def rewind(self) -> None:
        """Starts over; the model itself is let go."""
        self._model, self._next = None, 0


def run(
    path: str | Path = FOLDER / "floors.toml",
    *,
    model_dir: str | Path | None = None,
    note: Callable[[str], None] = lambda line: None,
) -> list[str]:
    """Measures every model of the file; what is below its floor, in words, so that an empty list is a pass."""
    gate, failures = Gate(model_dir), []
    for floor in floors(path):
        measured = gate.measure(gate.quantized(floor.config))
        failures += measured.below(floor)
        note(f"{floor.name}: {measured}")
    return failures


def _read(path: Path) -> Mapping[str, Any]:
    try:
        import tomllib
    except ModuleNotFoundError:  # Python 3.10
        import tomli as tomllib
    return tomllib.loads(path.read_text(encoding="utf-8"))


def _cloze(tokenizer: Any) -> Iterator[tuple[torch.Tensor, int]]:
    """(ids [T], the right next id); a line is a beginning and its continuation, of which the first token counts."""
    for line in (FOLDER / "cloze.txt").read_text(encoding="utf-8").splitlines():
        beginning, answer = line.split("|")
        ids = tokenizer(beginning, return_tensors="pt")["input_ids"][0]
        yield ids, tokenizer(answer, add_special_tokens=False)["input_ids"][0]
