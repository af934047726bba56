"""GPTQ and AutoRound, whose files share a layout: built value by value, and by their own tools where they install."""

import pytest
import torch
from oracle import random_weight

from torch_int4 import Int4Error, formats
from torch_int4.formats import Settings

GPTQ, AUTO_ROUND = formats.get("gptq"), formats.get("auto_round")


def config(bits=4, group=32, **fields):
    return {"quant_method": "gptq", "bits": bits, "group_size": group, "sym": False, "desc_act": False, **fields}


def pack_columns(values, bits):
    """[R, C] to int32 [R, C*bits/32], low bits first, one value after the other."""
    words = []
    for row in values.tolist():
        per_word = 32 // bits
        line = []
        for start in range(0, len(row), per_word):
            word = sum(value << (bits * i) for i, value in enumerate(row[start : start + per_word]))
            line.append(word - (1 << 32) if word >> 31 else word)
        words.append(line)
    return torch.tensor(words, dtype=torch.int32)


def minus_one(words, bits):
    """What version 1 does to zero points: 1 less in each field, with borrows across the word."""
    ones = sum(1 << shift for shift in range(0, 32, bits))
    lowered = [[(word - ones + (1 << 31)) % (1 << 32) - (1 << 31) for word in row] for row in words.tolist()]
    return torch.tensor(lowered, dtype=torch.int32)


def encode(weight, version=1, index=None):
    codes, zeros = weight.codes, weight.zeros
    if zeros is None:
        zeros = torch.full(weight.scales.shape, 1 << (weight.bits - 1), dtype=torch.uint8)
    qzeros = pack_columns(zeros.t(), weight.bits)
    tensors = {
        "qweight": pack_columns(codes, weight.bits).t().contiguous(),
        "qzeros": minus_one(qzeros, weight.bits) if version == 1 else qzeros,
        "scales": weight.scales.t().contiguous(),
    }
    return tensors | ({} if index is None else {"g_idx": index.int()})


def read(tensors, settings=None, shape=(24, 96), form=GPTQ):
    return form.read(tensors, settings or form.settings(config()), shape=shape, name="m.q")


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("kind", ["symmetric", "integer"])
@pytest.mark.parametrize(("inputs", "group"), [(96, 32), (64, -1), (200, 64)])
def test_reads_both_versions(inputs, group, kind, version, bits):
    weight = random_weight(24, inputs, group, kind, bits=bits)
    settings = GPTQ.settings(config(bits, group, checkpoint_format="gptq" if version == 1 else "gptq_v2"))
    got = read(encode(weight, version), settings, (24, inputs))
    assert torch.equal(got.codes, weight.codes)
    assert torch.equal(got.dequantize(), weight.dequantize())
    assert (got.zeros is None) == (kind == "symmetric")


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("version", [1, 2])
def test_symmetric_files_show_their_version_whatever_they_say(version, bits):
    weight = random_weight(24, 96, 32, "symmetric", bits=bits)
    for label in ("gptq", "gptq_v2"):
        got = read(encode(weight, version), GPTQ.settings(config(bits, checkpoint_format=label, sym=True)))
        assert got.zeros is None
        assert torch.equal(got.dequantize(), weight.dequantize())


@pytest.mark.parametrize(("version", "label"), [(1, "gptq"), (2, "gptq_v2")])
@pytest.mark.parametrize(("symmetric", "first"), [(False, 7), (False, 8), (True, 9)])
def test_files_of_other_zero_points_are_taken_at_their_word(version, label, symmetric, first):
    weight = random_weight(24, 96, 32, "integer", zero=8 if symmetric else first)
    weight.zeros[0] = first
    got = read(encode(weight, version), GPTQ.settings(config(checkpoint_format=label, sym=symmetric)))
    assert torch.equal(got.dequantize(), weight.dequantize())


def test_zero_points_of_zero_survive_version_one():
    weight = random_weight(16, 64, 32, "integer", zero=0)
    weight.zeros[3] = 15
    written = GPTQ.write(weight, Settings(4, 32, False, "v1"), name="m")
    assert torch.equal(written["qzeros"], encode(weight)["qzeros"])
    assert torch.equal(read(encode(weight), shape=(16, 64)).dequantize(), weight.dequantize())


@pytest.mark.parametrize("kind", ["symmetric", "integer"])
def test_act_order(kind):
    weight = random_weight(16, 96, 32, kind)
    index = torch.randperm(96, generator=torch.Generator().manual_seed(1)) // 32
    settings = GPTQ.settings(config(desc_act=True))
    assert GPTQ.suffixes(settings)["g_idx"]
    got = read(encode(weight, index=index), settings, (16, 96))
    zeros = torch.full(weight.scales.shape, 8.0) if weight.zeros is None else weight.zeros.float()
    want = (weight.codes.float() - zeros[:, index]) * weight.scales.float()[:, index]
    assert got.perm is not None
    assert torch.equal(got.dequantize(), want)
    back = GPTQ.write(got, GPTQ.settings_for(got), name="m.q")
    assert torch.equal(back["g_idx"], index.int())
    assert torch.equal(read(back, shape=(16, 96)).dequantize(), want)
    x = torch.randn(3, 96)
    from torch_int4 import Int4Linear

    torch.testing.assert_close(Int4Linear(got, compute="fp32")(x), x @ want.T, rtol=1e-5, atol=1e-5)


def test_order_that_changes_nothing_leaves_no_permutation():
    weight = random_weight(16, 96, 32)
    assert read(encode(weight, index=torch.arange(96) // 32), shape=(16, 96)).perm is None


def test_modules_of_other_bits_in_dynamic_files():
    settings = GPTQ.settings(config(dynamic={"+:.*down.*": {"bits": 8}}))
    for bits, group in ((4, 32), (8, 32), (8, 96)):
        weight = random_weight(16, 192, group, bits=bits)
        got = read(encode(weight), settings, (16, 192))
        assert (got.bits, got.group_size) == (bits, group)


def test_describe_names_exceptions():
    written = {
        "a.q": Settings(4, 32, layout="v1"),
        "a.k": Settings(4, 32, layout="v1"),
        "h": Settings(8, -1, layout="v1"),
    }
    described = GPTQ.describe(written, ["lm_head"])
    assert described["bits"] == 4
    assert described["dynamic"] == {"+:^h$": {"bits": 8, "group_size": -1}, "-:^lm_head$": {}}
    with pytest.raises(Int4Error, match="one version"):
        GPTQ.describe({"a": Settings(layout="v1"), "b": Settings(layout="v2")}, [])


REFUSED = {
    "bits: 3": config(3),
    "bits: 2": config(2),
    "bits: is missing": {"quant_method": "gptq"},
    "checkpoint_format: 'marlin'": config(checkpoint_format="marlin"),
    "is_marlin_format": config(is_marlin_format=True),
    "pack_dtype: 'int64'": config(pack_dtype="int64"),
    "group_size: 0": config(group=0),
    "group_size: True": config(group=True),
    "desc_act: 'no'": config(desc_act="no"),
}


@pytest.mark.parametrize("field", REFUSED)
def test_settings_that_cannot_be_served(field):
    with pytest.raises(Int4Error, match=rf"quantization_config\.{field}"):
        GPTQ.settings(REFUSED[field])


def broken():
    good = encode(random_weight(24, 96, 32, "integer"), index=torch.arange(96) // 32)
    scales = good["scales"].clone()
    scales[2, 23] = float("inf")
    index = good["g_idx"]
    return {
        "m.q.qweight: is missing": {"qweight": None},
        "m.q.qweight: must be int32": {"qweight": good["qweight"].float()},
        "m.q.qweight: must have shape [12, 24], got [24, 12]": {"qweight": good["qweight"].t().contiguous()},
        "m.q.qzeros: is missing": {"qzeros": None},
        "m.q.qzeros: must have shape [3, 3]": {"qzeros": good["qzeros"][:2]},
        "m.q.scales: holds NaN": {"scales": scales},
        "m.q.scales: must have shape [groups, 24]": {"scales": good["scales"][:, 1:]},
        "m.q.scales: must be float16": {"scales": good["scales"].int()},
        "m.q.scales: has 2 groups": {"scales": good["scales"][1:]},
        "m.q.g_idx: the group index holds 3": {"g_idx": index + 1},
        "m.q.g_idx: the group index holds -1": {"g_idx": index - 1},
        "m.q.g_idx: the group index must have": {"g_idx": index[1:]},
        "m.q.g_idx: must be int32": {"g_idx": index.float()},
        "m.q.g_idx: the group index does not hold": {"g_idx": index.clamp(max=1)},
    }


@pytest.mark.parametrize("message", broken())
def test_broken_tensors(message):
    good = encode(random_weight(24, 96, 32, "integer"), index=torch.arange(96) // 32)
    tensors = {key: value for key, value in (good | broken()[message]).items() if value is not None}
    with pytest.raises(Int4Error) as caught:
        read(tensors)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(("rows", "inputs"), [(20, 64), (16, 68)])
def test_sizes_that_leave_words_half_full_are_not_written(rows, inputs):
    with pytest.raises(Int4Error, match=r"m: is \d+ x \d+, and GPTQ"):
        GPTQ.write(random_weight(rows, inputs, 32), Settings(4, 32, layout="v1"), name="m")


def auto_round_config(**fields):
    return {"quant_method": "auto-round", "bits": 4, "group_size": 32, "sym": True, "data_type": "int", **fields}


@pytest.mark.parametrize(
    ("packing", "layout"),
    [
        ("auto_round:auto_gptq", "v1"),
        ("auto_round:gptqmodel", "v2"),
        ("auto_round:auto_awq", "awq"),
        ("auto_round:exllamav2", "v2"),
        ("auto_round", "v2"),
        (None, "v1"),
    ],
)
def test_packings_of_auto_round(packing, layout):
    settings = AUTO_ROUND.settings(auto_round_config(packing_format=packing))
    assert settings.layout == layout
    if layout == "awq":
        assert "g_idx" not in AUTO_ROUND.suffixes(settings)
        return
    weight = random_weight(24, 96, 32, "integer")
    got = read(encode(weight, 1 if layout == "v1" else 2), settings, form=AUTO_ROUND)
    assert torch.equal(got.dequantize(), weight.dequantize())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bits": 2}, "bits: 2"),
        ({"act_bits": 8}, "act_bits: 8"),
        ({"data_type": "mx_fp"}, "data_type: 'mx_fp'"),
        ({"packing_format": "auto_round:fp8_static"}, "packing_format: 'auto_round:fp8_static'"),
        ({"packing_format": "auto_round:auto_awq", "bits": 8}, "bits: 8 is not served in AWQ"),
        ({"rotation_config": {"a": 1}}, "rotation_config"),
    ],
)
def test_settings_of_auto_round_that_cannot_be_served(fields, message):
    with pytest.raises(Int4Error, match=rf"quantization_config\.{message}"):
        AUTO_ROUND.settings(auto_round_config(**fields))
