"""The kernels without torch: a plain program on guarded memory, as it is and under the sanitizers."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLAGS = ["-std=c++17", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", "-Wno-psabi", "-Wno-maybe-uninitialized"]


def build(folder: Path, *flags: str) -> Path:
    """Compiles tests/native/kernels_main.cpp with the kernels of csrc/."""
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    csrc = ROOT / "csrc"
    sources = [ROOT / "tests/native/kernels_main.cpp", *(csrc / f"{n}.cpp" for n in ("dispatch", "linear", "pack"))]
    sources += sorted((csrc / "kernels").glob("*.cpp"))
    objects = [(source, folder / f"{source.stem}.o") for source in sources]
    jobs = [
        subprocess.Popen([compiler, *FLAGS, *flags, "-c", str(source), "-o", str(target)]) for source, target in objects
    ]
    assert all(job.wait() == 0 for job in jobs)
    program = folder / "kernels_main"
    subprocess.run([compiler, *flags, *(str(o) for _, o in objects), "-o", str(program)], check=True)
    return program


@pytest.mark.parametrize(
    "flags", [("-O2",), ("-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")], ids=["guard", "asan"]
)
def test_guard_pages_and_reference(tmp_path: Path, flags: tuple[str, ...]) -> None:
    program = build(tmp_path, *flags)
    small = ["--small"] if len(flags) > 1 else []
    result = subprocess.run([str(program), *small], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert " 0 failed" in result.stdout
