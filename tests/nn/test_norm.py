"""The norm after the last layer: the operator against what modules of transformers compute, and who gets it."""

from __future__ import annotations

import copy
import itertools
import pickle
from typing import Any

import pytest
import torch
from decoders import FUSED, Calls, decoder, prompt
from fused_layers import blocks_of
from layer_problems import DTYPES, NORMS, assert_near, normalized, random
from torch import nn
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

from torch_int4 import Int4Error, ops, patch
from torch_int4.nn.norm import FusedNorm

OPS = torch.ops.torch_int4


@pytest.mark.parametrize(("norm", "eps", "offset", "biased"), NORMS)
def test_the_operator(isa: str, norm: str, eps: float, offset: float, biased: bool) -> None:
    chosen: dict[str, Any] = {"norm": norm, "eps": eps, "norm_offset": offset}
    for features, rows, dtype in itertools.product((1, 15, 16, 33, 576), (0, 1, 3, 700), DTYPES):
        x = random(rows, 2, features, dtype=dtype) * 3 + 1
        weight, bias = random(features, dtype=dtype, seed=1), random(features, dtype=dtype, seed=2) if biased else None
        got = OPS.normalize(x, weight, bias, **chosen)
        if rows and (norm == "rms" or features > 1):  # of one feature there is no variance
            assert_near(got, normalized(x, weight, bias, norm, eps, offset), 1e-2 if dtype == torch.bfloat16 else 2e-3)
        strided = x.transpose(0, 1).contiguous().transpose(0, 1)
        assert torch.equal(OPS.normalize(strided, weight, bias, **chosen), got)
        if rows == 3:
            got[1], x[1, 0], x[1, 1, -1] = 0, float("inf"), float("nan")
            mine = OPS.normalize(x, weight, bias, **chosen)
            ops.set_isa("reference")
            torch.testing.assert_close(OPS.normalize(x, weight, bias, **chosen), mine, rtol=0, atol=0, equal_nan=True)
            ops.set_isa(isa)
            assert mine[1, 1].isnan().all()
            assert torch.equal(mine[[0, 2]], got[[0, 2]])


def test_arguments_that_do_not_fit() -> None:
    x, weight = random(2, 8), random(8)
    for arguments, options, message in [
        ((x, random(7)), {}, r"norm_weight has shape \[7\] but must be \[8\]"),
        ((x, weight.to(torch.bfloat16)), {}, "norm_weight and x must have one dtype"),
        ((x, weight, weight), {}, "only norm='layer' has a norm_bias"),
        ((x, weight), {"norm": "batch"}, "norm must be 'rms', 'rms_once' or 'layer', not 'batch'"),
        ((x, weight), {"eps": -1.0}, "eps must not be negative"),
        ((x[:, :0], weight[:0]), {}, "x must have features"),
        ((x.double(), weight.double()), {}, "x must be float32, bfloat16 or float16"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            OPS.normalize(*arguments, **options)
    with pytest.raises(Int4Error, match="inference"):
        OPS.normalize(x.requires_grad_(), weight).sum().backward()
    torch.library.opcheck(OPS.normalize.default, (random(2, 3, 8), weight))


def final_norm(model: nn.Module) -> Any:
    return next(m for m in model.modules() if isinstance(m, FusedNorm))


def test_families_that_have_it() -> None:
    found = [name for name in FUSED if any(isinstance(m, FusedNorm) for m in patch(decoder(name)).modules())]
    assert {"llama", "gemma", "mistral", "qwen2", "qwen3"} <= set(found)
    assert not {"gpt_neox", "gptj", "falcon"} & set(found)  # theirs is one operator already
    for name in found:
        inside = [m for layer in blocks_of(patch(decoder(name))) for m in layer.modules()]
        assert inside
        assert not any(isinstance(m, FusedNorm) for m in inside)


@pytest.mark.parametrize("name", ["llama", "gemma", "qwen3"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_it_gives_what_the_stock_one_gives(name: str, dtype: torch.dtype) -> None:
    model = patch(decoder(name, dtype), head="float")
    norm, x = final_norm(model), random(2, 5, 64, dtype=dtype) * 5
    with torch.no_grad():
        norm.weight.copy_(random(64, dtype=dtype, seed=1))
        stock = copy.deepcopy(norm)
        stock.__class__ = type(norm).torch_int4_base
        with Calls() as calls:
            got = norm(x)
        assert calls.counts["normalize"] == 1
        assert_near(got, stock(x), 1e-2 if dtype == torch.bfloat16 else 2e-3)
        assert "by torch_int4" in repr(norm)
        for same in (copy.deepcopy(norm), pickle.loads(pickle.dumps(norm))):
            assert torch.equal(same(x), got)
        norm.variance_epsilon = norm.eps = stock.variance_epsilon = stock.eps = 0.5
        assert_near(norm(x), stock(x), 1e-2 if dtype == torch.bfloat16 else 2e-3)


def test_what_runs_as_the_stock_one() -> None:
    model = patch(decoder("llama"), head="float")
    norm, x = final_norm(model), random(2, 64)
    with Calls() as calls:
        norm(x).sum().backward()  # gradients
        with torch.no_grad():
            norm(x.to(torch.bfloat16))  # another dtype than that of the weight
    assert calls.counts["normalize"] == 0
    assert norm.weight.grad is not None
    graphs: list[Any] = []
    with torch.no_grad():
        torch.compile(norm, backend=lambda graph, _: graphs.append(graph) or graph, fullgraph=True)(x)
        assert len(graphs) == 1  # of operators that inductor makes one of, with what comes before and after
        assert not any("torch_int4" in str(node.target) for node in graphs[0].graph.nodes)
        with Calls() as calls:
            model(prompt(tokens=3))
    assert calls.counts["normalize"] == 1


def test_rms_once_rounds_as_olmo2_does() -> None:
    norm, x = Olmo2RMSNorm(576).to(torch.bfloat16), random(64, 576, dtype=torch.bfloat16)
    norm.weight.data.copy_(1 + 0.2 * random(576, seed=1))
    with torch.no_grad():
        want, eps = norm(x), norm.variance_epsilon
        once, twice = (OPS.normalize(x, norm.weight, norm=kind, eps=eps) for kind in ("rms_once", "rms"))
    assert (once != want).float().mean() < 1e-3  # where a sum in another order falls on the other side
    assert (twice != want).float().mean() > 1e-2
