"""A model of a decoder type, patched, next to the float one of the same weights: what runs where, and is it equal."""

from __future__ import annotations

import copy
import functools
import inspect
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from decoders import assert_near
from odd_types import NOT_BUILT, RAISE
from tiny_configs import tiny_model
from tiny_models import dequantized
from torch import Tensor, nn
from transformers import AutoModelForCausalLM  # noqa: F401 (its mapping is filled when it is imported)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from torch_int4 import patch

CLOSE = 1e-4  # norm of the difference to the norm of what is wanted; both models compute in fp32
NEW = 4  # tokens
IDS = torch.randint(3, 99, (2, 12), generator=torch.Generator().manual_seed(0))  # more than a window
MASK = torch.ones_like(IDS)
MASK[0, :4] = 0
PADDED = IDS * MASK
GREEDY = {"max_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}


@dataclass(frozen=True)
class Outcome:
    """What a patch made of a model, for a row of the page.

    Attributes:
        attention: where attention and decoder layers run.
        experts: how experts run; "" without any.
        remarks: what stays in float or stock, and why.
    """

    attention: str
    experts: str = ""
    remarks: tuple[str, ...] = ()


def decoder_types() -> list[str]:
    """Every type that `AutoModelForCausalLM` knows."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


@functools.cache
def outcome(model_type: str) -> Outcome:
    """Builds, patches and compares a model of a type.

    Raises:
        AssertionError: the patched model is not what its weights say.
    """
    if model_type in NOT_BUILT:
        return Outcome("not tried", remarks=(NOT_BUILT[model_type],))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: Any = tiny_model(model_type)
        patched: Any = patch(copy.deepcopy(model), compute="fp32", kv_cache="fp32", progress=False)
        _compare(model_type, model, patched, dequantized(model, patched))
        _reload(patched)
    return _described(patched, RAISE.get(model_type))


@torch.no_grad()
def _compare(model_type: str, model: Any, patched: Any, reference: Any) -> None:
    want = _logits(reference)
    assert want.std(dim=1).mean() > 1e-3, "the model says the same for all tokens"
    assert (_logits(model) - want).norm() > 1e-3 * want.norm(), "the weights are those of the float model"
    assert_near(_logits(patched), want, CLOSE)
    if "logits_to_keep" in inspect.signature(type(reference).forward).parameters:
        assert_near(_logits(patched, logits_to_keep=3), _logits(reference, logits_to_keep=3), CLOSE)
    _generate(patched, reference, IDS, use_cache=False)
    _as_transformers(RAISE.get(model_type), _generate, patched, reference, IDS)
    _as_transformers(RAISE.get(model_type), _generate, patched, reference, PADDED, attention_mask=MASK)


def _logits(model: Any, **options: Any) -> Tensor:
    logits: Tensor = model(input_ids=IDS, use_cache=False, **options).logits
    return logits


def _generate(patched: Any, reference: Any, ids: Tensor, **options: Any) -> None:
    got, want = (model.generate(ids, **GREEDY, **options) for model in (patched, reference))
    assert torch.equal(got.sequences, want.sequences)
    assert got.sequences.shape[1] == ids.shape[1] + NEW
    assert_near(torch.stack(got.logits), torch.stack(want.logits), CLOSE)


def _as_transformers(error: type[Exception] | None, compare: Callable[..., None], *args: Any, **options: Any) -> None:
    """Compares two models; where transformers' own raises, the patched one has to raise the same."""
    if error is None:
        compare(*args, **options)
        return
    patched, reference, *rest = args
    for model in (reference, patched):
        try:
            compare(model, model, *rest, **options)
        except error:
            continue
        raise AssertionError(f"{type(model).__name__} generates without {error.__name__}: take it out of RAISE")


@torch.no_grad()
def _reload(patched: Any) -> None:
    """Saves a model and loads it, which changes no bit."""
    with tempfile.TemporaryDirectory() as folder:
        patched.save_pretrained(folder)
        again = type(patched).from_pretrained(folder).eval()
    assert torch.equal(_logits(again), _logits(patched))


def _described(patched: Any, raises: type[Exception] | None) -> Outcome:
    report = patched.torch_int4_report
    assert report.complete
    assert report.linears
    if report.blocks:
        attention = "fused layers"
    elif report.fused:
        attention = "fused attention"
    else:
        attention = "operator" if report.interfaces else "stock"
    experts = ""
    if report.experts_modules:
        one = report.experts == report.experts_modules
        experts = "one operator" if one else "linear by linear"
        assert one or report.experts == 0
    reasons = [f"float: {reason}" for reason in sorted({reason for _, reason in report.skipped})]
    if kinds := _matrices(patched, {name for name, _ in report.skipped}):
        reasons.append(f"float: {', '.join(kinds)}")
    sentences = [sentence.partition("; ")[0] for sentence in report.unfused]
    failing = [f"`generate` with a cache raises {raises.__name__} in transformers, too"] if raises else []
    return Outcome(attention, experts, (*reasons, *sentences, *failing))


def _matrices(model: Any, told: set[str]) -> list[str]:
    """Classes of modules, no embeddings, that keep matrices in float; those of `told` names have a reason already."""

    def keeps(module: nn.Module) -> bool:
        held = [parameter for parameter in module._parameters.values() if parameter is not None]
        return not isinstance(module, nn.Embedding) and any(x.dim() > 1 and x.is_floating_point() for x in held)

    return sorted(
        {type(module).__name__ for name, module in model.named_modules() if name not in told and keeps(module)}
    )


def table() -> str:
    """The outcomes of all types as Markdown."""
    head = ("type", "attention", "experts", "remarks")
    lines: list[tuple[str, ...]] = [head, ("---",) * len(head)]
    for model_type in decoder_types():
        found = outcome(model_type)
        lines.append((f"`{model_type}`", found.attention, found.experts, "; ".join(found.remarks)))
    return "\n".join("| " + " | ".join(cells).rstrip() + " |" for cells in lines)
