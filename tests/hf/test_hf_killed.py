"""`save_pretrained` over an older checkpoint, killed at a hundred points of its time: the old files or the new ones."""

import os
import subprocess
import sys
from pathlib import Path

import tiny_models

POINTS = 100
SAVING = """
import os, signal, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)  # forked below
sys.path.insert(0, sys.argv[2])
from tiny_models import llama
from torch_int4 import patch
from transformers.utils import logging
logging.disable_progress_bar()

root, points = Path(sys.argv[1]), int(sys.argv[3])
old = llama(tied=False, hidden_size=64, intermediate_size=96, head_dim=16)
new = patch(llama(tied=True, hidden_size=64, intermediate_size=96, head_dim=16))
options = {"max_shard_size": "15KB"}
(root / "old").mkdir()
old.save_pretrained(root / "old", **options)
new.save_pretrained(root / "warm", **options)
old.save_pretrained(root / "new", **options)
start = time.perf_counter()
new.save_pretrained(root / "new", **options)
length = time.perf_counter() - start
for point in range(points):
    target = root / f"p{point}"
    old.save_pretrained(target, **options)
    pid = os.fork()
    if pid == 0:
        signal.setitimer(signal.ITIMER_REAL, max(1.2 * length * point / points, 1e-4))  # kills, without any cleaning up
        new.save_pretrained(target, **options)
        os._exit(7)
    os.waitpid(pid, 0)
"""


def read(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


def test_a_killed_save_leaves_the_old_or_the_new_checkpoint(tmp_path):
    run = [sys.executable, "-P", "-c", SAVING, str(tmp_path), str(Path(tiny_models.__file__).parent), str(POINTS)]
    done = subprocess.run(run, capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    old, new = read(tmp_path / "old"), read(tmp_path / "new")
    assert old.keys() - new.keys()  # shards that only the old one has
    states = [read(tmp_path / f"p{point}") for point in range(POINTS)]
    assert all(state in (old, new) for state in states)
    assert old in states
    left = [name for name in os.listdir(tmp_path) if ".saving-" in name]
    assert left  # some were killed while they wrote
