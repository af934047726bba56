"""Stages of recipes that work on the model as a whole, around the conversion of its linears."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from torch_int4 import recipes
from torch_int4.calibration.run import CalibratedPass
from torch_int4.calibration.whole import WholeModel
from torch_int4.errors import Int4Error
from torch_int4.nn.extended import extend, extras_of
from torch_int4.nn.linear import Int4Linear
from torch_int4.patching.convert import chosen_and_facts
from torch_int4.patching.plan import Plan, Survey, Target, decide
from torch_int4.patching.report import PatchReport
from torch_int4.weights.result import Extra
from torch_int4.weights.types import INT4


def whole_model(plan: Plan, calibrated: CalibratedPass | None) -> WholeModel | None:
    """The model as such stages see it.

    None where the recipe has none, where nothing becomes 4 bits, and where the model holds int4 linears already: these
    stages have then run, before it was saved or on a part of it.

    Raises:
        Int4Error: a stage would change a model whose linears another backend has quantized.
    """
    model, config = plan.survey.model, plan.config
    recipe = recipes.parse(config.recipe)
    if not (recipe.preparing or recipe.finishing) or not any(target.kind is INT4 for target in plan.targets):
        return None
    if any(
        isinstance(module, Int4Linear) for module in model.modules()
    ):  # also those that a loader has put there since
        return None
    if recipe.preparing and plan.foreign:
        raise Int4Error(
            f"{plan.foreign[0].name}: is quantized already, and Int4Config.recipe={config.recipe!r} changes the float "
            "model as a whole; load the float checkpoint, or choose another recipe"
        )
    return WholeModel(
        model, bits_of(plan.targets), config, calibrated, lambda name, extras: _extend(model, name, extras)
    )


def prepare(whole: WholeModel, plan: Plan, calibrated: CalibratedPass | None) -> Plan:
    """Let the stages of the recipe change the model, and plan anew.

    Raises:
        Int4Error: also where the changed model cannot be served; it is no longer the one that was given.
    """
    whole.prepare()
    try:
        plan = decide(Survey(plan.survey.model, plan.survey.given), plan.config)
        if calibrated is not None:
            calibrated.capture(*chosen_and_facts(plan))
        return plan
    except Int4Error as error:
        raise Int4Error(f"{error} (its recipe has prepared the model by now, so it must be loaded again)") from error


def bits_of(targets: Sequence[Target]) -> dict[str, int]:
    """Bits of the linears to be quantized, by name."""
    return {target.name: target.bits for target in targets}


def finish(whole: WholeModel, targets: Sequence[Target], report: PatchReport) -> None:
    """Let the stages of the recipe work on the model whose linears are int4, and measure these anew."""
    whole.finish(bits_of(targets))
    report.notices += [notice for notice in whole.model.notices if notice not in report.notices]
    for place, entry in enumerate(report.linears):
        linear = whole.model.module.get_submodule(entry.name)
        assert isinstance(linear, Int4Linear)
        report.linears[place] = entry.measured(linear.nbytes, tuple(extras_of(linear)))


def _extend(model: nn.Module, name: str, extras: Mapping[str, Extra]) -> None:
    linear = model.get_submodule(name)
    if not isinstance(linear, Int4Linear):
        raise Int4Error(f"{name}: is no int4 linear, so it can have no extras")
    extend(linear, extras)
