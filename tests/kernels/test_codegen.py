"""The compiler's inner loops: a tile whose accumulators are spilled runs at half its speed, and so may one whose jumps
touch a border of 32 bytes."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise

import pytest
from native_programs import find_compiler

from torch_int4 import _C

PRODUCT = re.compile(r"vpmaddubsw|vpdpbusd|vfn?madd\d+ps|tdp")
COPY = re.compile(r"vmov\w+ +%zmm\d+,%zmm")
VECTOR_STACK = re.compile(r"\(%rsp.*%[xyz]mm|%[xyz]mm\d+,.*\(%rsp")


@pytest.fixture(scope="module")
def listing() -> str:
    """The instructions of all operators and kernels."""
    objdump = shutil.which("objdump")
    if objdump is None:
        pytest.skip("needs objdump")
    command = [objdump, "-d", "--no-show-raw-insn", "-C", str(_C.__file__)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def functions(listing: str) -> Iterator[tuple[str, list[tuple[int, str]]]]:
    """(name, [(address, instruction)]) of every function in a listing of objdump."""
    name, body = "", []
    for line in listing.splitlines():
        if header := re.match(r"[0-9a-f]+ <(.*)>:$", line):
            if body:
                yield name, body
            name, body = header[1], []
        elif instruction := re.match(r"\s+([0-9a-f]+):\s+(.*)$", line):
            body.append((int(instruction[1], 16), instruction[2]))
    if body:
        yield name, body


def inner_loops(body: list[tuple[int, str]]) -> Iterator[list[str]]:
    """The instructions between a backward jump and its target, where no other such loop lies inside."""
    index = {address: i for i, (address, _) in enumerate(body)}
    loops = []
    for i, (_, text) in enumerate(body):
        if jump := re.match(r"j\w+\s+([0-9a-f]+)", text):
            start = index.get(int(jump[1], 16), len(body))
            if start <= i:
                loops.append((start, i))
    for start, end in loops:
        if not any(other != (start, end) and other[0] >= start and other[1] <= end for other in loops):
            yield [text for _, text in body[start : end + 1]]


# Codes of 5 and 6 bits, whose high bits lie apart, and blocks that end twice in a slab (Offset::kTwoLevelHalves).
IN_PARTS = re.compile(r"\(torch_int4::WeightType\)[34]|\(torch_int4::Offset\)5")


def test_inner_loops_keep_their_accumulators_in_registers(listing: str) -> None:
    tiles: Counter[str] = Counter()
    for name, body in functions(listing):
        vectors = re.search(r"(?:Int8Loops|TileLoops|FloatLoops|OneRow)<.*?(\w+), ", name)
        if vectors is None:
            continue
        for loop in inner_loops(body):
            products = sum(bool(PRODUCT.search(text)) for text in loop)
            scales = any("vcvtdq2ps" in text for text in loop)
            looks_up = any("vpermps" in text for text in loop)
            if products < 24 or ((scales or looks_up) and "FloatLoops" in name):
                continue  # a short tail, or dequantization
            tiles[vectors[1]] += not scales
            traffic = sum(bool(VECTOR_STACK.search(text)) for text in loop)
            # Sums of blocks that end inside of a loop change places with the sums of floats.
            most = products // 2 if scales else products // 4
            if "TileLoops" not in name and IN_PARTS.search(name):
                most = 2 * products  # few rows of such weights spill: tiles, which unpack them, must not
            assert traffic <= most, f"{name}: {traffic} stack accesses for {products} products"
    assert {"Avx2", "AvxVnni", "Avx512", "Avx512Vnni"} <= tiles.keys()
    assert all(count >= 3 for count in tiles.values()), tiles


def test_tiles_of_several_panels_copy_few_sums(listing: str) -> None:
    tiles = 0
    for name, body in functions(listing):
        if not re.search(r"TileLoops<.*?Avx512Vnni, ", name):
            continue
        for loop in inner_loops(body):
            products = sum(bool(PRODUCT.search(text)) for text in loop)
            if products < 192:  # 4 panels, 6 rows and 32 inputs
                continue
            tiles += 1
            copies = sum(bool(COPY.match(text)) for text in loop)
            assert copies <= products // 8, f"{name}: {copies} copies for {products} products"
    assert tiles >= 9  # each type of weight, and each kind of offset that it has


ATTENTION = re.compile(r"(?:Attend\w+|loops_attend_\w+)<.*?(\w+)[,>]")


def test_loops_of_attention_keep_their_accumulators_in_registers(listing: str) -> None:
    tiles: Counter[str] = Counter()
    for name, body in functions(listing):
        vectors = ATTENTION.search(name)
        if vectors is None:
            continue
        for loop in inner_loops(body):
            products = sum(bool(PRODUCT.search(text)) for text in loop)
            if products < 8 or any("vcvtps2dq" in text or "vdivps" in text for text in loop):
                continue  # a tail, or the softmax, whose constants may lie in memory
            tiles[vectors[1]] += 1
            traffic = sum(bool(VECTOR_STACK.search(text)) for text in loop)
            assert traffic <= products // 4, f"{name}: {traffic} stack accesses for {products} products"
    assert {"Avx2", "AvxVnni", "Avx512", "Avx512Vnni"} <= tiles.keys()
    assert all(count >= 8 for count in tiles.values()), tiles


KERNELS = re.compile(r"Avx2|AvxVnni|Avx512|Avx512Vnni|Amx")


def test_no_jump_of_a_kernel_touches_a_border_of_32_bytes(listing: str) -> None:
    if not _assembler_pads():
        pytest.skip("this assembler pads no jumps")
    jumps = 0
    for name, body in functions(listing):
        if not KERNELS.search(name):
            continue
        for (address, text), (after, _) in pairwise(body):
            if re.match(r"j\w+ +[0-9a-f]", text):  # indirect ones are left as they are
                assert address // 32 == after // 32, f"{name}: {text} from {address:x} to {after:x}"
                jumps += 1
    assert jumps > 1000


def _assembler_pads() -> bool:
    command = [find_compiler(), "-Wa,-mbranches-within-32B-boundaries", "-x", "c++", "-c", os.devnull, "-o", os.devnull]
    return subprocess.run(command, capture_output=True).returncode == 0
