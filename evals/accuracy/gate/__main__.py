"""``python -m torch_int4.evals.accuracy.gate``: what the gate measures here, and whether it passes."""

from __future__ import annotations

import sys

from torch_int4.errors import Int4Error
from torch_int4.evals.accuracy.gate import run

try:
    failures = run(note=lambda line: print(line, flush=True))
except Int4Error as error:
    sys.exit(f"gate: {error}")
sys.exit("\n".join(f"FAILED {line}" for line in failures) or 0)
