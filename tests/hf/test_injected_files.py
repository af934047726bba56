"""An error at any call of any function of ours in loading or saving leaves files and process as they were."""

import contextlib
import copy
import gc
import os

import pytest
import torch
from decoders import decoder
from injecting import broken, steps_of
from tiny_models import logits
from transformers import AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import torch_int4
from torch_int4 import Int4Config, patch

CLEANING = "support.atomic._remove,"  # what it does not remove, the next save does


@pytest.fixture(autouse=True)
def _quiet():
    from transformers.utils import logging

    logging.disable_progress_bar()


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def of_process(folder):
    """What loading could leave behind in the process."""
    gc.collect()
    links = [f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd")]
    opened = [os.readlink(link) for link in links if os.path.islink(link)]
    modes = torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads()
    return modes, sorted(ALL_ATTENTION_FUNCTIONS.valid_keys()), [path for path in opened if str(folder) in path]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("way", ["quantize", "ours", "stored", "panels"])
def test_a_failed_load_leaves_nothing(way, tmp_path, monkeypatch):
    folder, panels = tmp_path / "model", tmp_path / "panels"
    model = decoder("llama")
    (patch(model) if way == "stored" else model).save_pretrained(folder)
    config = Int4Config()
    if way == "panels":
        monkeypatch.setenv("TORCH_INT4_PANELS", str(panels))

    def run():
        for file in [*panels.rglob("*.safetensors"), *panels.rglob("*.partial-*")]:
            file.unlink()  # so that they are written each time
        if way in ("ours", "panels"):
            return torch_int4.from_pretrained(folder)
        return AutoModelForCausalLM.from_pretrained(
            folder, **({"quantization_config": config} if way == "quantize" else {})
        )

    steps = steps_of(run, most=36)
    want, files, asked = logits(run()), contents(folder), copy.deepcopy(config)
    process, raised = of_process(folder), 0
    for step in steps:
        with broken(step), contextlib.suppress(Exception):
            run()
            raised -= 1
        raised += 1
        assert contents(folder) == files, step
        assert of_process(folder) == process, step
        assert not [path for path in panels.rglob("*") if "partial" in path.name], step
    assert config == asked
    assert torch.equal(logits(run()), want)
    assert raised > 25


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("name", ["llama", "qwen2_moe"])
def test_a_failed_save_leaves_model_and_folder(name, tmp_path):
    folder = tmp_path / "model"
    model = patch(decoder(name))

    def things():
        modules = [(x, id(module), type(module), vars(module).copy()) for x, module in model.named_modules()]
        return modules, copy.deepcopy(vars(model.config)), copy.deepcopy(vars(model.generation_config))

    steps = steps_of(lambda: model.save_pretrained(folder), most=60)
    assert len(steps) > 40
    (folder / "note.txt").write_text("of the user")
    before, files, want, passed = things(), contents(tmp_path), logits(model), 0
    for step in steps:
        with broken(step) as one, contextlib.suppress(Exception):
            model.save_pretrained(folder)
            passed += one.reached
        assert things() == before, step
        if str(step).startswith(CLEANING):
            model.save_pretrained(folder)
        assert contents(tmp_path) == files, step
    assert passed < 5  # functions whose errors do not matter
    assert torch.equal(logits(model), want)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(folder)), want)
