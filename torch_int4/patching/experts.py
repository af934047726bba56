"""The experts of sparse layers, which transformers keeps in one tensor, as linears that are patched like all others."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torch_int4.config import Int4Config
from torch_int4.layouts.experts import ExpertsLayout
from torch_int4.nn.experts import Expert, LinearExperts, prepare, sum_of_experts
from torch_int4.patching import scan as _scan
from torch_int4.support.mixins import mix_in, mixed

STACKS = ("gate_up_proj", "up_proj", "down_proj")  # of weights; each may have a "_bias"
FACTS = ("has_gate", "has_bias", "is_transposed", "is_concatenated")  # that transformers puts on experts modules


class Split(NamedTuple):
    """The experts modules of a model that were split, and (name, reason) of those that were not."""

    names: set[str]
    skipped: list[tuple[str, str]]


def split(model: nn.Module, config: Int4Config, names: Collection[str] | None = None) -> Split:
    """Splits the experts of a model into linears whose weights are views; nothing is copied.

    Experts that `config.skip` names stay as they are, and so do those that compute what is not known.

    Args:
        model: with values, or on the meta device.
        config: of the patch.
        names: of the only modules to split; by default all.
    """
    done = Split(set(), [])
    for name, module in list(model.named_modules()):
        if isinstance(module, LinearExperts) or not _are_experts(module) or (names is not None and name not in names):
            continue
        pattern = _scan.skip_pattern(config, [name])
        reason = f"skip={pattern!r}" if pattern is not None else _reason_to_leave(module)
        if reason is None:
            layout = _layout(module)
            experts = [_expert(module, number, layout) for number in range(layout.count)]
            if _compute_the_same(module, layout, experts):
                _put(module, layout, experts)
                done.names.add(name)
                continue
            reason = f"{type(module).__name__}.forward computes more than experts do"
        done.skipped.append((name, reason))
    return done


def _put(module: nn.Module, layout: ExpertsLayout, experts: list[Expert]) -> None:
    """Puts experts into the place of a module's own tensors."""
    module._parameters.clear()
    for number, expert in enumerate(experts):
        module.add_module(str(number), expert)
    vars(module)["_is_hf_initialized"] = True  # its class would fill tensors that it has no more
    mix_in(LinearExperts, module, layout)


def fuse(model: nn.Module) -> tuple[int, int]:
    """Has one operator run the experts of each module where it can: (how many it does, how many modules there are)."""
    modules = [module for module in model.modules() if isinstance(module, LinearExperts)]
    return sum(prepare(module) is not None for module in modules), len(modules)


def _are_experts(module: nn.Module) -> bool:
    weights = [module._parameters.get(name) for name in STACKS]
    return sum(weight is not None and weight.dim() == 3 for weight in weights) >= 2


def _reason_to_leave(module: Any) -> str | None:
    kind = type(module).__name__
    if any(not hasattr(module, name) for name in FACTS) or not callable(getattr(module, "_apply_gate", None)):
        return f"{kind} keeps experts in one tensor, in a form that torch_int4 does not know"
    if getattr(module, "has_post_expert_norm", False):
        return f"{kind} normalizes what each expert gives"
    names = {name for name, parameter in module._parameters.items() if parameter is not None}
    names -= {*STACKS, *(f"{name}_bias" for name in STACKS)}
    if names or module._modules.keys() - {"act_fn"} or module._buffers:
        return f"{kind} holds more than the weights of experts"
    wanted = ("gate_up_proj" if module.has_gate else "up_proj", "down_proj")
    if any(module._parameters.get(name) is None for name in wanted):
        return f"{kind} has no {' and '.join(wanted)}"
    if hasattr(module, "_hf_hook"):
        return "carries an accelerate hook, which moves its weights in and out of memory"
    dtype = module._parameters["down_proj"].dtype
    return None if dtype in _scan.FLOATS else f"its weights are {dtype}"


def _layout(module: Any) -> ExpertsLayout:
    from transformers.integrations.moe import _default_apply_gate

    from torch_int4.nn.layer_parts import ACTIVATIONS

    if module.has_gate and type(module)._apply_gate is not _default_apply_gate:
        name = "clamped_swiglu" if _clamps(module) else None
    else:
        activation = getattr(module, "act_fn", None)
        name = "silu" if activation is F.silu else ACTIVATIONS.get(type(activation).__name__)
    return ExpertsLayout(module.down_proj.shape[0], module.has_gate, module.is_concatenated, name)


def _clamps(module: Any) -> bool:
    """Whether a module gates as gpt-oss does: tried on values around the limits."""
    values = torch.linspace(-9, 9, 37)
    gate, up = (each.flatten() for each in torch.meshgrid(values, values, indexing="ij"))
    both = torch.cat((gate, up)) if module.is_concatenated else torch.stack((gate, up), dim=-1).flatten()
    limited = gate.clamp(max=7.0)
    want = limited * torch.sigmoid(1.702 * limited) * (up.clamp(-7.0, 7.0) + 1)
    try:
        return torch.allclose(module._apply_gate(both), want, rtol=1e-5, atol=1e-5)
    except Exception:
        return False


def _expert(module: Any, number: int, layout: ExpertsLayout) -> Expert:
    first = "gate_up_proj" if layout.gated else "up_proj"
    weights, biases = _part(module, first, number), _bias(module, first, number)
    down = _linear(_part(module, "down_proj", number), _bias(module, "down_proj", number))
    if not layout.gated:
        return Expert({"up_proj": _linear(weights, biases), "down_proj": down})
    inner = weights.shape[0] // 2
    gate, up = (slice(inner), slice(inner, None)) if layout.concatenated else (slice(0, None, 2), slice(1, None, 2))
    linears = {
        name: _linear(weights[rows], None if biases is None else biases[rows])
        for name, rows in (("gate_proj", gate), ("up_proj", up))
    }
    return Expert({**linears, "down_proj": down})


def _part(module: Any, name: str, number: int) -> Tensor:
    """The weight of one expert as `[outputs, inputs]`, a view."""
    weight: Tensor = module._parameters[name].detach()[number]
    return weight.t() if module.is_transposed else weight


def _bias(module: Any, name: str, number: int) -> Tensor | None:
    biases = module._parameters.get(f"{name}_bias")
    return None if biases is None else biases.detach()[number]


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    linear = nn.Linear(1, 1, bias=False, device="meta")  # of no size: values are there already
    linear.out_features, linear.in_features = weight.shape
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.contiguous(), requires_grad=False)
    return linear


def _compute_the_same(module: Any, layout: ExpertsLayout, experts: list[Expert]) -> bool:
    """Whether the linears of experts give what the module does: tried on four rows where there are values."""
    weight = module._parameters["down_proj"]
    if weight.is_meta:
        return True
    generator = torch.Generator().manual_seed(0)
    features = experts[0].get_submodule(layout.linears[0]).in_features
    x = torch.randn(4, features, generator=generator).to(weight.dtype)  # type: ignore[call-overload]
    chosen = torch.stack([torch.randperm(layout.count, generator=generator)[:2] for _ in range(4)])
    shares = torch.rand(chosen.shape, generator=generator).to(weight.dtype)
    split: Any = object.__new__(mixed(LinearExperts, type(module), layout))
    split.__dict__.update(vars(module))
    split._modules = module._modules | {str(number): expert for number, expert in enumerate(experts)}
    stock = getattr(type(module).forward, "__wrapped__", type(module).forward)  # not what its config has put there
    try:
        with torch.no_grad():
            want, got = stock(module, x, chosen, shares), sum_of_experts(split, x, chosen, shares)
        return bool((got - want).float().norm() <= 0.02 * want.float().norm())
    except Exception:
        return False
