"""Interrupted calibrations go on where they stopped, and end with the same bits."""

import copy
import signal
import subprocess
import sys
from pathlib import Path

import calibrating
import pytest
import torch
from calibrating import few_steps, patched, small, tokens
from decoders import decoder
from tiny_models import int4s

from torch_int4 import Int4Error, patch
from torch_int4.calibration.resume import Progress
from torch_int4.recipes.parts import compose as _compose
from torch_int4.weights.canonical import Int4Weight
from torch_int4.weights.result import Result

RECIPES = ["awq+gptq", "signround", "omniquant"]
OPTIONS = {"compute": "fp32", "kv_cache": "fp32", "head": "float", "preset": "light"}


def assert_same_bits(a, b):
    left, right = a.state_dict(), b.state_dict()
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    few_steps(monkeypatch)


class KilledError(Exception):
    pass


@pytest.mark.parametrize("recipe", RECIPES)
def test_an_interrupted_run_ends_with_the_same_bits(recipe, tmp_path, monkeypatch):
    _, want = patched("llama", recipe, small(samples=6, batch=2), preset="light")
    stage = "torch_int4.calibration.run.round_block"
    original = _compose.round_block
    count = []

    def round_block(*args):
        count.append(1)
        if len(count) == 2:
            original(*args)  # its work is done, but lost
            raise KilledError
        return original(*args)

    monkeypatch.setattr(stage, round_block)
    with pytest.raises(Int4Error, match="must be loaded again"):
        patched("llama", recipe, small(samples=6, batch=2, resume=tmp_path), preset="light")
    _, got = patched("llama", recipe, small(samples=6, batch=2, resume=tmp_path), preset="light")
    assert len(count) == 3  # the first block was not worked on again
    assert_same_bits(got, want)
    _, again = patched("llama", recipe, small(samples=6, batch=2, resume=tmp_path), preset="light")
    assert len(count) == 3
    assert_same_bits(again, want)


SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
from calibrating import patched, small
from torch_int4.recipes import gptq
real, calls = gptq.quantize, []
def slow(*args, **kwargs):
    calls.append(1)
    if len(calls) == 6:
        print("in the second block", flush=True)
        sys.stdin.read()
    return real(*args, **kwargs)
gptq.quantize = slow
patched("llama", "awq+gptq", small(samples=6, batch=2, resume={folder!r}))
"""


def test_a_run_that_is_killed_leaves_whole_files_only(tmp_path):
    script = SCRIPT.format(tests=str(Path(calibrating.__file__).parent), folder=str(tmp_path))
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=tmp_path,  # not a folder with a package of this name that was not built
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "in the second block\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (tmp_path / "block-0000.safetensors").exists()
    assert not (tmp_path / "block-0001.safetensors").exists()
    (tmp_path / ".partial-x").write_bytes(b"half a file")
    _, want = patched("llama", "awq+gptq", small(samples=6, batch=2))
    _, got = patched("llama", "awq+gptq", small(samples=6, batch=2, resume=tmp_path))
    assert_same_bits(got, want)


@pytest.mark.parametrize(
    "change", [{"group_size": 64}, {"recipe": "gptq"}, {"seed": 5}, {"data": tokens(seed=9)}, {"model": "llama-mha"}]
)
def test_a_folder_of_another_run_is_refused(change, tmp_path):
    model = decoder("llama")
    patch(copy.deepcopy(model), recipe="awq+gptq", calibration=small(resume=tmp_path), **OPTIONS)
    data = small(change.get("data"), resume=tmp_path, seed=change.get("seed", 0))
    options = {key: change[key] for key in ("group_size", "recipe") if key in change}
    other = decoder(change.get("model", "llama"))
    with pytest.raises(Int4Error, match="holds the state of another run"):
        patch(other, calibration=data, **{"recipe": "awq+gptq", **OPTIONS, **options})
    assert not int4s(other)


def test_changed_weights_are_another_run(tmp_path):
    patch(decoder("llama"), recipe="gptq", calibration=small(resume=tmp_path), **OPTIONS)
    model = decoder("llama")
    model.model.layers[1].mlp.up_proj.weight.data *= 1.01
    with pytest.raises(Int4Error, match="another run"):
        patch(model, recipe="gptq", calibration=small(resume=tmp_path), **OPTIONS)


def test_states_without_their_blocks_do_not_count(tmp_path):
    progress = Progress(tmp_path, "x")
    assert progress.done == 0
    weight = Int4Weight(torch.zeros(2, 32, dtype=torch.uint8), torch.ones(2, 1), torch.ones(2, 1, dtype=torch.uint8))
    for index in range(3):
        states = {"hidden": torch.full((2,), float(index))}
        progress.save(index, {"a.b": Result(weight)}, {"norm": torch.ones(3, dtype=torch.bfloat16)}, states)
    assert progress.done == 3
    assert progress.states()["hidden"].tolist() == [2.0, 2.0]
    assert len(list(tmp_path.glob("states-*"))) == 1
    found, rest = progress.load(1)
    assert torch.equal(found["a.b"].weight.zeros, weight.zeros)
    assert rest["norm"].dtype == torch.bfloat16
    (tmp_path / "block-0001.safetensors").unlink()
    assert Progress(tmp_path, "x").done == 0


def test_captured_inputs_in_a_file_give_the_same_bits(tmp_path):
    _, want = patched("llama", "gptq")
    _, got = patched("llama", "gptq", small(offload=tmp_path))
    assert (tmp_path / "quantized.bin").stat().st_size == 16 * 24 * 64 * 4
    assert_same_bits(got, want)
