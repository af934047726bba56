"""The whole-model bench: shapes, random models, and engines in processes of their own."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from torch_int4 import Int4Error, Int4Linear
from torch_int4.cli import app
from torch_int4.evals.bench import engines, generate, random_model, shapes, token_profile, worker
from torch_int4.tuning import footprint

OPTIONS = {"group_size": 32, "dtype": "float32", "compute": "int8", "kv_cache": "auto", "head": "int4"}
ENGINES = list(engines.available())
HF = ["torch_int4", "transformers fp32"]


def spec(folder: Path, shape: str = "tiny", **fields: Any) -> engines.Spec:
    return engines.Spec(
        **{"shape": shape, "threads": 1, "context": 64, "batch": 4, "folder": folder} | fields | {"options": OPTIONS}
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bench")


@pytest.mark.parametrize("name", shapes.SHAPES)
def test_shapes_have_the_sizes_of_their_names(name: str) -> None:
    """Billions of parameters as in the name; 6.74, 6.05, 6.92, 20.55 are those of the published checkpoints."""
    exact = {"llama-2-7b": 6.74, "gpt-j-6b": 6.05, "falcon-7b": 6.92, "gpt-neox-20b": 20.55, "tinyllama-1.1b": 1.10}
    skeleton = shapes.find(name).skeleton()
    parameters = {id(p): p for p in skeleton.parameters()}.values()
    assert all(p.is_meta for p in parameters)
    assert not any(b.is_meta for b in skeleton.buffers())
    count = sum(p.numel() for p in parameters) / 1e9
    if name in exact:
        assert count == pytest.approx(exact[name], rel=0.003)
    elif name == "smollm2-135m":
        assert count == pytest.approx(0.1345, rel=0.003)


def test_unknown_names_are_errors(folder: Path) -> None:
    with pytest.raises(Int4Error, match="llama-2-7b"):
        shapes.find("llama-3")
    with pytest.raises(Int4Error, match="torch_int4"):
        generate.choose(["torch_int5"], spec(folder))
    result = CliRunner().invoke(app, ["bench", "generate", "--shape", "nothing"])
    assert result.exit_code == 2


@pytest.mark.parametrize("name", ["llama", "gptj", "gpt_neox", "falcon"])
def test_random_int4_models_never_hold_float_linears(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every family of the shapes, tiny: all linears int4, the head int8, nothing left on meta, finite logits."""
    small = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96}
    extra = {
        "gptj": {"rotary_dim": 8, "tie_word_embeddings": False},
        "gpt_neox": {"intermediate_size": 96},
        "falcon": shapes.find("falcon-7b").fields,
        "llama": {"intermediate_size": 96},
    }
    shape = shapes.Shape("x", name, {**extra[name], **small})
    largest: list[int] = []
    filled = random_model.fill

    def watched(module: nn.Module, dtype: torch.dtype, generator: torch.Generator) -> None:
        filled(module, dtype, generator)
        largest.append(sum(p.numel() for p in module._parameters.values() if p is not None and not p.is_meta))

    monkeypatch.setattr(random_model, "fill", watched)
    model = random_model.int4(shape, torch.float32, 100, group_size=32)
    assert max(largest) <= 96 * 64 + 96  # the embedding, or the head with its bias
    head = model.get_output_embeddings()
    assert isinstance(head, Int4Linear)
    assert head.weight_type == "int8"
    found = [module for module in model.modules() if isinstance(module, nn.Linear)]
    assert all(isinstance(module, Int4Linear) for module in found)
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    assert model.torch_int4_report.fused == 2
    assert torch.isfinite(model(torch.arange(90)[None]).logits).all()


def test_read_bytes_count_what_a_token_reads() -> None:
    shape = shapes.find("tiny")
    dense = random_model.dense(shape, torch.bfloat16, 0)
    linear = sum(m.weight.nbytes for m in dense.modules() if isinstance(m, nn.Linear))
    norms = sum(p.nbytes for p in dense.parameters() if p.dim() == 1)
    buffers = sum(b.nbytes for b in dense.buffers())
    assert footprint.read_bytes(dense) <= linear + norms + 2 * buffers
    assert footprint.read_bytes(dense) >= linear + norms
    dense.lm_head.weight = dense.model.embed_tokens.weight  # tied: the table is read as the head
    assert footprint.read_bytes(dense) >= linear + norms
    int4 = random_model.int4(shape, torch.float32, 0, group_size=32)
    packed = sum(m.nbytes for m in int4.modules() if isinstance(m, Int4Linear))
    assert packed <= footprint.read_bytes(int4) < 1.1 * packed


@pytest.mark.parametrize("name", ENGINES)
def test_engines_say_what_is_missing_or_run(name: str, folder: Path) -> None:
    """Each engine in a process of its own: as many times as tokens, whatever came before, in batches too."""
    wanted = spec(folder)
    if reason := engines.available()[name].missing(wanted):
        assert len(reason) > 10
        return
    engines.available()[name].prepare(wanted)
    assert engines.available()[name].memory(wanted) > 0
    with worker.Worker(name, wanted) as found:
        loaded = found.ask("load")
        assert 600_000 < loaded.weight_bytes < 6_000_000
        assert 0 < loaded.resident <= loaded.peak_loading
        for batch in (1, 3) if loaded.batches else (1,):
            found.ask("clear", batch)
            calls = ((generate.prompt(9), 3), (generate.prompt(2), 4))
            for tokens, new in calls[: 2 if batch == 1 else 1]:  # not every engine goes on with a batch
                times = found.ask("extend", tokens, new)
                assert len(times) == new
                assert all(seconds > 0 for seconds in times)
        assert found.ask("peak") > 0


@pytest.mark.parametrize("name", HF)
def test_continued_generation_is_that_of_one_go(name: str, folder: Path) -> None:
    engine = engines.available()[name](spec(folder))
    engine.extend([5, 6, 7], 4)
    engine.extend([8, 9], 3)
    whole = engine.ids
    engine.clear(1)
    assert engine.ids.shape[1] == 0
    engine.extend(whole[0, :9].tolist(), 3)
    assert torch.equal(engine.ids, whole)
    engine.clear(2)
    engine.extend([5, 6, 7], 2)
    assert engine.ids.shape == (2, 5)
    assert not torch.equal(engine.ids[0, :3], engine.ids[1, :3])


def test_worker_tells_errors_and_deaths(folder: Path) -> None:
    with worker.Worker("torch_int4", spec(folder)) as found:
        with pytest.raises(Int4Error, match=r"torch_int4: .*clear"):
            found.ask("clear", 1)  # nothing is loaded yet
        with pytest.raises(Int4Error, match="KeyError"):
            found.ask("no such thing")
        found._process.kill()
        found._process.join()
        with pytest.raises(Int4Error, match="ended with code -9"):
            found.ask("peak")


def test_what_does_not_fit_into_memory_is_left_out(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "available_memory", lambda: 2 << 30)
    left_out: dict[str, str] = {}
    from contextlib import ExitStack

    with ExitStack() as stack:
        big = spec(folder, shape="llama-2-7b")
        assert generate._start(["transformers bf16"], left_out, big, stack, lambda text: None) == []
    assert "13" in left_out["transformers bf16"] or "14" in left_out["transformers bf16"]
    assert "2.1 GB are free" in left_out["transformers bf16"]


def test_profile_of_a_real_token(folder: Path) -> None:
    engine = engines.available()["torch_int4"](spec(folder))
    found = token_profile.measure(engine, 4)
    assert 0 < found.forward_s < found.token_s
    assert found.operators
    assert sum(seconds for _, _, seconds in found.rows()) == pytest.approx(
        found.loop_s + found.operators_s + found.framework_s + found.python_s
    )
    assert "forward" not in engine.model.__dict__  # nothing of the measuring stays behind


def test_gguf_file_is_what_the_shape_says(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    from gguf import GGUFReader

    from torch_int4.evals.bench import gguf_file

    path = gguf_file.write(shapes.find("tiny"), tmp_path)
    reader = GGUFReader(path)
    sizes = {tensor.name: tuple(int(n) for n in reversed(tensor.shape)) for tensor in reader.tensors}
    assert sizes["blk.1.ffn_down.weight"] == (256, 512)
    assert sizes["blk.0.attn_k.weight"] == (128, 256)
    assert {tensor.tensor_type.name for tensor in reader.tensors} == {"Q4_0", "Q6_K", "F32"}
    from gguf.quants import dequantize

    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type)
        spread = float(values.std()) if tensor.tensor_type.name != "F32" else 0.02
        assert 0.01 < spread < 0.04, (tensor.name, spread)
    stamp = path.stat().st_mtime_ns
    assert gguf_file.write(shapes.find("tiny"), tmp_path).stat().st_mtime_ns == stamp  # found again
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    with pytest.raises(Int4Error, match="gptj"):
        gguf_file.write(shapes.find("gpt-j-6b"), tmp_path)


def test_prompts_fit_every_vocabulary() -> None:
    tokens = generate.prompt(5000)
    assert 2 < min(tokens) <= max(tokens) < 512
    shifted = engines.rows(tokens, 16, 512)
    assert max(map(max, shifted)) < 512
    assert len(set(map(tuple, shifted))) == 16


def test_command_measures_and_writes(tmp_path: Path) -> None:
    arguments = ["--shape", "tiny", "--threads", "1", "--tokens", "3", "--rounds", "2", "--prefill", "40"]
    files = {name: tmp_path / f"x.{name}" for name in ("json", "markdown")}
    chosen = ["--engine", "torch_int4", "--batch", "2", "--context", "70", "--profile", "3"]
    outputs = [part for name, path in files.items() for part in (f"--{name}", str(path))]
    run = CliRunner().invoke(app, ["bench", "generate", *arguments, *chosen, *outputs, "--folder", str(tmp_path)])
    assert run.exit_code == 0, run.output
    (data,) = json.loads(files["json"].read_text())
    (row,) = data["rows"]
    assert len(row["decode"]) == 2
    assert all(math.isfinite(seconds) and seconds > 0 for seconds in row["decode"])
    assert row["contexts"].keys() == {"70"}
    assert row["batches"].keys() == {"2"}
    assert row["peak"] > 0
    assert data["profile"]["token_s"] > 0
    assert "decode tok/s" in files["markdown"].read_text()
    random.seed(0)
