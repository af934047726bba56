"""The linears and embeddings that can be replaced, those that stay, and every refusal."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from fnmatch import fnmatchcase

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torch_int4.config import Int4Config
from torch_int4.errors import Int4Error
from torch_int4.layouts.family import Family
from torch_int4.nn.dense import is_conv1d
from torch_int4.weights.types import INT4, INT8, WeightType

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# Modules whose own forward hands the weights of their linears to a fused operator of torch.
READS_WEIGHTS = (nn.MultiheadAttention, nn.TransformerEncoderLayer)


def find_head(model: nn.Module, family: Family, modules: Mapping[str, nn.Module]) -> nn.Module | None:
    """The projection onto the vocabulary, if the model has one; `modules` are all of its by name."""
    getter = getattr(model, "get_output_embeddings", None)
    if callable(getter):
        try:
            return getter()
        except (AttributeError, NotImplementedError):
            return None
    return modules.get(family.head)


def type_of(names: list[str], config: Int4Config, is_head: bool) -> WeightType:
    """The type of weight that a linear of these names gets."""
    raised = match(config.int8, names) is not None or (is_head and config.head == "int8")
    return INT8 if raised else INT4


def parameter_users(model: nn.Module) -> dict[int, set[int]]:
    """Which modules hold a Parameter, both by `id`."""
    users: dict[int, set[int]] = defaultdict(set)
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                users[id(parameter)].add(id(module))
    return users


def reason_to_skip(
    module: nn.Module,
    names: list[str],
    places: list[tuple[nn.Module, str]],
    config: Int4Config,
    is_head: bool,
) -> str | None:
    """Why a linear stays in float; None if nothing speaks against replacing it."""
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
    if not hasattr(module, "_hf_hook") and not weight.is_meta and not is_product(module, weight):
        return f"{type(module).__name__}.forward does more than multiply with the weight"
    return None


def skip_pattern(config: Int4Config, names: list[str]) -> str | None:
    """The first pattern of `config.skip` that matches one of a module's names, or a module that holds it."""
    return match(config.skip, names)


def reason_to_keep(
    module: nn.Module, name: str, config: Int4Config, users: dict[int, set[int]], going: set[int]
) -> str | None:
    """Why an embedding keeps its table, "" where that goes without saying; None if bf16 can take its place.

    Args:
        module: an embedding.
        name: of it.
        config: of the patch.
        users: what `parameter_users` says of the model.
        going: by `id`, the linears that let go of their float weights.

    Raises:
        Int4Error: it has no values to convert.
    """
    weight = module._parameters.get("weight")
    if weight is None or weight.dtype in (torch.bfloat16, torch.float16):
        return ""  # takes no more than bf16 does
    pattern = skip_pattern(config, [name])
    if pattern is not None:
        return f"skip={pattern!r}"
    if type(module) is not nn.Embedding:
        return f"{type(module).__name__} is not a plain nn.Embedding"
    if users[id(weight)] - going - {id(module)}:
        return "its weight is shared with a module that stays in float"
    if weight.is_meta or hasattr(module, "_hf_hook"):
        raise Int4Error(f"{name}: has no values here (meta device or accelerate hook). Load it, then patch()")
    return None


def match(patterns: tuple[str, ...], names: list[str]) -> str | None:
    """The first pattern that matches one of a module's names, or a module that holds it."""
    for name in names:
        parts = name.split(".")
        for end in range(len(parts)):
            for pattern in patterns:
                if fnmatchcase(".".join(parts[: end + 1]), pattern):
                    return pattern
    return None


def is_product(module: nn.Module, weight: Tensor) -> bool:
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


def refuse(module: nn.Module, name: str) -> None:
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
