"""The promises of every file of torch_int4/formats; the files are discovered, none is listed."""

import pytest
import torch
from oracle import random_weight
from torch import nn

from torch_int4 import Int4Error, Int4Weight, formats
from torch_int4.formats import Format, Settings
from torch_int4.formats.parts.checks import serve

FOUR_BITS = ("awq",)  # formats that hold no other codes
ANYTHING = ("native",)  # formats that express every weight
WRITERS = [name for name in formats.available() if formats.get(name).writes]


@pytest.mark.parametrize("name", formats.available())
def test_every_file_is_a_format_that_knows_its_name(name):
    form = formats.get(name)
    assert isinstance(form, Format)
    assert form.name == name
    assert any(form.suffixes(Settings()).values())
    assert form.convert_module(nn.Linear(8, 8), name="x") is None
    assert not form.recognises({})
    assert not form.recognises({"quant_method": "no such method"})


def test_unknown_formats_are_errors_that_list_the_known_ones():
    with pytest.raises(Int4Error, match=r"unknown checkpoint format 'nope'; there are: .*compressed_tensors"):
        formats.get("nope")
    with pytest.raises(Int4Error, match=r"quant_method: 'quip' is not read; known are: "):
        formats.find({"quant_method": "quip"})
    with pytest.raises(Int4Error, match="must be a table"):
        formats.find(["gptq"])


def same(a: Int4Weight, b: Int4Weight) -> bool:
    return torch.equal(a.dequantize(), b.dequantize())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", ["symmetric", "integer"])
@pytest.mark.parametrize(("rows", "inputs", "group"), [(16, 64, 32), (40, 96, 32), (8, 256, 128), (24, 64, -1)])
@pytest.mark.parametrize("name", WRITERS)
def test_what_is_written_is_read_back_bit_by_bit(name, rows, inputs, group, kind, bits):
    form = formats.get(name)
    weight = random_weight(rows, inputs, group, kind, bits=bits)
    settings = form.settings_for(weight)
    if bits == 8 and name in FOUR_BITS:
        with pytest.raises(Int4Error, match=r"m\.q: .*8 bits"):
            form.write(weight, settings, name="m.q")
        return
    tensors = form.write(weight, settings, name="m.q")
    config = form.describe({"m.q": settings}, ["lm_head"])
    assert formats.find(config) is form
    read = form.settings(config)
    assert {s for s, needed in form.suffixes(read).items() if needed} <= set(tensors)
    linears = form.linears([f"m.q.{s}" for s in tensors] + ["m.q.bias", "m.norm.weight"], read)
    assert list(linears) == ["m.q"]
    back = form.read(tensors, read, shape=(rows, inputs), name="m.q")
    assert same(back, weight)
    assert torch.equal(back.codes, weight.codes)
    assert back.bits == bits


@pytest.mark.parametrize("name", [name for name in WRITERS if name != "native"])  # which is there to express all
@pytest.mark.parametrize(
    "fields",
    [
        {"codebook": "nf4"},
        {"kind": "float"},
        {"bits": 5},
        {"bits": 6, "kind": "scales", "group_size": 16},
        {"kind": "scales", "group_size": 16},
    ],
)
def test_what_a_format_cannot_express_is_refused_and_never_changed(name, fields):
    form = formats.get(name)
    weight = random_weight(16, 256, **{"group_size": 32, **fields})
    settings = form.settings_for(weight)
    if name not in ANYTHING:
        with pytest.raises(Int4Error, match=r"m\.q: "):
            form.write(weight, settings, name="m.q")
        return
    back = form.read(form.write(weight, settings, name="m.q"), settings, shape=(16, 256), name="m.q")
    assert same(back, weight)


@pytest.mark.parametrize(("size", "served"), [(2048, 1024), (192, 96), (1536, 768), (4096, 1024), (32, 32)])
def test_large_groups_are_cut_without_changing_a_value(size, served):
    weight = random_weight(3, 2 * size + 32, size, "integer")
    want = weight.dequantize()
    cut = serve(weight, "m.q")
    assert cut.group_size == served
    assert torch.equal(cut.dequantize(), want)
    torch.ops.torch_int4.pack(cut.codes, cut.scales, cut.zeros, group_size=cut.group_size)  # kernels take it


@pytest.mark.parametrize("size", [16, 48, 100])
def test_groups_that_no_kernel_serves_are_refused(size):
    with pytest.raises(Int4Error, match=rf"m\.q: groups of {size} inputs are not served"):
        serve(random_weight(3, 2 * size, size), "m.q")


def test_a_group_wider_than_the_row_is_the_row():
    weight = serve(random_weight(3, 40, 48), "m.q")
    assert weight.group_size == -1
