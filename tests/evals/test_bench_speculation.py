"""Ways of decoding with guesses are compared on the same prompt, each with its own plain one."""

import copy

import torch
from decoders import decoder, prompt

from torch_int4 import patch
from torch_int4.evals.bench.speculation import ROUNDS, Way, compare


def test_ways_are_compared_with_their_own_plain_one():
    exact = decoder("llama")
    model = patch(copy.deepcopy(exact), head="float", compute="fp32")
    asked = []
    forward = exact.forward

    def counted(*args, **kwargs):
        asked.append(kwargs["input_ids"].shape[1])
        return forward(*args, **kwargs)

    ways = [
        Way("plain", model, {}, "plain"),
        Way("lookup", model, {"prompt_lookup_num_tokens": 2}, "plain"),
        Way("float", exact, {}, "float"),
        Way("guessed", exact, {"assistant_model": model}, "float"),
    ]
    exact.forward = counted
    rows = compare(prompt(rows=1, tokens=6).repeat(1, 2), 8, ways)
    assert [row.how for row in rows] == [way.how for way in ways]
    assert all(row.same and row.new_tokens == 8 for row in rows), "in fp32, guesses change no token"
    assert all(0 < row.min_s <= row.median_s for row in rows)
    assert [rows[0].speedup, rows[2].speedup] == [1, 1]
    assert [rows[0].tokens_a_step, rows[2].tokens_a_step] == [1, 1]
    assert 1 < rows[3].tokens_a_step <= 8, "guesses of a model of the same weights are taken"
    assert rows[3].speedup == rows[2].median_s / rows[3].median_s
    assert asked.count(12) >= 3 * (ROUNDS + 1), "each way reads the prompt for itself"
    assert any(1 < tokens < 12 for tokens in asked), "the float model looked at several guesses at once"


def test_gradients_are_not_recorded():
    model = decoder("llama")
    seen = []
    forward = model.forward
    model.forward = lambda *a, **k: seen.append(torch.is_grad_enabled()) or forward(*a, **k)
    compare(prompt(rows=1, tokens=4), 2, [Way("plain", model, {}, "plain")])
    assert seen
    assert not any(seen)
