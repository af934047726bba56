"""bitsandbytes' NF4 and FP4, and MXFP4: built value by value, and by their own tools where they install."""

import json

import pytest
import torch
from oracle import random_weight

from torch_int4 import Int4Error, Int4Linear, formats
from torch_int4.formats import Settings

BNB, MXFP4 = formats.get("bitsandbytes"), formats.get("mxfp4")
NF4 = torch.ops.torch_int4.codebook("nf4")
FP4 = torch.tensor([s * v / 192 for s in (1, -1) for v in (0, 1, 128, 192, 64, 96, 32, 48)])
VALUES = {"nf4": NF4, "fp4": FP4}
STATE = "weight.quant_state.bitsandbytes__"


def bnb(rows, inputs, block=64, kind="nf4", nested=False, seed=0, **state):
    """The tensors of a linear, and its float weight."""
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (rows * inputs,), generator=g, dtype=torch.uint8)
    blocks = -(-rows * inputs // block)
    absmax = torch.rand(blocks, generator=g) + 0.5
    padded = torch.nn.functional.pad(codes, (0, codes.numel() % 2))
    table = {"quant_type": kind, "blocksize": block, "dtype": "float32", "shape": [rows, inputs]}
    tensors = {
        "weight": (padded[0::2] * 16 + padded[1::2])[:, None],
        "weight.absmax": absmax,
        "weight.quant_map": VALUES[kind],
    }
    if nested:
        outer, values = torch.rand(-(-blocks // 256), generator=g) + 0.1, torch.linspace(-1, 1, 256)
        inner = torch.randint(0, 256, (blocks,), generator=g, dtype=torch.uint8)
        tensors |= {"weight.absmax": inner, "weight.nested_absmax": outer, "weight.nested_quant_map": values}
        table |= {"nested_blocksize": 256, "nested_offset": 2.5, "nested_dtype": "float32"}
        absmax = torch.stack([values[int(q)] * outer[i // 256] for i, q in enumerate(inner)]) + 2.5
    text = json.dumps({**table, **state}).encode()
    tensors[STATE + kind] = torch.tensor(list(text), dtype=torch.uint8)
    dense = torch.stack([VALUES[kind][int(q)] * absmax[i // block] for i, q in enumerate(codes)])
    return tensors, dense.view(rows, inputs)


def config(kind="nf4", **fields):
    return {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": kind, **fields}


def read(tensors, shape, kind="nf4"):
    return BNB.read(tensors, BNB.settings(config(kind)), shape=shape, name="m.q")


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(
    ("shape", "block", "group"),
    [
        ((6, 128), 64, 64),
        ((5, 96), 64, 32),
        ((4, 160), 128, 32),
        ((3, 40), 4096, -1),
        ((2, 2048), 2048, -1),
        ((7, 64), 32, 32),
    ],
)
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_blocks_become_groups_of_rows(shape, block, group, nested, kind):
    if shape == (3, 40):
        block = 40  # not a block size of the library
    tensors, dense = bnb(*shape, block, kind=kind, nested=nested)
    if block == 40:
        with pytest.raises(Int4Error, match="blocksize 40"):
            read(tensors, shape, kind)
        return
    weight = read(tensors, shape, kind)
    assert weight.codebook == {"nf4": "nf4", "fp4": "bnb_fp4"}[kind]
    assert weight.group_size == group
    torch.testing.assert_close(weight.dequantize(), dense, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(Int4Linear(weight, compute="fp32").dequantize(), dense, rtol=1e-6, atol=1e-7)


def test_rows_that_share_no_group_with_blocks_are_refused_but_expanded():
    tensors, dense = bnb(6, 72)
    with pytest.raises(Int4Error, match=r"m\.q: blocks of 64 values cross its rows of 72 inputs"):
        read(tensors, (6, 72))
    settings = BNB.settings(config())
    assert torch.equal(BNB.read_dense(tensors, settings, shape=(6, 72), name="m"), dense)


def test_weights_stored_as_another_type():
    tensors, dense = bnb(6, 128)
    tensors["weight"] = tensors["weight"].squeeze(1).view(torch.bfloat16)[:, None]
    torch.testing.assert_close(read(tensors, (6, 128)).dequantize(), dense, rtol=1e-6, atol=1e-7)


def broken():
    good = bnb(6, 128, nested=True)[0]

    def state(**fields):
        return {STATE + "nf4": bnb(6, 128, nested=True, **fields)[0][STATE + "nf4"]}

    return {
        "m.q.weight: is missing": {"weight": None},
        "m.q.weight: holds 383 bytes": {"weight": good["weight"][1:]},
        "m.q.weight: must be uint8": {"weight": good["weight"].int()},
        "m.q.weight.absmax: must have shape [12]": {"weight.absmax": good["weight.absmax"][1:]},
        "m.q.weight.absmax: must be float32": {"weight.absmax": good["weight.absmax"].half()},
        "m.q.weight.nested_absmax: is missing": {"weight.nested_absmax": None},
        "m.q.weight.nested_absmax: must have shape [1]": {"weight.nested_absmax": torch.ones(2)},
        "m.q.weight.nested_absmax: holds NaN": {"weight.nested_absmax": torch.tensor([float("nan")])},
        "m.q.weight.nested_quant_map: must have shape [256]": {"weight.nested_quant_map": torch.ones(16)},
        "m.q.weight.quant_map: is not the code book of nf4": {"weight.quant_map": FP4},
        "m.q.weight.quant_map: must have shape [16]": {"weight.quant_map": NF4[1:]},
        f"m.q.{STATE}nf4: is missing": {STATE + "nf4": None},
        f"m.q.{STATE}nf4: holds no valid JSON": {STATE + "nf4": torch.full((9,), 200, dtype=torch.uint8)},
        f"m.q.{STATE}nf4: says [128, 6]": state(shape=[128, 6]),
        f"m.q.{STATE}nf4: blocksize -64": state(blocksize=-64),
        f"m.q.{STATE}nf4: blocksize True": state(blocksize=True),
        f"m.q.{STATE}nf4: says quant_type 'fp4'": state(quant_type="fp4"),
        "m.q: nested_blocksize 0": state(nested_blocksize=0),
        "m.q: nested_offset 'x'": state(nested_offset="x"),
        "m.q: nested_offset 1e+39": state(nested_offset=1e39),
        f"m.q.{STATE}nf4: must be at most": {STATE + "nf4": torch.zeros(1 << 17, dtype=torch.uint8)},
    }


@pytest.mark.parametrize("message", broken())
def test_broken_tensors(message):
    tensors = bnb(6, 128, nested=True)[0] | broken()[message]
    with pytest.raises(Int4Error) as caught:
        read({key: value for key, value in tensors.items() if value is not None}, (6, 128))
    assert str(caught.value).startswith(message)


def test_float_linears_beside_quantized_ones_are_told_apart():
    settings = BNB.settings(config())
    keys = [f"m.q.{suffix}" for suffix in bnb(2, 64)[0]] + ["norm.weight", "lm_head.weight"]
    assert list(BNB.linears(keys, settings)) == ["m.q"]
    with pytest.raises(Int4Error, match=r"m\.q\.weight\.quant_map: is missing"):
        BNB.linears([key for key in keys if not key.endswith("quant_map")], settings)
    with pytest.raises(Int4Error, match="load_in_8bit"):
        BNB.settings(config(load_in_8bit=True))
    with pytest.raises(Int4Error, match="bnb_4bit_quant_type: 'af4'"):
        BNB.settings(config("af4"))


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
def test_the_library_and_we_agree(kind, nested):
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    dense = torch.randn(32, 192, generator=torch.Generator().manual_seed(0))
    module = bitsandbytes.nn.Linear4bit(192, 32, bias=False, compress_statistics=nested, quant_type=kind)
    module.weight.data = dense
    module = module.to("cpu")
    want = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
    state = module.state_dict()
    got = BNB.read_dense(state, BNB.settings(config(kind)), shape=(32, 192), name="m")
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)
    assert formats.holds(module)
    converted = formats.convert_module(module, name="m")
    torch.testing.assert_close(converted.dequantize(), want, rtol=1e-6, atol=1e-7)


E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]


def mx(rows, inputs, layout, seed=0):
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (rows, inputs), generator=g, dtype=torch.uint8)
    scales = torch.randint(100, 140, (rows, inputs // 32), generator=g, dtype=torch.uint8)
    scales[0, 0] = 0  # the least exponent, a subnormal number
    packed = codes[:, 0::2] + codes[:, 1::2] * 16
    dense = torch.tensor(E2M1)[codes.long()] * torch.pow(2.0, scales.double() - 127).repeat_interleave(32, 1)
    if layout == "packed":
        return {"weight_packed": packed, "weight_scale": scales}, dense.float()
    return {"blocks": packed.view(rows, inputs // 32, 16), "scales": scales}, dense.float()


MX_CONFIGS = {
    "blocks": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]},
    "packed": {
        "quant_method": "compressed-tensors",
        "format": "mxfp4-pack-quantized",
        "config_groups": {"g": {"weights": {"num_bits": 4, "type": "float", "group_size": 32}}},
    },
}


@pytest.mark.parametrize("layout", MX_CONFIGS)
@pytest.mark.parametrize("shape", [(1, 32), (6, 160)])
def test_mxfp4(layout, shape):
    assert formats.find(MX_CONFIGS[layout]) is MXFP4
    tensors, dense = mx(*shape, layout)
    weight = MXFP4.read(tensors, MXFP4.settings(MX_CONFIGS[layout]), shape=shape, name="m")
    assert torch.equal(weight.dequantize(), dense)
    codes, scales = tensors
    for message, change in {
        f"m.{codes}: must be uint8": {codes: tensors[codes].int()},
        f"m.{codes}: must have shape": {codes: tensors[codes][..., :-1]},
        f"m.{scales}: must have shape": {scales: tensors[scales][:, :0]},
        f"m.{scales}: holds NaN": {scales: torch.full_like(tensors[scales], 255)},
        f"m.{scales}: is missing": {scales: None},
    }.items():
        with pytest.raises(Int4Error) as caught:
            MXFP4.read({**tensors, **change}, MXFP4.settings(MX_CONFIGS[layout]), shape=shape, name="m")
        assert str(caught.value).startswith(message)
    with pytest.raises(Int4Error, match="m: has 33 inputs"):
        MXFP4.read(tensors, Settings(layout=layout), shape=(shape[0], 33), name="m")


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({"weights": {"num_bits": 8, "type": "float", "group_size": 32}}, "weights: must be 4-bit floats"),
        ({"weights": {"num_bits": 4, "type": "float", "group_size": 32}, "input_activations": {}}, "input_activations"),
        ({}, "weights: must be a table"),
    ],
)
def test_mxfp4_settings_that_cannot_be_served(group, message):
    with pytest.raises(Int4Error, match=message):
        MXFP4.settings({**MX_CONFIGS["packed"], "config_groups": {"g": group}})


def test_mxfp4_of_compressed_tensors():
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    compressor = BaseCompressor.get_value_from_registry("mxfp4-pack-quantized")
    args = QuantizationArgs(num_bits=4, type="float", strategy="group", group_size=32, scale_dtype=torch.uint8)
    scheme = QuantizationScheme(targets=["Linear"], weights=args, format="mxfp4-pack-quantized")
    tensors, dense = mx(6, 160, "packed")
    theirs = compressor.decompress({k: v.clone() for k, v in tensors.items()}, scheme)["weight"].float()
    finite = tensors["weight_scale"].repeat_interleave(32, 1) > 0  # theirs may flush subnormal scales
    assert torch.equal(theirs[finite], dense[finite])


def test_the_formats_do_not_mix_with_grids():
    with pytest.raises(Int4Error):
        formats.get("compressed_tensors").write(random_weight(4, 64, 32, codebook="fp4"), Settings(), name="m")
