"""Weights of several types and group sizes in one call give the bits of calls of their own."""

from __future__ import annotations

from typing import Any

import oracle
import pytest
import torch
from layer_problems import OPS, lists, options_of, random
from test_decoder_layer import Layer, assert_equal
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import torch_int4
from torch_int4 import Int4Linear

# (bits, group size, kind, code book): blocks of 16, 32, 64, 96 and 128 inputs
TYPES: tuple[tuple[int, int, str, str | None], ...] = (
    (4, 32, "symmetric", None),
    (6, 16, "scales", None),
    (8, 64, "integer", None),
    (5, 96, "float", None),
    (4, -1, "symmetric", "nf4"),
    (4, 32, "records", None),
    (4, 16, "scales", None),
)


def linear(rows: int, inputs: int, kind: int) -> Int4Linear:
    bits, size, offsets, book = TYPES[kind % len(TYPES)]
    weight = oracle.random_weight(rows, inputs, size, offsets, bits=bits, codebook=book, seed=kind)
    bias = random(rows, seed=kind) if kind % 2 else None
    return Int4Linear.from_weight(weight, bias).requires_grad_(False)


@pytest.mark.parametrize("compute", ["int8", "int8x2", "bf16", "fp32"])
@pytest.mark.parametrize("rows", [1, 3, 33])
def test_linears(isa: str, compute: str, rows: int) -> None:
    modules = [linear(20 + 7 * kind, 256, kind) for kind in range(len(TYPES))]
    x = random(rows, 256)
    outputs = OPS.int4_linears(x, *lists(modules), None, **options_of(modules, compute))
    for module, y in zip(modules, outputs, strict=True):
        assert_equal(y, module(x))


@pytest.mark.parametrize("gated", [True, False])
def test_mlp(isa: str, gated: bool) -> None:
    modules = [*[linear(512, 256, 1), linear(512, 256, 0)][: 1 + gated], linear(256, 512, 6)]
    x, norm = random(5, 256), random(256, seed=3)
    inner = OPS.norm_linears(x, norm, None, *lists(modules[:-1]), None, **options_of(modules[:-1], "int8"))
    product = nn.functional.silu(inner[0]) * (inner[1] if gated else 1)
    y = OPS.mlp(x, x, norm, None, *lists(modules), None, None, **options_of(modules, "int8"))
    torch.testing.assert_close(y, x + modules[-1](product), rtol=1e-2, atol=1e-2 * float(y.abs().max()))
    alone = OPS.mlp(x[2:3], x[2:3], norm, None, *lists(modules), None, None, **options_of(modules, "int8"))
    assert_equal(alone, y[2:3])


def test_a_layer_gives_the_bits_of_its_steps(isa: str) -> None:
    for tokens in (1, 4):
        layer = Layer()
        for place, kind in ((0, 2), (2, 3), (3, 4), (5, 2), (6, 3)):
            old = layer.linears[place]
            layer.linears[place] = linear(old.out_features, old.in_features, kind)
        assert len({m.weight_type for m in layer.linears}) == 4
        x = random(2, tokens, 70)
        assert_equal(layer.whole(x, layer.caches(2)), layer.steps(x, layer.caches(2)))


@pytest.mark.parametrize("rows", [1, 6])
def test_experts(isa: str, rows: int) -> None:
    modules = [linear(*sizes, kind) for _ in range(3) for *sizes, kind in ((256, 256, 1), (256, 256, 6), (256, 256, 5))]
    chosen = torch.tensor([[0, 2]] * rows)
    shares = torch.full((rows, 2), 0.5)
    x, options = random(rows, 256), options_of(modules[:3], "int8")
    y = OPS.experts(x, chosen, shares, *lists(modules), [None] * 6, **options)
    want = torch.zeros(rows, 256)
    for first in (0, 6):
        gate, up, down = modules[first : first + 3]
        want += 0.5 * down(nn.functional.silu(gate(x)) * up(x))
    torch.testing.assert_close(y, want, rtol=1e-2, atol=1e-2 * float(want.abs().max()))
    uneven = [linear(256, 256, kind) for kind in (0, 1, 2)]
    with pytest.raises(RuntimeError, match="gate and up must take x in blocks of one length"):
        OPS.experts(x, chosen * 0, shares, *lists(uneven), [None] * 2, **options_of(uneven, "int8"))


def test_one_value_or_one_for_each() -> None:
    modules = [linear(20, 256, 0), linear(20, 256, 1)]
    given: dict[str, Any] = options_of(modules, "int8")
    for wrong in ({"group_size": [32, 16, 32]}, {"weight_type": "int4,int6,int4"}):
        with pytest.raises(RuntimeError, match="must be one for all of the 2 weights, or one for each"):
            OPS.int4_linears(random(1, 256), *lists(modules), None, **{**given, **wrong})


def test_a_model_of_several_types_runs_whole_layers() -> None:
    config = LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    patched = torch_int4.patch(model, int8=("*.v_proj", "*.down_proj"), compute="fp32", kv_cache="fp32")
    types = {name.rpartition(".")[2]: m.weight_type for name, m in patched.named_modules() if type(m) is Int4Linear}
    assert (types["v_proj"], types["q_proj"], types["down_proj"]) == ("int8", "int4", "int8")
    assert patched.torch_int4_report.merged == 4  # q, k and v; gate and up
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        patched.generate(ids, max_new_tokens=2, do_sample=False)
        from torch_int4.nn.prepared import layers

        assert all(layers[layer].is_whole for layer in patched.model.layers)
        logits = patched(ids).logits
    reference = LlamaForCausalLM(config).eval()
    reference.load_state_dict(
        {name: value for name, value in patched.state_dict().items() if name in reference.state_dict()}, strict=False
    )
    for name, module in patched.named_modules():
        if isinstance(module, Int4Linear):
            reference.get_submodule(name).weight.data.copy_(module.dequantize())
    with torch.no_grad():
        want = reference(ids).logits
    assert (logits - want).norm() < 1e-4 * want.norm()
