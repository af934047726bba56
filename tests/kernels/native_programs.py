"""The programs of tests/native/, compiled with the framework and the kernels of csrc/, without torch."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FLAGS = [
    f"-I{ROOT / 'csrc'}",
    "-std=c++17",
    "-ffp-contract=off",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-Wno-psabi",
    "-Wno-maybe-uninitialized",
]
PROGRAMS = ("kernels_main", "attention_main")


def find_compiler() -> str:
    """Path of the C++ compiler; skips the test where there is none."""
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    return compiler


def build(folder: Path, *flags: str, compiler: str | None = None) -> list[Path]:
    """Compiles PROGRAMS of tests/native/ with the framework and the kernels of csrc/."""
    compiler = compiler or find_compiler()
    csrc = ROOT / "csrc"
    sources = [
        *(ROOT / f"tests/native/{name}.cpp" for name in PROGRAMS),
        *sorted((csrc / "framework").glob("*.cpp")),
        *sorted((csrc / "kernels").glob("*.cpp")),
    ]
    objects = [(source, folder / f"{source.parent.name}_{source.stem}.o") for source in sources]
    jobs = [
        subprocess.Popen([compiler, *FLAGS, *flags, "-c", str(source), "-o", str(target)]) for source, target in objects
    ]
    assert all(job.wait() == 0 for job in jobs)
    shared = [str(target) for source, target in objects if source.stem not in PROGRAMS]
    for name in PROGRAMS:
        command = [compiler, *flags, str(folder / f"native_{name}.o"), *shared, "-o", str(folder / name)]
        subprocess.run(command, check=True)
    return [folder / name for name in PROGRAMS]


def passes(program: Path, *arguments: str) -> None:
    """Runs one of them, and asserts that all its checks passed."""
    result = subprocess.run([str(program), *arguments], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert " 0 failed" in result.stdout
