"""Assisted and prompt-lookup decoding of patched models: drafts change how fast tokens come, and not which."""

import copy

import pytest
import torch
import transformers
from behaviours import STOCK, behaviour
from decoders import assert_near, prompt
from generating import (
    CLOSE,
    NAMES,
    NEW,
    TOKENS,
    assert_same_cache,
    assert_same_generation,
    assert_same_output,
    assert_same_tree,
    generate,
    with_eager,
)
from packaging.version import Version

from torch_int4 import Int4Cache


def assistant(patched, kind):
    """A copy of a patched model, or one that agrees with it now and then."""
    model = copy.deepcopy(patched)
    if kind == "other":
        generator = torch.Generator().manual_seed(1)
        for parameter in model.parameters():
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    model.generation_config.num_assistant_tokens = 2
    model.generation_config.num_assistant_tokens_schedule = "constant"
    return model


def drafts(patched, kind):
    if kind == "lookup":
        return {"prompt_lookup_num_tokens": 2}
    return {"assistant_model": assistant(patched, kind)}


def check_drafts(patched, reference, kind, **record):
    ids = prompt(rows=1).repeat(1, 2)
    options = {"output_hidden_states": True, "max_new_tokens": 12, **record}
    plain = generate(patched, ids, **options)
    got, want = (generate(m, ids, **options, **drafts(patched, kind)) for m in (patched, reference))
    assert_same_output(got, want)
    assert torch.equal(got.sequences, plain.sequences)
    assert_same_tree(got.scores, plain.scores)
    assert_same_cache(got.past_key_values, plain.past_key_values)
    assert type(got.past_key_values) is Int4Cache


@behaviour("assisted decoding, prompt lookup")
@pytest.mark.parametrize("kind", ["same", "other", "lookup"])
def test_drafts(patched, reference, kind):
    check_drafts(patched, reference, kind)


@behaviour("prompt lookup with recorded attention weights", STOCK)
def test_drafts_with_attention_weights(patched, reference):
    check_drafts(with_eager(patched), with_eager(reference), "lookup", output_attentions=True)


@behaviour("assisted decoding, prompt lookup with sampling")
@pytest.mark.parametrize("kind", ["other", "lookup"])
def test_drafts_of_samples(patched, reference, kind):
    ids = prompt(rows=1).repeat(1, 2)
    got = assert_same_generation(patched, reference, ids, do_sample=True, **drafts(patched, kind))
    assert got.sequences.shape == (1, 2 * TOKENS + NEW)
    with torch.no_grad():  # the scores are those of the tokens that were taken
        logits = patched(got.sequences[:, :-1]).logits[:, 2 * TOKENS - 1 :]
    assert_near(torch.stack(got.logits, dim=1), logits, CLOSE)


OLD = pytest.mark.skipif(
    Version(transformers.__version__) >= Version("5.24"),
    reason="since 5.24 transformers does not refuse it, nor serve it",
)


@behaviour(
    "drafts for a batch, or on a static cache",
    refused=dict.fromkeys(NAMES, ValueError),
    why="as in transformers, which from 5.24 on does not say so of a static cache",
)
@pytest.mark.parametrize(
    "options", [{}, pytest.param({"cache_implementation": "static"}, marks=OLD)], ids=["batch", "static"]
)
def test_drafts_that_transformers_refuses(patched, reference, options):
    generate(patched, prompt(rows=1 if options else 2), prompt_lookup_num_tokens=2, **options)
