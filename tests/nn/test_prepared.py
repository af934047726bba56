"""Prepared decoder layers notice whatever changes, and hold nothing once their model is gone."""

import copy
import gc
import io

import pytest
import torch
from decoders import Calls, prompt
from prepared_models import OPS, blocks, layer, made, run
from torch import nn

from torch_int4 import Int4Cache, Int4Linear, patch
from torch_int4.layouts.roles import LINEAR
from torch_int4.nn.prepared import layers


def double_linear(model):
    down = layer(model).mlp.down_proj
    weight = down.to_weight()
    weight.scales = weight.scales * 2
    down.set_weight(weight)


def replace_linear(model):
    up = layer(model).mlp.up_proj
    layer(model).mlp.up_proj = Int4Linear.from_weight(up.to_weight(), compute="fp32")


def add_bias(model):
    layer(model).self_attn.o_proj.bias = nn.Parameter(torch.ones(64), requires_grad=False)


def assign(module, name, value):
    return lambda model: setattr(layer(model).get_submodule(module), name, value)


def in_place(name):
    def change(model):
        with torch.no_grad():
            layer(model).get_parameter(name).mul_(1.5)

    return change


def zero_points(model):
    down = layer(model).mlp.down_proj
    down.packed_offsets = torch.full(down.packed_scales.shape, 7, dtype=torch.uint8)


def double_scales(model):
    down = layer(model).mlp.down_proj
    down.packed_scales = down.packed_scales * 2


def nf4(model):
    for linear in (m for m in layer(model).modules() if isinstance(m, Int4Linear)):
        linear.weight_type = "nf4"


CHANGES = {
    "codes": double_linear,
    "scales": double_scales,
    "offsets": zero_points,
    "the type of weights": nf4,
    "a linear": replace_linear,
    "a bias": add_bias,
    "compute": assign("self_attn.q_proj", "compute", "fp32"),
    "compute of all": lambda model: [setattr(m, "compute", "fp32") for m in model.modules() if hasattr(m, "compute")],
    "a norm in place": in_place("input_layernorm.weight"),
    "a norm": lambda model: setattr(layer(model).input_layernorm, "weight", nn.Parameter(torch.full((64,), 0.5))),
    "eps": assign("post_attention_layernorm", "variance_epsilon", 0.5),
    "the activation": assign("mlp", "act_fn", nn.GELU(approximate="tanh")),
    "another activation": assign("mlp", "act_fn", nn.ReLU()),
    "scaling": assign("self_attn", "scaling", 0.7),
    "forward of a norm": assign("input_layernorm", "forward", lambda x: x),
    "the MLP": assign("", "mlp", nn.Identity()),
}


@pytest.mark.parametrize("what", CHANGES)
def test_changes_are_noticed(what):
    model, before = made()
    CHANGES[what](model)
    want = run(copy.deepcopy(model))  # a copy knows nothing of what was prepared
    got = run(model)
    assert torch.equal(got, want)
    assert not torch.equal(got, before)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("granite", assign("", "residual_multiplier", 0.1)),
        ("gemma2", in_place("post_feedforward_layernorm.weight")),
        ("gemma2", assign("post_attention_layernorm", "eps", 0.5)),
        ("phi3", assign("mlp", "activation_fn", nn.GELU(approximate="tanh"))),
        ("olmo2", in_place("self_attn.q_norm.weight")),
    ],
)
def test_changes_of_layers_in_steps_are_noticed(name, change):
    model, before = made(name)
    change(model)
    want = run(copy.deepcopy(model))
    got = run(model)
    assert torch.equal(got, want)
    assert not torch.equal(got, before)


def test_every_fact_is_watched():
    """Whatever operators are told of a module, a prepared layer notices another one."""
    model, _ = made("qwen3")
    block, x = layer(model), torch.ones(1, 1, 64)
    holds, norm = layers[block].guard.holds, block.torch_int4_data.layout.norm_role
    roles = [(block.input_layernorm, norm), (block.self_attn.k_norm, norm)]
    roles += [(m, LINEAR) for m in (block.self_attn.v_proj, block.self_attn.o_proj, block.mlp.gate_proj)]
    with torch.no_grad():
        for module, role in roles:
            for fact in (*role.own, *role.common):
                place = getattr(module, fact.place) if fact.place else vars(module)
                before = dict(place)
                assert holds(x)
                place[fact.name] = object()
                assert not holds(x), fact
                place.clear()
                place.update(before)
        assert holds(x)


def test_norms_in_half_precision_may_be_written_to():
    model, before = made(dtype=torch.bfloat16)
    in_place("post_attention_layernorm.weight")(model)
    want = run(copy.deepcopy(model))
    assert torch.equal(run(model), want)
    assert not torch.equal(want, before)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.to(torch.bfloat16),
        lambda model: model.share_memory(),
        lambda model: model.load_state_dict(model.state_dict()),
        lambda model: [m.packed.set_(m.packed.clone()) for m in model.modules() if isinstance(m, Int4Linear)],
        lambda model: model.train(),
        lambda model: patch(model, head="float"),
    ],
)
def test_what_moves_or_switches_everything(change):
    model, _ = made()
    change(model)
    want = run(copy.deepcopy(model))
    gc.collect()
    torch.empty(1 << 22).fill_(float("nan"))  # memory that was let go is somebody else's now
    assert torch.equal(run(model), want)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gptj", "gpt_neox", "falcon"])
def test_with_gradients_recorded_the_same_bits(name):
    model, before = made(name)
    model.requires_grad_(False)
    cache = Int4Cache()
    with torch.enable_grad(), Calls() as calls:
        logits = model(prompt(tokens=5), past_key_values=cache).logits
        logits = torch.cat((logits, model(prompt(tokens=1), past_key_values=cache).logits), 1)
    assert calls.counts["decoder_layer"] == 4
    assert torch.equal(logits, before)


def test_copies_and_files_hold_nothing_of_it():
    model, before = made()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert not any(block in layers for block in blocks(other))
        assert torch.equal(run(other), before)
        double_linear(other)
        assert not torch.equal(run(other), before)
    assert torch.equal(run(model), before)


def test_what_was_prepared_goes_with_the_model():
    model, _ = made()
    number = layers[layer(model)].number
    known = len(layers)
    keys, values = torch.zeros(2, 1, 2, 8, 16)
    arguments = (torch.zeros(1, 1, 64), [number], None, None, [keys], [values], [None], [None])
    with pytest.raises(RuntimeError, match="length"):
        OPS.prepared_decoder_layers(*arguments, [torch.zeros(2)], None, 0, 1.0, 0.0)
    with pytest.raises(RuntimeError, match="lists of one length"):
        OPS.prepared_decoder_layers(*arguments, [], None, 0, 1.0, 0.0)
    del model
    gc.collect()
    assert len(layers) == known - 2
    with pytest.raises(RuntimeError, match=f"there is no prepared layer {number}"):
        OPS.prepared_decoder_layers(*arguments, [torch.zeros(1, dtype=torch.int64)], None, 0, 1.0, 0.0)


def test_weights_that_were_replaced_are_let_go():
    model, _ = made()
    old = weakref_to_storage(layer(model).mlp.down_proj)
    double_linear(model)
    run(model)
    gc.collect()
    assert old() is None


def weakref_to_storage(linear):
    import weakref

    return weakref.ref(linear.packed)
