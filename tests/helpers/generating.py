"""Shared by the tests of `generate`: pairs of models, and the comparison of two outputs."""

import copy
import functools

import torch
from decoders import MAIN, assert_near, pair, prompt

from torch_int4.support.forwards import CACHES

NAMES = [*MAIN, "gpt2"]
CLOSE = 2e-3  # norm of the difference to the norm; both models compute in fp32
NEW = 6  # tokens
ROWS, TOKENS = 2, 12  # of prompt()
RECORD = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
PROCESSORS = {"repetition_penalty": 1.2, "bad_words_ids": [[1, 7], [5]], "remove_invalid_values": True}
NO_EMPTY_PLACES = {"falcon-rw": RuntimeError}
WHY_NOT_STATIC = "ALiBi of transformers has no columns for the empty places of a cache of fixed size"


@functools.cache
def shared(name):
    """The patched model and the float one, for tests that leave them as they are."""
    return pair(name)


def with_eager(model):
    """A copy with transformers' plain attention; of patched models that have no choice, the stock modules are it."""
    model = copy.deepcopy(model)
    if model._can_set_attn_implementation():
        model.set_attn_implementation("eager")
    elif not hasattr(model, "torch_int4_report"):
        model.config._attn_implementation_internal = "eager"
    return model


def generate(model, ids=None, **options):
    """A dictionary with scores and logits, greedy and from the same seed unless told otherwise."""
    torch.manual_seed(0)
    options = {"max_new_tokens": NEW, "do_sample": False, **RECORD, **options}
    return model.generate(ids, **options) if ids is not None else model.generate(**options)


def assert_same_tree(got, want, tolerance=CLOSE):
    """Nested tuples of tensors, with -inf at the same places."""
    assert type(got) is type(want)
    if isinstance(want, torch.Tensor):
        assert got.shape == want.shape
        finite = want.isfinite()
        assert torch.equal(got[~finite], want[~finite])
        assert_near(got[finite].float(), want[finite].float(), tolerance)
    elif want is not None:
        assert len(got) == len(want)
        for a, b in zip(got, want, strict=True):
            assert_same_tree(a, b, tolerance)


def assert_same_output(got, want, tolerance=CLOSE, but=()):
    """Tokens, and all that the outputs of `generate` recorded; caches by what they hold."""
    assert type(got) is type(want)
    assert got.keys() == want.keys()
    assert torch.equal(got.sequences, want.sequences)
    for key in got.keys() - {"sequences", *CACHES, "beam_indices", *but}:
        assert_same_tree(got[key], want[key], tolerance)
    for key in want.keys() & set(CACHES) if "past_key_values" not in but else ():
        if want[key] is not None:
            assert_same_cache(got[key], want[key], tolerance)


def assert_same_generation(patched, reference, ids=None, but=(), **options):
    """Both generate the same, `options` being those of `generate`; returns the patched model's output."""
    ids = prompt() if ids is None else ids
    want = generate(reference, ids, **options)
    got = generate(patched, ids, **options)
    assert_same_output(got, want, but=but)
    return got


def assert_same_cache(got, want, tolerance=CLOSE):
    """Keys and values of the tokens in two caches; the stock one may repeat what ours holds once."""
    n = int(want.get_seq_length())
    assert int(got.get_seq_length()) == n
    assert len(got.layers) == len(want.layers)
    for ours, stock in zip(got.layers, want.layers, strict=True):
        for a, b in ((ours.keys, stock.keys), (ours.values, stock.values)):
            assert a.shape[0] == b.shape[0]
            repeated = a[:, :, :n].repeat_interleave(b.shape[1] // a.shape[1], dim=1)
            assert_near(repeated, b[:, :, :n], tolerance)


@torch.no_grad()
def steps(model, ids, first, cache=None, mask=None, **options):
    """Logits of a prompt of `first` tokens and of each token after it, one at a time, and the cache."""
    logits, start = [], 0
    for end in range(first, ids.shape[1] + 1):
        inputs = {"input_ids": ids[:, start:end], "past_key_values": cache, "use_cache": True, **options}
        if mask is not None:
            inputs["attention_mask"] = mask[:, :end]
            inputs["position_ids"] = (mask[:, :end].cumsum(1) - 1).clamp(min=0)[:, start:end]
        out = model(**inputs)
        cache, start = out.past_key_values, end
        logits.append(out.logits)
    return torch.cat(logits, dim=1), cache
