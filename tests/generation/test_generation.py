"""Patched models generate as float models do that hold the same weights: ways of decoding, and what they record.

These are the behaviours that transformers asks of every model that generates; docs/guides/generation.md lists them.
"""

import copy

import pytest
import torch
from behaviours import STOCK, behaviour
from decoders import prompt
from generating import (
    NAMES,
    NEW,
    PROCESSORS,
    ROWS,
    TOKENS,
    assert_same_generation,
    assert_same_output,
    assert_same_tree,
    generate,
    shared,
    with_eager,
)
from transformers import GenerationMixin, LogitsProcessor, StoppingCriteria
from transformers.generation import GenerateBeamDecoderOnlyOutput, GenerateDecoderOnlyOutput
from transformers.generation.streamers import BaseStreamer

from torch_int4 import Int4Cache

pytestmark = pytest.mark.oldest

SAMPLING = {"do_sample": True, "top_k": 10, "top_p": 0.7, "temperature": 0.7}
BEAMS = {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 2.0}
with_or_without_cache = pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "no-cache"])


def sizes(tree):
    """Shapes of a tuple of tuples of tensors."""
    return [[tuple(x.shape) for x in step] for step in tree]


def check_mode(patched, reference, use_cache=True, attentions=False, **mode):
    """All that is recorded is the same and has the shapes that transformers promises."""
    options = {**mode, **PROCESSORS, "use_cache": use_cache, "output_hidden_states": True}
    got = assert_same_generation(patched, reference, output_attentions=attentions, **options)
    beams = "num_beams" in options
    assert isinstance(got, GenerateBeamDecoderOnlyOutput if beams else GenerateDecoderOnlyOutput)
    returned, width = options.get("num_return_sequences", 1), options.get("num_beams", 1)
    rows = ROWS * (width if beams else returned)
    assert got.sequences.shape == (ROWS * returned, TOKENS + NEW)
    assert [tuple(x.shape) for x in (*got.scores, *got.logits)] == [(rows, 99)] * (2 * NEW)
    news = [1 if use_cache and step else TOKENS + step for step in range(NEW)]
    assert sizes(got.hidden_states) == [[(rows, new, 64)] * 3 for new in news]
    if attentions:
        assert sizes(got.attentions) == [[(rows, 4, new, TOKENS + step)] * 2 for step, new in enumerate(news)]
    if use_cache:
        assert type(got.past_key_values) is Int4Cache
        assert got.past_key_values.get_seq_length() == TOKENS + NEW - 1
    else:
        assert got.past_key_values is None


@behaviour("greedy search, with scores, logits and hidden states recorded")
@with_or_without_cache
def test_greedy_search(patched, reference, use_cache):
    check_mode(patched, reference, use_cache)


@behaviour("sampling, several sequences per prompt")
@with_or_without_cache
def test_sampling(patched, reference, use_cache):
    check_mode(patched, reference, use_cache, **SAMPLING, num_return_sequences=2)


@behaviour("beam search")
@with_or_without_cache
def test_beam_search(patched, reference, use_cache):
    check_mode(patched, reference, use_cache, **BEAMS)


@behaviour("beam search with sampling")
def test_sampled_beams(patched, reference):
    check_mode(patched, reference, **BEAMS, **SAMPLING)


@behaviour("recorded attention weights", STOCK, why="the stock modules compute them; falcon-rw as in transformers")
@pytest.mark.parametrize("mode", [{}, BEAMS], ids=["greedy", "beams"])
def test_attention_weights(patched, reference, mode):
    check_mode(with_eager(patched), with_eager(reference), attentions=True, **mode)


@behaviour("`model.train()`", STOCK, why="gradients and dropout are the stock modules'")
def test_training_mode(patched, reference):
    models = [copy.deepcopy(model).train() for model in (patched, reference)]
    assert_same_generation(*models)


@behaviour("the same with a cache and without one")
@pytest.mark.parametrize("mode", [{}, BEAMS], ids=["greedy", "beams"])
def test_a_cache_changes_nothing(patched, reference, mode):
    got, want = (generate(patched, prompt(), use_cache=use_cache, **mode) for use_cache in (True, False))
    assert torch.equal(got.sequences, want.sequences)
    assert_same_tree(got.logits, want.logits)


@behaviour("left-padded batches; rows are what they are alone")
def test_left_padding(patched, reference):
    rows = [prompt(rows=1, tokens=n, seed=n) for n in (12, 5, 1)]
    ids = torch.cat([torch.nn.functional.pad(row, (12 - row.shape[1], 0), value=0) for row in rows])
    mask = torch.cat([torch.nn.functional.pad(torch.ones_like(row), (12 - row.shape[1], 0)) for row in rows])
    together = assert_same_generation(patched, reference, ids, attention_mask=mask, but=["past_key_values"])
    for index, row in enumerate(rows):
        alone = generate(patched, row)
        assert torch.equal(together.sequences[index, 12:], alone.sequences[0, row.shape[1] :])
        assert_same_tree(tuple(x[index : index + 1] for x in together.logits), alone.logits)


@behaviour("`position_ids` given")
def test_positions(patched, reference):
    mask = torch.ones(ROWS, TOKENS, dtype=torch.int64)
    mask[0, :5] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    got = generate(patched, prompt(), attention_mask=mask, position_ids=positions)
    assert_same_output(got, generate(patched, prompt(), attention_mask=mask))


@behaviour("an end token: rows stop one by one, beams early")
def test_rows_that_end_early(patched, reference):
    plain = generate(patched, prompt(), max_new_tokens=10).sequences
    end = plain[0, TOKENS + 3].item()
    got = assert_same_generation(patched, reference, eos_token_id=end, max_new_tokens=10)
    first = (plain[0, TOKENS:] == end).nonzero()[0].item()
    assert (got.sequences[0, TOKENS + first + 1 :] == 0).all()
    beams = [generate(m, prompt(), eos_token_id=end, early_stopping=True, **BEAMS) for m in (patched, reference)]
    assert torch.equal(beams[0].sequences, beams[1].sequences)


class Ban(LogitsProcessor):
    def __call__(self, input_ids, scores):
        scores[:, 50:] = -torch.inf
        return scores


class Stop(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), input_ids.shape[1] >= TOKENS + 3)


class Tokens(BaseStreamer):
    def __init__(self):
        self.seen = []

    def put(self, value):
        self.seen += value.flatten().tolist()

    def end(self):
        self.seen.append("end")


@behaviour("processors of scores, stopping criteria, streamers")
def test_processors(patched, reference):
    got = assert_same_generation(patched, reference, logits_processor=[Ban()], stopping_criteria=[Stop()])
    assert got.sequences.shape == (ROWS, TOKENS + 3)
    assert (got.sequences[:, TOKENS:] < 50).all()
    options = {"no_repeat_ngram_size": 2, "min_new_tokens": 3, "typical_p": 0.9, "min_p": 0.01, "epsilon_cutoff": 1e-3}
    penalties = {"encoder_repetition_penalty": 1.1, "exponential_decay_length_penalty": (2, 1.1), "eos_token_id": 9}
    assert_same_generation(patched, reference, do_sample=True, renormalize_logits=True, **options, **penalties)
    streamer = Tokens()
    plain = generate(patched, prompt(rows=1), streamer=streamer)
    assert streamer.seen == [*plain.sequences[0].tolist(), "end"]


@behaviour("classifier-free guidance")
def test_guidance(patched, reference):
    options = {"guidance_scale": 1.5, "negative_prompt_ids": prompt(tokens=4, seed=7)}
    got = assert_same_generation(patched, reference, **options)
    assert not torch.equal(got.scores[-1], generate(patched, prompt()).scores[-1])


@behaviour("no prompt")
def test_from_nothing(patched, reference):
    got, want = (generate(model) for model in (patched, reference))
    assert_same_output(got, want)
    assert got.sequences.shape == (1, 1 + NEW)


@behaviour("`inputs_embeds`, alone and with ids")
def test_embeddings_as_input(patched, reference):
    ids = prompt()
    embeddings = patched.get_input_embeddings()(ids).detach()
    plain = generate(patched, ids)
    for model in (patched, reference):
        alone = generate(model, inputs_embeds=embeddings, max_new_tokens=NEW)
        assert torch.equal(alone.sequences, plain.sequences[:, TOKENS:])
        assert_same_tree(alone.logits, plain.logits)
        both = generate(model, ids, inputs_embeds=embeddings)
        assert torch.equal(both.sequences, plain.sequences)
    assert_same_generation(patched, reference, inputs_embeds=embeddings, **BEAMS)


@behaviour("logits of the whole prompt, or of its end")
def test_logits_of_the_whole_prompt(patched, reference):
    assert_same_output(generate(patched, prompt(), logits_to_keep=0), generate(patched, prompt()))


@behaviour("a prompt in chunks (`prefill_chunk_size`)")
@pytest.mark.parametrize("chunk", [1, 5])
def test_a_prompt_in_chunks(patched, reference, chunk):
    assert_same_output(generate(patched, prompt(), prefill_chunk_size=chunk), generate(patched, prompt()))


MOVED = {
    "contrastive": {"penalty_alpha": 0.6, "top_k": 4},
    "dola": {"dola_layers": "low"},
    "groups": {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 1.0},
    "constrained": {"num_beams": 3, "force_words_ids": [[5]]},
}


@behaviour(
    "contrastive search, DoLa, groups of beams, constrained beams",
    refused=dict.fromkeys(NAMES, ValueError),
    why="transformers 5 loads them from the Hub as code to trust",
)
@pytest.mark.parametrize("mode", MOVED)
def test_modes_that_transformers_gave_away(patched, reference, mode):
    generate(patched, prompt(), **MOVED[mode])


@pytest.mark.parametrize("name", NAMES)
def test_patched_models_still_generate(name):
    model, reference = shared(name)
    assert isinstance(model, GenerationMixin)
    assert type(model).can_generate()
    assert model._can_compile_fullgraph == reference._can_compile_fullgraph
