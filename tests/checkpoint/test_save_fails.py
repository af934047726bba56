"""After an error at any step of `save_pretrained` model and folder are what they were."""

import copy
import pkgutil

import pytest
import torch
from tiny_models import llama, logits
from transformers import AutoModelForCausalLM

from torch_int4 import patch

STEPS = [
    "torch_int4.checkpoint.saving.state_of",
    "torch_int4.checkpoint.saving._Writer",
    "torch_int4.checkpoint.saving._Writer.get_state_dict_and_metadata",
    "torch_int4.checkpoint.saving._add_companions",
    "torch_int4.checkpoint.stored._write",
    "torch_int4.nn.linear.Int4Linear.to_weight",
    "transformers.modeling_utils.safe_save_file",
    "transformers.configuration_utils.PreTrainedConfig.save_pretrained",
    "torch_int4.support.atomic._publish",
]


class BrokenError(Exception):
    pass


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def things(model):
    modules = [(name, id(module), type(module), sorted(vars(module))) for name, module in model.named_modules()]
    config = copy.deepcopy(vars(model.config))
    for name in ("architectures", "dtype"):  # which transformers notes in the config whenever it saves
        config.pop(name)
    return modules, config, copy.deepcopy(vars(model.generation_config))


@pytest.mark.parametrize("step", STEPS)
def test_nothing_is_changed(step, tmp_path, monkeypatch):
    folder = tmp_path / "model"
    patch(llama(tied=False)).save_pretrained(folder)
    model = patch(llama(tied=True), group_size=64)
    files, before, want = contents(folder), things(model), logits(model)
    calls = []

    def fail(*args, **kwargs):
        calls.append(step)
        raise BrokenError(step)

    with monkeypatch.context() as broken:
        assert pkgutil.resolve_name(step)
        broken.setattr(step, fail)
        with pytest.raises(BrokenError):
            model.save_pretrained(folder)
    assert calls
    assert things(model) == before
    assert contents(folder) == files
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith(".")] == ["model"]
    model.save_pretrained(folder)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(folder)), want)
