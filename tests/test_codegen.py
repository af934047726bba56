"""What the compiler made of the inner loops: a tile whose accumulators are spilled runs at half its speed."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

KERNELS = Path(__file__).resolve().parent.parent / "csrc/kernels"
PRODUCT = re.compile(r"vpmaddubsw|vpdpbusd|vfn?madd\d+ps|tdp")
VECTOR_STACK = re.compile(r"\(%rsp.*%[xyz]mm|%[xyz]mm\d+,.*\(%rsp")


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


@pytest.mark.parametrize("source", sorted(KERNELS.glob("a*.cpp")), ids=lambda path: path.stem)
def test_inner_loops_keep_their_accumulators_in_registers(source: Path, tmp_path: Path) -> None:
    compiler, objdump = shutil.which("g++"), shutil.which("objdump")
    if compiler is None or objdump is None:
        pytest.skip("needs g++ and objdump")
    target = tmp_path / "kernel.o"
    flags = ["-std=c++17", "-O3", "-ffp-contract=off", "-fPIC", "-w"]
    subprocess.run([compiler, *flags, "-c", str(source), "-o", str(target)], check=True)
    listing = subprocess.run(
        [objdump, "-d", "--no-show-raw-insn", "-C", str(target)], capture_output=True, text=True, check=True
    ).stdout
    tiles = 0
    for name, body in functions(listing):
        for loop in inner_loops(body):
            products = sum(bool(PRODUCT.match(text)) for text in loop)
            if products < 24 or any("vcvtdq2ps" in text for text in loop):
                continue  # a short tail, or dequantization
            tiles += 1
            traffic = sum(bool(VECTOR_STACK.search(text)) for text in loop)
            assert traffic <= products // 4, f"{name}: {traffic} stack accesses for {products} products"
    assert tiles >= 10
