"""The facts about an experts module of transformers that tell how its weights become linears: data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ExpertsLayout:
    """How an experts module computes.

    Attributes:
        count: experts.
        gated: whether they compute down(activation(gate(x)) * up(x)), or down(activation(up(x))).
        concatenated: whether its `_apply_gate` takes the features of gate before those of up, or takes them in turns.
        activation: what the operators call it; None where they do not have it.
    """

    count: int
    gated: bool
    concatenated: bool
    activation: str | None

    @property
    def linears(self) -> tuple[str, ...]:
        """Names of an expert's linears, in the order of the operators."""
        return ("gate_proj", "up_proj", "down_proj") if self.gated else ("up_proj", "down_proj")
