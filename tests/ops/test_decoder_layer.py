"""The operator of a whole decoder layer against the operators of its steps, bit by bit, on every kernel set."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from alone import survives
from layer_problems import OPS, linears, lists, options_of, random
from torch import Tensor

HEAD = 18  # features of a head, of which 12 are rotated
WIDTH, INNER = 70, 40
CACHES = (torch.float32, torch.bfloat16, torch.float16, torch.int8)


@dataclass
class Layer:
    """A random layer, its caches with 5 tokens in them, and what it is called with."""

    kv_heads: int = 2
    group: int = 3
    projections: int = 3
    gated: bool = True
    norm_count: int = 2
    parallel: bool = False
    head_norms: bool = False
    perm: bool = False
    kind: str = "rms"
    compute: str = "int8"
    dtype: torch.dtype = torch.float32
    cache: torch.dtype = torch.float32
    activation: str = "silu"
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        heads, kv = self.kv_heads * self.group * HEAD, self.kv_heads * HEAD
        outputs = [heads, kv, kv] if self.projections == 3 else [heads + 2 * kv]
        mlp = [(INNER, WIDTH)] * (2 if self.gated else 1) + [(WIDTH, INNER)]
        shapes = [(n, WIDTH) for n in outputs] + [(WIDTH, heads), *mlp]
        self.linears = [m.requires_grad_(False) for m in linears(shapes, perm=self.perm)]
        self.layout = {"norm": self.kind, "eps": 1e-5}
        self.norms = [random(WIDTH, dtype=self.dtype, seed=i) for i in range(self.norm_count)]
        self.biases = [random(WIDTH, dtype=self.dtype, seed=9) if self.kind == "layer" else None for _ in self.norms]
        self.heads = [random(HEAD, dtype=self.dtype, seed=i) for i in (3, 4)] if self.head_norms else []

    def caches(self, batch: int, capacity: int = 16) -> list[Any]:
        """Keys, values, their scales and the length."""
        shape = (batch, self.kv_heads, capacity)
        states = [random(*shape, HEAD, seed=i) for i in (5, 6)]
        if self.cache == torch.int8:
            scales = [random(*shape, seed=i).abs() for i in (7, 8)]
            states = [(30 * x).to(torch.int8) for x in states]
        else:
            scales, states = [None, None], [x.to(self.cache) for x in states]  # type: ignore[list-item]
        return [*states, *scales, torch.tensor([5])]

    def angles(self, tokens: int) -> tuple[Tensor, Tensor]:
        return random(1, tokens, 12, dtype=self.dtype, seed=1), random(1, tokens, 12, dtype=self.dtype, seed=2)

    def whole(self, x: Tensor, caches: list[Any], mask: Tensor | None = None, **changes: Any) -> Tensor:
        given = {
            "x": x, "norm_weights": self.norms, "norm_biases": self.biases, "head_norms": self.heads,
            **dict(zip(("weights", "scales", "offsets", "biases"), lists(self.linears), strict=True)),
            "perms": [m.perm for m in self.linears],
            **dict(zip(("cos", "sin"), self.angles(x.shape[1]), strict=True)),
            **dict(zip(("key_cache", "value_cache", "key_scales", "value_scales", "length"), caches, strict=True)),
            "mask": mask, **options_of(self.linears, self.compute), **self.layout, "activation": self.activation,
            "projections": self.projections, "parallel_residual": self.parallel, "rotary_dim": 12, "scale": 0.3,
        }  # fmt: skip
        result: Tensor = OPS.decoder_layer(**{**given, **changes})
        return result

    def steps(self, x: Tensor, caches: list[Any], mask: Tensor | None = None) -> Tensor:
        count = self.projections
        shared, output, mlp = self.linears[:count], self.linears[count], self.linears[count + 1 :]
        projected = OPS.norm_linears(
            x, self.norms[0], self.biases[0], *lists(shared), shared[0].perm, **options_of(shared, self.compute),
            **self.layout,
        )  # fmt: skip
        if count == 3:
            query, key, value = (y.view(*x.shape[:2], -1, HEAD) for y in projected)
        else:
            grouped = projected[0].view(*x.shape[:2], self.kv_heads, -1, HEAD)
            query, key, value = grouped[..., :-2, :].flatten(2, 3), grouped[..., -2, :], grouped[..., -1, :]
        query = OPS.rotary_append(query, key, value, *self.angles(x.shape[1]), *caches, rotary_dim=12)
        attended = OPS.attention(query, *caches, mask, None, scale=0.3, causal=mask is None).flatten(2)
        own = (output.packed, output.packed_scales, output.packed_offsets, output.bias, output.perm)
        options = {**options_of([output], self.compute), "out_features": WIDTH}
        total = OPS.linear_add(attended, x, *own, **options)
        norm = (self.norms[-1], self.biases[-1])
        result: Tensor = OPS.mlp(
            x if self.parallel else total, total, *norm, *lists(mlp), mlp[0].perm, mlp[-1].perm,
            **options_of(mlp, self.compute), **self.layout, activation=self.activation,
        )  # fmt: skip
        return result


KINDS: list[dict[str, Any]] = [
    {},
    {"perm": True, "group": 1, "cache": torch.int8},
    {"projections": 1, "kind": "layer", "gated": False, "parallel": True, "activation": "gelu"},
    {"projections": 1, "kv_heads": 1, "norm_count": 1, "parallel": True, "gated": False, "activation": "gelu_tanh"},
    {"projections": 1, "kind": "layer", "group": 1, "gated": False, "cache": torch.float16},
    {"kind": "layer", "norm_count": 1, "parallel": True, "cache": torch.bfloat16},
]


def assert_equal(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_layer_gives_the_bits_of_its_steps(isa: str, kind: dict[str, Any]) -> None:
    types = itertools.product((torch.float32, torch.bfloat16, torch.float16), ("int8", "int8x2", "bf16", "fp32"))
    for (dtype, compute), (batch, tokens) in zip(types, itertools.cycle([(1, 1), (2, 1), (3, 4), (1, 11)])):
        layer = Layer(**kind, dtype=dtype, compute=compute)
        x = random(batch, tokens, WIDTH, dtype=dtype)
        seen = torch.rand(batch, 1, tokens, 16, generator=torch.Generator().manual_seed(1)) < 0.7
        for mask in (None, seen):
            caches, others = layer.caches(batch), layer.caches(batch)
            got, want = layer.whole(x, caches, mask), layer.steps(x, others, mask)
            assert got.dtype == dtype
            assert_equal(got, want)
            for cache, other in zip(caches, others, strict=True):
                assert cache is None or torch.equal(cache, other)


def test_norms_of_heads(isa: str) -> None:
    """As if the projections gave normalized heads."""
    for dtype, compute in itertools.product((torch.float32, torch.bfloat16), ("int8", "fp32")):
        layer = Layer(head_norms=True, dtype=dtype, compute=compute, projections=3)
        plain = Layer(dtype=dtype, compute=compute)
        x, caches, others = random(2, 3, WIDTH, dtype=dtype), layer.caches(2), layer.caches(2)
        got = layer.whole(x, caches)
        assert not torch.equal(got, plain.whole(x, plain.caches(2)))
        shared = layer.linears[:3]
        arguments = (layer.norms[0], layer.biases[0], *lists(shared), None)
        projected = OPS.norm_linears(x, *arguments, **options_of(shared, compute), **layer.layout)
        query, key, value = (y.view(2, 3, -1, HEAD) for y in projected)
        parts = []
        for heads, weight in zip((query, key), layer.heads, strict=True):
            y = heads.float()
            parts.append((y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-5)).to(dtype) * weight)
        OPS.rotary_append(*parts, value, *layer.angles(3), *others, rotary_dim=12)
        bound = 1e-5 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(caches[0][:, :, :8], others[0][:, :, :8], rtol=bound, atol=bound)
        assert_equal(caches[1], others[1])


def test_rows_and_threads_do_not_matter(isa: str) -> None:
    layer = Layer(cache=torch.int8)
    x = random(3, 1, WIDTH)
    x[1] = float("nan")
    want = layer.whole(x, layer.caches(3))
    for row in (0, 2):
        caches = [c if c is None or c.dim() == 1 else c[row : row + 1].clone() for c in layer.caches(3)]
        assert_equal(layer.whole(x[row : row + 1], caches), want[row : row + 1])
    assert want[[0, 2]].isfinite().all()
    assert want[1].isnan().all()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2 if threads == 1 else 1)
        assert_equal(layer.whole(x, layer.caches(3)), want)
    finally:
        torch.set_num_threads(threads)


def test_inputs_that_are_not_contiguous(isa: str) -> None:
    layer = Layer()
    for x in (random(3, 2, WIDTH).transpose(0, 1), random(2, 3, 2 * WIDTH)[..., ::2]):
        assert not x.is_contiguous()
        assert_equal(layer.whole(x, layer.caches(2)), layer.whole(x.contiguous(), layer.caches(2)))


def test_opcheck() -> None:
    layer = Layer(compute="fp32", projections=1, gated=False)
    x, caches = random(2, 3, WIDTH), layer.caches(2)
    arguments = (x, layer.norms, layer.biases, layer.heads, *lists(layer.linears), [None] * 4, *layer.angles(3))
    options = {**options_of(layer.linears, "fp32"), "projections": 1, "rotary_dim": 12, "scale": 0.3}
    torch.library.opcheck(OPS.decoder_layer.default, (*arguments, *caches), options)


def test_no_rows() -> None:
    layer = Layer()
    caches = layer.caches(2)
    assert layer.whole(random(2, 0, WIDTH), caches).shape == (2, 0, WIDTH)
    assert caches[-1].item() == 5
    assert layer.whole(random(0, 1, WIDTH), layer.caches(0)).shape == (0, 1, WIDTH)


def test_bad_arguments_are_named_before_anything_is_written() -> None:
    layer, x = Layer(), random(2, 3, WIDTH)
    caches = layer.caches(2)
    before = [None if c is None else c.clone() for c in caches]
    features = [m.out_features for m in layer.linears]

    def bad(message: str, **changes: Any) -> None:
        with pytest.raises(RuntimeError, match=message):
            layer.whole(**{"x": x, "caches": caches, **changes})

    bad("x must be \\[batch, tokens, features\\]", x=x[0], cos=None, sin=None)
    bad("x must be float32", x=x.double())
    bad("projections must be 1", projections=2)
    bad("a layer with 1 projections", projections=1)
    bad("lists of one length", perms=[None])
    bad("must be lists of two", norm_weights=layer.norms[:1], norm_biases=layer.biases[:1])
    bad("norm_weight has shape", norm_weights=[layer.norms[0], torch.ones(3)])
    bad("head_norms must be", head_norms=[torch.ones(HEAD)])
    bad("norm_weight has shape", head_norms=[torch.ones(HEAD), torch.ones(3)])
    bad("key projection has", out_features=[features[0], 18, *features[2:]])
    bad("query projection has", out_features=[features[0] + 1, *features[1:]])
    no_biases: list[None] = [None] * 7
    bad("output projection has", out_features=[*features[:3], 69, *features[4:]], biases=no_biases)
    bad("gate has", out_features=[*features[:4], 39, *features[5:]], biases=no_biases)
    bad("down projection has", out_features=[*features[:-1], 69], biases=no_biases)
    bad("scales has shape", group_size=64)
    bad("perm must hold", perms=[torch.full((WIDTH,), WIDTH), *[None] * 6])
    bad("the cache holds 5 of 7", caches=layer.caches(2, capacity=7))
    bad("key_cache has shape", caches=layer.caches(3))
    bad("key_scales must be given", caches=[c.to(torch.int8) for c in caches[:2]] + caches[2:])
    bad("length must be int64", length=torch.tensor([5], dtype=torch.int32))
    bad("mask has shape", mask=torch.ones(2, 1, 3, 7, dtype=torch.bool))
    bad("rotary_dim must be even", rotary_dim=20)
    bad("activation must be", activation="tanh")
    bad("compute must be", compute="int2")
    bad("softcap must not be negative", softcap=-1.0)
    wide = torch.empty(0, 2, 16, 2**40)
    bad("heads of 18 and 1099511627776 features are too large", x=x[:0], value_cache=wide)
    for cache, old in zip(caches, before, strict=True):
        assert cache is None or torch.equal(cache, old)


def test_lengths_that_no_sum_holds() -> None:
    survives(
        """
import pytest, torch
from test_decoder_layer import Layer, WIDTH, random
layer = Layer()
for length in (2**63 - 1, 2**63 - 3, 14, -1, -2**63):
    *caches, _ = layer.caches(2)
    before = caches[0].clone()
    with pytest.raises(RuntimeError, match=f"length says that the cache holds {length} of 16 tokens"):
        layer.whole(random(2, 3, WIDTH), [*caches, torch.tensor([length])])
    assert torch.equal(caches[0], before)
"""
    )
