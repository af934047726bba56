"""Layers of a model that run in one operator call give what they give one by one, or run one by one."""

import copy
import inspect
import pickle
import threading

import pytest
import torch
from decoders import FUSED, Calls, assert_near, decoder, prompt
from fused_layers import calls_of, is_whole
from torch import nn
from transformers import DynamicCache

from torch_int4 import Int4Cache, patch
from torch_int4.nn import stack
from torch_int4.nn.stack import FusedStack, stacks
from torch_int4.patching import fuse_stack as _stack
from torch_int4.support.forwards import cache_argument

pytestmark = pytest.mark.oldest

STACKED = ["gemma", "gpt_neox", "gpt_neox-serial", "llama", "llama-mha", "llama-odd", "mistral", "qwen2", "qwen3"]
STACKED += [
    "cohere",
    "ernie4_5",
    "helium",
    "jamba",
    "phi",
    "qwen2_5_vl_text",
    "qwen2_vl_text",
    "stablelm",
    "stablelm-parallel",
    "starcoder2",
]
WINDOWS = ["cohere2", "cwm", "ministral", "qwen2-window", "smollm3"]  # ready to, but their layers are of two types


def made(name="llama", dtype=torch.float32, **options):
    return patch(decoder(name, dtype), head="float", **options)


def steps(model, *lengths, cache=None, **arguments):
    """Logits of prompts of these lengths, one after the other, and how many layers each operator call ran."""
    cache = Int4Cache() if cache is None else cache
    found = []
    with torch.no_grad(), Calls() as calls:
        for seed, tokens in enumerate(lengths):
            found.append(model(prompt(tokens=tokens, seed=seed), past_key_values=cache, **arguments).logits)
    return torch.cat(found, 1), (calls.counts["prepared_decoder_layers"], calls.prepared)


def alone(monkeypatch, model, *lengths, **arguments):
    """The same with layers that run one by one."""
    with monkeypatch.context() as patching:
        patching.setattr(stack, "MOST_TOKENS", 0)
        return steps(model, *lengths, **arguments)


def test_families_whose_layers_run_in_one_call():
    models = {name: made(name) for name in FUSED}
    found = {name for name, model in models.items() if any(isinstance(m, FusedStack) for m in model.modules())}
    whole = {name for name in found if is_whole(name)}
    assert whole == {*STACKED, *WINDOWS}
    for name in found - whole:  # whose models are ready for it, while their layers run in steps, or some of them
        calls, ran = steps(models[name], 5, 1)[1]
        assert calls == ran == 2 * calls_of(models[name], whole=True)["prepared_decoder_layers"], name


@pytest.mark.parametrize("name", WINDOWS)
def test_layers_with_masks_of_their_own_run_one_by_one(name, monkeypatch):
    model = made(name)
    want, _ = alone(monkeypatch, model, 12, 1, 1)
    got, calls = steps(model, 12, 1, 1)
    assert calls == (6, 6)
    assert torch.equal(got, want)


@pytest.mark.parametrize("name", STACKED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_call_gives_the_same_bits(name, dtype, monkeypatch):
    for cache in ("bf16", "int8"):
        model = made(name, dtype, kv_cache=cache)
        lengths = (5, 1, 1, 7, 32, 33, 1)
        want, calls = alone(monkeypatch, model, *lengths)
        assert calls == (14, 14)
        got, calls = steps(model, *lengths)
        assert calls == (8, 14)  # all but that of 33 tokens
        assert torch.equal(got, want)


def test_padding_and_caches_of_fixed_size(monkeypatch):
    model = made()
    mask = torch.ones(2, 6, dtype=torch.int64)
    mask[0, :3] = 0
    results = []
    for most in (0, 32):
        monkeypatch.setattr(stack, "MOST_TOKENS", most)
        cache = Int4Cache(max_length=16)
        with torch.no_grad():
            model(prompt(tokens=5), attention_mask=mask[:, :5], past_key_values=cache)
            results.append(model(prompt(tokens=1), attention_mask=mask, past_key_values=cache).logits)
        assert int(cache.get_seq_length()) == 6
        with pytest.raises(RuntimeError, match="do not fit"):
            steps(model, 11, cache=cache)
        assert [layer.length.item() for layer in cache.layers] == [6, 6]  # a refused step has changed nothing
    assert torch.equal(*results)


def generated(model):
    with torch.no_grad():
        return model.generate(prompt(tokens=4), max_new_tokens=6, do_sample=False)


def test_generate(monkeypatch):
    model = made()
    with monkeypatch.context() as patching:
        patching.setattr(stack, "MOST_TOKENS", 0)
        want = generated(model)
    with Calls() as calls:
        assert torch.equal(generated(model), want)
    assert calls.counts["prepared_decoder_layers"] * 2 == calls.prepared == 12


def by_itself(model):
    """Whether layers run one by one now."""
    return steps(model, 3, 1)[1] == (4, 4)


def hook_a_layer(model):
    model.model.layers[1].register_forward_hook(lambda module, args, output: output.flip(-1))


def wrap_a_layer(model):
    forward = model.model.layers[1].forward
    model.model.layers[1].forward = lambda *args, **kwargs: forward(*args, **kwargs).flip(-1)


CHANGES = {
    "a hook on a layer": hook_a_layer,
    "forward of a layer": wrap_a_layer,
    "fewer layers asked for": lambda model: setattr(model.config, "num_hidden_layers", 1),
    "a layer less": lambda model: model.model.layers.pop(1),
    "another order": lambda model: setattr(model.model, "layers", nn.ModuleList(reversed(model.model.layers))),
    "scaling of one": lambda model: setattr(model.model.layers[1].self_attn, "scaling", 0.5),
    "scaling of all": lambda model: [setattr(layer.self_attn, "scaling", 0.5) for layer in model.model.layers],
}


@pytest.mark.parametrize("what", CHANGES)
def test_changes_are_noticed(what, monkeypatch):
    model = made()
    before, calls = steps(model, 3, 1, 1)
    assert calls == (4, 6)
    assert len(stacks) > 0
    CHANGES[what](model)
    want, _ = alone(monkeypatch, copy.deepcopy(model), 3, 1, 1)
    got, _ = steps(model, 3, 1, 1)
    assert torch.equal(got, want)
    assert not torch.equal(got, before)


def test_hidden_states_of_all_layers():
    model = made()
    plain, _ = steps(model, 3, 1)
    cache = Int4Cache()
    with torch.no_grad():
        model(prompt(tokens=3), past_key_values=cache)
        output = model(prompt(tokens=1, seed=1), past_key_values=cache, output_hidden_states=True)
    assert len(output.hidden_states) == 3
    assert not torch.equal(output.hidden_states[1], output.hidden_states[2])
    assert_near(output.logits, plain[:, -1:], 2e-2)  # with hooks inside of them, layers run as stock ones do


def test_other_caches_and_training_run_layer_by_layer():
    model = made()
    steps(model, 3, 1)
    with torch.no_grad(), Calls() as calls:
        model(prompt(tokens=3), past_key_values=DynamicCache())
    assert calls.prepared == 0
    model.model.layers[1].train()
    assert steps(model, 3, 1)[1] == (2, 2)
    model.eval()
    assert steps(model, 3, 1)[1] == (3, 4)


@pytest.mark.parametrize("name", ["own", "past_key_values"])
def test_layers_that_are_called_by_hand(name):
    """Outside of the model's own `forward`, a layer is a layer, also where the cache comes under its name of before."""
    model = made()
    cache, by_hand = Int4Cache(), Int4Cache()
    own = cache_argument(type(model.model.layers[0]).torch_int4_base)
    with torch.no_grad():
        want = model.model(prompt(tokens=3), past_key_values=cache).last_hidden_state
        want = model.model(prompt(tokens=1), past_key_values=cache).last_hidden_state
        model.model(prompt(tokens=3), past_key_values=by_hand)
        x = model.model.embed_tokens(prompt(tokens=1))
        angles = model.model.rotary_emb(x, position_ids=torch.tensor([[3]]))
        for layer in model.model.layers:
            given = {own if name == "own" else name: by_hand}
            x = layer(x, attention_mask=None, position_embeddings=angles, **given)
        got = model.model.norm(x)
    if name == "own":
        assert torch.equal(got, want)
    torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)
    assert cache.get_seq_length() == by_hand.get_seq_length() == 4


def test_only_the_models_own_loop_ends_early(monkeypatch):
    """Who looks at the layers while the model runs, or runs one besides, gets them as they are."""
    model = made()
    want, _ = steps(model, 3, 1)
    seen, forward, norm = [], type(model.model.layers[0]).forward, model.model.norm.forward
    layers = model.model.layers

    def look(*args, **kwargs):
        seen.append((list(layers), len(layers[:]), layers[:1][0] is layers[0], layers[-1] is list(layers)[-1]))
        return norm(*args, **kwargs)

    monkeypatch.setattr(model.model.norm, "forward", look)
    got, calls = steps(model, 3, 1)
    assert torch.equal(got, want)
    assert calls == (2, 4), "all layers in one call, each time"
    assert seen == [(list(layers), 2, True, True)] * 2
    ran = []
    monkeypatch.setattr(type(layers[0]), "forward", lambda block, *a, **k: ran.append(block) or forward(block, *a, **k))
    steps(model, 1)
    assert ran == [layers[0]]


def test_a_list_of_layers_is_still_one():
    model = made()
    steps(model, 3, 1)
    layers = model.model.layers
    assert isinstance(layers, nn.ModuleList)
    assert [len(layers[:1]), len(layers[1:]), len(layers[:])] == [1, 1, 2]
    assert layers[:] is not layers
    assert list(layers) == [layers[0], layers[1]]
    assert repr(layers).startswith("ModuleList(")


def test_copies_files_and_threads():
    model = made()
    want, _ = steps(model, 3, 1, 1)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.model not in stacks
        assert torch.equal(steps(other, 3, 1, 1)[0], want)
        assert other.model in stacks
    found = []
    threads = [threading.Thread(target=lambda: found.append(steps(model, 3, 1, 1)[0])) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert all(torch.equal(each, want) for each in found)


def test_what_the_model_takes_can_still_be_asked():
    stock, model = decoder("llama"), made()
    for mine, theirs in ((model, stock), (model.model, stock.model)):
        assert inspect.signature(type(mine).forward) == inspect.signature(type(theirs).forward)
    assert _stack.runs_in_turn(type(model.model), "layers")
