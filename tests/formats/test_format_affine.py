"""HQQ and torchao, whose offsets are floats: built value by value, and by their own tools where they install."""

import pytest
import torch
from broken_files import hqq, hqq_config

from torch_int4 import Int4Error, Int4Linear, formats
from torch_int4.formats import Settings

HQQ, TORCHAO = formats.get("hqq"), formats.get("torchao")


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("shape", "size", "group"), [((6, 128), 64, 64), ((4, 96), 64, 32), ((8, 64), 256, -1)])
def test_hqq_groups_of_a_row(shape, size, group, bits):
    tensors, dense = hqq(*shape, size, bits)
    weight = HQQ.read(tensors, HQQ.settings(hqq_config(bits, size)), shape=shape, name="m")
    assert (weight.group_size, weight.bits) == (group, bits)
    torch.testing.assert_close(weight.dequantize().double(), dense, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(Int4Linear(weight, compute="fp32").dequantize(), weight.dequantize())


def test_hqq_along_the_other_axis_is_expanded():
    tensors, dense = hqq(8, 64, 64, axis=0)
    settings = HQQ.settings(hqq_config(axis=0))
    expanded = HQQ.read_dense(tensors, settings, shape=(8, 64), name="m")
    torch.testing.assert_close(expanded.double(), dense, rtol=1e-5, atol=1e-5)
    with pytest.raises(Int4Error, match="m: axis=0 groups weights of several rows"):
        HQQ.read(tensors, settings, shape=(8, 64), name="m")


def test_hqq_settings_that_a_module_keeps_must_agree():
    tensors, _ = hqq(6, 128)
    kept = {
        "nbits": torch.tensor(4),
        "group_size": torch.tensor(64),
        "axis": torch.tensor(1),
        "shape": torch.tensor([6, 128]),
    }
    settings = HQQ.settings(hqq_config())
    HQQ.read(tensors | kept, settings, shape=(6, 128), name="m")
    for key, value in {"nbits": 3, "group_size": 32, "axis": 0, "shape": [128, 6]}.items():
        with pytest.raises(Int4Error, match=rf"m\.{key}: says"):
            HQQ.read(tensors | kept | {key: torch.tensor(value)}, settings, shape=(6, 128), name="m")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"W_q": None}, "m.W_q: is missing"),
        ({"W_q": torch.zeros(6, 64, dtype=torch.int32)}, "m.W_q: must be uint8"),
        ({"W_q": torch.zeros(5, 64, dtype=torch.uint8)}, "m.W_q: must have shape [6, 64]"),
        ({"scale": torch.ones(12)}, "m.scale: must have shape [12, 1]"),
        ({"scale": torch.full((12, 1), float("nan"))}, "m.scale: holds NaN"),
        ({"zero": torch.full((12, 1), float("inf"))}, "m.zero: holds NaN"),
        ({"zero": torch.ones(12, 1, dtype=torch.uint8)}, "m.zero: must be float16"),
    ],
)
def test_broken_hqq(change, message):
    tensors = {k: v for k, v in {**hqq(6, 128)[0], **change}.items() if v is not None}
    with pytest.raises(Int4Error) as caught:
        HQQ.read(tensors, HQQ.settings(hqq_config()), shape=(6, 128), name="m")
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("config", "field"),
    [
        (hqq_config(3), "nbits: 3"),
        (hqq_config(axis=2), "axis: 2"),
        (hqq_config(size=0), "group_size: 0"),
        (hqq_config(view_as_float=True), "view_as_float"),
        ({"quant_method": "hqq", "quant_config": {"scale_quant_params": {"nbits": 8}}}, "scale_quant_params"),
        ({"quant_method": "hqq", "quant_config": 4}, "quant_config"),
    ],
)
def test_hqq_settings_that_cannot_be_served(config, field):
    with pytest.raises(Int4Error, match=field):
        HQQ.settings(config)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("axis", [0, 1])
def test_the_hqq_library_and_we_agree(axis, bits):
    quantize = pytest.importorskip("hqq.core.quantize", reason="hqq is not installed")
    linear = torch.nn.Linear(128, 16, bias=False)
    config = quantize.BaseQuantizeConfig(nbits=bits, group_size=64, axis=axis)
    module = quantize.HQQLinear(linear, config, compute_dtype=torch.float32, device="cpu", del_orig=False)
    want = module.dequantize()
    assert formats.holds(module)
    converted = formats.convert_module(module, name="m")
    got = formats.dense_module(module, name="m") if axis == 0 else converted.dequantize()
    assert (converted is None) == (axis == 0)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    encoded = quantize.HQQLinear.state_dict(module)
    read = HQQ.read_dense(encoded, HQQ.settings(hqq_config(bits, 64, axis)), shape=(16, 128), name="m")
    torch.testing.assert_close(read, want, rtol=1e-5, atol=1e-6)


def ao_packed(rows=6, inputs=128, group=32, seed=0):
    g = torch.Generator().manual_seed(seed)
    q = torch.randint(-8, 8, (rows, inputs), generator=g)
    scale, zero = torch.rand(inputs // group, rows, generator=g) + 0.1, torch.randn(inputs // group, rows, generator=g)
    packed = ((q[:, 0::2] & 15) | ((q[:, 1::2] & 15) << 4)).to(torch.uint8).view(torch.int8)
    dense = q * scale.t().repeat_interleave(group, 1) + zero.t().repeat_interleave(group, 1)
    return {"_weight_qdata": packed, "_weight_scale": scale, "_weight_zero_point": zero}, dense


def ao_unpacked(rows=6, inputs=128, group=32, zeros="int", seed=0):
    g = torch.Generator().manual_seed(seed)
    q = torch.randint(-8, 8, (rows, inputs), generator=g).to(torch.int8)
    scale = torch.rand(rows, inputs // group, generator=g) + 0.1
    zero = torch.randint(-8, 8, scale.shape, generator=g).to(torch.int8)
    zero = {"int": zero, "none": torch.zeros_like(zero), "float": zero + 0.25}[zeros]
    dense = (q - zero.repeat_interleave(group, 1)) * scale.repeat_interleave(group, 1)
    return {"_weight_qdata": q, "_weight_scale": scale, "_weight_zero_point": zero}, dense


def ao_config(kind="Int4WeightOnlyConfig", **data):
    return {"quant_method": "torchao", "quant_type": {"default": {"_type": kind, "_version": 2, "_data": data}}}


@pytest.mark.parametrize("group", [32, 64, 128])
def test_torchao_packed(group):
    tensors, dense = ao_packed(group=group)
    weight = TORCHAO.read(tensors, TORCHAO.settings(ao_config(group_size=group)), shape=(6, 128), name="m")
    torch.testing.assert_close(weight.dequantize(), dense, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("zeros", ["int", "none", "float"])
def test_torchao_unpacked(zeros):
    tensors, dense = ao_unpacked(zeros=zeros)
    weight = TORCHAO.read(tensors, TORCHAO.settings(ao_config("IntxWeightOnlyConfig")), shape=(6, 128), name="m")
    assert (weight.zeros is not None, weight.offsets is not None) == (zeros == "int", zeros == "float")
    torch.testing.assert_close(weight.dequantize(), dense, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_weight_qdata": torch.full((6, 128), 8, dtype=torch.int8)}, "m._weight_qdata: holds values outside -8..7"),
        ({"_weight_qdata": torch.zeros(6, 64, dtype=torch.int8)}, "m._weight_qdata: must have shape [6, 128]"),
        ({"_weight_scale": torch.ones(4, 6)}, "m._weight_scale: must have shape [6, groups]"),
        ({"_weight_scale": torch.ones(6, 5)}, "m._weight_scale: has 5 groups"),
        ({"_weight_scale": torch.full((6, 4), float("nan"))}, "m._weight_scale: holds NaN"),
        ({"_weight_zero_point": torch.full((6, 4), 9, dtype=torch.int8)}, "m._weight_zero_point: holds values"),
        ({"_weight_zero_point": torch.zeros(6, 3, dtype=torch.int8)}, "m._weight_zero_point: must have shape [6, 4]"),
        ({"_weight_zero_point": torch.full((6, 4), float("nan"))}, "m: offsets hold NaN"),
    ],
)
def test_broken_torchao(change, message):
    settings = TORCHAO.settings(ao_config("IntxWeightOnlyConfig"))
    with pytest.raises(Int4Error) as caught:
        TORCHAO.read({**ao_unpacked()[0], **change}, settings, shape=(6, 128), name="m")
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    "config",
    [
        ao_config("Float8WeightOnlyConfig"),
        ao_config(int4_packing_format={"_type": "Int4PackingFormat", "_data": "TILE_PACKED_TO_4D"}),
        {"quant_method": "torchao", "quant_type": "int4_weight_only"},
        {"quant_method": "torchao"},
    ],
)
def test_torchao_settings_that_cannot_be_served(config):
    with pytest.raises(Int4Error, match=r"quantization_config\.quant_type"):
        TORCHAO.settings(config)


@pytest.mark.parametrize("asymmetric", [False, True])
def test_the_torchao_library_and_we_agree_on_unpacked_weights(asymmetric):
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    from torchao.quantization.granularity import PerGroup

    mapping = quantization.MappingType.ASYMMETRIC if asymmetric else quantization.MappingType.SYMMETRIC
    module = torch.nn.Sequential(torch.nn.Linear(128, 32, bias=False))
    config = quantization.IntxWeightOnlyConfig(torch.int4, PerGroup(32), mapping)
    quantization.quantize_(module, config)
    want = module[0].weight.dequantize()
    assert formats.holds(module[0])
    torch.testing.assert_close(formats.convert_module(module[0], name="m").dequantize(), want, rtol=1e-5, atol=1e-6)
    flattened = pytest.importorskip("torchao.prototype.safetensors.safetensors_support")
    tensors, _ = flattened.flatten_tensor_state_dict({"0.weight": module[0].weight})
    tensors = {key.removeprefix("0."): value for key, value in tensors.items()}
    read = TORCHAO.read(tensors, Settings(4, layout="IntxUnpackedToInt8Tensor"), shape=(32, 128), name="m")
    torch.testing.assert_close(read.dequantize(), want, rtol=1e-5, atol=1e-6)


def test_the_torchao_library_and_we_agree_on_packing_for_cpus():
    opaque = pytest.importorskip(
        "torchao.prototype.quantization.int4.int4_opaque_tensor", reason="torchao is not installed"
    )
    dense = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    weight = opaque.Int4OpaqueTensor.from_hp(dense, [1, 64])
    module = torch.nn.Linear(256, 64, bias=False)
    module.weight = torch.nn.Parameter(weight, requires_grad=False)
    converted = formats.convert_module(module, name="m")
    x = torch.randn(4, 256, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(x @ converted.dequantize().T, module(x), rtol=1e-4, atol=1e-3)
