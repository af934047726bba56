"""lm-eval with our model type: registration in both orders, local tasks, command line, batches."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partialmethod
from pathlib import Path
from typing import Any

import eval_data
import pytest
import saved_model
import torch
import yaml
from typer.testing import CliRunner

import torch_int4
from torch_int4 import Int4Error
from torch_int4.cli import app
from torch_int4.evals import models
from torch_int4.evals.accuracy import command_line, tasks
from torch_int4.hf import harness_hook

lm_eval = pytest.importorskip("lm_eval")
NAMES = sorted(tasks.available())
CONFIG = "recipe=rtn,group_size=64,compute=fp32,symmetric=False,head=float,kv_cache=fp32,skip=*.down_proj;*.up_proj"


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_model.save(tmp_path_factory.mktemp("model"), initializer_range=0.2, max_position_embeddings=512)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return eval_data.write(tmp_path_factory.mktemp("data"))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")


@pytest.fixture
def few_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-eval without its own tasks: reading those thousands of files takes ten seconds."""
    from lm_eval.tasks.manager import TaskManager

    monkeypatch.setattr(TaskManager, "__init__", partialmethod(TaskManager.__init__, include_defaults=False))


def python(code: str, folder: Path) -> None:
    """Runs code in a fresh interpreter, away from the sources."""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=180, cwd=folder)


def results(lm: Any, names: list[str], data: Path, **options: Any) -> dict[str, Any]:
    from torch_int4.evals.accuracy import harness

    with harness.task_manager(names, data) as manager:
        return harness.evaluate(lm, names, manager, **options)


def item_scores(found: dict[str, Any]) -> dict[str, list[list[Any]]]:
    return {
        task: [[sample[metric] for metric in sample["metrics"]] for sample in samples]
        for task, samples in found["samples"].items()
    }


@pytest.mark.parametrize(
    "imports",
    [
        "import torch_int4; assert not any(m.startswith(('lm_eval', 'datasets')) for m in sys.modules)",
        "import lm_eval.models, torch_int4",
        "from torch_int4.hf import harness_hook as h; import importlib.util as u\n"
        "u.find_spec('lm_eval.models'); h.install()",
    ],
)
def test_both_orders_of_import_register_the_type(imports: str, tmp_path: Path) -> None:
    python(
        f"import sys; {imports}\n"
        "import lm_eval.models\n"
        "from lm_eval.api.registry import model_registry\n"
        "assert 'torch_int4' in model_registry and 'hf' in model_registry\n"
        "assert lm_eval.models.__loader__ is lm_eval.models.__spec__.loader\n"
        "assert type(lm_eval.models.__loader__).__name__ == 'SourceFileLoader'\n"
        "assert not any(getattr(finder, 'name', '') == 'lm_eval.models' for finder in sys.meta_path)\n"
        "assert 'torch_int4.evals.accuracy.harness' not in sys.modules\n",
        tmp_path,
    )


def test_the_registered_path_leads_to_our_class() -> None:
    from lm_eval.api.registry import get_model

    from torch_int4.evals.accuracy.harness import Int4LM

    assert get_model("torch_int4") is Int4LM
    assert f"{Int4LM.__module__}:{Int4LM.__name__}" == harness_hook.TARGET


def test_a_failing_import_of_the_harness_leaves_the_hook(tmp_path: Path) -> None:
    """An lm-eval whose models cannot be imported raises its own error, each time."""
    package = tmp_path / "lm_eval" / "models"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").write_text("")
    (package / "__init__.py").write_text("raise RuntimeError('broken')")
    python(
        "import sys; sys.path.insert(0, '.'); import torch_int4\n"
        "for _ in range(2):\n"
        "    try:\n        import lm_eval.models\n"
        "    except RuntimeError as error:\n        assert 'broken' in str(error)\n"
        "    else:\n        raise SystemExit('no error')\n",
        tmp_path,
    )


def test_a_registry_without_lazy_entries_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.api.registry", type(sys)("lm_eval.api.registry"))
    harness_hook.register()


def test_named_type_equals_a_patched_object_and_stock_hf(model_dir: Path, data: Path, tmp_path: Path) -> None:
    """The same model by name, as an object in our class or in lm-eval's own, and saved in int4."""
    from lm_eval.models.huggingface import HFLM

    from torch_int4.evals.accuracy.harness import Int4LM

    names = ["piqa", "lambada_openai", "wikitext"]
    with_name = lm_eval.simple_evaluate(
        "torch_int4",
        f"pretrained={model_dir},max_length=128,{CONFIG}",
        tasks=names,
        batch_size="auto",
        bootstrap_iters=0,
        task_manager=_manager(names, data, model_dir),
    )
    model, tokenizer = models.load(model_dir)
    skip = ("*.down_proj", "*.up_proj")
    torch_int4.patch(model, group_size=64, compute="fp32", symmetric=False, head="float", kv_cache="fp32", skip=skip)
    ours = results(Int4LM(model, tokenizer=tokenizer, max_length=128, batch_size="auto"), names, data)
    stock = results(HFLM(model, tokenizer=tokenizer, max_length=128, batch_size=1), names, data)
    assert item_scores(with_name) == item_scores(ours)
    for task, rows in item_scores(stock).items():
        torch.testing.assert_close(_flat(item_scores(ours)[task]), _flat(rows), rtol=1e-5, atol=1e-5)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    saved = results(Int4LM(str(tmp_path), max_length=128, batch_size="auto"), names, data)
    assert item_scores(saved) == item_scores(ours)
    assert with_name["config"]["torch_int4"]["config"]["group_size"] == 64


def _manager(names: list[str], data: Path, folder: Path) -> Any:
    from lm_eval.tasks import TaskManager

    target = folder / "tasks"
    target.mkdir(exist_ok=True)
    tasks.write(names, data, target)
    return TaskManager(include_path=str(target), include_defaults=False)


def _flat(rows: list[list[Any]]) -> torch.Tensor:
    return torch.tensor([[float(x) for v in row for x in (v if isinstance(v, (tuple, list)) else [v])] for row in rows])


def test_wrong_arguments_are_named(model_dir: Path) -> None:
    from torch_int4.evals.accuracy.harness import Int4LM

    with pytest.raises(Int4Error, match="group_size must be"):
        Int4LM("no/such/model", group_size=48)
    with pytest.raises(Int4Error, match="calibration"):
        Int4LM(str(model_dir), calibration=str(model_dir / "missing.txt"))
    model, tokenizer = models.load(model_dir)
    torch_int4.patch(model, group_size=64)
    with pytest.raises(Int4Error, match="group_size: the model is int4 already"):
        Int4LM(model, tokenizer=tokenizer, group_size=32)


def test_automatic_batches_depend_on_the_requests_alone(model_dir: Path) -> None:
    from torch_int4.evals.accuracy.harness import BATCH_TOKENS, CpuLM

    model, tokenizer = models.load(model_dir)
    lm = CpuLM(model, tokenizer=tokenizer, batch_size="auto")
    assert lm._detect_batch_size() == BATCH_TOKENS // 512
    requests = [(None, [1] * 100, [2] * 5), (None, [1] * 9000, [2]), (None, [1], [2])]
    assert [lm._detect_batch_size(requests, i) for i in range(3)] == [BATCH_TOKENS // 104, BATCH_TOKENS // 512, 64]


@pytest.mark.parametrize("name", NAMES)
def test_local_tasks_are_the_shipped_ones_but_for_the_data(name: str, data: Path, tmp_path: Path) -> None:
    """All that lm-eval reads of a local task equals its own file, except where the documents are."""
    from lm_eval.tasks._yaml_loader import load_yaml

    task = tasks.available()[name]
    tasks.write([name], data, tmp_path)
    ours = load_yaml(tmp_path / f"{name}.yaml", resolve_func=False)
    shipped = load_yaml(tasks.harness_folder() / task.include, resolve_func=False)
    data_keys = {"dataset_path", "dataset_name", "dataset_kwargs", "tag", *tasks.SPLITS[:3]}
    assert {k: v for k, v in ours.items() if k not in data_keys} == {
        k: v for k, v in shipped.items() if k not in data_keys
    }
    scored = "test" if shipped.get("test_split") else "validation"  # lm-eval scores the test split if there is one
    assert list(task.data) == [scored]
    assert ours[f"{scored}_split"] == shipped[f"{scored}_split"]
    metrics = {entry["metric"] for entry in shipped["metric_list"]}
    assert set(task.scores) <= metrics


def test_prompts_are_those_of_the_harness(data: Path) -> None:
    from torch_int4.evals.accuracy import harness

    expected = {
        "piqa": ("Question: How to open jar 0?\nAnswer:", [" Turn the lid.", " Sing to it."]),
        "lambada_openai": ("The cat sat by the door. Nobody let in the", [" cat"]),
        "hellaswag": (
            "Baking bread: A woman pours flour into bowl 0 slowly. The woman",
            [" stirs it.", " eats the bowl. whole.", " flies away.", " reads a book about tides."],
        ),
        "arc_easy": ("Question: What is wet?\nAnswer:", [" Water", " Sand", " Iron"]),
        "winogrande": ("The cup fell off the shelf because the cup", [" was loose."]),
    }
    with harness.task_manager(list(expected), data) as manager:
        loaded = manager.load(list(expected))["tasks"]
        for name, (prompt, answers) in expected.items():
            loaded[name].set_config(key="num_fewshot", value=0)
            loaded[name].build_all_requests(limit=1)
            arguments = [instance.args for instance in loaded[name].instances]
            assert arguments[0] == (prompt, answers[0])
            if name != "winogrande":  # there the options change the prompt instead
                assert [answer for _, answer in arguments] == answers


def test_broken_data_is_named(data: Path, tmp_path: Path) -> None:
    with pytest.raises(Int4Error, match=r"gsm8k.*no local data.*hellaswag"):
        tasks.write(["gsm8k"], data, tmp_path)
    with pytest.raises(Int4Error, match=r"piqa.*validation\.jsonl.*--data"):
        tasks.write(["piqa"], tmp_path, tmp_path)
    (tmp_path / "piqa").mkdir()
    file = tmp_path / "piqa" / "validation.jsonl"
    for content, message in (("", "not JSON"), ("no json\n", "not JSON"), ("[1]\n", "is a list")):
        file.write_text(content)
        with pytest.raises(Int4Error, match=message):
            tasks.write(["piqa"], tmp_path, tmp_path)
    assert tasks.present(tmp_path) == ["piqa"]
    assert tasks.present(data) == NAMES


def test_unknown_tasks_are_named(few_tasks: None) -> None:
    from torch_int4.evals.accuracy import harness

    with pytest.raises(Int4Error, match="no task no_such_task"), harness.task_manager(["no_such_task"]):
        pass


def test_command_line_of_the_harness(model_dir: Path, data: Path, tmp_path: Path, few_tasks: None) -> None:
    """The harness's own arguments go through, samples are logged, and local data replaces the hub's."""
    arguments = ["lm-eval", "--model", "torch_int4", "--model_args", f"pretrained={model_dir},{CONFIG}"]
    arguments += ["--tasks", "piqa,winogrande", "--batch_size", "auto", "--log_samples", "--limit", "2"]
    arguments += ["--output_path", str(tmp_path / "out"), "--data", str(data)]
    argv = list(sys.argv)
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert sys.argv == argv
    assert "|winogrande|" in result.output
    (summary,) = (tmp_path / "out").rglob("results_*.json")
    found = json.loads(summary.read_text())
    assert found["config"]["model"] == "torch_int4"
    assert found["n-samples"]["piqa"]["effective"] == 2
    (samples,) = (tmp_path / "out").rglob("samples_piqa_*.jsonl")
    lines = [json.loads(line) for line in samples.read_text().splitlines()]
    assert [line["doc"]["goal"] for line in lines] == ["How to open jar 0?", "How to open jar 1?"]


def test_command_line_refuses_what_cannot_work(data: Path, tmp_path: Path) -> None:
    with pytest.raises(Int4Error, match="holds no files"):
        command_line.run(["run"], tmp_path)
    with pytest.raises(Int4Error, match="exclude each other"):
        command_line.run(["run", "--include_path=x"], data)
    result = CliRunner().invoke(app, ["lm-eval", "run", "--help"])
    assert result.exit_code == 0
    assert "--model_args" in result.output
    assert "torch-int4 lm-eval run" in CliRunner().invoke(app, ["lm-eval"]).output


def test_written_tasks_are_plain_yaml(data: Path, tmp_path: Path) -> None:
    assert tasks.write(NAMES, data, tmp_path) == NAMES
    for name in NAMES:
        content = yaml.safe_load((tmp_path / f"{name}.yaml").read_text())
        assert Path(content["include"]).is_file()
        assert all(Path(file).is_file() for file in content["dataset_kwargs"]["data_files"].values())
