"""Recipes, data and models that calibration refuses, before anything is changed."""

import pytest
import torch
from calibrating import small
from decoders import decoder
from tiny_models import int4s
from torch import nn

from torch_int4 import Int4Config, Int4Error, patch
from torch_int4.calibration.run import find_blocks


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ("", "unknown recipe ''"),
        ("best", "unknown recipe 'best'.*gptq"),
        ("gptq+rtn", "'gptq' transforms nothing; transforms: awq"),
        ("awq+smooth", "'smooth' rounds nothing.*roundings: gptq"),
        ("awq+gptq+rtn", "'gptq' transforms nothing"),
        ("gptq+awq", "'awq' transforms what 'gptq' has rounded"),
        ("awq+smooth+awq+gptq", "'awq' stands in it twice"),
        ("awq+gptq+", "unknown recipe ''"),
        ("awq+", "unknown recipe ''"),
        ("_grid", "unknown recipe"),
        (7, "must be a name"),
    ],
)
def test_recipes_that_are_none(recipe, words):
    with pytest.raises(Int4Error, match=words):
        Int4Config(recipe=recipe)


@pytest.mark.parametrize("data", [[], ["text without a tokenizer"], torch.tensor([5, 700])])
def test_unusable_data_leaves_the_model_alone(data):
    model = decoder("llama")
    before = {n: p.clone() for n, p in model.named_parameters()}
    with pytest.raises(Int4Error, match="calibration"):
        patch(model, recipe="gptq", calibration=data)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert not int4s(model)


class Skipping(nn.Module):
    """Blocks that do not run one on the output of the other."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(99, 32)
        self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(3))

    def forward(self, ids):
        x = self.embed(ids)
        return self.layers[2](x) + self.layers[0](x)


def test_models_whose_blocks_are_no_chain_are_refused():
    with pytest.raises(Int4Error, match="do not run one after the other"):
        patch(Skipping(), recipe="gptq", calibration=small())


def test_models_without_blocks_are_refused_and_lists_within_blocks_are_no_blocks():
    with pytest.raises(Int4Error, match="no list of blocks"):
        patch(nn.Sequential(nn.Embedding(99, 32), nn.Linear(32, 32)), recipe="gptq", calibration=small())
    model = decoder("mixtral")
    chosen = {n: (m, 4) for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert find_blocks(model, chosen)[0] == ["model.layers.0", "model.layers.1"]


def test_hqq_needs_float_offsets():
    with pytest.raises(Int4Error, match="symmetric=False, zeros='float'"):
        Int4Config(recipe="hqq")
