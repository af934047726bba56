"""`patch`: replace the linears of a model in place, layer by layer."""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from typing import Any, TypeVar

from torch import nn

from torch_int4.calibration.run import CalibratedPass
from torch_int4.config import Int4Config
from torch_int4.errors import Int4Error
from torch_int4.nn.linear import Int4Linear
from torch_int4.nn.shared_input import merge_inputs
from torch_int4.patching import convert as _convert
from torch_int4.patching import embedding as _embedding
from torch_int4.patching import experts as _experts
from torch_int4.patching import families
from torch_int4.patching import foreign as _foreign
from torch_int4.patching import fuse_attention as _attention
from torch_int4.patching import fuse_layers as _block
from torch_int4.patching import fuse_stack as _stack
from torch_int4.patching import kept_in_fp32 as _fp32
from torch_int4.patching import stages as _stages
from torch_int4.patching import ties as _ties
from torch_int4.patching.plan import Foreign, Plan, Survey, Target, decide
from torch_int4.patching.refusals import Refusals
from torch_int4.patching.report import PatchReport, count_floats
from torch_int4.support.snapshot import Snapshot
from torch_int4.weights.arena import return_memory

ModelT = TypeVar("ModelT", bound=nn.Module)


def patch(
    model: ModelT,
    config: Int4Config | None = None,
    *,
    calibration: Any = None,
    tokenizer: Any = None,
    family: families.Family | str | None = None,
    progress: bool | None = None,
    **overrides: Any,
) -> ModelT:
    """Replace the linears of `model` by int4 ones, in place, and return it.

    Every `nn.Linear` is replaced (and GPT-2's `Conv1D`), the projection onto the vocabulary and the
    embeddings as the config says. Linears that another backend has loaded (GPTQ, AWQ, AutoRound, compressed-tensors,
    bitsandbytes, HQQ, torchao, GGUF) are taken over as they are, with the codes and groups that they have. Attention
    runs in fused operators over a managed KV cache, where the model is of a kind that we know; else it stays what it
    was. Float weights are freed layer by layer, so that at most one layer is held in both forms. What was
    done is measured in `model.torch_int4_report`, which can be printed.
    Everything is checked before anything is changed. Patching a model again with the same config does nothing.

    Args:
        model: any module on the CPU, with weights loaded.
        config: how to quantize; `Int4Config()` by default.
        calibration: what recipes that need data look at: texts, a `Dataset`, token ids, a DataLoader, or a
            `Calibration` that also says how much of it; a built-in text, with a warning, where nothing is given.
            Recipes that need no data use it for the clip search.
        tokenizer: for calibration with texts.
        family: facts about the model's modules, a `Family` or the name of one; by default found by
            `model.config.model_type`, and generic where that is unknown.
        progress: show a progress bar; by default where the standard error output is a terminal.
        **overrides: fields of `Int4Config`, changed in `config`.

    Raises:
        Int4Error: naming the module and the reason, with the model unchanged. If a conversion fails
            nevertheless (out of memory) when float weights have been freed, it says that the model has to be loaded
            again.
    """
    config = Int4Config.with_overrides(config, **overrides)
    given = families.resolve(family)
    if not isinstance(model, nn.Module):
        raise Int4Error(f"patch() needs a torch.nn.Module; got {type(model).__name__}")
    report = _previous_report(model, config) or PatchReport(config)
    undo = _Undo(model, report)
    try:
        split = _experts.split(model, config)
        plan = decide(Survey(model, given), config)
        plan.skipped += split.skipped
        _carry_out(plan, report, (calibration, tokenizer), progress, undo)
    except BaseException:
        undo.run()
        raise
    return model


def carry_out(
    plan: Plan, report: PatchReport, data: tuple[Any, Any] = (None, None), progress: bool | None = None
) -> Any:
    """Do what a plan says, fuse what can be fused, and return the model.

    Args:
        plan: of a model that nothing was done to since it was surveyed.
        report: what was done to the model before; it is written on.
        data: calibration and tokenizer, as `patch` gets them.
        progress: as there.

    Raises:
        Int4Error: as `patch` says.
    """
    undo = _Undo(plan.survey.model, report)
    try:
        _carry_out(plan, report, data, progress, undo)
    except BaseException:
        undo.run()
        raise
    return plan.survey.model


class _Undo:
    """Puts a model back as it was, for as long as no float weight was let go of; then as it was with int4 linears."""

    def __init__(self, model: nn.Module, report: PatchReport) -> None:
        self._model, self._report = model, report
        self.renew()

    def renew(self) -> None:
        """From now on the model goes back to what it is now."""
        before = Snapshot(self._model)
        said = {name: list(x) if isinstance(x, list) else x for name, x in vars(self._report).items()}
        self._before: Snapshot | None = before
        self._said = said

    def forget(self) -> None:
        """Lets float weights go, after which there is no way back."""
        self._before = None

    def run(self) -> None:
        """Undoes what was done, if that is possible."""
        if self._before is not None:
            self._before.restore()
            vars(self._report).update(self._said)


def _carry_out(plan: Plan, report: PatchReport, data: tuple[Any, Any], progress: bool | None, undo: _Undo) -> None:
    model: Any = plan.survey.model
    if not (plan.targets or plan.foreign or plan.survey.holds_int4 or report.linears):
        raise Int4Error(_nothing_to_do(model, plan.skipped))
    calibrated = _convert.calibrated_pass(plan, data, progress)
    whole = _stages.whole_model(plan, calibrated)
    if plan.changes_nothing and report.complete:
        return
    report.complete = False
    model.torch_int4_report = report
    if whole is not None and whole.recipe.preparing:
        plan = _stages.prepare(whole, plan, calibrated)
    _replace_linears(plan, report, calibrated, progress, undo)
    while plan.embeddings:
        _embedding.store_bf16(*plan.embeddings.pop(), report)
    if whole is not None:
        _stages.finish(whole, plan.targets, report)
    undo.renew()
    if plan.foreign:
        _foreign.forget_backend(model)
    _fp32.keep(model, report)
    report.merged += _merge(model, plan.survey.families)
    _fuse(model, plan.survey.families, report)
    report.skipped = plan.skipped + plan.kept
    report.floats = count_floats(model)
    report.complete = True
    _make_saveable(model, plan.config)
    return_memory()


def _replace_linears(
    plan: Plan, report: PatchReport, calibrated: CalibratedPass | None, progress: bool | None, undo: _Undo
) -> None:
    model, memory = plan.survey.model, plan.arena().take
    ties = _ties.record(model)
    try:
        _convert.convert_foreign(plan, report, memory, progress, undo.forget)
        _convert.convert_all(plan, report, memory, progress, calibrated, undo.forget)
    finally:  # also after a failure the rest has to stay consistent
        done: list[Target | Foreign] = [*plan.targets, *plan.foreign]
        _ties.forget(model, ties, {name for target in done if target.module is None for name in target.names})


def _fuse(model: nn.Module, by_module: dict[int, families.Family], report: PatchReport) -> None:
    """Fuse what the families know, and say what of it could not be."""
    refusals = Refusals()
    fused = _attention.fuse(model, by_module, report.config, refusals)
    report.fused += fused.modules
    report.interfaces += fused.interfaces
    report.blocks += _block.fuse(model, by_module, refusals)
    _stack.fuse(model)
    report.experts, report.experts_modules = _experts.fuse(model)
    report.unfused = refusals.lines()
    if report.unfused:
        warnings.warn(f"torch_int4: not fused, and so slower: {'. '.join(report.unfused)}", stacklevel=4)


def _previous_report(model: nn.Module, config: Int4Config) -> PatchReport | None:
    """The report of an earlier patch of this model; that of it or of a part must have the same config."""
    for name, module in model.named_modules():
        report = getattr(module, "torch_int4_report", None)
        if isinstance(report, PatchReport) and report.config != config:
            where = name or type(model).__name__
            raise Int4Error(
                f"{where}: is patched already, with {report.config}, and its float weights are gone. "
                "To use another config, load the model again and patch that"
            )
    report = getattr(model, "torch_int4_report", None)
    return report if isinstance(report, PatchReport) else None


def _nothing_to_do(model: nn.Module, skipped: list[tuple[str, str]]) -> str:
    kind = type(model).__name__
    if isinstance(model, nn.Linear):
        return f"{kind}: cannot be replaced in place; put it into a module, or use Int4Linear.from_weight"
    if not skipped:
        return f"{kind}: has no nn.Linear, so there is nothing to patch"
    reasons = "; ".join(f"{name}: {reason}" for name, reason in skipped[:3])
    return f"{kind}: none of its {len(skipped)} linears can be patched ({reasons})"


def _merge(model: nn.Module, by_module: dict[int, families.Family]) -> int:
    """Merge linears that share an input, where a whole group is int4; the number of groups."""
    count = 0
    holders = Counter(id(child) for parent in model.modules() for child in parent._modules.values())
    for parent in model.modules():
        family = by_module.get(id(parent))
        if family is None or any(name in parent._modules for name in family.not_shared_beside):
            continue
        for group in family.shared_inputs:
            found = [_descendant(parent, name) for name in group]
            linears = [m for m in found if isinstance(m, Int4Linear) and _may_merge(m) and holders[id(m)] == 1]
            if len(linears) == len(group) and merge_inputs(linears):
                count += 1
    return count


def _descendant(module: nn.Module, path: str) -> nn.Module | None:
    found: nn.Module | None = module
    for name in path.split("."):
        found = found._modules.get(name) if found is not None else None
    return found


def _may_merge(linear: Int4Linear) -> bool:
    """Whether a linear is not merged yet and gets its parent's input: a hook may give it another one."""
    return linear._shared is None and not linear._forward_pre_hooks


def _make_saveable(model: nn.Module, config: Int4Config) -> None:
    if "transformers" in sys.modules:  # else there is nothing of theirs
        from torch_int4.checkpoint.saving import make_saveable
        from torch_int4.patching.resize import make_resizable

        make_resizable(model)
        _tell_of_training(model)
        make_saveable(model, config)


def _tell_of_training(model: nn.Module) -> None:
    from transformers import PreTrainedModel

    from torch_int4.nn.told import TellsOfTraining
    from torch_int4.support.mixins import mix_in

    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            mix_in(TellsOfTraining, module)
