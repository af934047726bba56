"""Float linears of a model, and those of other backends, one after another into int4 ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from torch_int4 import recipes
from torch_int4.calibration.data import Calibration
from torch_int4.calibration.run import CalibratedPass, Chosen
from torch_int4.config import Int4Config
from torch_int4.errors import Int4Error
from torch_int4.layouts.scales import ScaleFold
from torch_int4.nn.dense import is_conv1d
from torch_int4.nn.extended import extend
from torch_int4.nn.linear import Int4Linear
from torch_int4.patching import foreign as _foreign
from torch_int4.patching import hooks as _hooks
from torch_int4.patching.plan import Plan, Target
from torch_int4.patching.report import PatchedLinear, PatchReport
from torch_int4.support.progress import track
from torch_int4.weights.packed import Memory, PackedWeight
from torch_int4.weights.result import Result
from torch_int4.weights.types import INT4


def calibrated_pass(plan: Plan, data: tuple[Any, Any], progress: bool | None) -> CalibratedPass | None:
    """The pass over calibration data, if the recipe needs one or the user gave data that it can use."""
    config = plan.config
    recipe = recipes.parse(config.recipe)
    rounded = any(target.kind is INT4 for target in plan.targets)
    wants_clip = data[0] is not None and recipe.configure(config.weights).clip
    if not rounded or not (recipe.needs_calibration or wants_clip):
        return None
    return CalibratedPass(plan.survey.model, *chosen_and_facts(plan), config, Calibration.of(*data), progress)


def chosen_and_facts(plan: Plan) -> tuple[Chosen, dict[int, tuple[ScaleFold, ...]]]:
    """The linears to quantize, and the scale folds of their families, as the pass over calibration data takes them."""
    chosen = {target.name: (target.module, target.bits) for target in plan.targets if target.module is not None}
    return chosen, {key: family.folds for key, family in plan.survey.families.items() if family.folds}


def convert_foreign(
    plan: Plan, report: PatchReport, memory: Memory, progress: bool | None, on_freed: Callable[[], None]
) -> None:
    """Take over the linears of other backends, one after another; `on_freed` is called when the first lets go."""
    for done, target in enumerate(track(plan.foreign, "linears", show=progress)):
        try:
            _foreign.convert(target, plan.config, report, memory)
            on_freed()
        except Exception as error:
            state = f"after {done} of {len(plan.foreign)} linears, so the model must be loaded again"
            raise Int4Error(
                f"{target.name}: taking it over from its backend failed {state if done else 'at once'}: {error}"
            ) from error


def convert_all(
    plan: Plan,
    report: PatchReport,
    memory: Memory,
    progress: bool | None,
    calibrated: CalibratedPass | None,
    on_freed: Callable[[], None],
) -> None:
    """Quantize linears and put the int4 ones in their places, one after another; `on_freed` as above."""
    done, targets = 0, plan.targets
    try:
        for target, result in _results(targets, plan.config, progress, calibrated):
            report.linears.append(_replace(target, result, plan.config, memory))
            on_freed()
            done += 1
    except Exception as error:
        if done == len(targets):  # after the last of them, or there were none
            raise
        state = f"after {done} of {len(targets)} linears, so the model is half int4 and must be loaded again"
        if done + len(plan.foreign) == 0:
            state = "at once, and the model is unchanged"
        raise Int4Error(f"{targets[done].name}: conversion failed {state}: {error}") from error
    if calibrated is not None:
        report.notices += calibrated.notices


def _results(
    targets: list[Target], config: Int4Config, progress: bool | None, calibrated: CalibratedPass | None
) -> Iterator[tuple[Target, Result]]:
    """Every target with the result of rounding it: those in blocks from the pass over data, then all others."""
    by_name = {target.name: target for target in targets}
    if calibrated is not None:
        for name, result in calibrated.results():
            yield by_name.pop(name), result
    recipe, nearest = recipes.parse(config.recipe), recipes.get("rtn")
    rounding = recipe.rounding if calibrated is None else nearest
    show = progress if calibrated is None else False
    for target in track(list(by_name.values()), "linears", show=show):
        old = target.module
        assert old is not None
        assert isinstance(old.weight, Tensor)
        dense = old.weight.detach().t() if is_conv1d(old) else old.weight.detach()
        stage = rounding if target.kind is INT4 else nearest
        found = stage.quantize(dense, config.weights, bits=target.bits, name=target.name)
        yield target, recipe.checked(Result.of(found), dense.shape, target.name)


def _replace(target: Target, result: Result, config: Int4Config, memory: Memory) -> PatchedLinear:
    """Put the new module into every place of a linear, and let go of the old one."""
    old = target.module
    assert old is not None
    assert isinstance(old.weight, Tensor)
    weight = old.weight.detach()
    before = weight.numel() * weight.element_size()
    rows, inputs = result.weight.codes.shape
    bias = old.bias if isinstance(old.bias, Tensor) else None
    packed = PackedWeight.pack(result.weight, memory)
    new = Int4Linear(packed, bias, compute=config.compute, dtype=weight.dtype)
    extend(new, result.extras)
    extras = tuple(result.extras)
    entry = PatchedLinear(target.name, rows, inputs, target.bits, before, new.nbytes, target.shared, extras)
    _hooks.replace(old, new, target.places)
    target.module = None
    return entry
