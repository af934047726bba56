import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torch_int4 import Int4Config, Int4Error
from torch_int4.recipes import rtn

KINDS = {
    "symmetric": {"symmetric": True},
    "integer": {"symmetric": False, "zeros": "integer"},
    "float": {"symmetric": False, "zeros": "float"},
}
SHAPES = [(1, 1, 32), (3, 72, 32), (5, 64, 64), (7, 300, 128), (4, 96, -1), (2, 33, 32), (3, 1300, 1024)]


def normal(n, k, seed=0):
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed)) * 0.02


def spread(groups, n, k, size):
    """A value per group, repeated for every weight of it."""
    return groups.repeat_interleave(k if size == -1 else size, dim=1)[:, :k].reshape(n, k)


def distance_to_best_code(w, weight):
    """How much farther weights are from their code than from the nearest one, in steps (brute force)."""
    n, k = w.shape
    scales = spread(weight.scales.double(), n, k, weight.group_size)
    q = torch.arange(1 << weight.bits).double()
    if weight.offsets is not None:
        points = scales[..., None] * q + spread(weight.offsets.double(), n, k, weight.group_size)[..., None]
    else:
        middle = torch.full_like(weight.scales.double(), 1 << (weight.bits - 1))
        zeros = middle if weight.zeros is None else weight.zeros.double()
        points = scales[..., None] * (q - spread(zeros, n, k, weight.group_size)[..., None])
    all_errors = (points - w.double()[..., None]).abs()
    chosen = all_errors.gather(2, weight.codes.long()[..., None])[..., 0]
    return ((chosen - all_errors.amin(2)) / scales.abs().clamp(min=1e-300)).max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(("n", "k", "group"), SHAPES)
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_every_code_is_the_nearest_one(kind, clip, n, k, group, dtype):
    w = normal(n, k).to(dtype)
    weight = rtn.quantize(w, Int4Config(group_size=group, clip=clip, **KINDS[kind]))
    assert weight.scales.dtype == torch.float16
    assert weight.group_size == group
    assert distance_to_best_code(w, weight) < 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_the_error_is_at_most_half_a_step(kind):
    w = normal(16, 256)
    weight = rtn.quantize(w, Int4Config(**KINDS[kind]))
    steps = (weight.dequantize() - w).abs() / spread(weight.scales.float().abs(), 16, 256, 32)
    # Symmetric: the smaller side ends at 7 steps, and its last weights may be one step away.
    assert steps.max() <= (1.01 if kind == "symmetric" else 0.51)


def test_symmetric_puts_the_larger_side_on_the_first_code():
    w = normal(16, 256)
    weight = rtn.quantize(w, Int4Config())
    groups = w.view(-1, 32)
    largest = groups.abs().argmax(1, keepdim=True)
    assert weight.codes.view(-1, 32).gather(1, largest).eq(0).all()
    sign = groups.gather(1, largest).flatten().sign()
    assert torch.equal(weight.scales.flatten().float().sign(), -sign)


@pytest.mark.parametrize("group", [32, 128, -1])
def test_int8_is_symmetric_whatever_the_config_says(group):
    w = normal(16, 200)
    config = Int4Config(group_size=group, clip=True, **KINDS["float"])
    weight = rtn.quantize(w, config, bits=8)
    assert weight.bits == 8
    assert weight.zeros is None
    assert weight.offsets is None
    assert distance_to_best_code(w, weight) < 1e-3
    assert ((weight.dequantize() - w).abs() / spread(weight.scales.float(), 16, 200, group)).max() < 0.6
    assert weight.codes.min() >= 1


# Weights that lie on a grid already


def on_grid(kind, first, steps, n=6, k=104, size=32, seed=0):
    """Weights of codes first..first+steps (both ends in every group) with random fp16 scales and offsets."""
    g = torch.Generator().manual_seed(seed)
    groups = k if size == -1 else -(-k // size)
    groups = 1 if size == -1 else groups
    q = torch.randint(first, first + steps + 1, (n, k), generator=g)
    starts = torch.arange(0, k, k if size == -1 else size)
    q[:, starts], q[:, starts + 1] = first, first + steps
    s = spread((torch.rand(n, groups, generator=g) * 0.01 + 1e-4).half().float(), n, k, size)
    if kind == "float":
        m = spread((torch.randn(n, groups, generator=g) * 0.05).half().float(), n, k, size)
        return s * q + m
    zeros = 8 if kind == "symmetric" else spread(torch.randint(0, 16, (n, groups), generator=g), n, k, size)
    return s * (q - zeros)


CODES = st.integers(0, 14).flatmap(lambda first: st.tuples(st.just(first), st.integers(1, 15 - first)))


@settings(deadline=None, max_examples=150)
@given(
    kind=st.sampled_from(list(KINDS)),
    codes=CODES,
    size=st.sampled_from([32, 64, -1]),
    seed=st.integers(0, 999),
)
def test_weights_on_a_grid_are_taken_over_bit_by_bit(kind, codes, size, seed):
    w = on_grid(kind, *codes, size=size, seed=seed)
    weight = rtn.quantize(w, Int4Config(group_size=size, **KINDS[kind]))
    assert torch.equal(weight.dequantize(), w)
    assert weight.scales.dtype == torch.float16


def test_clipping_leaves_weights_on_a_grid_alone():
    w = on_grid("float", 0, 15)
    assert torch.equal(rtn.quantize(w, Int4Config(clip=True, **KINDS["float"])).dequantize(), w)


def test_most_groups_on_a_grid_are_taken_over_when_some_are_not():
    w = on_grid("float", 3, 9, n=8, k=128)
    w[2, 32:64] = normal(1, 32)
    got = rtn.quantize(w, Int4Config(**KINDS["float"])).dequantize()
    same = (got == w).view(8, 4, 32).all(2)
    assert same.sum() == 31
    assert not same[2, 1]


def test_int8_takes_over_weights_of_a_q8_0_file():
    g = torch.Generator().manual_seed(1)
    q = torch.randint(-127, 128, (6, 96), generator=g)
    q[:, ::32] = 127
    s = spread((torch.rand(6, 3, generator=g) * 0.01 + 1e-4).half().float(), 6, 96, 32)
    assert torch.equal(rtn.quantize(s * q, Int4Config(), bits=8).dequantize(), s * q)


# Special values


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [0.0, 1.0, -1.0, 0.1, -0.3, 1e-3])
def test_constant_groups(kind, value):
    got = rtn.quantize(torch.full((3, 72), value), Int4Config(**KINDS[kind])).dequantize()
    torch.testing.assert_close(got, torch.full((3, 72), value), rtol=2**-10, atol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("factor", [1e-36, 1e-20, 1e-7, 1e-5, 1.0, 1e6, 1e20, 1e36])
def test_the_error_does_not_depend_on_the_magnitude(kind, factor):
    w = normal(4, 96)
    plain = (rtn.quantize(w, Int4Config(**KINDS[kind])).dequantize() - w).norm() / w.norm()
    w = w * factor
    got = rtn.quantize(w, Int4Config(**KINDS[kind])).dequantize()
    assert torch.isfinite(got).all()
    assert (got.double() - w.double()).norm() / w.double().norm() < 1.05 * plain


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("clip", [False, True])
def test_the_ends_of_the_range_of_fp32(kind, clip):
    w = normal(4, 96)
    for extreme in (1.6e38, 1e-45):
        w[1, :4] = torch.tensor([extreme, -extreme, extreme, 0])
        got = rtn.quantize(w, Int4Config(clip=clip, **KINDS[kind])).dequantize()
        assert torch.isfinite(got).all()
        torch.testing.assert_close(got[1, :3], w[1, :3], rtol=0.15, atol=0.01)


@pytest.mark.parametrize("kind", KINDS)
def test_scales_are_fp32_only_when_fp16_cannot_hold_them(kind):
    config = Int4Config(**KINDS[kind])
    assert rtn.quantize(normal(4, 96), config).scales.dtype == torch.float16
    assert rtn.quantize(normal(4, 96) * 1e-4, config).scales.dtype == torch.float32  # below fp16's normal numbers
    assert rtn.quantize(normal(4, 96) * 1e9, config).scales.dtype == torch.float32  # above its largest
    zero_rows = normal(4, 96)
    zero_rows[1] = 0
    assert rtn.quantize(zero_rows, config).scales.dtype == torch.float16


def test_a_minimum_that_fp16_would_move_by_a_step_is_kept_in_fp32():
    w = 100 + normal(4, 64)
    weight = rtn.quantize(w, Int4Config(**KINDS["float"]))
    assert weight.offsets.dtype == weight.scales.dtype == torch.float32
    assert (weight.dequantize() - w).abs().max() < 0.006


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 3e38])
def test_values_without_a_code_are_refused_by_name(value):
    w = normal(4, 96)
    w[3, 95] = value
    with pytest.raises(Int4Error, match=r"^model\.layers\.0\.mlp\.up_proj: holds"):
        rtn.quantize(w, Int4Config(), name="model.layers.0.mlp.up_proj")


@pytest.mark.parametrize(
    "w",
    [
        torch.zeros(3),
        torch.zeros(0, 4),
        torch.zeros(4, 4, dtype=torch.int32),
        torch.zeros(4, 4, device="meta"),
    ],
)
def test_what_is_not_a_weight_is_refused_by_name(w):
    with pytest.raises(Int4Error, match=r"^some\.name: "):
        rtn.quantize(w, Int4Config(), name="some.name")


# Clip search


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("k", "group"), [(512, 128), (200, 128), (96, -1)])
def test_clipping_never_adds_weight_error_and_helps_with_outliers(kind, k, group):
    w = normal(32, k)
    w[::2, 5] *= 4
    error = {}
    for clip in (False, True):
        weight = rtn.quantize(w, Int4Config(group_size=group, clip=clip, **KINDS[kind]))
        squares = (weight.dequantize() - w).square()
        size = k if group == -1 else group
        error[clip] = torch.stack([part.sum(1) for part in squares.split(size, dim=1)], 1)
    assert (error[True] <= error[False] * (1 + 1e-5)).all()
    assert error[True].sum() < 0.97 * error[False].sum()


@pytest.mark.parametrize("kind", KINDS)
def test_the_result_does_not_depend_on_the_chunks(kind, monkeypatch):
    config = Int4Config(clip=True, **KINDS[kind])
    w = normal(37, 104)
    whole = rtn.quantize(w, config)
    monkeypatch.setattr(rtn, "CHUNK", 5 * 104)
    parts = rtn.quantize(w, config)
    assert torch.equal(whole.codes, parts.codes)
    assert torch.equal(whole.scales, parts.scales)


def test_the_weight_is_not_changed_and_may_be_a_transposed_view():
    w = normal(96, 8)
    before = w.clone()
    weight = rtn.quantize(torch.nn.Parameter(w).t(), Int4Config(clip=True, **KINDS["float"]))
    assert torch.equal(w, before)
    assert torch.equal(weight.codes, rtn.quantize(w.t().contiguous(), Int4Config(clip=True, **KINDS["float"])).codes)
    assert not weight.scales.requires_grad
