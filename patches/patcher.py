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

from .. import arena, recipes
from ..config import Int4Config
from ..errors import Int4Error
from ..linear import Int4Linear
from ..merge import merge_inputs
from . import _attention, _block, _scan, _ties, families
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
    family: families.Family | str | None = None,
    progress: bool | None = None,
    **overrides: Any,
) -> ModelT:
    """Replace the linears of `model` by int4 ones, in place, and return it.

    Every `nn.Linear` is replaced (and GPT-2's `Conv1D`), the projection onto the vocabulary and the
    embeddings as the config says. Attention runs in fused operators over a managed KV cache, where the model is of
    a kind that we know; else it stays what it was. Float weights are freed layer by layer, so that at most one
    layer is held in both forms. What was done is measured in `model.torch_int4_report`, which can be printed.
    Everything is checked before anything is changed. Patching a model again with the same config does nothing.

    Args:
        model: any module on the CPU, with weights loaded.
        config: how to quantize; `Int4Config()` by default.
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
    embeddings, kept = _find_embeddings(model, config, targets)
    if not targets and not any(isinstance(m, Int4Linear) for m in model.modules()):
        raise Int4Error(_nothing_to_do(model, skipped))

    if targets or embeddings:
        report.complete = False
        model.torch_int4_report = report  # type: ignore[assignment]
        ties = _ties.record(model)
        try:
            _convert_all(targets, config, report, progress)
        finally:  # also after a failure the rest has to stay consistent
            replaced = {name for target in targets if target.module is None for name in target.names}
            _ties.forget(model, ties, replaced)
        while embeddings:
            _store_bf16(*embeddings.pop(), report)
        arena.gather(module for module in model.modules() if isinstance(module, Int4Linear))
        report.merged += _merge(model, by_module)
        fused, interfaces = _attention.fuse(model, by_module, config)
        report.fused += fused
        report.interfaces += interfaces
        report.blocks += _block.fuse(model, by_module)
        report.skipped = skipped + kept
        report.complete = True
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


def _convert_all(targets: list[Target], config: Int4Config, report: PatchReport, progress: bool | None) -> None:
    for done, target in enumerate(_with_progress(targets, progress)):
        try:
            report.linears.append(_convert(target, config))
        except Exception as error:
            raise Int4Error(
                f"{target.name}: conversion failed after {done} of {len(targets)} linears, so the model is "
                f"half int4 and must be loaded again: {error}"
            ) from error


def _convert(target: Target, config: Int4Config) -> PatchedLinear:
    """Quantize one linear, put the new module into every place, and let go of the old one."""
    old = target.module
    assert old is not None
    assert isinstance(old.weight, Tensor)
    weight = old.weight.detach()
    before = weight.numel() * weight.element_size()
    if _scan.is_conv1d(old):
        weight = weight.t()
    recipe = recipes.get(config.recipe if target.bits == 4 else "rtn")
    quantized = recipe.quantize(weight, config, bits=target.bits, name=target.name)
    rows, inputs = weight.shape
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
