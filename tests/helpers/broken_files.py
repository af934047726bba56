"""Writers of small checkpoints and their tensors, and of every way to break them that a reader has to survive."""

import json
import struct

import numpy as np
import torch

PAYLOAD = 1 << 16


def safetensors(path, header=None, payload=None, length=None):
    """A file from its parts; `header` is a table, or bytes as they are."""
    payload = bytes(PAYLOAD) if payload is None else payload
    header = GOOD if header is None else header
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = len(text) if length is None else length
    path.write_bytes(size.to_bytes(8, "little") + text + payload)
    return path


def entry(begin, end, dtype="U8", shape=None):
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


HALF = PAYLOAD // 2
GOOD = {"a.weight": entry(0, HALF), "b.weight": entry(HALF, PAYLOAD, "F32", [HALF // 16, 4])}


def changed(**fields):
    return {**GOOD, "b.weight": {**GOOD["b.weight"], **fields}}


DEEP = b'{"a":' * 100000 + b"1" + b"}" * 100000
TWICE = b'{"a.weight":%s,"a.weight":%s}' % ((json.dumps(GOOD["a.weight"]).encode(),) * 2)
WHOLE = json.dumps(entry(0, PAYLOAD)).encode()
# what is broken: what the message says of it, after the file's name, and arguments of `safetensors`
SAFETENSORS = {
    "no length": ("is cut off, damaged, or no safetensors file", {"raw": bytes(PAYLOAD)}),
    "three bytes": ("header too small", {"raw": b"abc"}),
    "no bytes": ("header too small", {"raw": b""}),
    "a length of 2^63 - 1": ("header too large", {"length": (1 << 63) - 1}),
    "a length of 2^64 - 1": ("header too large", {"length": (1 << 64) - 1}),
    "no UTF-8": ("invalid UTF-8", {"header": b"\xff\xfe{}"}),
    "JSON that is cut off": ("invalid JSON", {"header": b'{"a.weight": '}),
    "JSON of great depth": ("recursion limit", {"header": DEEP}),
    "a list": ("invalid type: sequence", {"header": b"[1, 2]"}),
    "NaN": ("invalid JSON", {"header": b'{"a": NaN}'}),
    "a tensor twice, and a hole": ("not fully covered", {"header": TWICE}),
    "a tensor twice": ("holds 'a' twice", {"header": b'{"a":%s,"a":%s}' % (WHOLE, WHOLE)}),
    "a field twice": ("duplicate field `shape`", {"header": b'{"a":%s}' % WHOLE.replace(b"{", b'{"shape":[1],')}),
    "a text twice": ("holds 'k' twice", {"header": b'{"__metadata__":{"k":"1","k":"2"},"a":%s}' % WHOLE}),
    "metadata that are no texts": ("expected a string", {"header": {**GOOD, "__metadata__": {"format": 3}}}),
    "a missing field": ("missing field", {"header": {**GOOD, "b.weight": {"dtype": "F32"}}}),
    "an unknown field": ("b.weight: needs exactly dtype, shape", {"header": changed(extra=1)}),
    "an unknown dtype": ("unknown variant `F128`", {"header": changed(dtype="F128")}),
    "a dtype that is a number": ("invalid type: integer `7`", {"header": changed(dtype=7)}),
    "a negative shape": ("expected usize", {"header": changed(shape=[-HALF // 16, -4])}),
    "a shape of True": ("boolean `true`, expected usize", {"header": changed(shape=[True, HALF // 4])}),
    "a shape of floats": ("expected usize", {"header": changed(shape=[float(HALF)])}),
    "17 extents": ("invalid shape", {"header": changed(shape=[1] * 17)}),
    "a size of 2^64": ("overflow", {"header": changed(shape=[1 << 31, 1 << 31])}),
    "a size that wraps around": ("overflow", {"header": changed(shape=[(1 << 62) + 1])}),
    "a size of half its place": ("invalid shape, data type, or offset", {"header": changed(dtype="F16")}),
    "one offset": ("expected a tuple of size 2", {"header": changed(data_offsets=[HALF])}),
    "a negative offset": ("integer `-1`, expected usize", {"header": changed(data_offsets=[-1, HALF])}),
    "an end before its begin": (
        "invalid offset for tensor `b.weight`",
        {"header": changed(data_offsets=[PAYLOAD, HALF])},
    ),
    "an end behind the file": (
        "not fully covered",
        {"header": changed(data_offsets=[HALF, HALF + PAYLOAD], shape=[HALF // 8, 4])},
    ),
    "a byte too few": ("not fully covered", {"payload": bytes(PAYLOAD - 1)}),
    "an overlap": (
        "invalid offset for tensor `b.weight`",
        {"header": {"a.weight": entry(0, HALF), "b.weight": entry(HALF - 4, PAYLOAD)}},
    ),
    "a hole": (
        "invalid offset for tensor `b.weight`",
        {"header": {"a.weight": entry(0, HALF), "b.weight": entry(HALF + 4, PAYLOAD)}},
    ),
    "two tensors in one place": ("invalid offset", {"header": {"a": entry(0, PAYLOAD), "b": entry(0, PAYLOAD)}}),
    "bytes of no tensor": ("not fully covered", {"header": {"a.weight": entry(0, HALF)}}),
    "a byte too many": ("not fully covered", {"payload": bytes(PAYLOAD + 1)}),
    "no tensors": ("not fully covered", {"header": {}}),
}


def break_safetensors(path, raw=None, **parts):
    if raw is None:
        return safetensors(path, **parts)
    path.write_bytes(raw)
    return path


def text(value):
    raw = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(raw)) + raw


def item(key, kind, raw):
    return text(key) + struct.pack("<I", kind) + raw


def tensor(name="a.weight", shape=(64, 4), kind=2, offset=0, dimensions=None):
    count = len(shape) if dimensions is None else dimensions
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", count, *shape, kind, offset)


LONG_NAME = item("general.architecture", 8, text("llama" + 22 * "x"))  # ends five bytes before a multiple of 32
NAME = item("general.architecture", 8, text("llama"))


def gguf(path, tensors=None, items=None, payload=4 * 36, magic=b"GGUF", version=3, counts=None, order="<"):
    """A file with Q4_0 tensors of 4 rows of 64 inputs (144 bytes), from its parts."""
    tensors = [tensor()] if tensors is None else tensors
    items = [NAME] if items is None else items
    counts = (len(tensors), len(items)) if counts is None else counts
    head = magic + struct.pack(f"{order}IQQ", version, *counts) + b"".join(items) + b"".join(tensors)
    path.write_bytes(head + bytes(-len(head) % 32) + np.full(payload, 0x38, np.uint8).tobytes())
    return path


HUGE = (1 << 64) - 1
GGUF = {
    "is cut off, or no GGUF file": {"raw": b"GGUF"},
    "begins with b'GGML'": {"magic": b"GGML"},
    "has GGUF version 1": {"version": 1},
    "has GGUF version 4": {"version": 4},
    "big-endian": {"order": ">"},
    f"declares {HUGE} tensors": {"counts": (HUGE, 1)},
    f"and {HUGE} metadata entries": {"counts": (1, HUGE)},
    "the file ends before it": {"counts": (1, 0), "tensors": [], "items": [], "payload": 0},
    "metadata entry 1: the file ends": {"counts": (0, 2), "tensors": [], "items": [LONG_NAME], "payload": 0},
    "metadata entry 0: a text of 18446744073709551615 bytes": {"items": [struct.pack("<Q", HUGE)]},
    "k: has the unknown type 77": {"items": [item("k", 77, b"")]},
    "metadata entry 0: is no UTF-8": {"items": [item(b"\xff\xff", 4, bytes(4))]},
    "'general.architecture' twice": {"items": [NAME, NAME]},
    "k: an array of 18446744073709551615": {"items": [item("k", 9, struct.pack("<IQ", 10, HUGE))]},
    "k: the file ends": {"items": [item("k", 9, struct.pack("<IQ", 10, 1 << 20))]},
    "k: is an array of the unknown type 9": {"items": [item("k", 9, struct.pack("<IQ", 9, 1))]},
    "general.alignment is 33": {"items": [item("general.alignment", 4, struct.pack("<I", 33))]},
    "general.alignment is 0": {"items": [item("general.alignment", 4, struct.pack("<I", 0))]},
    "general.alignment is 4294967295": {"items": [item("general.alignment", 4, struct.pack("<I", (1 << 32) - 1))]},
    "general.alignment is 'x'": {"items": [item("general.alignment", 8, text("x"))]},
    "the tensor 'a.weight' twice": {"tensors": [tensor(), tensor()]},
    "a.weight: has 0 dimensions": {"tensors": [tensor(shape=())]},
    "a.weight: has 5 dimensions": {"tensors": [tensor(shape=(64, 1, 1, 1, 1))]},
    "a.weight: has 4294967295 dimensions": {"tensors": [tensor(dimensions=(1 << 32) - 1)]},
    "a.weight: has the impossible shape [0, 64]": {"tensors": [tensor(shape=(64, 0))]},
    "a.weight: has the impossible shape [18446744073709551615": {"tensors": [tensor(shape=(64, HUGE))]},
    "a.weight: has the unknown GGUF type 4096": {"tensors": [tensor(kind=4096)]},
    "a.weight: has rows of 63": {"tensors": [tensor(shape=(63, 4))]},
    "a.weight: 5066549580791808 bytes at offset 0 do not": {"tensors": [tensor(shape=(64, 1 << 48 >> 1))]},
    "a.weight: 144 bytes at offset 32 do not": {"tensors": [tensor(offset=32)]},
    "a.weight: 144 bytes at offset 8 do not": {"tensors": [tensor(offset=8)], "payload": 1000},
    "at offset 18446744073709551584 do not": {"tensors": [tensor(offset=HUGE - 31)]},
    "b: overlaps a.weight": {"tensors": [tensor(), tensor("b", offset=128)], "payload": 1000},
    "144 bytes at offset 0 do not lie in the file": {"payload": 143},
}


def hqq(rows, inputs, size=64, bits=4, axis=1, seed=0):
    """The tensors of a linear as HQQ keeps it, built value by value, and its float weight in fp64."""
    g = torch.Generator().manual_seed(seed)
    groups = rows * inputs // size
    shape = (groups, size) if axis == 1 else (size, groups)
    codes = torch.randint(0, 1 << bits, shape, generator=g, dtype=torch.uint8)
    per_group = (groups, 1) if axis == 1 else (1, groups)
    scale, zero = torch.rand(per_group, generator=g) + 0.1, torch.rand(per_group, generator=g) * 15
    half = shape[0] // 2
    packed = codes if bits == 8 else codes[:half] * 16 + codes[half:]
    dense = (codes.double() - zero.double()) * scale.double()
    return {"W_q": packed, "scale": scale, "zero": zero}, dense.view(rows, inputs)


def hqq_config(bits=4, size=64, axis=1, **fields):
    weights = {"nbits": bits, "group_size": size, "axis": axis, "channel_wise": True} | fields
    return {"quant_method": "hqq", "quant_config": {"weight_quant_params": weights}, "skip_modules": ["lm_head"]}
