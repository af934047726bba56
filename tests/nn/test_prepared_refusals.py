"""Arguments of prepared layers, and tensors that changed under them, are checked before anything runs."""

import copy

import pytest
import torch
from alone import survives
from prepared_models import OPS, layer, made, run, scattered

from torch_int4.nn.prepared import layers


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
from prepared_models import OPS, layer, layers, made
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


def test_tensors_that_lose_what_was_checked():
    survives(
        """
import copy, pytest, torch
from prepared_models import HARMS, layer, made, run, scattered
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
