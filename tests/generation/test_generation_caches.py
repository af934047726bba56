"""Caches that generation with patched models may be given, may name, and gives back."""

import pytest
import torch
from behaviours import behaviour
from decoders import prompt
from generating import (
    NEW,
    NO_EMPTY_PLACES,
    TOKENS,
    WHY_NOT_STATIC,
    assert_same_cache,
    assert_same_generation,
    assert_same_output,
    assert_same_tree,
    generate,
)
from transformers import CompileConfig, DynamicCache, StaticCache

from torch_int4 import Int4Cache

BEAMS = {"num_beams": 3}


def fixed(model):
    return Int4Cache(model.config, dtype="fp32", max_length=TOKENS + NEW)


@behaviour("a returned cache continued by a further `generate`")
def test_another_turn(patched, reference):
    outputs = [generate(model, prompt()) for model in (patched, reference)]
    turn = torch.cat([outputs[0].sequences, prompt(tokens=4, seed=3)], dim=1)
    whole = generate(patched, turn)
    more = [
        generate(model, turn, past_key_values=output.past_key_values)
        for model, output in zip((patched, reference), outputs, strict=True)
    ]
    assert_same_output(*more)
    assert_same_output(more[0], whole)
    assert type(more[0].past_key_values) is Int4Cache


@behaviour("a cache cut and continued")
def test_a_cut_cache(patched, reference):
    plain = generate(patched, prompt())
    outputs = [generate(model, prompt(), max_new_tokens=NEW + 3) for model in (patched, reference)]
    for output in outputs:
        output.past_key_values.crop(-(NEW + 4))
        assert output.past_key_values.get_seq_length() == TOKENS - 2
    more = [
        generate(model, prompt(), past_key_values=output.past_key_values)
        for model, output in zip((patched, reference), outputs, strict=True)
    ]
    assert_same_output(*more)
    assert_same_output(more[0], plain)


@behaviour("a prompt's cache computed once, repeated for several sequences")
def test_a_shared_prefix(patched, reference):
    outputs = []
    for model in (patched, reference):
        cache = generate(model, prompt(rows=1), max_new_tokens=1).past_key_values
        cache.batch_repeat_interleave(3)
        ends = torch.cat([prompt(rows=1).expand(3, -1), prompt(rows=3, tokens=2, seed=5)], dim=1)
        outputs.append(generate(model, ends, past_key_values=cache))
    assert_same_output(*outputs)
    assert_same_output(outputs[0], generate(patched, ends))


@behaviour("beam search: the cache follows its beams")
def test_beams_reorder_the_cache(patched, reference):
    got = assert_same_generation(patched, reference, num_return_sequences=3, **BEAMS)
    assert len({tuple(row.tolist()) for row in got.sequences}) > 2
    assert torch.equal(got.beam_indices, generate(reference, prompt(), num_return_sequences=3, **BEAMS).beam_indices)


@behaviour("`DynamicCache` given")
@pytest.mark.parametrize("mode", [{}, BEAMS], ids=["greedy", "beams"])
def test_a_dynamic_cache(patched, reference, mode):
    cache = DynamicCache(config=patched.config)
    got = generate(patched, prompt(), past_key_values=cache, **mode)
    assert got.past_key_values is cache
    assert_same_output(got, generate(reference, prompt(), **mode))


@behaviour("`StaticCache` given", refused=NO_EMPTY_PLACES, why=WHY_NOT_STATIC)
def test_a_static_cache(patched, reference):
    caches = [StaticCache(config=patched.config, max_cache_len=TOKENS + NEW) for _ in range(2)]
    got, want = (
        generate(model, prompt(), past_key_values=cache)
        for model, cache in zip((patched, reference), caches, strict=True)
    )
    assert got.past_key_values is caches[0]
    assert_same_output(got, want, but=["past_key_values"])
    assert_same_tree(got.logits, generate(patched, prompt()).logits)


@behaviour("`Int4Cache` of fixed size given, emptied and used again", refused=NO_EMPTY_PLACES, why="as above")
@pytest.mark.parametrize("mode", [{}, BEAMS], ids=["greedy", "beams"])
def test_a_cache_of_fixed_size(patched, reference, mode):
    if not hasattr(patched, "torch_int4_report"):  # what transformers has of this kind
        generate(patched, prompt(), cache_implementation="static", **mode)
    cache = fixed(patched)
    want = generate(reference, prompt(), **mode)
    for _ in range(2):
        got = generate(patched, prompt(), past_key_values=cache, **mode)
        assert got.past_key_values is cache
        assert_same_output(got, want, but=["past_key_values"])
        cache.reset()


@behaviour('`cache_implementation="static"`', refused=NO_EMPTY_PLACES, why="as above")
@pytest.mark.parametrize("mode", [{}, BEAMS], ids=["greedy", "beams"])
def test_a_static_cache_by_name(patched, reference, mode):
    got = assert_same_generation(
        patched, reference, cache_implementation="static", disable_compile=True, but=["past_key_values"], **mode
    )
    assert type(got.past_key_values) is StaticCache
    assert torch.equal(got.sequences, generate(patched, prompt(), **mode).sequences)


@behaviour('`cache_implementation="dynamic"`')
def test_a_dynamic_cache_by_name(patched, reference):
    got = assert_same_generation(patched, reference, cache_implementation="dynamic")
    assert type(got.past_key_values) is Int4Cache


def generate_compiled(model, **options):
    """What comes out, of steps that are one graph in which our attention runs once per layer."""
    torch._dynamo.reset()
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph.forward

    config = CompileConfig(fullgraph=True, mode=None, backend=keep)
    config._compile_all_devices = True  # or nothing is compiled on CPUs
    output = generate(model, prompt(), compile_config=config, **options)
    assert len(graphs) == 1
    names = [str(node.target) for node in graphs[0].graph.nodes]
    assert sum(name.startswith("torch_int4.attention") for name in names) == 2
    return output


@behaviour("compiled steps, `StaticCache`", refused=NO_EMPTY_PLACES, why="as above", counted=False)
def test_compiled_with_a_static_cache(patched, reference):
    got = generate_compiled(patched, cache_implementation="static")
    assert_same_output(got, generate(reference, prompt()), but=["past_key_values"])


@behaviour("compiled steps, `Int4Cache` of fixed size", refused=NO_EMPTY_PLACES, why="as above", counted=False)
def test_compiled_with_our_cache(patched, reference):
    got = generate_compiled(patched, past_key_values=fixed(patched))
    assert_same_output(got, generate(reference, prompt()), but=["past_key_values"])
    assert_same_cache(got.past_key_values, generate(reference, prompt()).past_key_values)
