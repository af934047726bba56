"""Prepared decoder layers notice whatever changes, and hold nothing once their model is gone."""

import copy
import gc
import io

import pytest
import torch
from alone import survives
from decoders import Calls, decoder, prompt
from torch import nn

from torch_int4 import _C, Int4Cache, Int4Linear, patch
from torch_int4.layouts.roles import LINEAR
from torch_int4.nn.guard import Guard
from torch_int4.nn.prepared import layers

OPS = torch.ops.torch_int4


def made(name="llama", dtype=torch.float32, **options):
    """A patched decoder whose layers are prepared, and its logits."""
    model = patch(decoder(name, dtype), head="float", **options)
    before = run(model)
    assert all(layer in layers for layer in blocks(model))
    return model, before


def blocks(model):
    return next(m for m in model.modules() if isinstance(m, nn.ModuleList))


def run(model, tokens=5):
    """Logits of a prompt and of one more token, with our cache."""
    cache = Int4Cache()
    with torch.no_grad():
        first = model(prompt(tokens=tokens), past_key_values=cache).logits
        return torch.cat((first, model(prompt(tokens=1), past_key_values=cache).logits), 1)


def layer(model):
    return model.model.layers[1]


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


@pytest.mark.parametrize(
    ("cache", "x", "words"),
    [
        ((1, 3, 8, 16), (1, 1, 64), "key_cache has shape"),
        ((1, 2, 8, 8), (1, 1, 64), "key_cache has shape"),
        ((2, 2, 8, 16), (1, 1, 64), "key_cache has shape"),
        ((1, 2, 0, 16), (1, 1, 64), "do not fit"),
        ((1, 2, 8, 16), (1, 1, 32), "the layer takes 64 features"),
        ((1, 2, 8, 16), (1, 64), r"x must be \[batch, tokens, features\]"),
    ],
)
def test_what_does_not_fit_is_refused(cache, x, words):
    model, _ = made()
    number, length = layers[layer(model)].number, torch.zeros(1, dtype=torch.int64)
    keys, values = torch.zeros(2, *cache)
    with pytest.raises(RuntimeError, match=words):
        OPS.prepared_decoder_layers(
            torch.zeros(x), [number], None, None, [keys], [values], [None], [None], [length], None, 0, 1.0, 0.0
        )
    assert length.item() == 0


def test_lengths_that_no_sum_holds():
    survives(
        """
import pytest, torch
from test_prepared import OPS, layer, layers, made
model, _ = made()
number = layers[layer(model)].number
for length in (2**63 - 1, 2**63 - 1 - 8, 8, -1, -2**63):
    keys, values = torch.zeros(2, 1, 2, 8, 16)
    arguments = (torch.ones(1, 1, 64), [number], None, None, [keys], [values], [None], [None])
    with pytest.raises(RuntimeError, match=f"length says that the cache holds {length} of 8 tokens"):
        OPS.prepared_decoder_layers(*arguments, [torch.tensor([length])], None, 0, 1.0, 0.0)
    assert not keys.any() and not values.any()
"""
    )


# What is done to tensors of the last linear, and what the next call says of it.
HARMS = {
    "perm out of range": ("down.perm.fill_(2**40)", "perm must hold indices"),
    "perm below zero": ("down.perm[5] = -1", "perm must hold indices"),
    "perm emptied": ("down.perm.untyped_storage().resize_(8)", "the storage of perm .* was resized"),
    "codes emptied": ("down.packed.untyped_storage().resize_(0)", "the storage of weight .* was resized"),
    "scales emptied": ("down.packed_scales.untyped_storage().resize_(9)", "the storage of scales .* was resized"),
    "offsets emptied": ("down.packed_offsets.untyped_storage().resize_(9)", "the storage of offsets .* was resized"),
    "bias emptied": ("down.bias.untyped_storage().resize_(0)", "the storage of bias .* was resized"),
    "norm emptied": ("norm.weight.untyped_storage().resize_(0)", "the storage of norm_weight .* was resized"),
    "other codes": ("down.packed.data = torch.zeros(0, dtype=torch.uint8)", "weight has shape"),
    "other scales": ("down.packed_scales.data = down.packed_scales[:1]", "scales has shape"),
    "other type": ("down.packed.data = down.packed.view(torch.int8).clone()", "weight must be uint8"),
    "other strides": ("down.packed.data = down.packed.mT.contiguous().mT", "weight must be contiguous"),
    "other perm": ("down.perm.data = down.perm.int()", "perm must be int64"),
}


def test_tensors_that_lose_what_was_checked():
    survives(
        """
import copy, pytest, torch
from test_prepared import HARMS, layer, made, run, scattered
sound, _ = made(symmetric=False)
scattered(sound)
for what, (harm, message) in HARMS.items():
    print(what, flush=True)
    model = copy.deepcopy(sound)
    down, norm = layer(model).mlp.down_proj, layer(model).input_layernorm
    run(model)
    exec(harm)
    with pytest.raises(RuntimeError, match=message):
        run(model)
"""
    )


def scattered(model):
    """Gives a linear a permutation and a bias."""
    down = layer(model).mlp.down_proj
    down.perm = torch.arange(down.in_features - 1, -1, -1)
    down.bias = nn.Parameter(torch.ones(down.out_features), requires_grad=False)


def test_permutations_may_be_written_to():
    model, _ = made()
    scattered(model)
    before = run(model)
    layer(model).mlp.down_proj.perm.copy_(torch.arange(96))
    want = run(copy.deepcopy(model))
    assert torch.equal(run(model), want)
    assert not torch.equal(want, before)


@pytest.mark.parametrize("wrong", [0, 1, 4])
def test_all_layers_are_checked_before_one_runs(wrong):
    model, _ = made()
    number, count = layers[layer(model)].number, 5
    lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(count)]
    keys = [torch.zeros(1, 2, 0 if i == wrong else 8, 16) for i in range(count)]
    values = [torch.zeros_like(key) for key in keys]
    none = [None] * count
    with pytest.raises(RuntimeError, match="do not fit"):
        OPS.prepared_decoder_layers(
            torch.ones(1, 1, 64), [number] * count, None, None, keys, values, none, none, lengths, None, 0, 1.0, 0.0
        )
    assert not any(length.item() for length in lengths)
    assert not any(key.any() for key in keys)


def test_guards_see_hooks_that_come_and_go():
    modules, model, x = [nn.Identity(), nn.Identity()], nn.Linear(1, 1), torch.ones(2)
    guard = Guard(torch.float32, modules)
    with torch.no_grad():
        for _ in range(2):
            assert guard.holds(x)
            handle = modules[1].register_forward_pre_hook(lambda module, args: None)
            assert not guard.holds(x)
            model.register_forward_hook(lambda module, args, output: None)  # another one, of no concern
            assert not guard.holds(x)
            handle.remove()
            assert guard.holds(x)
        other = Guard(torch.float32, [model])
        guard.include(other)
        assert not guard.holds(x)


class Equal:
    """Equal to everything, and the same as nothing."""

    __hash__ = None

    def __eq__(self, other):
        return True


def test_entries_are_compared_by_identity():
    value, other = Equal(), Equal()
    dicts, keys = [{"a": value}, {}, {"a": None}], ["a", "a", "a"]
    assert _C.entries_are(dicts, keys, [value, None, None])  # what is missing is None
    assert not _C.entries_are(dicts, keys, [other, None, None])
    assert not _C.entries_are(dicts, keys, [value, value, None])
    assert not _C.entries_are(dicts, ["b", "a", "a"], [value, None, None])
    assert _C.entries_are([], [], [])
    assert _C.contents_are([])
    assert _C.contents_are([dicts[0], "a", value, {}, dicts[2], "a", None])
    assert not _C.contents_are([dicts[0], "a", other])
    assert not _C.contents_are([dicts[0], "b", value])
    assert not _C.contents_are([dicts[0]])
    assert not _C.contents_are([{}, "a", value])
    assert not _C.contents_are([{"a": value, "b": other}, "b", other, "a", value])
    assert not _C.contents_are([dicts[0], "a"])
    assert not _C.contents_are([{"a": value, "b": other}, "a", value, {}])  # more, and the next one begins
    assert not _C.contents_are([{}, "a", value, {"a": value}])  # less: all of it has moved on
    assert _C.types_are([1, value], [int, Equal])
    assert not _C.types_are([True, value], [int, Equal])  # a subclass is another type
    float_, double = torch.zeros(1), torch.zeros(1, dtype=torch.float64)
    assert _C.attributes_are([float_, float_], "dtype", torch.float32)
    assert not _C.attributes_are([float_, double], "dtype", torch.float32)


@pytest.mark.parametrize(
    ("function", "arguments", "error"),
    [
        (_C.entries_are, ([{}], ["a"], []), TypeError),
        (_C.entries_are, ({}, [], []), TypeError),
        (_C.entries_are, ([1], ["a"], [None]), TypeError),
        (_C.entries_are, ([{}], [[]], [None]), TypeError),  # a key that cannot be one
        (_C.entries_are, ([], []), TypeError),
        (_C.contents_are, ({},), TypeError),
        (_C.types_are, ([1], [int, int]), TypeError),
        (_C.types_are, ((), []), TypeError),
        (_C.attributes_are, ((), "dtype", None), TypeError),
        (_C.attributes_are, ([1], "dtype", None), AttributeError),
    ],
)
def test_bad_arguments_of_the_extension(function, arguments, error):
    with pytest.raises(error):
        function(*arguments)
