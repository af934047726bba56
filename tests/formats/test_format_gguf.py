"""GGUF blocks against the package gguf, bit by bit: it quantizes where it can, and expands every type."""

import numpy as np
import pytest
import torch

from torch_int4 import Int4Error, Int4Linear, Int4Weight, formats
from torch_int4.formats import Settings
from torch_int4.formats.gguf import BLOCKS, dense

gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")
FORM = formats.get("gguf")
# type: the places of fp16 numbers in its blocks, where they are not at the beginning alone
HALVES = {"MXFP4": (), "Q4_1": (0, 2), "Q5_1": (0, 2), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q3_K": (108,), "Q6_K": (208,)}


def random_blocks(kind, rows, inputs, seed=0):
    """Bytes of every value; the fp16 numbers in a block are made finite and of both signs."""
    per_block, size = BLOCKS[kind]
    generator = np.random.default_rng(seed)
    raw = generator.integers(0, 256, (rows, inputs // per_block, size), dtype=np.uint8)
    for at in HALVES.get(kind, (0,)):
        values = generator.standard_normal((rows, inputs // per_block)).astype(np.float16)
        raw[..., at : at + 2] = values[..., None].view(np.uint8)
    if kind == "MXFP4":
        raw[..., 0] = generator.integers(100, 140, raw.shape[:2])
    return raw.reshape(rows, -1)


def expanded(raw, kind):
    return torch.from_numpy(gguf.quants.dequantize(raw, getattr(gguf.GGMLQuantizationType, kind)))


def read(raw, kind, shape, name="blk.0.attn_q"):
    return FORM.read({"weight": torch.from_numpy(raw)}, Settings(layout=kind), shape=shape, name=name)


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize(("rows", "inputs"), [(1, 256), (7, 768)])
def test_every_type_is_taken_over_bit_by_bit(kind, rows, inputs):
    raw = random_blocks(kind, rows, inputs)
    weight = read(raw, kind, (rows, inputs))
    assert weight.group_size == (16 if kind in ("Q3_K", "Q6_K") else 32)
    assert torch.equal(weight.dequantize(), expanded(raw, kind).reshape(rows, inputs))
    packed = Int4Linear(weight, compute="fp32")
    assert torch.equal(packed.dequantize(), weight.dequantize())


@pytest.mark.parametrize(("kind", "bits"), [("IQ4_NL", 4.5), ("IQ4_XS", 4.3125)])
def test_the_values_of_iq4_are_a_code_book(kind, bits):
    """With the bits of products of the same values as codes of 8 bits."""
    weight = read(random_blocks(kind, 32, 512), kind, (32, 512))
    linear = Int4Linear(weight)
    assert linear.nbytes * 8 / weight.codes.numel() == bits
    values = torch.ops.torch_int4.codebook("iq4_nl")
    assert tuple(values.tolist()) == gguf.quants.IQ4_NL.kvalues
    wide = (values[weight.codes.long()] + 128).to(torch.uint8)
    x = torch.randn(5, 512, generator=torch.Generator().manual_seed(0))
    assert torch.equal(linear(x), Int4Linear(Int4Weight(wide, weight.group_scales(), bits=8))(x))


@pytest.mark.parametrize("kind", BLOCKS)
def test_no_type_takes_more_than_one_part_in_twenty_more_than_in_the_file(kind):
    weight = read(random_blocks(kind, 32, 1024), kind, (32, 1024))
    per_block, size = BLOCKS[kind]
    stored, taken = size * 8 / per_block, Int4Linear(weight).nbytes * 8 / weight.codes.numel()
    if kind == "Q3_K":  # its codes of three bits take four
        assert taken == 4.5625
    else:
        assert stored <= taken <= 1.05 * stored
    if kind in ("Q4_K", "Q5_K"):
        assert int(weight.multipliers.max()) < 64


@pytest.mark.parametrize("kind", [k for k in BLOCKS if k in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4")])
def test_what_the_package_quantizes_is_read(kind):
    dense_weight = np.random.default_rng(1).standard_normal((5, 96)).astype(np.float32)
    raw = gguf.quants.quantize(dense_weight, getattr(gguf.GGMLQuantizationType, kind))
    got = read(raw, kind, (5, 96)).dequantize()
    assert torch.equal(got, expanded(raw, kind))
    assert (got - torch.from_numpy(dense_weight)).norm() < 0.2 * np.linalg.norm(dense_weight)


@pytest.mark.parametrize("kind", ["Q6_K", "Q3_K", "Q2_K", "F16", "F32", "BF16", "Q4_K"])
def test_everything_else_is_expanded(kind):
    quantized = getattr(gguf.GGMLQuantizationType, kind)
    per_block, size = gguf.GGML_QUANT_SIZES[quantized]
    raw = np.random.default_rng(2).integers(0, 256, (3, 512 // per_block * size), dtype=np.uint8)
    raw &= 0xBB if size < 10 else 0xBF  # keeps every pattern of exponents finite, wherever it stands
    if kind == "BF16":
        want = torch.from_numpy(raw).view(torch.bfloat16).float()
    else:
        view = {"F16": np.float16, "F32": np.float32}.get(kind, np.uint8)
        want = torch.from_numpy(gguf.quants.dequantize(raw.view(view), quantized))
    assert torch.equal(dense(torch.from_numpy(raw), kind, (3, 512), "x"), want.float())


def test_types_without_a_grid_are_refused_with_the_list_of_those_that_have_one():
    with pytest.raises(Int4Error, match=r"blk\.0\.attn_q: the GGUF type Q2_K lies on no grid.*Q4_0"):
        read(np.zeros((1, 84), np.uint8), "Q2_K", (1, 256))


@pytest.mark.parametrize("kind", BLOCKS)
def test_broken_blocks_are_named(kind):
    raw = random_blocks(kind, 3, 512)
    with pytest.raises(Int4Error, match=r"blk\.0\.attn_q\.weight: must have shape"):
        read(raw[:, :-1].copy(), kind, (3, 512))
    with pytest.raises(Int4Error, match=r"blk\.0\.attn_q\.weight: must be uint8"):
        read(raw.astype(np.int8), kind, (3, 512))
    with pytest.raises(Int4Error, match=r"blk\.0\.attn_q: has 500 inputs"):
        read(raw, kind, (3, 500))
    at = HALVES.get(kind, (0,))[0] if kind != "MXFP4" else 0
    raw[2, -BLOCKS[kind][1] :][at : at + 2] = 255  # NaN as fp16, and as a shared exponent
    with pytest.raises(Int4Error, match=r"blk\.0\.attn_q \(.*\): (scales|offsets) hold NaN"):
        read(raw, kind, (3, 512))


def test_expanding_checks_sizes_and_values():
    with pytest.raises(Int4Error, match="x: holds 5 bytes"):
        dense(torch.zeros(5, dtype=torch.uint8), "Q8_0", (1, 32), "x")
    with pytest.raises(Int4Error, match="x: holds NaN or infinity"):
        dense(torch.full((64,), 255, dtype=torch.uint8), "F16", (1, 32), "x")


def gguf_linear(kind, rows, inputs, order=None):
    utils = pytest.importorskip("transformers.integrations.gguf.utils")
    number = int(getattr(gguf.GGMLQuantizationType, kind))
    module = utils.GgufLinear(inputs, rows, number)
    module.weight.data = torch.from_numpy(random_blocks(kind, rows, inputs))
    module.input_permutation = order
    return module


@pytest.mark.parametrize("ordered", [False, True])
def test_the_linear_of_transformers_is_converted(ordered):
    order = torch.randperm(256) if ordered else None
    module = gguf_linear("Q4_K", 6, 256, order)
    weight = formats.convert_module(module, name="m")
    want = expanded(module.weight.numpy(), "Q4_K")
    by_input = torch.empty_like(want)
    by_input[:, order if ordered else slice(None)] = want  # it reads x[order]: column k belongs to input order[k]
    assert torch.equal(weight.dequantize(), by_input)
    assert torch.equal(FORM.dense_module(module, name="m"), weight.dequantize())
