import pytest
import torch

from torch_int4 import Int4Error, Int4Weight


def make(n=5, k=72, group=32, kind="symmetric", bits=4, dtype=torch.float16, perm=False, seed=0):
    g = torch.Generator().manual_seed(seed)
    groups = 1 if group == -1 else -(-k // group)
    codes = torch.randint(0, 1 << bits, (n, k), generator=g, dtype=torch.uint8)
    scales = torch.randn(n, groups, generator=g).to(dtype)
    zeros = torch.randint(0, 1 << bits, (n, groups), generator=g, dtype=torch.uint8)
    offsets = torch.randn(n, groups, generator=g).to(dtype)
    return Int4Weight(
        codes,
        scales,
        zeros=zeros if kind == "integer" else None,
        offsets=offsets if kind == "float" else None,
        perm=torch.randperm(k, generator=g) if perm else None,
        group_size=group,
        bits=bits,
    )


def by_hand(weight):
    """One weight after the other, in float64."""
    n, k = weight.codes.shape
    out = torch.empty(n, k, dtype=torch.float64)
    for row in range(n):
        for column in range(k):
            group = 0 if weight.group_size == -1 else column // weight.group_size
            q, s = int(weight.codes[row, column]), float(weight.scales[row, group])
            if weight.offsets is not None:
                value = s * q + float(weight.offsets[row, group])
            else:
                value = s * (q - (2 ** (weight.bits - 1) if weight.zeros is None else int(weight.zeros[row, group])))
            out[row, column if weight.perm is None else int(weight.perm[column])] = value
    return out


@pytest.mark.parametrize("perm", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", ["symmetric", "integer", "float"])
@pytest.mark.parametrize(("k", "group"), [(72, 32), (64, 32), (1, 32), (33, 32), (130, 128), (72, -1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dequantize_follows_the_formula(k, group, kind, bits, perm, dtype):
    weight = make(k=k, group=group, kind=kind, bits=bits, perm=perm, dtype=dtype).validate()
    want = by_hand(weight)
    if dtype != torch.float32:  # few enough bits that the product is exact in fp32, so that one rounding remains
        assert torch.equal(weight.dequantize(), want.float())
    torch.testing.assert_close(weight.dequantize().double(), want, rtol=1e-6, atol=1e-5)
    assert torch.equal(weight.dequantize(torch.bfloat16), weight.dequantize().bfloat16())


@pytest.mark.parametrize(
    ("kind", "group", "bits", "expected"),
    [
        ("symmetric", 32, 4, 4.5),
        ("symmetric", 128, 4, 4.125),
        ("integer", 32, 4, 4.75),
        ("float", 32, 4, 5.0),
        ("symmetric", 32, 8, 8.5),
    ],
)
def test_bits_per_weight(kind, group, bits, expected):
    assert make(k=256, group=group, kind=kind, bits=bits).bits_per_weight == expected


def test_sizes():
    weight = make(n=5, k=72)
    assert (weight.out_features, weight.in_features, weight.groups) == (5, 72, 3)
    assert make(group=-1).groups == 1


def replaced(**fields):
    weight = make(kind=fields.pop("kind", "symmetric"))
    for name, value in fields.items():
        setattr(weight, name, value)
    return weight


G = (5, 3)
M = torch.zeros(5, 3, 2, dtype=torch.uint8)
BROKEN = {
    "codes must be torch.uint8": {"codes": torch.zeros(5, 72, dtype=torch.int8)},
    "codes must be a tensor": {"codes": [[1]]},
    "codes must be [N, K]": {"codes": torch.zeros(72, dtype=torch.uint8)},
    "with N, K > 0": {"codes": torch.zeros(0, 72, dtype=torch.uint8)},
    "codes must be 0..15, found 16": {"codes": torch.full((5, 72), 16, dtype=torch.uint8)},
    "codes is on the meta device": {"codes": torch.zeros(5, 72, dtype=torch.uint8, device="meta")},
    "bits must be 4 or 5 or 6 or 8": {"bits": 3},
    "group_size must be positive": {"group_size": 0},
    "positive, or -1": {"group_size": -32},
    "scales must have shape [5, 3]": {"scales": torch.ones(5, 2)},
    "scales must be": {"scales": torch.ones(G, dtype=torch.float64)},
    "scales hold NaN": {"scales": torch.full(G, float("nan"))},
    "scales hold NaN or infinity": {"scales": torch.full(G, float("inf"))},
    "both zeros and offsets": {"zeros": torch.zeros(G, dtype=torch.uint8), "offsets": torch.zeros(G).half()},
    "zeros must be torch.uint8": {"zeros": torch.zeros(G)},
    "zeros must be 0..15": {"zeros": torch.full(G, 16, dtype=torch.uint8)},
    "zeros must have shape": {"zeros": torch.zeros(3, 5, dtype=torch.uint8)},
    "offsets must be torch.float16": {"offsets": torch.zeros(G)},
    "offsets must have shape": {"offsets": torch.zeros(5).half()},
    "offsets hold NaN": {"offsets": torch.full(G, float("-inf")).half()},
    "perm must be torch.int64": {"perm": torch.arange(72, dtype=torch.int32)},
    "perm must have shape": {"perm": torch.arange(71)},
    "perm is not a permutation": {"perm": torch.arange(72).clamp(max=70)},
    "not a permutation of 0..71": {"perm": torch.arange(72) - 1},
    "or of 16 without offsets, and a multiple of 256 inputs, and these are 72 in groups of 32": {"multipliers": M},
}


@pytest.mark.parametrize("message", BROKEN)
def test_validate_names_the_tensor_and_the_reason(message):
    with pytest.raises(Int4Error) as caught:
        replaced(**BROKEN[message]).validate("model.layers.3.q_proj")
    assert str(caught.value).startswith("model.layers.3.q_proj: ")
    assert message in str(caught.value)


def two_levels(**fields):
    """Of 512 inputs: 2 scales and 16 groups."""
    weight = make(k=512, kind="float")
    weight.scales, weight.offsets = weight.scales[:, :2].clone(), weight.offsets[:, :2].clone()
    weight.multipliers = torch.randint(0, 256, (5, 16, 2), dtype=torch.uint8)
    for name, value in fields.items():
        setattr(weight, name, value)
    return weight


def test_two_levels_are_the_products_of_both():
    weight = two_levels(perm=torch.randperm(512)).validate()
    groups = [
        make(k=512, kind="float").codes,
        weight.scales.float().repeat_interleave(8, 1) * weight.multipliers[..., 0].float(),
        weight.offsets.float().repeat_interleave(8, 1) * weight.multipliers[..., 1].float(),
    ]
    plain = Int4Weight(groups[0], groups[1], offsets=groups[2], perm=weight.perm).validate()
    assert torch.equal(weight.dequantize(), plain.dequantize())
    torch.testing.assert_close(weight.dequantize().double(), by_hand(plain), rtol=1e-6, atol=1e-4)
    assert (weight.groups, weight.bits_per_weight) == (16, 4.625 + 64 / 5)


BROKEN_LEVELS = {
    "multipliers need groups of 32": {"group_size": 64},
    "multipliers must be torch.int8": {"offsets": None},
    "a weight with a codebook has neither": {"codebook": "nf4"},
    "multipliers must be torch.uint8": {"multipliers": torch.zeros(5, 16, 2)},
    "multipliers must have shape [5, 16, 2]": {"multipliers": torch.zeros(5, 16, dtype=torch.uint8)},
    "multipliers must be a tensor": {"multipliers": 1},
    "scales must have shape [5, 2]": {"scales": torch.zeros(5, 16).half()},
    "scales must be torch.float16, got torch.float32": {"scales": torch.zeros(5, 2)},
    "scales hold NaN or infinity": {"scales": torch.full((5, 2), float("nan")).half()},
    "offsets must have shape [5, 2]": {"offsets": torch.zeros(5, 16).half()},
    "offsets hold NaN or infinity": {"offsets": torch.full((5, 2), float("inf")).half()},
    "both zeros and offsets": {"zeros": torch.zeros(5, 2, dtype=torch.uint8)},
}


@pytest.mark.parametrize("message", BROKEN_LEVELS)
def test_validate_names_what_is_wrong_with_two_levels(message):
    with pytest.raises(Int4Error) as caught:
        two_levels(**BROKEN_LEVELS[message]).validate("model.layers.3.q_proj")
    assert str(caught.value).startswith("model.layers.3.q_proj: ")
    assert message in str(caught.value)


def test_eight_bits_may_use_every_code():
    make(bits=8, kind="integer").validate()
    with pytest.raises(Int4Error, match=r"codes must be 0\.\.15"):
        replaced(codes=make(bits=8).codes).validate()
