"""Linears, norms and blocks that a model uses more than once: recipes see every use, or leave them and say so."""

import copy
from types import SimpleNamespace

import pytest
import torch
from calibrating import small
from decoders import decoder
from torch import nn

from torch_int4 import Int4Error, patch
from torch_int4.calibration.uses import count
from torch_int4.recipes.parts.block import Inputs

RECIPES = ["gptq", "awq", "smooth", "teq", "signround", "omniquant"]
IDS = torch.randint(2, 99, (4, 16), generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    def __init__(self, uses):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(64), nn.Linear(64, 64), nn.Linear(64, 64)
        self.uses = uses

    def forward(self, hidden_states):
        x = self.norm(hidden_states)
        for use in range(self.uses):
            x = torch.relu(self.up(x * (1 + use)))
        return hidden_states + self.down(x)


class Looped(nn.Module):
    """A decoder that runs its list of blocks `loops` times, and in each block a linear `uses` times."""

    def __init__(self, loops=1, uses=1, blocks=2):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.lm_head = nn.Embedding(99, 64), nn.Linear(64, 99)
        self.layers = nn.ModuleList(Block(uses) for _ in range(blocks))
        self.loops = loops

    def forward(self, input_ids):
        x = self.embed(input_ids)
        for _ in range(self.loops):
            for layer in self.layers:
                x = layer(x)
        return self.lm_head(x)


def patched(model, recipe, **options):
    return patch(
        copy.deepcopy(model),
        recipe=recipe,
        calibration=small(samples=4, length=16, batch=2),
        preset="light",
        **{"compute": "fp32", "kv_cache": "fp32", "head": "float", **options},
    )


def logits(model):
    with torch.no_grad():
        found = model(IDS)
    return getattr(found, "logits", found)


def error(model, other):
    return ((logits(other) - logits(model)).norm() / logits(model).norm()).item()


def test_statistics_count_every_use_of_a_linear(monkeypatch):
    seen = {}
    from torch_int4.calibration import run

    stock = run.round_block
    monkeypatch.setattr(
        run,
        "round_block",
        lambda recipe, block, options: (
            seen.update({one.name: one.inputs.rows for one in block.linears}) or stock(recipe, block, options)
        ),
    )
    patched(Looped(uses=3), "gptq")
    assert seen == {f"layers.{n}.{name}": rows for n in (0, 1) for name, rows in (("up", 3 * 64), ("down", 64))}


def test_linears_part_once_they_are_given_different_inputs():
    one, other = SimpleNamespace(inputs=None), SimpleNamespace(inputs=None)
    x, y, z = torch.randn(3, 5, 8)
    count([one, other], [[x], [x]])
    assert one.inputs is other.inputs
    count([one, other], [[y], [y, z]])  # the second is used once more
    count([one, other], [[], [x]])  # and once without the first
    for linear, given in ((one, [x, y]), (other, [x, y, z, x])):
        want = Inputs(8)
        for part in given:
            want.add(part)
        assert linear.inputs.rows == want.rows
        torch.testing.assert_close(linear.inputs.gram, want.gram)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("blocks", [1, 2])
def test_lists_of_blocks_that_run_several_times_are_refused(recipe, blocks):
    model = Looped(loops=2, blocks=blocks)
    with pytest.raises(Int4Error, match=r"once each.*recipe='rtn'"):
        patched(model, recipe)
    assert error(model, patched(model, "rtn")) < 0.1


@pytest.mark.parametrize("recipe", RECIPES)
def test_one_block_in_two_places_is_refused(recipe):
    model = Looped()
    model.layers.append(model.layers[0])
    with pytest.raises(Int4Error, match="runs one block several times"):
        patched(model, recipe)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("shared", ["norm", "norm's weight", "linear", "linear's weight"])
def test_parts_of_two_blocks_keep_what_they_compute(recipe, shared):
    model = decoder("llama")
    first, second = model.model.layers
    if shared == "norm":
        second.input_layernorm = first.input_layernorm
    elif shared == "norm's weight":
        second.input_layernorm.weight = first.input_layernorm.weight
    elif shared == "linear":
        second.self_attn.q_proj = first.self_attn.q_proj
    else:
        second.self_attn.v_proj.weight = first.self_attn.v_proj.weight
    with torch.no_grad():
        first.input_layernorm.weight.copy_(torch.linspace(0.5, 2, 64))
    got = patched(model, recipe)
    assert error(model, got) < 1.6 * error(model, patched(model, "rtn"))
    report = str(got.torch_int4_report)
    if recipe not in ("gptq", "signround"):
        assert "several blocks share their weights" in report
    if shared == "linear":
        assert "model.layers.0.self_attn.q_proj: several blocks run it, so it is rounded to nearest" in report
        assert got.model.layers[1].self_attn.q_proj is got.model.layers[0].self_attn.q_proj
    if shared.startswith("norm"):
        assert torch.equal(got.model.layers[1].input_layernorm.weight, model.model.layers[0].input_layernorm.weight)
