"""Code that may kill the process it runs in gets one of its own."""

import os
import subprocess
import sys
from pathlib import Path

from torch import Tensor


def run_alone(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs Python code that may import the tests' own modules, helpers and tests alike."""
    rooms = [room for room in sorted(Path(__file__).parents[1].iterdir()) if any(room.glob("*.py"))]
    path = {"PYTHONPATH": os.pathsep.join(map(str, [Path(__file__).parent, *rooms]))}
    # Elsewhere, or Python would import the source folder instead of the installed package.
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **path, **environment}, cwd="/", capture_output=True, text=True
    )


def survives(code: str) -> None:
    """The code ends without an error, and its process with it."""
    result = run_alone(code)
    assert result.returncode == 0, f"exit status {result.returncode}\n{result.stdout}\n{result.stderr}"


def shortened(t: Tensor) -> Tensor:
    """A copy whose storage ends before it does."""
    t = t.clone()
    t.untyped_storage().resize_(t.nbytes - 1)
    return t
