"""`resize_token_embeddings` of patched models."""

import copy

import pytest
import torch
from tiny_models import IDS, llama, logits

from torch_int4 import Int4Error, Int4Linear, patch
from torch_int4.recipes import rtn


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "options", [{}, {"head": "int4"}, {"head": "int4", "symmetric": False}, {"embeddings": "bf16"}]
)
def test_the_head_grows_in_its_own_type(tied, options):
    model = patch(llama(tied), **options)
    before, old = logits(model), model.lm_head.to_weight()
    table = model.resize_token_embeddings(104, mean_resizing=False)
    new = model.lm_head.to_weight()
    assert (table.weight.shape[0], model.config.vocab_size, model.lm_head.out_features) == (104, 104, 104)
    assert type(model.lm_head) is Int4Linear
    assert new.bits == old.bits
    assert torch.equal(new.codes[:99], old.codes)
    assert torch.equal(new.scales[:99], old.scales)
    after = logits(model)
    assert torch.equal(after[..., :99], before)
    assert after.isfinite().all()
    assert after[..., 99:].abs().max() > 0
    entry = next(entry for entry in model.torch_int4_report.linears if entry.name == "lm_head")
    assert (entry.out_features, entry.bytes_after) == (104, model.lm_head.nbytes)
    assert model.generate(IDS, max_new_tokens=2, do_sample=False, pad_token_id=0).shape == (2, 8)


def test_new_rows_are_what_transformers_makes_rounded():
    model = patch(llama(tied=False), head="int4")
    dense = copy.deepcopy(model)
    dense.__class__ = dense.__class__.torch_int4_base  # without what makes it resizable
    float_head = torch.nn.Linear(72, 99, bias=False)
    float_head.weight.data = model.lm_head.dequantize()
    dense.set_output_embeddings(float_head)
    for each in (dense, model):
        torch.manual_seed(0)
        each.resize_token_embeddings(109)
    config = model.torch_int4_report.config
    want = rtn.quantize(dense.lm_head.weight[99:].detach(), config.weights, bits=4)
    got = model.lm_head.to_weight()
    assert torch.equal(got.codes[99:], want.codes)
    assert torch.equal(got.scales[99:].float(), want.scales.float())


def test_the_head_shrinks_and_saves(tmp_path):
    model = patch(llama(tied=False))
    before = logits(model)
    model.resize_token_embeddings(90)
    assert torch.equal(logits(model), before[..., :90])
    model.save_pretrained(tmp_path)
    again = type(llama()).from_pretrained(tmp_path)
    assert torch.equal(logits(again), before[..., :90])


def test_a_float_head_is_left_to_transformers():
    model = patch(llama(tied=True), head="float")
    model.resize_token_embeddings(104)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight.shape[0] == 104


def test_nothing_is_changed_where_the_head_cannot_grow(monkeypatch):
    model = patch(llama(tied=True))
    before, table, head, values = state(model), model.get_input_embeddings(), model.lm_head, logits(model)
    monkeypatch.setattr(
        "torch_int4.patching.resize.rtn.quantize", lambda *a, **k: (_ for _ in ()).throw(Int4Error("no"))
    )
    with pytest.raises(Int4Error, match="no"):
        model.resize_token_embeddings(104)
    assert model.get_input_embeddings() is table
    assert table.num_embeddings == 99
    assert model.lm_head is head
    assert model.config.vocab_size == model.vocab_size == 99
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(logits(model), values)
