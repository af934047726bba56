"""Our own form holds every `Int4Weight` bit by bit, and refuses what is none."""

import pytest
import torch
from oracle import random_weight

from torch_int4 import Int4Error, Int4Weight
from torch_int4.formats import get

FORM = get("native")
SETTINGS = FORM.settings({"quant_method": "torch_int4", "format": "native", "version": 1})
FIELDS = ("codes", "scales", "zeros", "offsets", "multipliers", "perm")


def weights():
    for kind in ("symmetric", "integer", "float"):
        for bits in (4, 8):
            for rows, inputs, group in ((17, 72, 32), (1, 1, 32), (3, 33, -1), (2, 130, 128)):
                yield random_weight(rows, inputs, group, kind, bits=bits)
    for book in ("nf4", "fp4", "bnb_fp4", "iq4_nl"):
        yield random_weight(5, 40, 32, codebook=book)
    shared = random_weight(4, 64, 32, codebook="fp4")
    shared.scales = torch.tensor([[0, 254], [127, 1], [2, 3], [100, 200]], dtype=torch.uint8)
    yield shared
    yield random_weight(5, 512, 32, "records")
    yield random_weight(3, 256, 32, "records", bits=8)
    ordered = random_weight(4, 64, 32, "integer")
    ordered.perm = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    yield ordered
    wide = random_weight(4, 64, 32, "float")
    yield Int4Weight(wide.codes, wide.scales.bfloat16(), offsets=wide.offsets.bfloat16())


@pytest.mark.parametrize("weight", list(weights()))
def test_every_weight_comes_back_bit_by_bit(weight):
    settings = FORM.settings_for(weight)
    tensors = FORM.write(weight, settings, name="m")
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    assert set(tensors) <= set(FORM.suffixes(SETTINGS))
    back = FORM.read(tensors, SETTINGS, shape=tuple(weight.codes.shape), name="m")
    for field in FIELDS:
        a, b = getattr(weight, field), getattr(back, field)
        assert (a is None) == (b is None), field
        assert a is None or (a.dtype == b.dtype and torch.equal(a, b)), field
    assert (back.bits, back.group_size, back.codebook) == (weight.bits, weight.group_size, weight.codebook)


def layout(*values):
    return {"int4_layout": torch.tensor(values)}


HARM = {
    "layout: says": layout(4, 32, 0, 8, 72),
    "no bits": layout(3, 32, 0, 17, 72),
    "is no bits, group size": layout(4, 0, 0, 17, 72),
    "group size and code": layout(4, 32, 9, 17, 72),
    "no shape": layout(4, 32, 0, 0, -1),
    r"layout: must have shape \[5\]": {"int4_layout": torch.tensor([4, 32])},
    "layout: must be torch.int64": {"int4_layout": torch.zeros(5)},
    "codes: must have shape": {"int4_codes": torch.zeros(17, 35, dtype=torch.uint8)},
    "codes: must be torch.uint8": {"int4_codes": torch.zeros(17, 36, dtype=torch.int32)},
    "scales: must have shape": {"int4_scales": torch.ones(17, 2)},
    "scales hold NaN": {"int4_scales": torch.full((17, 3), float("inf"))},
    "zeros must be 0..15": {"int4_zeros": torch.full((17, 3), 16, dtype=torch.uint8)},
    "both zeros and offsets": {"int4_offsets": torch.ones(17, 3).half()},
    "offsets: must be torch.float16": {"int4_offsets": torch.ones(17, 3)},
    "not a permutation": {"int4_perm": torch.zeros(72, dtype=torch.int64)},
    "perm: must have shape": {"int4_perm": torch.arange(71)},
    "codebook has neither": layout(4, 32, 1, 17, 72),
    "scales: is missing": {"int4_scales": None},
}


@pytest.mark.parametrize("message", HARM)
def test_what_is_damaged_is_named(message):
    weight = random_weight(17, 72, 32, "integer")
    weight.scales = weight.scales.half()
    tensors = {**FORM.write(weight, SETTINGS, name="a.b"), **HARM[message]}
    tensors = {suffix: tensor for suffix, tensor in tensors.items() if tensor is not None}
    with pytest.raises(Int4Error, match=rf"^a\.b.*{message}"):
        FORM.read(tensors, SETTINGS, shape=(17, 72), name="a.b")


def test_newer_versions_are_refused():
    for version in (0, 3, "1", None):
        with pytest.raises(Int4Error, match="version"):
            FORM.settings({"quant_method": "torch_int4", "format": "native", "version": version})


def test_a_version_with_extras_says_how_many_and_the_one_without_has_none():
    assert FORM.extras({"version": 1}) == {}
    assert FORM.extras({"version": 2, "extras": {"low_rank": 3}}) == {"low_rank": 3}
    for wrong in ({"version": 2}, {"version": 1, "extras": {"low_rank": 3}}, {"version": 2, "extras": {"low_rank": 0}}):
        with pytest.raises(Int4Error, match=r"quantization_config\.extras"):
            FORM.extras(wrong)
