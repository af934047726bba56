"""Perplexity, comparison, timing and memory figures against direct computations on tiny random models."""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from torch_int4 import Int4Error
from torch_int4.evals import output
from torch_int4.evals.accuracy.perplexity import Perplexity, compare, perplexity
from torch_int4.evals.speed import generation as speed
from torch_int4.support.markdown import markdown_table
from torch_int4.support.text import builtin_text
from torch_int4.tuning.footprint import weight_bytes

VOCABULARY = 97


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """These models are so small that threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tiny_model(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        initializer_range=0.5,  # far from uniform predictions, so that a misplaced target shows
        eos_token_id=2,
    )
    return LlamaForCausalLM(config).eval()


def tokens(count: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed))


def direct_nll(model: nn.Module, context: torch.Tensor, target: torch.Tensor) -> float:
    """-log p(target | context), one token at a time."""
    with torch.no_grad():
        return -model(context[None]).logits[0, -1].double().log_softmax(-1)[target].item()


def test_text_is_plain_english_of_the_promised_size() -> None:
    text = builtin_text(16_000)
    assert len(text) == 16_000
    assert text.isascii()
    assert text == builtin_text(16_000)
    assert builtin_text(40_000).startswith(text)
    words = text.lower().split()
    share = sum(word in {"the", "a", "of", "is", "to", "and", "in", "that"} for word in words) / len(words)
    assert share > 0.2
    lines = text.split("\n")
    assert len(set(lines)) == len(lines)


def test_text_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Int4Error, match="100000000 characters wanted"):
        builtin_text(100_000_000)
    with pytest.raises(Int4Error, match="built-in text"):
        builtin_text(0)
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(Int4Error, match="no pydoc_data"):
        builtin_text()


@pytest.mark.parametrize(("window", "stride"), [(8, 8), (8, 3), (8, 1), (2, 2), (64, 64), (29, 29), (28, 28)])
def test_perplexity_equals_a_direct_computation(window: int, stride: int) -> None:
    model, ids = tiny_model(), tokens(29)
    expected, scored_to = [], 0
    for begin in range(0, len(ids), stride):
        end = min(begin + window, len(ids))
        for position in range(max(scored_to, begin + 1), end):
            expected.append(direct_nll(model, ids[begin:position], ids[position]))
        scored_to = end
        if end == len(ids):
            break
    score = perplexity(model, ids, window=window, stride=stride)
    assert score.tokens == len(expected) == sum(score.window_tokens) == score.top1.numel()
    assert score.nll == pytest.approx(statistics.fmean(expected), rel=1e-5)
    assert score.ppl == pytest.approx(math.exp(statistics.fmean(expected)), rel=1e-4)
    weighted = sum(n * count for n, count in zip(score.window_nll, score.window_tokens, strict=True))
    assert weighted / score.tokens == pytest.approx(score.nll, rel=1e-12)
    if stride < window:  # every token but the first
        assert score.tokens == len(ids) - 1


def test_perplexity_reads_text_and_stops_at_max_tokens() -> None:
    model, ids = tiny_model(), tokens(40)

    def tokenizer(text: str, **_: object) -> dict[str, torch.Tensor]:
        assert text == "some text"
        return {"input_ids": ids[None]}

    assert perplexity(model, tokenizer, "some text", window=8, max_tokens=20) == perplexity(model, ids[:20], window=8)


def test_perplexity_leaves_the_mode_of_the_model() -> None:
    model = tiny_model().train()
    perplexity(model, tokens(9), window=4)
    assert model.training


@pytest.mark.parametrize(
    "arguments",
    [{"window": 1}, {"window": 8, "stride": 9}, {"window": 8, "stride": 0}, {"window": 8, "max_tokens": 1}],
)
def test_perplexity_refuses_what_has_no_answer(arguments: dict[str, int]) -> None:
    with pytest.raises(Int4Error, match="perplexity"):
        perplexity(tiny_model(), tokens(20), **arguments)


def test_perplexity_wants_ids_or_text() -> None:
    with pytest.raises(Int4Error, match="tokenizer and a text"):
        perplexity(tiny_model(), tokens(20), "text too")
    with pytest.raises(Int4Error, match="tokenizer and a text"):
        perplexity(tiny_model(), print)


def test_reference_gives_kl_and_agreement() -> None:
    model, reference, ids = tiny_model(0), tiny_model(1), tokens(300)
    score = perplexity(model, ids, window=300, reference=reference)
    with torch.no_grad():
        ours = model(ids[None]).logits[0, :-1].double().log_softmax(-1)
        theirs = reference(ids[None]).logits[0, :-1].double().log_softmax(-1)
    assert score.kl == pytest.approx((theirs.exp() * (theirs - ours)).sum(-1).mean().item(), rel=1e-4)
    assert score.agreement == (ours.argmax(-1) == theirs.argmax(-1)).double().mean().item()
    assert score.reference == perplexity(reference, ids, window=300)
    same = perplexity(model, ids, window=100, reference=model)
    assert same.kl == pytest.approx(0, abs=1e-6)
    assert same.agreement == 1.0


def score_of(nll: list[float], count: list[int], top1: list[int] | None = None) -> Perplexity:
    mean = sum(n * c for n, c in zip(nll, count, strict=True)) / sum(count)
    best = torch.tensor(top1 if top1 is not None else [0] * sum(count))
    return Perplexity(math.exp(mean), mean, sum(count), tuple(nll), tuple(count), best)


def test_compare_has_the_error_of_a_paired_mean() -> None:
    differences = [0.01, 0.03, -0.02, 0.05]
    a = score_of([1.0, 5.0, 3.0, 2.0], [2] * 4, [1, 2, 3, 4, 5, 6, 7, 8])
    b = score_of([1.01, 5.03, 2.98, 2.05], [2] * 4, [1, 2, 3, 4, 0, 0, 7, 8])
    versus = compare(a, b)
    mean = statistics.fmean(differences)
    assert versus.relative == pytest.approx(math.expm1(mean))
    assert versus.relative == pytest.approx(b.ppl / a.ppl - 1)
    # Windows differ by 4 nats, their differences by 0.05: only the latter may enter.
    assert versus.stderr == pytest.approx(statistics.stdev(differences) / 2 * math.exp(mean))
    assert versus.agreement == 0.75


def test_compare_weighs_windows_by_their_tokens() -> None:
    a, b = score_of([1.0, 1.0], [30, 10]), score_of([1.1, 1.3], [30, 10])
    versus = compare(a, b)
    assert versus.relative == pytest.approx(math.expm1(0.15))
    # sqrt(2/1 * (30*0.05)^2 + (10*0.15)^2) / 40
    assert versus.stderr == pytest.approx(math.sqrt(2 * 2 * 1.5**2) / 40 * math.exp(0.15))


def test_compare_of_one_window_has_no_error_and_other_windows_are_refused() -> None:
    one = score_of([1.0], [9])
    assert math.isnan(compare(one, one).stderr)
    with pytest.raises(Int4Error, match="different windows"):
        compare(one, score_of([1.0], [8]))


def test_broken_model_is_not_a_number() -> None:
    model, ids = tiny_model(), tokens(16)
    good = perplexity(model, ids, window=8)
    model.model.norm.weight.data.fill_(math.nan)
    broken = perplexity(model, ids, window=8)
    assert math.isnan(broken.ppl)
    assert math.isnan(compare(good, broken).relative)


def test_timing_generates_exactly_what_was_asked_for() -> None:
    model, prompt = tiny_model(), tokens(5)[None]
    free = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, do_sample=False)
    model.generation_config.eos_token_id = free[0, 7].item()  # its third new token would end a usual generation
    timing = speed.time_generate(model, prompt, 12)
    assert timing.new_tokens == len(timing.output_ids) == 12
    assert timing.output_ids == tuple(free[0, 5:].tolist())
    assert timing.prompt_tokens == 5
    assert timing.decode_s > 0
    assert timing.prefill_s > 0
    assert timing.decode_tps == pytest.approx(11 / timing.decode_s)


def test_alternating_repeats_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    clock = iter(range(1, 100))

    def time_generate(model: str, ids: torch.Tensor, count: int) -> speed.Timing:
        calls.append(f"{model}{count}")
        return speed.Timing(1, count, 1.0, float(next(clock)), ())

    monkeypatch.setattr(speed, "time_generate", time_generate)
    a, b = speed.alternate(["a", "b"], tokens(3)[None], 9, repeats=3)
    assert calls == ["a4", "b4", *["a9", "b9"] * 3]
    assert [timing.decode_s for timing in a] == [3, 5, 7]
    assert [timing.decode_s for timing in b] == [4, 6, 8]
    assert speed.decode_ratios(a, b) == pytest.approx([3 / 4, 5 / 6, 7 / 8])


def test_summary_is_best_and_median() -> None:
    timings = [speed.Timing(10, 5, seconds, seconds, ()) for seconds in (1.0, 4.0, 2.0)]
    assert speed.summarize(timings) == speed.Speed(4.0, 2.0, 10.0, 5.0, 3)


def test_bytes_count_shared_storage_once() -> None:
    model = tiny_model()  # head and embedding are one tensor
    assert sum(weight_bytes(model).values()) == sum(p.nbytes for p in model.parameters()) + sum(
        buffer.nbytes for buffer in model.buffers()
    )
    whole = torch.zeros(10, 4)
    pair = nn.ModuleList([nn.Linear(4, 5, bias=False), nn.Linear(4, 5, bias=False), nn.LayerNorm(4)])
    pair[0].weight = nn.Parameter(whole[:5])
    pair[1].weight = nn.Parameter(whole[5:])
    assert weight_bytes(pair) == {"Linear": 160, "LayerNorm": 32}
    assert weight_bytes(nn.Linear(4, 4, device="meta")) == {}


def test_output_is_strict_json_and_aligned_markdown(tmp_path: object) -> None:
    file = tmp_path / "out.json"  # type: ignore[operator]
    output.write_json(file, {"a": [1.5, math.nan], "b": (math.inf, "x")})
    assert json.loads(file.read_text()) == {"a": [1.5, None], "b": [None, "x"]}
    table = markdown_table(("name", "n"), [("x", "100"), ("longer", "2")])
    assert table.split("\n") == [
        "| name   | n   |",
        "|--------|-----|",
        "| x      | 100 |",
        "| longer | 2   |",
    ]
