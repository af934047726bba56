"""The seam of stages: toy stages, files of helpers/stages, that do what no stage of ours does yet."""

import copy

import pytest
import torch
import torch.nn.functional as F
from calibrating import small
from tiny_models import int4s, linears, logits
from toys import EXACT, dense, model_of, toy
from transformers import AutoModelForCausalLM

import torch_int4
from torch_int4 import Int4Config, Int4Error, patch, recipes
from torch_int4.calibration import run as calibrated
from torch_int4.nn.extended import ExtendedLinear, extend, extras_of
from torch_int4.recipes.parts import compose
from torch_int4.recipes.parts.model import Model

pytestmark = pytest.mark.usefixtures("toy_stages")


def assert_same_bits(a, b):
    left, right = a.state_dict(), b.state_dict()
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name


# What goes together


def test_any_number_of_stages_of_which_one_rounds():
    recipe = recipes.parse("toy_shuffle+smooth+awq+toy_low_rank+toy_tune")
    assert [stage.__name__.rpartition(".")[2] for stage in recipe.transforms] == ["smooth", "awq"]
    assert recipe.rounding is toy("low_rank")
    assert recipe.preparing == (toy("shuffle"), toy("tune"))
    assert recipe.finishing == (toy("tune"),)
    assert recipe.extras == {"low_rank": toy("low_rank").LowRank}
    assert recipe.needs_calibration
    assert not recipes.parse("toy_shuffle+rtn").needs_calibration
    assert recipes.parse("toy_tune+rtn").needs_calibration


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ("toy_shuffle", "'toy_shuffle' rounds nothing.*of whole models: toy_"),
        ("rtn+toy_shuffle", "'toy_shuffle' does nothing after rounding; put it before 'rtn'"),
        ("toy_low_rank+rtn", "'toy_low_rank' transforms nothing"),
        ("toy_shuffle+toy_shuffle+rtn", "stands in it twice"),
        ("toy_unknown+rtn", "unknown recipe 'toy_unknown'"),
    ],
)
def test_stages_that_do_not_go_together(recipe, words):
    with pytest.raises(Int4Error, match=words):
        Int4Config(recipe=recipe)


def test_two_stages_cannot_mean_different_extras_by_one_name(monkeypatch):
    toy("strip")
    monkeypatch.setattr(toy("recover"), "EXTRAS", {"strip": toy("low_rank").LowRank})
    with pytest.raises(Int4Error, match="two of its stages give linears an extra 'strip'"):
        Int4Config(recipe="toy_strip+toy_recover")


# prepare


def test_what_prepare_made_of_the_model_is_what_is_quantized():
    model = model_of()
    prepared = copy.deepcopy(model)
    names = {name: 4 for name, _ in linears(model).items()}
    toy("shuffle").CALLS.clear()
    toy("shuffle").prepare(Model(prepared, names, generator=torch.Generator().manual_seed(0)), None)
    torch.testing.assert_close(logits(prepared), logits(model), rtol=1e-4, atol=1e-4)
    assert not torch.equal(prepared.model.layers[0].mlp.up_proj.weight, model.model.layers[0].mlp.up_proj.weight)
    want = patch(prepared, recipe="gptq", calibration=small())
    got = patch(model, recipe="toy_shuffle+gptq", calibration=small())
    assert toy("shuffle").CALLS == [0, 4]
    assert "toy_shuffle: shuffled" in str(got.torch_int4_report)
    assert_same_bits(got, want)
    assert torch.equal(logits(got), logits(want))


def test_recipes_that_need_no_data_prepare_without():
    toy("shuffle").CALLS.clear()
    model = patch(model_of(), recipe="toy_shuffle+rtn")
    assert toy("shuffle").CALLS == [0]
    before = logits(model)
    patch(model, recipe="toy_shuffle+rtn")  # is patched already
    assert toy("shuffle").CALLS == [0]
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("recipe", ["toy_narrow+rtn", "toy_narrow+awq+gptq"])
def test_modules_of_new_shapes_are_found_fused_saved_and_read(recipe, tmp_path):
    model = patch(model_of(), recipe=recipe, calibration=small() if "gptq" in recipe else None, symmetric=False)
    assert {m.out_features for n, m in int4s(model).items() if "up_proj" in n} == {64}
    report = model.torch_int4_report
    assert (len(report.linears), report.blocks, report.merged) == (15, 2, 4)
    assert not any(module.training for module in model.modules())
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config.intermediate_size == 64
    assert torch.equal(logits(again), logits(model))


def test_a_model_that_was_prepared_before_it_was_saved_is_not_prepared_again(tmp_path):
    patch(model_of(), recipe="toy_shuffle+rtn", head="float").save_pretrained(tmp_path)
    toy("shuffle").CALLS.clear()
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    with_head = torch_int4.from_pretrained(tmp_path, head="int4")
    assert toy("shuffle").CALLS == []
    assert len(int4s(with_head)) == len(int4s(again)) + 1


def test_a_stage_that_fails_is_named_and_the_model_must_be_loaded_again():
    with pytest.raises(Int4Error, match=r"'toy_broken' failed \(prepare\), so the model must be loaded again: no such"):
        patch(model_of(), recipe="toy_broken+rtn")


def test_everything_is_checked_before_a_model_is_prepared(tmp_path):
    model = model_of()
    before = copy.deepcopy(model.state_dict())
    patch(model_of(), recipe="toy_shuffle+gptq", calibration=small(resume=tmp_path))
    wrong = [
        ({"calibration": torch.tensor([5, 700])}, "token ids reach"),
        ({"calibration": small(resume=tmp_path, seed=5)}, "another run"),
    ]
    toy("shuffle").CALLS.clear()
    for options, words in wrong:
        with pytest.raises(Int4Error, match=words):
            patch(model, recipe="toy_shuffle+gptq", **options)
    model.model.layers.append(model.model.layers[0])
    with pytest.raises(Int4Error, match="several times"):
        patch(model, recipe="toy_shuffle+gptq", calibration=small())
    del model.model.layers[2]
    assert toy("shuffle").CALLS == []
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_an_error_after_preparing_says_that_the_model_has_changed(monkeypatch):
    def prepare(model, options):
        model.module.lm_head.weight.data[0, 0] = float("nan")

    monkeypatch.setattr(toy("shuffle"), "prepare", prepare)
    with pytest.raises(Int4Error, match=r"lm_head: .*NaN.*must be loaded again"):
        patch(model_of(), recipe="toy_shuffle+rtn")


def test_models_that_cannot_be_prepared_while_they_are_loaded(tmp_path):
    model_of().save_pretrained(tmp_path)
    with pytest.raises(Int4Error, match="works on the model as a whole"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=Int4Config(recipe="toy_shuffle+rtn"))


# after


def test_after_trains_on_the_float_logits_that_prepare_has_noted():
    options = {"calibration": small(samples=8), "recipe": "toy_tune+gptq"}
    toy("tune").LOSSES.clear()
    model = model_of(mlp_bias=True)
    for linear in linears(model).values():
        if linear.bias is not None:
            linear.bias.data.normal_(std=0.1)
    got = patch(copy.deepcopy(model), **options, **EXACT)
    first, last = toy("tune").LOSSES.pop()
    assert last < 0.99 * first
    plain = patch(copy.deepcopy(model), calibration=options["calibration"], recipe="gptq", **EXACT)
    biases = [(n, m.bias, plain.get_submodule(n).bias) for n, m in int4s(got).items() if m.bias is not None]
    assert [n for n, a, b in biases if not torch.equal(a, b)] == ["model.layers.1.mlp.down_proj"]
    assert got.torch_int4_report.blocks == 2
    ids = options["calibration"].windows()  # a bias of a random model helps only where it was trained
    error = [F.mse_loss(logits(m, ids), logits(model, ids)) for m in (got, plain)]
    assert error[0] < error[1]


# extras


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
