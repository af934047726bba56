"""An error at any call of any function of ours while a model is patched: the model is what it was.

Once float weights are gone it cannot be that; then it says so, runs, and can be patched on.
"""

import copy

import pytest
import torch
from calibrating import small
from decoders import decoder
from injecting import broken, steps_of
from tiny_models import int4s, llama, logits

from torch_int4 import patch


def things(model):
    """All that a patch could change."""
    modules = [
        (name, id(module), type(module), vars(module) | {key: (id(x), dict(x)) for key, x in tables(module).items()})
        for name, module in model.named_modules(remove_duplicate=False)
    ]
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    tensors = [(name, id(x), x.requires_grad, x.dtype, x.data_ptr()) for name, x in named]
    return modules, tensors, copy.deepcopy(vars(model.config)), dict(vars(model.generation_config))


def tables(module):
    return {key: value for key, value in vars(module).items() if isinstance(value, dict)}


def float_model(name):
    return llama() if name == "llama-tied" else decoder(name)


CASES = {
    "llama-tied": {"embeddings": "bf16"},
    "gpt2": {"embeddings": "bf16"},
    "qwen2_moe": {},
    "qwen3": {"attention": "stock"},
}


@pytest.mark.filterwarnings("ignore:.*not fused", "ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("name", CASES)
def test_the_model_is_what_it_was_or_can_be_patched_on(name):
    base, options = float_model(name), CASES[name]
    float_logits = logits(base)
    whole = patch(copy.deepcopy(base), **options)
    want, raised = logits(whole), 0
    for step in steps_of(lambda: patch(copy.deepcopy(base), **options), most=36):
        model = copy.deepcopy(base)
        before = things(model)
        try:
            with broken(step):
                patch(model, **options)
        except Exception:
            raised += 1
            if not int4s(model):
                assert things(model) == before, step
                assert torch.equal(logits(model), float_logits), step
            else:
                assert "INCOMPLETE" in str(model.torch_int4_report), step
                assert logits(model).isfinite().all(), step
            patch(model, **options)
            assert torch.equal(logits(model), want), step
            assert str(model.torch_int4_report) == str(whole.torch_int4_report), step
    assert raised > 25


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(("recipe", "dtype"), [("awq", torch.bfloat16), ("gptq", torch.float32)])
def test_recipes_that_change_float_weights_undo_that(recipe, dtype):
    base = decoder("llama").to(dtype)
    float_logits = logits(base)

    def options():
        return {"recipe": recipe, "calibration": small(samples=2, length=8, batch=1)}

    linears = len(patch(copy.deepcopy(base), **options()).torch_int4_report.linears)
    for step in steps_of(lambda: patch(copy.deepcopy(base), **options()), most=24):
        model = copy.deepcopy(base)
        before = things(model)
        try:
            with broken(step):
                patch(model, **options())
        except Exception:
            if not int4s(model):
                assert things(model) == before, step
                assert torch.equal(logits(model), float_logits), step
            assert all(x.dtype == dtype for x in model.parameters()), step
            patch(model, **options())
            assert logits(model).isfinite().all(), step
            assert len(model.torch_int4_report.linears) == linears, step
