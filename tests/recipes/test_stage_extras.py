"""Results of stages that carry more than a weight: fused, saved, copied and resumed with everything."""

import copy

import pytest
import torch
import torch.nn.functional as F
from calibrating import small
from tiny_models import int4s, logits
from toy_models import EXACT, assert_same_bits, dense, model_of, toy
from transformers import AutoModelForCausalLM

from torch_int4 import Int4Error, patch
from torch_int4.calibration import run as calibrated
from torch_int4.nn.extended import ExtendedLinear, extend, extras_of
from torch_int4.recipes.parts import compose

pytestmark = pytest.mark.usefixtures("toy_stages")


@pytest.mark.parametrize("recipe", ["toy_low_rank", "toy_strip", "toy_shuffle+smooth+toy_strip+toy_recover"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_whose_linears_have_extras_give_what_their_matrices_say(recipe, dtype):
    model = model_of(dtype=dtype)
    calibration = None if recipe == "toy_low_rank" else small()
    got = patch(copy.deepcopy(model), recipe=recipe, calibration=calibration, **EXACT)
    extended = [name for name, module in int4s(got).items() if extras_of(module)]
    assert len(extended) >= 14
    assert got.torch_int4_report.merged == 0
    reference = copy.deepcopy(model).float()
    rest = {n: p.float() for n, p in got.named_parameters() if n in reference.state_dict()}
    reference.load_state_dict(rest, strict=False)
    reference = dense(reference, got)
    tolerance = 1e-3 if dtype == torch.float32 else 0.2
    torch.testing.assert_close(logits(got).float(), logits(reference), rtol=tolerance, atol=tolerance)
    for name in extended:  # without the extras it would be another model
        reference.get_submodule(name).weight.data = got.get_submodule(name).to_weight().dequantize()
    assert (logits(reference) - logits(got).float()).abs().max() > 3 * tolerance


def test_one_extended_linear_keeps_its_layer_from_being_fused_and_no_other():
    model = model_of()
    got = patch(copy.deepcopy(model), skip=("lm_head",), **EXACT)
    want = logits(got)
    linear = got.model.layers[1].mlp.down_proj
    extra = toy("low_rank").branch(torch.randn(64, 128, generator=torch.Generator().manual_seed(1)))
    with torch.no_grad():
        assert torch.equal(logits(got), want)  # the layer is prepared as a plain one
        extend(linear, {"low_rank": extra})
    assert (logits(got) - want).abs().max() > 0.1
    torch.testing.assert_close(logits(got), logits(dense(model, got)), rtol=1e-3, atol=1e-3)


def test_a_low_rank_branch_helps_and_is_counted():
    model = model_of()
    plain, got = (patch(copy.deepcopy(model), recipe=recipe, **EXACT) for recipe in ("rtn", "toy_low_rank"))
    error = [F.mse_loss(logits(m), logits(model)) for m in (got, plain)]
    assert error[0] < 0.8 * error[1]
    linear = got.model.layers[0].mlp.up_proj
    assert type(linear) is ExtendedLinear
    extra = 4 * 12 * (64 + 128)
    assert linear.nbytes == plain.model.layers[0].mlp.up_proj.nbytes + extra
    assert "low_rank: 14 linears compute it besides their product" in str(got.torch_int4_report)
    assert got.torch_int4_report.bits_per_weight(4) > plain.torch_int4_report.bits_per_weight(4) + 1


RECIPES = ["toy_low_rank", "toy_shuffle+awq+toy_strip+toy_tune+toy_recover"]


@pytest.mark.parametrize("recipe", RECIPES)
def test_results_travel_through_state_dicts_copies_and_files(recipe, tmp_path):
    calibration = None if recipe == "toy_low_rank" else small(samples=8)
    model = patch(model_of(mlp_bias=True), recipe=recipe, calibration=calibration)
    want = logits(model)
    assert torch.equal(logits(copy.deepcopy(model)), want)
    with pytest.warns(UserWarning, match=r"linears have extras \(.*own form, which only torch_int4 loads"):
        model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again), want)
    assert_same_bits(again, model)
    assert set(again.torch_int4_report.linears) == set(model.torch_int4_report.linears)
    state = copy.deepcopy(model.state_dict())
    for module in model.modules():
        for extra in extras_of(module).values():
            for tensor in extra.tensors().values():
                tensor.zero_()
    assert not torch.equal(logits(model), want)
    model.load_state_dict(state)
    assert torch.equal(logits(model), want)


@pytest.mark.parametrize("recipe", ["toy_shuffle+awq+toy_strip+toy_tune+toy_recover", "toy_narrow+toy_strip"])
def test_an_interrupted_run_goes_on_with_everything_that_results_carry(recipe, tmp_path, monkeypatch):
    model, options = model_of(mlp_bias="tune" in recipe), {"recipe": recipe, "symmetric": False}
    want = patch(copy.deepcopy(model), calibration=small(samples=8), **options)
    real, calls = compose.round_block, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(calibrated, "round_block", interrupted)
    with pytest.raises(KeyboardInterrupt):
        patch(copy.deepcopy(model), calibration=small(samples=8, resume=tmp_path), **options)
    got = patch(copy.deepcopy(model), calibration=small(samples=8, resume=tmp_path), **options)
    assert len(calls) == 3  # the first block was not rounded again
    assert_same_bits(got, want)
    assert torch.equal(logits(got), logits(want))


def test_extras_that_no_stage_declares_are_refused(monkeypatch):
    strip = toy("strip")
    monkeypatch.setattr(strip, "EXTRAS", {"strip": strip.Strip})
    with pytest.raises(Int4Error, match=r"extra 'a_order' \(Order\) that no stage of 'toy_strip' declares"):
        patch(model_of(), recipe="toy_strip", calibration=small())


def test_results_of_another_size_are_refused(monkeypatch):
    strip = toy("strip")
    real = strip._round
    monkeypatch.setattr(strip, "_round", lambda linear, number, options: real(linear, 2 * number, options))
    monkeypatch.setattr(strip.Strip, "check", lambda self, rows, inputs, name: (_ for _ in ()).throw(Int4Error(name)))
    with pytest.raises(Int4Error, match=r"q_proj\.extras\.strip"):
        patch(model_of(), recipe="toy_strip", calibration=small())
