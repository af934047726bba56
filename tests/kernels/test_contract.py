"""The permitted contents of each room of csrc/, read from its sources: no torch below ops/, no intrinsics in loops."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = {
    path.relative_to(ROOT / "csrc").as_posix(): path.read_text()
    for path in sorted((ROOT / "csrc").rglob("*"))
    if path.suffix in (".h", ".cpp")
}
INCLUDE = re.compile(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', re.M)
C_HEADERS = {"math.h", "stddef.h", "stdint.h", "string.h"}
TORCH = re.compile(r"^(torch|ATen|c10|Python\.h)")
ORDER = {"kernels": ("kernels/",), "framework": ("kernels/", "framework/"), "ops": ("kernels/", "framework/", "ops/")}
# Instructions of x86 and of Arm as functions and types.
INTRINSIC = re.compile(r"\b(_mm\d*_|_tile_|__m(64|128|256|512)|v\w+q?_[sufp](8|16|32|64)\b|(u?int|float)\d+x\d+_t\b)")
QUESTION = re.compile(r"\b(__get_cpuid|__cpuid|_xgetbv|xgetbv|getauxval|arch_prctl)")
FORBIDDEN = re.compile(r"\b(std::|new\b|delete\b(?!;)|throw\b|try\b|malloc|calloc|free\(|thread_local\b|pthread|omp\b)")
ARCHITECTURE = re.compile(r"kernels/(?:cpu|simd)_(\w+)\.h|framework/cpu_(\w+)\.cpp")


def code(text: str) -> str:
    """Source without its comments."""
    return re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.S)


def has_intrinsics(name: str) -> bool:
    """Whether instructions of one architecture may stand in a file: kernel files, their vectors, headers and probes."""
    if name.startswith(("kernels/vectors/", "kernels/probes/")):
        return True
    return re.fullmatch(r"kernels/(simd_\w+\.h|\w+\.cpp)", name) is not None and name != "kernels/reference.cpp"


def breaches(name: str, text: str) -> Iterator[str]:
    """Sentences about what a file of csrc/ holds that its room may not."""
    room, source = name.split("/")[0], code(text)
    for header in INCLUDE.findall(text):
        if room != "ops" and TORCH.match(header):
            yield f"{name} includes {header}, which is torch's or Python's"
        elif header.startswith(tuple(ORDER)) and not header.startswith(ORDER[room]):
            yield f"{name} includes {header}, of a room above its own"
        elif room == "kernels" and header not in C_HEADERS and not header.startswith("kernels/"):
            simd = re.fullmatch(r"kernels/simd_\w+\.h", name)
            if not (simd and header in {"immintrin.h", "arm_neon.h", "arm_sve.h", "emulated/simd.h"}):
                yield f"{name} includes {header}, which kernels do without"
    if not has_intrinsics(name):
        yield from (f"{name} uses {match[0]}, an instruction" for match in INTRINSIC.finditer(source))
    if not re.fullmatch(r"framework/cpu_\w+\.cpp", name):
        yield from (
            f"{name} uses {match[0]}, a question for framework/cpu_*.cpp" for match in QUESTION.finditer(source)
        )
    if room == "kernels":
        yield from (f"{name} uses {match[0]}, which kernels do without" for match in FORBIDDEN.finditer(source))


@pytest.mark.parametrize("name", SOURCES)
def test_a_file_holds_what_its_room_may(name: str) -> None:
    assert list(breaches(name, SOURCES[name])) == []
    assert len(SOURCES[name].splitlines()) <= 300


@pytest.mark.parametrize(
    ("name", "line", "what"),
    [
        ("framework/linear.cpp", "#include <torch/csrc/stable/tensor.h>", "torch's"),
        ("kernels/kernel.h", "#include <ATen/ATen.h>", "torch's"),
        ("kernels/scalar.h", "#include <vector>", "do without"),
        ("kernels/avx2.cpp", "#include <immintrin.h>", "do without"),
        ("kernels/avx2.cpp", '#include "framework/dispatch.h"', "above"),
        ("framework/decoder.cpp", '#include "ops/norms.h"', "above"),
        ("kernels/loops/linear.h", "const __m256i x = _mm256_setzero_si256();", "an instruction"),
        ("kernels/loops/block.h", "float32x4_t x = vld1q_f32(p);", "an instruction"),
        ("ops/probes.cpp", "_mm_pause();", "an instruction"),
        ("framework/dispatch.cpp", "__get_cpuid(1, &a, &b, &c, &d);", "a question"),
        ("kernels/amx.cpp", "static thread_local int x;", "do without"),
        ("kernels/loops/attend_few.h", "float* p = new float[16];", "do without"),
        ("kernels/reference.cpp", "std::sort(a, b);", "do without"),
    ],
)
def test_the_contract_sees_a_breach(name: str, line: str, what: str) -> None:
    assert not list(breaches(name, f"// {line}\n")), "a comment is no breach" if "include" not in line else ""
    (found,) = {sentence.split(", ")[-1] for sentence in breaches(name, line + "\n")}
    assert what in found


def test_an_architecture_is_its_two_headers_and_its_file_of_the_framework() -> None:
    parts: dict[str, set[str]] = {}
    for name in SOURCES:
        if match := ARCHITECTURE.fullmatch(name):
            parts.setdefault(match[1] or match[2], set()).add(name)
    assert parts
    for arch, names in parts.items():
        assert names == {f"kernels/cpu_{arch}.h", f"kernels/simd_{arch}.h", f"framework/cpu_{arch}.cpp"}


def test_every_kernel_file_but_the_reference_is_of_one_architecture() -> None:
    for name, text in SOURCES.items():
        if re.fullmatch(r"kernels/\w+\.cpp", name) and name != "kernels/reference.cpp":
            headers = [header for header in INCLUDE.findall(text) if header.startswith("kernels/simd_")]
            assert len(headers) == 1, name
            assert re.search(r"^#ifdef TI4_[A-Z0-9]+$.*^#endif$", text, re.M | re.S), f"{name} is compiled everywhere"
