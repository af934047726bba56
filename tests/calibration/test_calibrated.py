"""The pass over a model, block by block, with every stage and every family that there is."""

import copy
import gc
import weakref

import pytest
import torch
from calibrating import few_steps, output_error, patched, rows, small, statistics, tokens, weights
from decoders import ALL, FAMILIES, MAIN, decoder
from tiny_models import dequantized, int4s, logits
from torch import nn

from torch_int4 import Int4Config, patch, recipes
from torch_int4.calibration import run as calibrated_module
from torch_int4.calibration.capture import Tape
from torch_int4.calibration.run import CalibratedPass
from torch_int4.patching import families
from torch_int4.recipes import gptq
from torch_int4.recipes.parts.block import Inputs

STAGES = {name: recipes.get(name) for name in recipes.available()}
TRANSFORMS = [name for name, stage in STAGES.items() if hasattr(stage, "transform")]
ROUNDINGS = [name for name, stage in STAGES.items() if recipes.rounds(stage)]
OPTIONS = {"symmetric": False, "zeros": "float", "preset": "light"}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    few_steps(monkeypatch)


# Names


def test_names_alone_are_the_published_methods():
    assert recipes.parse("awq").transforms == (STAGES["awq"],)
    assert recipes.parse("awq").rounding is STAGES["rtn"]
    assert recipes.parse("awq").configure(Int4Config()).clip
    assert not recipes.parse("awq+rtn").configure(Int4Config()).clip
    assert recipes.parse("gptq").transforms == ()
    assert recipes.parse("none+gptq").stages == (STAGES["gptq"],)
    assert recipes.parse("omniquant").by_block
    assert recipes.parse("omniquant").folds_scales


@pytest.mark.parametrize("name", recipes.available())
def test_every_stage_does_something_and_says_what(name):
    assert name in TRANSFORMS + ROUNDINGS
    assert STAGES[name].__doc__
    assert recipes.parse(name).stages


# The pass


@pytest.mark.parametrize("name", ALL)
def test_gptq_serves_every_decoder_and_beats_rounding(name):
    model, plain = patched(name, "rtn", None, group_size=32)
    _, better = patched(name, "gptq", group_size=32)
    # What is rounded to nearest in both (experts that are no linears stay float) does not count.
    assert output_error(model, better) < output_error(model, plain)
    assert len(int4s(better)) == len(int4s(plain))


PAIRS = [*ROUNDINGS, *(f"{transform}+gptq" for transform in TRANSFORMS), *(f"awq+{name}" for name in ROUNDINGS)]
PAIRS += ["smooth+awq+gptq"]


@pytest.mark.parametrize("recipe", dict.fromkeys(PAIRS))
def test_pairs_run_and_the_result_is_what_the_weights_say(recipe):
    calibration = small(samples=4, batch=2)
    model, result = patched("llama", recipe, calibration, **{**OPTIONS, "attention": "stock"})
    assert len(int4s(result)) == 14
    kept = dict(result.named_parameters())  # norms as they were folded
    model_with_norms = copy.deepcopy(model)
    for name, parameter in model_with_norms.named_parameters():
        parameter.data = kept[name].data if name in kept else parameter.data
    reference = dequantized(model_with_norms, result)
    ids = tokens().view(16, 24)[:3]
    torch.testing.assert_close(logits(result, ids), logits(reference, ids), rtol=2e-3, atol=2e-3)
    assert output_error(model, result) < 0.4


@pytest.mark.parametrize("name", MAIN)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_folding_leaves_the_float_model_what_it_was(name, transform, monkeypatch):
    """With weights that are not rounded, only the scales are left, and they cancel."""
    model = decoder(name)
    folded = copy.deepcopy(model)
    chosen = {n: (m, 4) for n, m in folded.named_modules() if isinstance(m, nn.Linear) and "lm_head" not in n}
    facts = {key: family.folds for key, family in families.of_modules(folded, None).items()}
    config = Int4Config(recipe=f"{transform}+rtn", preset="light", symmetric=False)
    run = CalibratedPass(folded, chosen, facts, config, small(samples=4, batch=2))
    moved = []
    real = calibrated_module.round_block

    def spy(recipe, block, config):
        moved.append(block.name)
        return real(recipe, block, config)

    monkeypatch.setattr(calibrated_module, "round_block", spy)
    names = [name for name, _ in run.results()]
    assert sorted(names) == sorted(chosen)
    assert len(moved) == 2
    assert output_error(model, folded) < 1e-6
    changed = [n for n, p in model.named_parameters() if not torch.equal(p, folded.get_parameter(n))]
    assert changed


# One has a fact that does not hold, and the pictures of the others go through lists of modules that are no chains.
NOT_FOLDED = ("arcee", "qwen3_vl_text", "qwen3_vl_moe_text")


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in NOT_FOLDED])
def test_facts_of_families_hold_where_their_modules_exist(name):
    """A fold that is refused on the blocks of its own family is a wrong fact."""
    _, result = patched(name, "smooth", small(samples=4, batch=2))
    assert not [notice for notice in result.torch_int4_report.notices if "cannot be folded" in notice]


def test_facts_that_do_not_hold_are_found_out_and_said():
    model, result = patched("arcee", "smooth", small(samples=4, batch=2))  # an activation lies between up and down
    assert "mlp.down_proj cannot be folded into mlp.up_proj" in str(result.torch_int4_report)
    assert "no scales are folded for mlp.up_proj" in str(result.torch_int4_report)
    assert output_error(model, result) < 0.5


def test_models_without_facts_skip_the_transform_and_say_so():
    _, result = patched("jais2", "awq+gptq")
    assert "no scales are folded for self_attn.q_proj" in str(result.torch_int4_report)
    _, plain = patched("jais2", "gptq")
    for name, module in int4s(plain).items():
        assert torch.equal(module.to_weight().codes, int4s(result)[name].to_weight().codes)


def test_inputs_of_a_block_come_from_the_quantized_blocks_before_it(monkeypatch):
    seen = []
    real = gptq.quantize

    def spy(weight, config, **kwargs):
        seen.append(kwargs["inputs"].gram.clone())
        return real(weight, config, **kwargs)

    monkeypatch.setattr(gptq, "quantize", spy)
    _, result = patched("llama", "gptq", attention="stock", group_size=-1)
    caught = []
    handle = result.model.layers[1].self_attn.q_proj.register_forward_pre_hook(lambda m, a: caught.append(a[0]))
    with torch.no_grad():
        result(small().windows())
    handle.remove()
    inputs = Inputs(caught[0].shape[-1])
    for batch in caught[0].split(4):
        inputs.add(batch)
    want = inputs.gram
    assert len(seen) == 8  # one stack of rows per input: q/k/v, o, gate/up, down
    torch.testing.assert_close(seen[4], want, rtol=1e-3, atol=1e-3 * want.abs().max().item())


def test_linears_that_share_an_input_share_their_statistics(monkeypatch):
    rows_seen = []
    real = Inputs.add
    monkeypatch.setattr(Inputs, "add", lambda self, x: rows_seen.append(x.shape) or real(self, x))
    patched("gptj", "gptq", small(samples=4, batch=4))
    assert len(rows_seen) == 2 * 3  # q/k/v/fc_in, out_proj, fc_out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_stay_what_they_are(dtype):
    model = decoder("llama", dtype)
    norms = {n: p.dtype for n, p in model.named_parameters() if "norm" in n}
    result = patch(model, recipe="awq+gptq", calibration=small(), compute="fp32", head="float")
    assert {n: p.dtype for n, p in result.named_parameters() if "norm" in n} == norms
    assert logits(result, tokens().view(16, 24)).dtype == dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_arguments_are_taken_in_fp32_and_the_weights_stay_where_they_were(dtype, monkeypatch):
    model = decoder("llama", dtype)
    before = {n: (p.dtype, p.data_ptr()) for n, p in model.named_parameters()}
    told, used = [], set()
    real = torch.nn.functional.linear
    monkeypatch.setattr(torch.nn.functional, "linear", lambda x, w, b=None: used.add(w.dtype) or real(x, w, b))
    tape = Tape(model, model.model.layers, tokens().view(16, 24), 16, told.append)
    assert used == {torch.float32}
    assert told == [1, 2]  # how many blocks a pass has reached
    assert tape.hidden.dtype == dtype
    assert all(value.dtype == dtype for value in tape.calls[0][0][1]["position_embeddings"])
    assert {n: (p.dtype, p.data_ptr()) for n, p in model.named_parameters()} == before


def test_weights_come_back_where_a_block_fails(monkeypatch):
    model = decoder("llama", torch.bfloat16)
    before = {n: p.data_ptr() for n, p in model.named_parameters()}
    monkeypatch.setattr(model.model.layers[1].mlp, "forward", lambda x: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        Tape(model, model.model.layers, tokens().view(16, 24), 16)
    assert {n: p.data_ptr() for n, p in model.named_parameters()} == before


@pytest.mark.parametrize("recipe", ["gptq", "awq", "teq", "signround", "omniquant"])
def test_float_weights_are_freed_block_by_block(recipe, monkeypatch):
    model = decoder("llama")
    blocks = [[weakref.ref(m.weight) for m in b.modules() if isinstance(m, nn.Linear)] for b in model.model.layers]
    real, alive = CalibratedPass._quantize, []

    def counting(self, index, module):
        gc.collect()
        alive.append([sum(ref() is not None for ref in block) for block in blocks])
        return real(self, index, module)

    monkeypatch.setattr(CalibratedPass, "_quantize", counting)
    patch(model, recipe=recipe, calibration=small(samples=4), preset="light")
    gc.collect()
    assert alive == [[7, 7], [0, 7]]
    assert not any(ref() for block in blocks for ref in block)


def test_progress_names_what_takes_time(capsys):
    patched("llama", "gptq", small(samples=4), progress=True)
    lines = [line for line in capsys.readouterr().err.replace("\n", "\r").split("\r") if line]
    found = list(dict.fromkeys(line.partition(" |")[0] for line in lines))
    assert [line for line in found if line.endswith("2/2 blocks")] == [
        "torch_int4: gptq, arguments of 2/2 blocks",
        "torch_int4: gptq, 2/2 blocks",
    ]
    assert all("left" in line for line in lines)
    assert not any("0/0" in line for line in lines)


def test_the_result_depends_on_the_seed_and_on_nothing_else():
    def codes(seed):
        _, result = patched("llama", "signround", small(samples=6, seed=seed), preset="light")
        return torch.cat([m.to_weight().codes.flatten() for m in int4s(result).values()])

    assert torch.equal(codes(3), codes(3))
    assert not torch.equal(codes(3), codes(4))


def test_training_mode_and_gradients_are_put_back():
    model = decoder("llama").train()
    model.model.layers[0].mlp.eval()
    result = patch(model, recipe="signround", calibration=small(samples=4), preset="light")
    assert result.training
    assert not result.model.layers[0].mlp.training
    assert all(p.requires_grad for n, p in result.named_parameters() if "norm" in n)


def test_linears_in_int8_and_in_float_beside_calibrated_ones():
    model, result = patched("llama", "awq+gptq", int8=("*.down_proj", "model.layers.0.self_attn"), skip=("*.q_proj",))
    bits = {name: module.to_weight().bits for name, module in int4s(result).items()}
    assert bits["model.layers.1.mlp.down_proj"] == 8
    assert bits["model.layers.0.self_attn.o_proj"] == 8
    assert bits["model.layers.1.self_attn.k_proj"] == 4
    assert isinstance(result.model.layers[0].self_attn.q_proj, nn.Linear)
    assert "model.layers.0.self_attn.q_proj" not in bits
    assert output_error(model, result) < 0.05


def test_the_clip_search_uses_data_where_there_is_some():
    x = rows()
    x[:, 10:] *= 0.05
    w = weights()
    config = Int4Config(clip=True, group_size=-1, symmetric=False)
    plain, aware = STAGES["rtn"].quantize(w, config), STAGES["rtn"].quantize(w, config, inputs=statistics(x))
    error = [statistics(x).error(q.dequantize() - w).sum() for q in (plain, aware)]
    assert error[1] < 0.9 * error[0]
    _, without = patched("llama", "rtn", clip=True)
    torch.manual_seed(0)
    alone = patch(decoder("llama"), clip=True, compute="fp32", kv_cache="fp32", head="float", symmetric=False)
    some = [torch.equal(m.to_weight().scales, int4s(alone)[n].to_weight().scales) for n, m in int4s(without).items()]
    assert not all(some)
