import math

import pytest
import torch

from torch_int4 import Int4Error
from torch_int4.tuning.paired import PairedLoss, accuracy_loss, kl_loss, perplexity_loss, worst


def correlated(n=400, seed=0):
    g = torch.Generator().manual_seed(seed)
    base = torch.rand(n, generator=g, dtype=torch.float64) + 2
    return base, base + 0.01 + 0.02 * torch.randn(n, generator=g, dtype=torch.float64)


def bootstrap(function, *arrays, rounds=600):
    g = torch.Generator().manual_seed(1)
    n = len(arrays[0])
    draws = [torch.randint(0, n, (n,), generator=g) for _ in range(rounds)]
    return torch.tensor([function(*(array[draw] for array in arrays)).loss for draw in draws]).std().item()


def test_perplexity_is_the_ratio_and_its_error_the_bootstraps():
    base, nll = correlated()
    tokens = torch.randint(50, 900, (400,), generator=torch.Generator().manual_seed(2)).double()
    got = perplexity_loss(base, nll, tokens)
    want = ((nll * tokens).sum() / tokens.sum()).exp() / ((base * tokens).sum() / tokens.sum()).exp() - 1
    assert math.isclose(got.loss, want.item(), rel_tol=1e-9)
    assert math.isclose(got.stderr, bootstrap(perplexity_loss, base, nll, tokens), rel_tol=0.15)
    assert got.base < got.score


def test_accuracy_is_a_relative_drop_and_its_error_the_bootstraps():
    g = torch.Generator().manual_seed(3)
    base = (torch.rand(500, generator=g) < 0.6).double()
    flips = torch.rand(500, generator=g) < 0.08
    score = torch.where(flips, 1 - base, base)
    got = accuracy_loss(base, score)
    assert math.isclose(got.loss, 1 - score.mean().item() / base.mean().item(), rel_tol=1e-9)
    assert math.isclose(got.stderr, bootstrap(accuracy_loss, base, score), rel_tol=0.15)


def test_both_kinds_are_positive_when_worse():
    assert accuracy_loss([1, 1, 0, 1], [1, 0, 0, 1]).loss > 0
    assert accuracy_loss([1, 0, 0, 1], [1, 1, 0, 1]).loss < 0
    assert perplexity_loss([2.0, 3.0], [2.1, 3.1]).loss > 0
    assert perplexity_loss([2.0, 3.0], [1.9, 2.9]).loss < 0


def test_pairing_removes_the_noise_of_the_items():
    base = torch.linspace(1, 9, 50)
    assert perplexity_loss(base, base + 0.02).stderr < 1e-6
    assert perplexity_loss(base, base + 0.02).verdict(0.03) == "pass"


@pytest.mark.parametrize(
    ("loss", "stderr", "want"),
    [
        (0.005, 0.002, "pass"),
        (0.009, 0.002, "undecided"),
        (0.011, 0.002, "undecided"),
        (0.020, 0.002, "fail"),
        (-0.5, 0.01, "pass"),
        (0.01, 0.0, "pass"),
        (math.nan, 0.0, "fail"),
        (math.inf, 0.0, "fail"),
        (0.0, math.nan, "undecided"),
    ],
)
def test_verdicts(loss, stderr, want):
    assert PairedLoss("perplexity", 1, 1, loss, stderr, 10).verdict(0.01) == want


def test_how_many_items_decide():
    loss = PairedLoss("perplexity", 1, 1, 0.008, 0.004, 10)
    assert loss.items_needed(0.01) == 160
    assert PairedLoss("perplexity", 1, 1, 0.01, 0.004, 10).items_needed(0.01) is None
    assert PairedLoss("perplexity", 1, 1, 0.02, math.nan, 1).items_needed(0.01) is None


def test_one_item_has_no_error_and_decides_nothing():
    loss = perplexity_loss([2.0], [2.0])
    assert math.isnan(loss.stderr)
    assert loss.verdict(0.5) == "undecided"
    assert loss.within(0.01)


def test_an_infinite_nll_fails():
    loss = perplexity_loss([2.0, 2.0], [2.0, math.inf])
    assert loss.verdict(0.01) in ("fail", "undecided")
    assert not loss.within(0.01)
    assert not perplexity_loss([2.0, 2.0], [2.0, 1e6]).within(0.01)


def test_kl_is_its_mean():
    loss = kl_loss([0.01, 0.03], [100, 300])
    assert math.isclose(loss.loss, 0.025)
    assert "nats" in str(loss)


def test_the_worst_is_the_largest_and_nan_is_worse_than_all():
    small, large, bad = (PairedLoss("kl", 0, x, x, 0.0, 3) for x in (0.001, 0.2, math.nan))
    assert worst([small, large], 0.01) is large
    assert worst([large, bad, small], 0.01) is bad


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: perplexity_loss([1.0], [1.0, 2.0]), "1 items against 2"),
        (lambda: accuracy_loss([], []), "0 items"),
        (lambda: accuracy_loss([0, 0], [1, 0]), "positive"),
        (lambda: perplexity_loss([1.0, 2.0], [1.0, 2.0], [3, 0]), "positive number of tokens"),
        (lambda: worst([], 0.01), "nothing was measured"),
    ],
)
def test_what_cannot_be_compared_is_refused(call, words):
    with pytest.raises(Int4Error, match=words):
        call()
