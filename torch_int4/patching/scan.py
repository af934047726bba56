"""The dry pass of a patch: which linears are replaced, which stay, and every refusal."""

from __future__ import annotations

import warnings
from collections import defaultdict
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torch_int4.config import Int4Config
from torch_int4.errors import Int4Error
from torch_int4.layouts.family import Family
from torch_int4.nn.linear import Int4Linear

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# Modules whose own forward hands the weights of their linears to a fused operator of torch.
READS_WEIGHTS = (nn.MultiheadAttention, nn.TransformerEncoderLayer)


@dataclass
class Target:
    """A linear to replace: its names, the (parent, attribute) places that hold it, and the bits it gets.

    `module` is emptied once it has been replaced, so that its float weight is freed.
    """

    names: list[str]
    places: list[tuple[nn.Module, str]]
    module: nn.Module | None
    bits: int
    shared: bool = False  # a module that stays in float holds the same Parameter

    @property
    def name(self) -> str:
        """The first of its names."""
        return self.names[0]


def is_conv1d(module: nn.Module) -> bool:
    """GPT-2's linear with a transposed weight, recognised without importing transformers."""
    return any(c.__name__ == "Conv1D" and c.__module__ == "transformers.pytorch_utils" for c in type(module).__mro__)


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear that is not int4 yet."""
    return (isinstance(module, nn.Linear) and not isinstance(module, Int4Linear)) or is_conv1d(module)


def find_head(model: nn.Module, family: Family) -> nn.Module | None:
    """The projection onto the vocabulary, if the model has one."""
    getter = getattr(model, "get_output_embeddings", None)
    if callable(getter):
        try:
            return getter()
        except (AttributeError, NotImplementedError):
            return None
    return dict(model.named_modules()).get(family.head)


def find_targets(
    model: nn.Module, config: Int4Config, head: nn.Module | None
) -> tuple[list[Target], list[tuple[str, str]]]:
    """The linears to replace, and (name, reason) of those that stay in float.

    Raises:
        Int4Error: naming a linear that should be replaced and cannot be.
    """
    for field in ("skip", "int8"):
        for pattern in getattr(config, field):
            if not any(fnmatchcase(name, pattern) for name, _ in model.named_modules()):
                kind = type(model).__name__
                warnings.warn(f"Int4Config.{field}: {pattern!r} matches no module of {kind}", stacklevel=3)
    names, places = _linears(model)
    targets, skipped = [], []
    for module in names:
        name = names[module][0]
        bits = bits_of(names[module], config, module is head)
        reason = _reason_to_skip(module, names[module], places[module], config, module is head)
        if reason is not None:
            skipped.append((name, reason))
            continue
        _refuse(module, name)
        targets.append(Target(names[module], places[module], module, bits))
    _mark_shared(model, targets)
    return targets, skipped


def bits_of(names: list[str], config: Int4Config, is_head: bool) -> int:
    """Bits that a linear of these names gets."""
    if match(config.int8, names) is not None:
        return 8
    return 8 if is_head and config.head == "int8" else 4


def _mark_shared(model: nn.Module, targets: list[Target]) -> None:
    users = parameter_users(model)
    going = {id(target.module) for target in targets}
    for target in targets:
        assert target.module is not None
        target.shared = bool(users[id(target.module.weight)] - going)


def _linears(
    model: nn.Module,
) -> tuple[dict[nn.Module, list[str]], dict[nn.Module, list[tuple[nn.Module, str]]]]:
    """Names of every linear, and who holds it; one that several modules share has several of both."""
    names: dict[nn.Module, list[str]] = defaultdict(list)
    places: dict[nn.Module, list[tuple[nn.Module, str]]] = defaultdict(list)
    modules: dict[str, nn.Module] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        modules[name] = module
        if not name or not is_linear(module):
            continue
        holder, _, attribute = name.rpartition(".")
        place = (modules[holder], attribute)
        names[module].append(name)
        if place not in places[module]:
            places[module].append(place)
    return names, places


def parameter_users(model: nn.Module) -> dict[int, set[int]]:
    """Which modules hold a Parameter, both by `id`."""
    users: dict[int, set[int]] = defaultdict(set)
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                users[id(parameter)].add(id(module))
    return users


def _reason_to_skip(
    module: nn.Module,
    names: list[str],
    places: list[tuple[nn.Module, str]],
    config: Int4Config,
    is_head: bool,
) -> str | None:
    pattern = skip_pattern(config, names)
    if pattern is not None:
        return f"skip={pattern!r}"
    if is_head and config.head == "float":
        return "head='float'"
    if any(part.startswith("lora_") for part in names[0].split(".")):
        return "an adapter's weight"
    reader = next((type(parent).__name__ for parent, _ in places if isinstance(parent, READS_WEIGHTS)), None)
    if reader is not None:
        return f"{reader} reads the weight itself instead of calling the linear"
    weight = module._parameters.get("weight")
    if weight is None:
        return "its weight is computed (parametrized, pruned or weight-normed) or quantized already"
    if type(weight) is not nn.Parameter or weight.layout != torch.strided:
        return f"its weight is a {type(weight).__name__}, not a plain tensor"
    if weight.dtype not in (*FLOATS, torch.float64):
        return f"its weight is {weight.dtype}, quantized already"
    if weight.numel() == 0:
        return "it has no weights"
    if not hasattr(module, "_hf_hook") and not weight.is_meta and not _is_product(module, weight):
        return f"{type(module).__name__}.forward does more than multiply with the weight"
    return None


def skip_pattern(config: Int4Config, names: list[str]) -> str | None:
    """The first pattern of `config.skip` that matches one of a module's names, or a module that holds it."""
    return match(config.skip, names)


def match(patterns: tuple[str, ...], names: list[str]) -> str | None:
    """The first pattern that matches one of a module's names, or a module that holds it."""
    for name in names:
        parts = name.split(".")
        for end in range(len(parts)):
            for pattern in patterns:
                if fnmatchcase(".".join(parts[: end + 1]), pattern):
                    return pattern
    return None


def _is_product(module: nn.Module, weight: Tensor) -> bool:
    """Whether a forward of its own (FalconLinear has one) computes x @ W.T + b: tried on two rows."""
    if "forward" in module.__dict__:
        return False
    transposed = is_conv1d(module)
    if not transposed and type(module).forward is nn.Linear.forward:
        return True
    generator = torch.Generator().manual_seed(0)
    inputs = weight.shape[0] if transposed else weight.shape[1]
    x = torch.randn(2, inputs, generator=generator).to(weight.dtype)
    try:
        with torch.no_grad():
            got = type(module).forward(module, x)
            want = F.linear(x, weight.t() if transposed else weight, module.bias)  # type: ignore[arg-type]
            return bool((got - want).float().norm() <= 0.02 * want.float().norm())
    except Exception:
        return False


def _refuse(module: nn.Module, name: str) -> None:
    """Raise for a linear that the user expects to be replaced and that cannot be."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    if hasattr(module, "_hf_hook"):
        raise Int4Error(
            f"{name}: carries an accelerate hook, which moves its weight in and out of memory. Load the "
            "model without offload, or call "
            "accelerate.hooks.remove_hook_from_module(model, recurse=True) before patch()"
        )
    if weight.is_meta:
        raise Int4Error(f"{name}: its weight is on the meta device and has no values. Load the weights, then patch()")
    if weight.device.type != "cpu":
        raise Int4Error(
            f"{name}: its weight is on {weight.device}. Kernels run on CPUs: model.to('cpu') before patch()"
        )
    if weight.dtype == torch.float64:
        raise Int4Error(f"{name}: its weight is float64. Kernels compute in fp32 at most: model.float() before patch()")
    low, high = torch.aminmax(weight.detach())
    limit = torch.finfo(torch.float32).max / 2
    if not (bool(low >= -limit) and bool(high <= limit)):
        raise Int4Error(
            f"{name}: its weight holds NaN, infinity or values near the end of fp32's range. Check the "
            f"checkpoint, or leave it in float with skip=({name!r},)"
        )
