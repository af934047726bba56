"""Patched models generate as float models do that hold the same weights: ways of decoding, and what they record.

These are the behaviours that transformers asks of every model that generates; docs/generation.md lists them.
"""

import copy

import pytest
import torch
from decoders import Calls, assert_near, decoder, prompt
from generating import (
    CLOSE,
    NAMES,
    NEW,
    PROCESSORS,
    ROWS,
    TOKENS,
    assert_same_cache,
    assert_same_output,
    assert_same_tree,
    generate,
    of_both,
    own,
    shared,
)
from transformers import GenerationMixin
from transformers.generation import GenerateBeamDecoderOnlyOutput, GenerateDecoderOnlyOutput

from torch_int4 import Int4Cache, patch

SAMPLING = {"do_sample": True, "top_k": 10, "top_p": 0.7, "temperature": 0.7}
BEAMS = {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 2.0}
MODES = {
    "greedy": {},
    "sampling": {**SAMPLING, "num_return_sequences": 2},
    "beams": BEAMS,
    "sampled-beams": {**BEAMS, **SAMPLING},
}


def sizes(tree):
    """Shapes of a tuple of tuples of tensors."""
    return [[tuple(x.shape) for x in step] for step in tree]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "no-cache"])
@pytest.mark.parametrize("path", ["fused", "stock"])
def test_every_output(name, mode, use_cache, path):
    """Recorded attention weights come from the stock modules, all else from the fused ones."""
    options = {**MODES[mode], **PROCESSORS, "use_cache": use_cache, "output_hidden_states": True}
    models = own(name, "eager") if path == "stock" else shared(name)
    outputs = []
    for model in models:
        with Calls() as calls:
            outputs.append(generate(model, prompt(), output_attentions=path == "stock", **options))
        assert (calls.counts["attention"] > 0) == (model is models[0] and path == "fused")
    got, want = outputs
    assert_same_output(got, want)

    beams = "num_beams" in options
    assert isinstance(got, GenerateBeamDecoderOnlyOutput if beams else GenerateDecoderOnlyOutput)
    returned, width = options.get("num_return_sequences", 1), options.get("num_beams", 1)
    rows = ROWS * (width if beams else returned)
    assert got.sequences.shape == (ROWS * returned, TOKENS + NEW)
    assert [tuple(x.shape) for x in (*got.scores, *got.logits)] == [(rows, 99)] * (2 * NEW)
    news = [1 if use_cache and step else TOKENS + step for step in range(NEW)]
    assert sizes(got.hidden_states) == [[(rows, new, 64)] * 3 for new in news]
    if path == "stock":
        assert sizes(got.attentions) == [[(rows, 4, new, TOKENS + step)] * 2 for step, new in enumerate(news)]
    if use_cache:
        assert type(got.past_key_values) is Int4Cache
        assert got.past_key_values.get_seq_length() == TOKENS + NEW - 1
    else:
        assert got.past_key_values is None


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mode", MODES)
def test_a_cache_changes_nothing(name, mode):
    model, _ = shared(name)
    got, want = (generate(model, prompt(), use_cache=use_cache, **MODES[mode]) for use_cache in (True, False))
    assert torch.equal(got.sequences, want.sequences)
    assert_same_tree(got.logits, want.logits)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_fused_attention_changes_nothing(name, implementation):
    (stock, _), (fused, _) = own(name, implementation), shared(name)
    assert_same_output(generate(fused, prompt()), generate(stock, prompt()))


@pytest.mark.parametrize("name", NAMES)
def test_left_padded_rows_are_what_they_are_alone(name):
    model, reference = shared(name)
    rows = [prompt(rows=1, tokens=n, seed=n) for n in (12, 5, 1)]
    ids = torch.cat([torch.nn.functional.pad(row, (12 - row.shape[1], 0), value=0) for row in rows])
    mask = torch.cat([torch.nn.functional.pad(torch.ones_like(row), (12 - row.shape[1], 0)) for row in rows])
    together = generate(model, ids, attention_mask=mask)
    assert_same_output(together, generate(reference, ids, attention_mask=mask), but=["past_key_values"])
    for index, row in enumerate(rows):
        alone = generate(model, row)
        assert torch.equal(together.sequences[index, 12:], alone.sequences[0, row.shape[1] :])
        assert_same_tree(tuple(x[index : index + 1] for x in together.logits), alone.logits)


@pytest.mark.parametrize("name", NAMES)
def test_rows_that_end_early_are_filled_up(name):
    plain = generate(shared(name)[0], prompt(), max_new_tokens=10).sequences
    end = plain[0, TOKENS + 3].item()
    got, want = of_both(name, eos_token_id=end, max_new_tokens=10)
    assert_same_output(got, want)
    first = (plain[0, TOKENS:] == end).nonzero()[0].item()
    assert (got.sequences[0, TOKENS + first + 1 :] == 0).all()
    beams = [generate(m, prompt(), eos_token_id=end, early_stopping=True, **BEAMS).sequences for m in shared(name)]
    assert torch.equal(*beams)


@pytest.mark.parametrize("name", NAMES)
def test_from_nothing(name):
    got, want = (generate(model) for model in shared(name))
    assert_same_output(got, want)
    assert got.sequences.shape == (1, 1 + NEW)


@pytest.mark.parametrize("name", NAMES)
def test_positions_may_be_given(name):
    model, _ = shared(name)
    mask = torch.ones(ROWS, TOKENS, dtype=torch.int64)
    mask[0, :5] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    got = generate(model, prompt(), attention_mask=mask, position_ids=positions)
    assert_same_output(got, generate(model, prompt(), attention_mask=mask))


@pytest.mark.parametrize("name", NAMES)
def test_logits_of_the_whole_prompt(name):
    """`generate` asks for the last ones only; both are the same."""
    model, _ = shared(name)
    assert_same_output(generate(model, prompt(), logits_to_keep=0), generate(model, prompt()))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("chunk", [1, 5, 12, 50])
def test_a_prompt_in_chunks(name, chunk):
    model, _ = shared(name)
    assert_same_output(generate(model, prompt(), prefill_chunk_size=chunk), generate(model, prompt()))


# Drafts


def other(name):
    """A patched model that agrees with the one of that name now and then."""
    model = decoder(name)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
    return patch(model, compute="fp32", kv_cache="fp32")


def assistant(name, kind):
    model = copy.deepcopy(shared(name)[0]) if kind == "same" else other(name)
    model.generation_config.num_assistant_tokens = 2
    model.generation_config.num_assistant_tokens_schedule = "constant"
    return model


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["same", "other", "lookup"])
@pytest.mark.parametrize("attentions", [False, True], ids=["fused", "stock"])
def test_drafts_change_nothing(name, kind, attentions):
    models = own(name, "eager" if attentions else None)
    ids = prompt(rows=1).repeat(1, 2)
    drafts = {"prompt_lookup_num_tokens": 2} if kind == "lookup" else {"assistant_model": assistant(name, kind)}
    record = {"output_hidden_states": True, "output_attentions": attentions, "max_new_tokens": 12}
    plain = generate(models[0], ids, **record)
    got, want = (generate(model, ids, **record, **drafts) for model in models)
    assert_same_output(got, want)
    assert torch.equal(got.sequences, plain.sequences)
    assert_same_tree(got.scores, plain.scores)
    assert_same_cache(got.past_key_values, plain.past_key_values)
    assert type(got.past_key_values) is Int4Cache


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["same", "other", "lookup"])
def test_drafts_of_samples(name, kind):
    ids = prompt(rows=1).repeat(1, 2)
    drafts = {"prompt_lookup_num_tokens": 2} if kind == "lookup" else {"assistant_model": assistant(name, kind)}
    got, want = of_both(name, ids, do_sample=True, **drafts)
    assert_same_output(got, want)
    assert got.sequences.shape == (1, 2 * TOKENS + NEW)
    with torch.no_grad():  # the scores are those of the tokens that were taken
        logits = shared(name)[0](got.sequences[:, :-1]).logits[:, 2 * TOKENS - 1 :]
    assert_near(torch.stack(got.logits, dim=1), logits, CLOSE)


def test_patched_models_still_generate():
    for name in NAMES:
        model, reference = shared(name)
        assert isinstance(model, GenerationMixin)
        assert type(model).can_generate()
        assert model._can_compile_fullgraph == reference._can_compile_fullgraph
