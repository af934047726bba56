"""``torch-int4 eval`` on a tiny model and a few documents of our own."""

from __future__ import annotations

import json
import math
from pathlib import Path

import eval_data
import pytest
import saved_model
from typer.testing import CliRunner

from torch_int4 import Int4Config, Int4Error
from torch_int4.cli import app
from torch_int4.evals import models
from torch_int4.evals.accuracy import run as accuracy

pytest.importorskip("lm_eval")
NAMES = ["piqa", "winogrande", "wikitext"]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_model.save(tmp_path_factory.mktemp("model"), initializer_range=0.2, max_position_embeddings=512)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return eval_data.write(tmp_path_factory.mktemp("data"))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")


def test_float_scores_are_those_of_stock_lm_eval(model_dir: Path, data: Path, tmp_path: Path) -> None:
    """`lm_eval --model hf` on the same files: the same score, item by item."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    from torch_int4.evals.accuracy import scores, tasks

    tasks.write(NAMES, data, tmp_path)
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    options = {"tasks": NAMES, "task_manager": manager, "bootstrap_iters": 0, "batch_size": 1}
    stock = lm_eval.simple_evaluate("hf", f"pretrained={model_dir},max_length=128,device=cpu", **options)
    ours = accuracy.run(model_dir, [], NAMES, data=data, batch_size=1, max_length=128)
    assert ours.items == tuple(scores.items(stock))
    for entry in ours.items:
        assert stock["results"][entry.task][f"{entry.metric},none"] == pytest.approx(entry.score, rel=1e-12)


def test_configs_are_compared_with_one_float_run(model_dir: Path, data: Path) -> None:
    """The first is patched in place, later ones are loaded again: both must start from float weights."""
    exact = Int4Config(skip=("*.layers.1.*", "*.mlp.*"), compute="fp32", head="float", kv_cache="fp32")
    rough = Int4Config(group_size=-1, head="int4")
    result = accuracy.run(model_dir, [rough, exact, rough], NAMES, data=data, max_length=128)
    first, second, third = result.comparisons
    assert first.items == third.items
    assert first.items != second.items
    assert [row.loss for row in first.rows] == [row.loss for row in third.rows]
    assert [(row.task, row.metric) for row in first.rows if row.decides] == [
        ("piqa", "acc"),
        ("winogrande", "acc"),
        ("wikitext", "word_perplexity"),
    ]
    assert first.config is not None
    assert first.config["group_size"] == -1


def test_baseline_may_be_another_model(model_dir: Path, data: Path, tmp_path: Path) -> None:
    other = saved_model.save(tmp_path, seed=1, initializer_range=0.2, max_position_embeddings=512)
    result = accuracy.run(model_dir, [Int4Config()], ["wikitext"], data=data, baseline=str(other), max_length=128)
    plain = accuracy.run(other, [], ["wikitext"], data=data, max_length=128)
    assert result.items == plain.items
    assert abs(result.comparisons[0].rows[0].loss.loss) > 0.01


def test_command_prints_and_writes(model_dir: Path, data: Path, tmp_path: Path) -> None:
    files = [tmp_path / "r.json", tmp_path / "r.md"]
    arguments = ["eval", str(model_dir), "--data", str(data), "--tasks", "piqa,wikitext", "--limit", "2"]
    arguments += ["--max-length", "64", "--config", "group_size=64,kv_cache=fp32", "--max-loss", "0.5"]
    result = CliRunner().invoke(app, [*arguments, "--json", str(files[0]), "--markdown", str(files[1])])
    assert result.exit_code == 0, result.output
    assert "passed" in result.output
    found = json.loads(files[0].read_text())
    assert found["limit"] == 2
    assert found["comparisons"][0]["failed"] == []
    assert found["comparisons"][0]["config"]["group_size"] == 64
    assert [len(entry["values"]) for entry in found["items"]] == [2] * len(found["items"])
    assert {row["verdict"] for row in found["comparisons"][0]["rows"]} <= {"pass", "fail", "undecided"}
    table = files[1].read_text()
    assert "word_perplexity" in table
    assert "the first 2 items" in table


def test_command_fails_when_the_gate_does(model_dir: Path, data: Path) -> None:
    arguments = ["eval", str(model_dir), "--data", str(data), "--tasks", "wikitext", "--max-length", "64"]
    arguments += ["--max-loss", "-0.5"]  # perplexity would have to halve
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1
    assert "FAILED: wikitext word_perplexity" in result.output
    undecided = CliRunner().invoke(app, [*arguments, "--limit", "1"])  # one item has no error to speak of
    assert undecided.exit_code == 0


def test_errors_are_named(model_dir: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(Int4Error, match="no such directory, and not on the hub"):
        accuracy.load("nobody/no-such-model-of-int4")
    with pytest.raises(Int4Error, match="no local data"):
        accuracy.run(model_dir, [Int4Config()], ["gsm8k"], data=data)
    for arguments, message in (
        (["--tasks", ","], "names no task"),
        (["--config", "group_size=7"], "group_size must be"),
        (["--tasks", "piqa", "--data", str(tmp_path)], "--data names the folder"),
    ):
        result = CliRunner().invoke(app, ["eval", str(model_dir), *arguments])
        assert result.exit_code == 2
        assert message in result.output


def test_int4_is_no_baseline(model_dir: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch_int4

    model, tokenizer = models.load(model_dir)
    torch_int4.patch(model)
    monkeypatch.setattr(accuracy, "load", lambda *_: (model, tokenizer))
    with pytest.raises(Int4Error, match="is no baseline"):
        accuracy.run(model_dir, [Int4Config()], ["piqa"], data=data)


def test_tables_show_nan_and_single_items() -> None:
    from torch_int4.tuning.paired import PairedLoss

    row = accuracy.Row("t", "acc", True, PairedLoss("accuracy", 0.5, math.nan, math.nan, math.nan, 1), math.nan)
    assert accuracy.cells(row, 0.01)[-1] == "fail"
    assert "nan" in accuracy.cells(row, 0.01)[5]
