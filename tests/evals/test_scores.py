"""Scores per item: which metrics can be paired, their errors, and the mean over tasks."""

from __future__ import annotations

import dataclasses
import math
import random
from typing import Any

import pytest

from torch_int4 import Int4Config, Int4Error
from torch_int4.config.text import parse_config
from torch_int4.evals.accuracy import run as accuracy
from torch_int4.evals.accuracy import scores
from torch_int4.evals.accuracy.scores import Items


def sample(doc: int, **metrics: Any) -> dict[str, Any]:
    base = {"doc_id": doc, "doc_hash": f"d{doc}", "prompt_hash": f"p{doc}", "filter": "none"}
    return base | metrics | {"metrics": list(metrics)}


def results(samples: list[dict[str, Any]], better: dict[str, bool], task: str = "t") -> dict[str, Any]:
    return {"samples": {task: samples}, "higher_is_better": {task: better}}


def hits(values: list[float], task: str = "t") -> Items:
    return Items(task, "acc", "accuracy", tuple(map(str, range(len(values)))), tuple(values))


def test_metrics_that_are_means_are_found_and_others_left_out() -> None:
    rows = [
        sample(1, acc=1.0, acc_norm=True, perplexity=-2.0, word_perplexity=(-30.0, 10), bits_per_byte=(-30.0, 60)),
        sample(0, acc=0.0, acc_norm=False, perplexity=-1.0, word_perplexity=(-5.0, 5), bits_per_byte=(-5.0, 20)),
    ]
    better = {"acc": True, "acc_norm": True, "perplexity": False, "word_perplexity": False, "bits_per_byte": False}
    found = {entry.metric: entry for entry in scores.items(results(rows, better))}
    assert sorted(found) == ["acc", "acc_norm", "perplexity", "word_perplexity"]
    assert found["acc"].values == (0.0, 1.0)  # in the order of documents
    assert found["acc"].ids == ("d0:p0", "d1:p1")
    assert found["acc_norm"].score == 0.5
    assert found["perplexity"].score == pytest.approx(math.exp(1.5))
    assert found["word_perplexity"].score == pytest.approx(math.exp(35 / 15))
    assert found["word_perplexity"].weights == (5.0, 10.0)


def test_only_the_first_filter_counts() -> None:
    rows = [sample(0, exact_match=1.0), sample(0, exact_match=0.0) | {"filter": "flexible"}]
    (entry,) = scores.items(results(rows, {"exact_match": True}))
    assert entry.values == (1.0,)
    assert math.isnan(entry.stderr)


@pytest.mark.parametrize("metric", ["f1", "perplexity", "mcc"])
def test_values_of_unknown_meaning_are_left_out(metric: str) -> None:
    assert scores.items(results([sample(0, **{metric: ["a", "b", "c"]})], {metric: True})) == []
    assert scores.items(results([sample(0, f1=1.0)], {"f1": False})) == []


def test_different_documents_do_not_pair() -> None:
    with pytest.raises(Int4Error, match="documents or prompts differ"):
        scores.pair(hits([1, 0]), dataclasses.replace(hits([1, 0]), ids=("0", "2")))
    with pytest.raises(Int4Error, match="documents or prompts differ"):
        scores.pair(hits([1, 0]), hits([1, 0, 1]))


def test_decisive_metric() -> None:
    chosen = {"hellaswag": ("acc_norm",)}
    assert scores.decisive("hellaswag", ["acc", "acc_norm"], chosen) == ("acc_norm",)
    assert scores.decisive("hellaswag", ["acc"], chosen) == ("acc",)
    assert scores.decisive("gsm8k", ["f1", "exact_match"], chosen) == ("exact_match",)
    assert scores.decisive("other", ["f1"], chosen) == ("f1",)
    assert scores.decisive("other", [], chosen) == ()


def test_error_of_the_mean_over_tasks_is_that_of_simulation() -> None:
    """Thousands of draws of items: the spread of the loss is what the formula says from one draw."""
    generator = random.Random(0)
    sizes = {"a": 60, "b": 150}

    def draw() -> list[tuple[Items, Items]]:
        pairs = []
        for task, size in sizes.items():
            base = [float(generator.random() < 0.6) for _ in range(size)]
            other = [value if generator.random() < 0.9 else 1 - value for value in base]
            pairs.append((hits(base, task), hits(other, task)))
        return pairs

    losses = [scores.mean_accuracy(draw()) for _ in range(1500)]
    mean = sum(loss.loss for loss in losses) / len(losses)
    spread = math.sqrt(sum((loss.loss - mean) ** 2 for loss in losses) / len(losses))
    predicted = sum(loss.stderr for loss in losses) / len(losses)
    assert predicted == pytest.approx(spread, rel=0.08)


def test_mean_over_tasks_weighs_tasks_alike() -> None:
    pairs = [(hits([1, 1], "a"), hits([1, 0], "a")), (hits([1] * 8, "b"), hits([1] * 8, "b"))]
    loss = scores.mean_accuracy(pairs)
    assert (loss.base, loss.score, loss.loss) == (1.0, 0.75, 0.25)
    assert math.isnan(scores.mean_accuracy([(hits([1.0]), hits([0.0]))] * 2).stderr)
    with pytest.raises(Int4Error, match="nothing right"):
        scores.mean_accuracy([(hits([0, 0]), hits([1, 1]))] * 2)


def test_gate_fails_on_a_shown_loss_only() -> None:
    n = 400
    base = [hits([1.0] * n, "a"), hits([1.0, 0.0] * (n // 2), "b")]
    worse = [hits([0.0] * 40 + [1.0] * (n - 40), "a"), base[1]]
    noisy = [base[0], hits([0.0, 1.0] * (n // 2), "b")]

    def failed(other: list[Items], **options: bool) -> list[str]:
        return accuracy.compare(base, other, None, 0.0).failed(0.01, **options)

    assert failed(base) == failed(base, strict=True) == []
    assert failed(worse) == ["a acc", "mean accuracy"]
    assert failed(noisy) == []
    assert failed(noisy, strict=True) == ["b acc", "mean accuracy"]
    nan = dataclasses.replace(base[0], values=(math.nan,) * n)
    assert "a acc" in failed([nan, base[1]])


def test_nothing_right_means_nothing_to_lose() -> None:
    zero, one = [hits([0.0] * 9, "a"), hits([0.0] * 9, "b")], [hits([1.0] * 9, "a"), hits([0.0] * 9, "b")]
    found = accuracy.compare(zero, one, None, 0.0)
    assert found.mean is None
    assert [row.loss.verdict(0.01) for row in found.rows] == ["undecided", "undecided"]


def test_missing_scores_are_named() -> None:
    with pytest.raises(Int4Error, match="b/acc: only the float model"):
        accuracy.compare([hits([1], "a"), hits([1], "b")], [hits([1], "a")], None, 0.0)


def test_configs_as_text() -> None:
    assert parse_config("") == parse_config(" , ") == Int4Config()
    found = parse_config("recipe=rtn, group_size=-1,symmetric=False,zeros=float,clip=TRUE,skip=*.a;b.*")
    assert found == Int4Config(group_size=-1, symmetric=False, zeros="float", clip=True, skip=("*.a", "b.*"))
    assert accuracy.describe(dataclasses.asdict(found)).startswith("recipe=rtn, group_size=-1, symmetric=False")
    assert parse_config("int8=*.down_proj;*.o_proj").int8 == ("*.down_proj", "*.o_proj")
    assert parse_config("skip=lm_head").skip == ("lm_head",)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("group_size", "not field=value"),
        ("group_size=", "not field=value"),
        ("=3", "not field=value"),
        ("group_size=32,group_size=64", "given twice"),
        ("group_size=48", "group_size must be"),
        ("group_size=32.0", "group_size must be"),
        ("symmetric=1", "symmetric must be"),
        ("recipe=none", "recipe must be"),
        ("nope=1", "unknown option nope"),
    ],
)
def test_bad_configs_are_named(text: str, message: str) -> None:
    with pytest.raises(Int4Error, match=message):
        parse_config(text)
