"""The kernels without torch: a plain program on guarded memory, as it is and under the sanitizers."""

from __future__ import annotations

import importlib.metadata
import os
import signal
import subprocess
from pathlib import Path

import pytest
from native_programs import FLAGS, ROOT, build, find_compiler, passes

SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")


@pytest.fixture(scope="module")
def optimised(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The programs as processors run them; static where an emulator is to run them, too."""
    static = ["-static"] if os.environ.get("TORCH_INT4_EMULATOR") else []
    return build(tmp_path_factory.mktemp("native"), "-O2", *static)


def test_guard_pages_and_reference(optimised: list[Path]) -> None:
    for program in optimised:
        passes(program)


def test_sanitizers_and_reference(tmp_path: Path) -> None:
    for program in build(tmp_path, "-O0", *SANITIZE):
        passes(program, "--small")


def emulation() -> list[str]:
    """Flags that compile the kernels of every instruction set for an AVX2 processor."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists() or " avx2 " not in cpuinfo.read_text():
        pytest.skip("the emulation of instruction sets needs a processor with AVX2")
    try:
        simde = importlib.metadata.distribution("cmeel-simde").locate_file("cmeel.prefix/include")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the emulation of instruction sets needs SIMDe: pip install cmeel-simde==0.8.2")
    own = ROOT / "tests/native"
    return ["-DTORCH_INT4_EMULATE", "-mavx2", "-mfma", "-mf16c", f"-I{own}", f"-isystem{simde}"]


# gcc takes minutes over the unrolled tiles at -O1: unoptimised, they compile and run in seconds.
@pytest.mark.parametrize("flags", [("-Os",), ("-O0", *SANITIZE)], ids=["guard", "asan"])
def test_every_kernel_set_on_emulated_instructions(tmp_path: Path, flags: tuple[str, ...]) -> None:
    extent = "--tiny" if len(flags) > 1 else "--small"
    for program in build(tmp_path, *flags, *emulation()):
        expect = ["--expect", "amx"] if program.name == "kernels_main" else []
        result = subprocess.run([str(program), extent, *expect], capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr
        assert " 0 failed" in result.stdout
        ran = set(result.stdout.splitlines()[0].partition("run here: ")[2].split())
        assert ran == {path.stem for path in (ROOT / "csrc/kernels").glob("*.cpp")}
        assert ran >= {"amx", "avx512_vnni", "avx512", "avx_vnni", "avx2"}


def test_emulated_tiles_multiply_and_fault_as_the_processor_does(tmp_path: Path) -> None:
    program = str(tmp_path / "amx_main")
    source = ROOT / "tests/native/amx_main.cpp"
    subprocess.run(
        [find_compiler(), *FLAGS, "-O1", *SANITIZE, f"-I{source.parent}", str(source), "-o", program], check=True
    )
    subprocess.run([program], check=True)
    rules = subprocess.run([program, "--rules"], capture_output=True, text=True, check=True).stdout.splitlines()
    assert "configured" in rules
    for rule in rules:
        broken = subprocess.run([program, rule], capture_output=True, text=True)
        assert broken.returncode == -signal.SIGABRT, f"{rule}: the program went on"
        assert broken.stderr.startswith("AMX emulation: "), f"{rule}: {broken.stderr}"
    unconfigured = subprocess.run([program, "configured"], capture_output=True, text=True)
    assert "no tile configuration is loaded" in unconfigured.stderr


# Processors and the kernel set that each must choose.
EMULATED = {
    "haswell": "avx2",
    "skylake_x": "avx512",
    "tigerlake": "avx512_vnni",
    "arrow_lake": "avx_vnni",
    "sapphire_rapids": "amx",
}


def test_dispatch_and_kernels_of_processors_this_machine_is_not(optimised: list[Path]) -> None:
    """The real machine code on emulated processors: dispatch on each, all kernel sets on the one that has them all.

    TORCH_INT4_EMULATOR is a program `EMULATOR MODEL PROGRAM ARGUMENTS...` that runs a static program on that processor.
    """
    emulator = os.environ.get("TORCH_INT4_EMULATOR")
    if not emulator:
        pytest.skip("TORCH_INT4_EMULATOR names no processor emulator")
    program, _ = optimised
    for model, expected in EMULATED.items():
        extent = "--tiny" if model == "sapphire_rapids" else "--dispatch"
        command = [emulator, model, str(program), extent, "--expect", expected]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, f"{model}: {result.stdout}{result.stderr}"
        assert f"kernels chosen: {expected};" in result.stdout
