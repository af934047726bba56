"""Writers of small checkpoints, and of every way to break them that a reader has to survive."""

import json
import struct

import numpy as np

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
# what is in the message: arguments of `safetensors`
SAFETENSORS = {
    "is cut off, or no safetensors file: 65536": {"raw": bytes(PAYLOAD)},
    "is cut off, or no safetensors file: 3 bytes": {"raw": b"abc"},
    "is cut off, or no safetensors file: 0 bytes": {"raw": b""},
    "header of 9223372036854775807": {"length": (1 << 63) - 1},
    "header of 18446744073709551615": {"length": (1 << 64) - 1},
    "holds no valid JSON: 'utf-8'": {"header": b"\xff\xfe{}"},
    "holds no valid JSON: Expecting": {"header": b'{"a.weight": '},
    "holds no valid JSON": {"header": DEEP},
    "must hold a JSON table, got list": {"header": b"[1, 2]"},
    "holds NaN, which is no JSON": {"header": b'{"a": NaN}'},
    "holds 'a.weight' twice": {"header": TWICE},
    "__metadata__ must be a table": {"header": {**GOOD, "__metadata__": {"format": 3}}},
    "b.weight: needs exactly": {"header": {**GOOD, "b.weight": {"dtype": "F32"}}},
    "b.weight: needs exactly dtype, shape": {"header": changed(extra=1)},
    "b.weight: has an unknown dtype 'F128'": {"header": changed(dtype="F128")},
    "b.weight: has an unknown dtype '7'": {"header": changed(dtype=7)},
    "b.weight: its shape must be a list of": {"header": changed(shape=[-HALF // 16, -4])},
    "b.weight: its shape must be a list": {"header": changed(shape=[True, HALF // 4])},
    "b.weight: its shape must be": {"header": changed(shape=[float(HALF)])},
    "at most 16 sizes": {"header": changed(shape=[1] * 17)},
    "needs 18446744073709551616 bytes": {"header": changed(shape=[1 << 31, 1 << 31])},
    "b.weight: F32 [4611686018427387905]": {"header": changed(shape=[(1 << 62) + 1])},
    "b.weight: F16 [2048, 4] needs 16384 bytes, and the file gives it 32768": {"header": changed(dtype="F16")},
    "b.weight: its data_offsets must be": {"header": changed(data_offsets=[HALF])},
    "b.weight: its data_offsets": {"header": changed(data_offsets=[-1, HALF])},
    "b.weight: lies at 65536..32768": {"header": changed(data_offsets=[PAYLOAD, HALF])},
    "b.weight: lies at 32768..98304": {"header": changed(data_offsets=[HALF, HALF + PAYLOAD], shape=[HALF // 8, 4])},
    "b.weight: lies at 32768..65536, and the file holds 65535": {"payload": bytes(PAYLOAD - 1)},
    "b.weight: overlaps a.weight": {"header": {"a.weight": entry(0, HALF), "b.weight": entry(HALF - 4, PAYLOAD)}},
    "there is a hole of 4 bytes before": {"header": {"a.weight": entry(0, HALF), "b.weight": entry(HALF + 4, PAYLOAD)}},
    "and its header describes 32768": {"header": {"a.weight": entry(0, HALF)}},
    "describes 65536": {"payload": bytes(PAYLOAD + 1)},
    "describes 0": {"header": {}},
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
