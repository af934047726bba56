"""`patch`: replace the linears of a model in place, layer by layer."""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .. import recipes
from ..calibrated import CalibratedPass
from ..calibration import Calibration
from ..config import Int4Config
from ..errors import Int4Error
from ..linear import Int4Linear
from ..merge import merge_inputs
from ..weight import Int4Weight
from . import _attention, _foreign, _scan, _ties, families
from ._embedding import Bf16Embedding
from ._report import PatchedLinear, PatchReport
from ._scan import Target

ModelT = TypeVar("ModelT", bound=nn.Module)
ItemT = TypeVar("ItemT")

# Moved as the same objects: a handle that a user keeps can then still remove its hook.
HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)


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
            nevertheless (out of memory), it says that the model has to be loaded again.
    """
    config = Int4Config.with_overrides(config, **overrides)
    given = families.resolve(family)
    if not isinstance(model, nn.Module):
        raise Int4Error(f"patch() needs a torch.nn.Module; got {type(model).__name__}")
    report = _previous_report(model, config) or PatchReport(config)

    by_module = families.of_modules(model, given)
    targets, skipped = _scan.find_targets(model, config, _scan.find_head(model, by_module[id(model)]))
    foreign = _foreign.find(model, config)
    taken = {name for target in foreign for name in target.names}
    skipped = [entry for entry in skipped if entry[0] not in taken]
    embeddings, kept = _find_embeddings(model, config, targets)
    if not targets and not foreign and not any(isinstance(m, Int4Linear) for m in model.modules()):
        raise Int4Error(_nothing_to_do(model, skipped))

    calibrated = _calibrated(model, targets, config, by_module, (calibration, tokenizer), progress)
    if targets or foreign or embeddings or not report.complete:
        report.complete = False
        model.torch_int4_report = report  # type: ignore[assignment]
        ties = _ties.record(model)
        try:
            _convert_foreign(foreign, config, report, progress)
            _convert_all(targets, config, report, progress, calibrated)
        finally:  # also after a failure the rest has to stay consistent
            replaced = {name for target in targets if target.module is None for name in target.names}
            _ties.forget(model, ties, replaced)
        while embeddings:
            _store_bf16(*embeddings.pop(), report)
        if foreign:
            _foreign.forget_backend(model)
        report.merged += _merge(model, by_module)
        fused, interfaces = _attention.fuse(model, by_module, config)
        report.fused += fused
        report.interfaces += interfaces
        report.skipped = skipped + kept
        report.complete = True
        _make_saveable(model, config)
        _return_memory()
    return model


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


def _calibrated(
    model: nn.Module,
    targets: list[Target],
    config: Int4Config,
    by_module: dict[int, families.Family],
    data: tuple[Any, Any],
    progress: bool | None,
) -> CalibratedPass | None:
    """The pass over calibration data, if the recipe needs one or the user gave data that it can use."""
    recipe = recipes.parse(config.recipe)
    four_bits = [target for target in targets if target.bits == 4]
    if not four_bits or not (recipe.needs_calibration or (data[0] is not None and recipe.configure(config).clip)):
        return None
    chosen = {target.name: (target.module, target.bits) for target in targets if target.module is not None}
    facts = {key: family.folds for key, family in by_module.items() if family.folds}
    return CalibratedPass(model, chosen, facts, config, Calibration.of(*data), progress)


def _convert_foreign(
    foreign: list[_foreign.Foreign], config: Int4Config, report: PatchReport, progress: bool | None
) -> None:
    for done, target in enumerate(_with_progress(foreign, progress)):
        try:
            _foreign.convert(target, config, report, HOOKS)
        except Exception as error:
            state = f"after {done} of {len(foreign)} linears, so the model must be loaded again" if done else "at once"
            raise Int4Error(f"{target.name}: taking it over from its backend failed {state}: {error}") from error


def _convert_all(
    targets: list[Target],
    config: Int4Config,
    report: PatchReport,
    progress: bool | None,
    calibrated: CalibratedPass | None,
) -> None:
    done = 0
    try:
        for target, weight in _weights(targets, config, progress, calibrated):
            report.linears.append(_replace(target, weight, config))
            done += 1
    except Exception as error:
        raise Int4Error(
            f"{targets[done].name}: conversion failed after {done} of {len(targets)} linears, so the model is "
            f"half int4 and must be loaded again: {error}"
        ) from error
    if calibrated is not None:
        report.notices += calibrated.notices


def _weights(
    targets: list[Target], config: Int4Config, progress: bool | None, calibrated: CalibratedPass | None
) -> Iterator[tuple[Target, Int4Weight]]:
    """Every target with its quantized weight: those in blocks from the pass over data, then all others."""
    by_name = {target.name: target for target in targets}
    if calibrated is not None:
        for name, weight in calibrated.weights():
            yield by_name.pop(name), weight
    rounding = recipes.parse(config.recipe).rounding if calibrated is None else recipes.get("rtn")
    for target in _with_progress(list(by_name.values()), progress and calibrated is None):
        old = target.module
        assert old is not None
        assert isinstance(old.weight, Tensor)
        dense = old.weight.detach().t() if _scan.is_conv1d(old) else old.weight.detach()
        recipe = rounding if target.bits == 4 else recipes.get("rtn")
        yield target, recipe.quantize(dense, config, bits=target.bits, name=target.name)


def _replace(target: Target, quantized: Int4Weight, config: Int4Config) -> PatchedLinear:
    """Put the new module into every place of a linear, and let go of the old one."""
    old = target.module
    assert old is not None
    assert isinstance(old.weight, Tensor)
    weight = old.weight.detach()
    before = weight.numel() * weight.element_size()
    rows, inputs = quantized.codes.shape
    bias = old.bias if isinstance(old.bias, Tensor) else None
    new = Int4Linear.from_weight(quantized, bias, compute=config.compute, dtype=weight.dtype)
    for name in HOOKS:
        setattr(new, name, getattr(old, name))
    new.train(old.training)
    for parent, attribute in target.places:
        setattr(parent, attribute, new)
    target.module = None
    after = new.nbytes
    return PatchedLinear(target.name, rows, inputs, target.bits, before, after, target.shared)


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


def _find_embeddings(
    model: nn.Module, config: Int4Config, targets: list[Target]
) -> tuple[list[tuple[str, nn.Embedding, list[tuple[nn.Module, str]]]], list[tuple[str, str]]]:
    """Embeddings to store in bf16, with who holds them, and (name, reason) of those left alone."""
    if config.embeddings == "float":
        return [], []
    found: dict[nn.Embedding, tuple[str, list[tuple[nn.Module, str]]]] = {}
    for name, parent in model.named_modules():
        for attribute, child in parent._modules.items():
            if isinstance(child, nn.Embedding) and not isinstance(child, Bf16Embedding):
                path = f"{name}.{attribute}" if name else attribute
                found.setdefault(child, (path, []))[1].append((parent, attribute))
    going = {id(target.module) for target in targets}
    users = _scan.parameter_users(model)
    chosen, kept = [], []
    for module, (name, places) in found.items():
        weight = module._parameters.get("weight")
        if weight is None or weight.dtype in (torch.bfloat16, torch.float16):
            continue  # takes no more than bf16 does
        pattern = _scan.skip_pattern(config, [name])
        if pattern is not None:
            kept.append((name, f"skip={pattern!r}"))
        elif type(module) is not nn.Embedding:
            kept.append((name, f"{type(module).__name__} is not a plain nn.Embedding"))
        elif users[id(weight)] - going - {id(module)}:
            kept.append((name, "its weight is shared with a module that stays in float"))
        elif weight.is_meta or hasattr(module, "_hf_hook"):
            raise Int4Error(f"{name}: has no values here (meta device or accelerate hook). Load it, then patch()")
        else:
            chosen.append((name, module, places))
    return chosen, kept


def _store_bf16(name: str, old: nn.Embedding, places: list[tuple[nn.Module, str]], report: PatchReport) -> None:
    new = Bf16Embedding.from_embedding(old)
    for hook in HOOKS:
        setattr(new, hook, getattr(old, hook))
    for parent, attribute in places:
        setattr(parent, attribute, new)
    report.embeddings.append((name, 4 * old.weight.numel(), 2 * old.weight.numel()))


def _make_saveable(model: nn.Module, config: Int4Config) -> None:
    if "transformers" in sys.modules:  # else there is nothing of theirs
        from ..hf import make_saveable

        make_saveable(model, config)


def _return_memory() -> None:
    """Give freed pages back: glibc keeps those of middle-sized tensors, as if nothing had been freed."""
    with contextlib.suppress(OSError, AttributeError):  # other C libraries have no such call
        ctypes.CDLL(None).malloc_trim(0)


def _with_progress(items: list[ItemT], show: bool | None) -> Iterator[ItemT]:
    """The items, counted on the standard error output."""
    if show is None:
        show = sys.stderr is not None and sys.stderr.isatty()
    for done, item in enumerate(items):
        if show:
            print(f"\rtorch_int4: {done}/{len(items)} linears", end="", file=sys.stderr, flush=True)
        yield item
    if show:
        print(f"\rtorch_int4: {len(items)}/{len(items)} linears", file=sys.stderr)
