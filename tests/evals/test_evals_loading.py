"""The measured load: figures of a process of its own, for a checkpoint that is written shard by shard."""

import json

import pytest
from safetensors import safe_open

from torch_int4 import Int4Error
from torch_int4.evals.speed import loading


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("random") / "tiny"
    assert loading.write_random(folder, "tiny") > 0
    return folder


def test_the_checkpoint_is_sharded_by_layer_and_complete(checkpoint):
    index = json.loads((checkpoint / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) == 4 + 1
    for name in set(index["weight_map"].values()):
        with safe_open(checkpoint / name, framework="pt") as file:
            assert {key for key, shard in index["weight_map"].items() if shard == name} == set(file.keys())


def test_a_load_is_measured(checkpoint):
    load = loading.measure(checkpoint, kv_cache="int8")
    assert load.peak_bytes >= load.resident_bytes > load.base_bytes > 0
    assert load.seconds > 0
    weights = 4 * (4 * 256 * 256 + 3 * 256 * 704)
    assert 0.5 < load.linear_bytes / (weights * 4.5 / 8 + 32000 * 256 * 8.5 / 8) < 1.1


def test_failures_are_told(tmp_path, monkeypatch):
    with pytest.raises(Int4Error, match="unknown shape '8b'"):
        loading.write_random(tmp_path, "8b")
    monkeypatch.setattr(loading, "MEASURE", "raise SystemExit('no such model')")
    with pytest.raises(Int4Error, match=r"nowhere: could not be loaded: no such model"):
        loading.measure(tmp_path / "nowhere")
