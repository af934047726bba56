"""The processor behind its interface: what kernel files ask, who answers, and what a build without any of them is."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import pytest
from native_programs import FLAGS, PROGRAMS, ROOT, build, find_compiler, passes

KERNELS = sorted((ROOT / "csrc/kernels").glob("*.cpp"))

# A kernel set of one file that asks for a flag which no file of csrc/ names.
NEW_SET = """
#include "kernels/kernel.h"
#include "kernels/simd_x86.h"
#ifdef TI4_X86
namespace torch_int4 {{
namespace {{
bool supported() {{ return {condition}; }}
IsaKernels kernels{{"new_set", 99, supported, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr,
                   nullptr, nullptr, nullptr, nullptr}};
[[maybe_unused]] const bool registered = register_kernels(&kernels);
}}
}}
#endif
"""
MAIN = """
#include <stdio.h>
#include "framework/dispatch.h"
int main() {
  for (const auto& name : torch_int4::kernel_names(false)) printf("%s ", name.c_str());
  printf("; %s\\n", torch_int4::active_kernels().name);
}
"""


def needed(name: str) -> str:
    """Path of a program; skips the test where it is not installed."""
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"needs {name}")
    return found


def digest(output: str) -> str:
    """What kernels_main prints of the reference's results."""
    return output.partition("digest of the reference: ")[2].split()[0]


@pytest.mark.skipif(platform.machine() != "x86_64", reason="asks CPUID")
@pytest.mark.parametrize(
    ("condition", "chosen"),
    [
        ("x86::cpuid(1, 0, x86::kEdx, 26)", "new_set"),  # SSE2, which every x86-64 processor has
        ("x86::has_avx2() || x86::cpuid(1, 0, x86::kEdx, 25)", "new_set"),
        ("x86::saves(3)", "new_set"),  # x87 and SSE state
        ("x86::cpuid(1, 0, x86::kEdx, 10)", "reference"),  # reserved
        ("x86::cpuid(0x7fffffff, 0, x86::kEax, 0)", "reference"),  # no such leaf
        ("x86::cpuid(7, 77, x86::kEbx, 5)", "reference"),  # no such sub-leaf
        ("x86::saves(uint64_t(1) << 62)", "reference"),  # no such state
        ("x86::request(99)", "reference"),
    ],
)
def test_a_kernel_set_with_a_flag_of_its_own_is_one_file(tmp_path: Path, condition: str, chosen: str) -> None:
    (tmp_path / "new_set.cpp").write_text(NEW_SET.format(condition=condition))
    (tmp_path / "main.cpp").write_text(MAIN)
    sources = [tmp_path / "new_set.cpp", tmp_path / "main.cpp", ROOT / "csrc/kernels/reference.cpp"]
    sources += [ROOT / f"csrc/framework/{name}.cpp" for name in ("dispatch", "cpu_x86")]
    program = str(tmp_path / "main")
    subprocess.run([find_compiler(), *FLAGS, *map(str, sources), "-o", program], check=True)
    output = subprocess.run([program], capture_output=True, text=True, check=True, env={}).stdout
    assert output == f"new_set reference ; {chosen}\n"


@pytest.fixture(scope="module")
def portable(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The native programs with the scalar kernels alone."""
    return build(tmp_path_factory.mktemp("portable"), "-O1", "-DTORCH_INT4_PORTABLE")


def test_a_build_without_instruction_sets_is_the_reference(portable: list[Path]) -> None:
    for program in portable:
        passes(program, "--tiny", *(["--expect", "reference"] if program.name == "kernels_main" else []))


def test_without_instruction_sets_no_header_of_theirs_is_read() -> None:
    sources = [*KERNELS, *sorted((ROOT / "csrc/framework").glob("*.cpp"))]
    command = [find_compiler(), *FLAGS, "-DTORCH_INT4_PORTABLE", "-M", *map(str, sources)]
    headers = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "kernels/cpu_x86.h" in headers
    for header in ("immintrin.h", "cpuid.h", "kernels/probes/", "kernels/vectors/", "kernels/loops/"):
        assert header not in headers


def test_another_architecture_runs_the_reference_to_the_same_bits(tmp_path: Path, portable: list[Path]) -> None:
    """Cross-compiled for 64-bit Arm and emulated by qemu-user, where both are installed."""
    cross, emulator = needed("aarch64-linux-gnu-g++"), needed("qemu-aarch64")
    here = subprocess.run([str(portable[0]), "--tiny"], capture_output=True, text=True, check=True).stdout
    for program in build(tmp_path, "-O1", "-static", compiler=cross):
        result = subprocess.run([emulator, str(program), "--tiny"], capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr
        assert " 0 failed" in result.stdout
        if program.name == PROGRAMS[0]:
            assert digest(result.stdout) == digest(here)
