"""Finds the packages and builds the C++ operators; everything else is in pyproject.toml."""

import os
import shlex
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build import build

try:
    from torch.utils.cpp_extension import BuildExtension, CppExtension, include_paths
except ModuleNotFoundError as error:
    raise SystemExit(
        f"torch_int4 compiles against torch, which cannot be imported here ({error}). "
        "Run `pip install torch==2.13.0` first, or drop --no-build-isolation and pip gets it for the build."
    ) from error

# patches/ and evals/ live inside the package once installed, so that no global module has those names. evals/tables is
# no package, so it stays out.
FOLDERS = {"torch_int4": "torch_int4", "torch_int4.patches": "patches", "torch_int4.evals": "evals"}
PACKAGES = [*FOLDERS, *(f"{name}.{sub}" for name, folder in FOLDERS.items() for sub in find_packages(folder))]

DEFINES: list[tuple[str, str | None]] = [
    ("TORCH_TARGET_VERSION", "0x020a000000000000"),  # LibTorch 2.10: the oldest that the wheel loads into
    ("TORCH_STABLE_ONLY", None),
]
# No -march: a file of csrc/kernels raises its own target. No contraction: all kernels must round alike.
COMPILE = ["-O3", "-g0", "-std=c++17", "-fvisibility=hidden", "-ffp-contract=off", "-fopenmp"]
# gcc 12 warns of its own AVX-512 headers (undefined vectors as the source of masked moves).
WARN = ["-Wall", "-Wextra", "-Wno-maybe-uninitialized"]
LINK = ["-fopenmp"]
# Intel's cores from Skylake to Cascade Lake keep no decoded copy of code with a jump that touches a border of 32 bytes
# (Intel, Mitigations for Jump Conditional Code Erratum, 2019), so the address that a loop happens to get decides its
# speed: from one build to the next, prefill on Cascade Lake took 0.9 to 1.16 of the time. gcc passes the flag on.
WHOLE_JUMPS = ("-Wa,-mbranches-within-32B-boundaries", "-mbranches-within-32B-boundaries")


def whole_jumps() -> list[str]:
    """The flag that pads code so that no jump touches such a border; none where compiler or processor knows none."""
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    with tempfile.TemporaryDirectory() as folder:
        for flag in WHOLE_JUMPS:
            command = [*compiler, "-Werror", flag, "-x", "c++", "-c", os.devnull, "-o", os.path.join(folder, "empty.o")]
            if shutil.which(compiler[0]) and subprocess.run(command, capture_output=True).returncode == 0:
                return [flag]
    return []


def sanitizers() -> list[str]:
    """Flags for TORCH_INT4_SANITIZE=address,undefined (run Python with the sanitizer's library preloaded)."""
    names = os.environ.get("TORCH_INT4_SANITIZE")
    if not names:
        return []
    return [f"-fsanitize={names}", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g"]


def operators() -> object:
    """The extension torch_int4._C: every .cpp below csrc/, in a fixed order."""
    csrc = Path("csrc")
    system = [f"-isystem{path}" for path in (*include_paths(), sysconfig.get_path("include"))]
    return CppExtension(
        "torch_int4._C",
        [str(path) for path in sorted(csrc.rglob("*.cpp"))],
        depends=[str(path) for path in sorted(csrc.rglob("*.h"))],
        include_dirs=[os.path.abspath(csrc)],
        define_macros=DEFINES,
        # -isystem keeps the warnings of other people's headers quiet.
        extra_compile_args={"cxx": [*COMPILE, *WARN, *whole_jumps(), *sanitizers(), *system]},
        extra_link_args=[*LINK, *sanitizers()],
        py_limited_api=True,
    )


class FreshBuild(build):
    """Keeps objects between builds, but no Python file: a deleted one would be installed again."""

    def run(self) -> None:
        shutil.rmtree(Path(self.build_lib) / "torch_int4", ignore_errors=True)
        super().run()


# BuildExtension looks for ninja on the PATH, where that of a virtual environment nobody activated is missing.
os.environ["PATH"] += os.pathsep + sysconfig.get_path("scripts")

setup(
    packages=PACKAGES,
    package_dir=FOLDERS,
    ext_modules=[operators()],
    cmdclass={"build": FreshBuild, "build_ext": BuildExtension},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
