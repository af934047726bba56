import pytest
import torch
from calibrating import KINDS, product_error, rows, statistics, weights

from torch_int4 import Int4Config, Int4Error
from torch_int4.recipes import gptq, rtn
from torch_int4.recipes.parts.block import FIRST, Inputs, row_factors
from torch_int4.recipes.parts.grid import Grid


def reference(w, gram, config):
    """Algorithm 1 of the paper in its plainest form: one input at a time, the inverse updated after each."""
    start = rtn.quantize(w, config)
    s, z = gptq.grid_of(start)
    size = w.shape[1] if config.group_size == -1 else config.group_size
    grid = Grid("symmetric" if config.symmetric else config.zeros)
    h = gram.double().clone()
    h.diagonal().add_(gptq.DAMPING * h.diagonal().mean())
    inverse, w = torch.linalg.inv(h), w.double().clone()
    codes = torch.zeros(w.shape, dtype=torch.uint8)
    for k in gram.diagonal().double().argsort(descending=True, stable=True).tolist():
        scale, zero = s[:, k // size, None], z[:, k // size, None]
        q = grid.encode(w[:, k, None].float(), scale, zero)
        codes[:, k] = q[:, 0].to(torch.uint8)
        error = (w[:, k] - grid.decode(q, scale, zero)[:, 0].double()) / inverse[k, k]
        w -= error[:, None] * inverse[k]
        inverse -= inverse[:, k, None] * inverse[k] / inverse[k, k]
    return codes


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("group", [32, -1])
def test_it_is_the_papers_algorithm(kind, group):
    x, w = rows(k=200), weights(8, 200)
    config = Int4Config(recipe="gptq", group_size=group, **KINDS[kind])
    got = gptq.quantize(w, config, inputs=statistics(x))
    want = reference(w, statistics(x).gram, config)
    # A weight on the edge between two codes may fall to either side, and changes what comes after it.
    assert (got.codes != want).float().mean() < 0.01


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("k", "group"), [(200, 32), (160, 128), (300, -1), (33, 32), (520, 256)])
def test_it_beats_rounding_by_far(kind, k, group):
    x, w = rows(k=k), weights(24, k)
    config = Int4Config(recipe="gptq", group_size=group, **KINDS[kind])
    got = gptq.quantize(w, config, inputs=statistics(x))
    plain = rtn.quantize(w, config)
    assert product_error(w, got, x) < 0.5 * product_error(w, plain, x)
    assert torch.equal(got.scales, plain.scales)
    assert got.perm is None


def test_on_inputs_that_it_has_not_seen():
    x = rows(count=2000)
    config = Int4Config(recipe="gptq", group_size=64)
    w = weights()
    got = gptq.quantize(w, config, inputs=statistics(x[:1000]))
    assert product_error(w, got, x[1000:]) < 0.7 * product_error(w, rtn.quantize(w, config), x[1000:])


def test_independent_inputs_leave_nothing_to_make_up_for():
    w, inputs = weights(), Inputs(200)
    inputs.add(torch.eye(200))
    config = Int4Config(recipe="gptq")
    assert torch.equal(gptq.quantize(w, config, inputs=inputs).codes, rtn.quantize(w, config).codes)


def test_rows_do_not_depend_on_each_other():
    x, w = rows(), weights(40)
    config = Int4Config(recipe="gptq", group_size=64)
    whole = gptq.quantize(w, config, inputs=statistics(x))
    part = gptq.quantize(w[7:20], config, inputs=statistics(x))
    assert (whole.codes[7:20] != part.codes).float().mean() < 0.01  # products of other shapes round differently


@pytest.mark.parametrize("dead", [slice(0, 40), slice(0, 200)])
def test_inputs_that_are_always_zero_are_rounded_to_nearest(dead):
    x, w = rows(), weights()
    x[:, dead] = 0
    config = Int4Config(recipe="gptq")
    got = gptq.quantize(w, config, inputs=statistics(x))
    assert torch.equal(got.codes[:, dead], rtn.quantize(w, config).codes[:, dead])


def test_no_inputs_at_all_is_rounding_to_nearest():
    config = Int4Config(recipe="gptq")
    assert torch.equal(
        gptq.quantize(weights(), config, inputs=Inputs(200)).codes, rtn.quantize(weights(), config).codes
    )


@pytest.mark.parametrize("factor", [1e-12, 1e-4, 1e4, 1e12])
def test_the_size_of_the_inputs_does_not_matter(factor):
    x, w = rows(), weights()
    config = Int4Config(recipe="gptq")
    want = gptq.quantize(w, config, inputs=statistics(x))
    got = gptq.quantize(w, config, inputs=statistics(x * factor))
    assert (got.codes != want.codes).float().mean() < 0.02


def test_fewer_rows_than_inputs_and_copies_of_inputs_are_no_trouble():
    x = rows(count=20)
    x[:, 50:100] = x[:, :50]
    config = Int4Config(recipe="gptq")
    got = gptq.quantize(weights(), config, inputs=statistics(x))
    assert product_error(weights(), got, x) < 0.3 * product_error(weights(), rtn.quantize(weights(), config), x)


def test_fp32_falls_back_to_fp64_where_it_does_not_do(monkeypatch):
    x = rows(count=20)
    config = Int4Config(recipe="gptq", group_size=64)
    want = gptq.quantize(weights(), config, inputs=statistics(x))
    monkeypatch.setattr(gptq, "DOUBLE", 0)
    tried = []
    real = gptq._upper_of_inverse

    def spy(h):
        tried.append(h.dtype)
        return None if h.dtype == torch.float32 else real(h)

    monkeypatch.setattr(gptq, "_upper_of_inverse", spy)
    got = gptq.quantize(weights(), config, inputs=statistics(x))
    assert tried == [torch.float32, torch.float64]
    assert torch.equal(got.codes, want.codes)


def test_what_is_not_positive_definite_is_damped_more():
    inputs = Inputs(64)
    inputs.gram = -5 * torch.ones(64, 64) + 6 * torch.eye(64)  # no Gram matrix has negative eigenvalues
    inputs.rows = 1
    got = gptq.quantize(weights(4, 64), Int4Config(recipe="gptq"), inputs=inputs)
    assert got.codes.shape == (4, 64)


def test_weights_on_their_own_grid_stay_there():
    config = Int4Config(recipe="gptq", **KINDS["float"])
    w = rtn.quantize(weights(16, 128), config).dequantize()
    got = gptq.quantize(w, config, inputs=statistics(rows(k=128)))
    assert torch.equal(got.dequantize(), w)


def test_the_inverse_is_computed_once_for_linears_with_one_input(monkeypatch):
    calls = []
    real = gptq._inverse_factor
    monkeypatch.setattr(gptq, "_inverse_factor", lambda *a: calls.append(1) or real(*a))
    inputs = statistics(rows())
    for seed in range(3):
        gptq.quantize(weights(seed=seed), Int4Config(recipe="gptq"), inputs=inputs)
    inputs.divide(torch.full((200,), 2.0))
    gptq.quantize(weights(), Int4Config(recipe="gptq"), inputs=inputs)
    assert len(calls) == 2


def test_refusals_name_the_weight():
    config = Int4Config(recipe="gptq")
    with pytest.raises(Int4Error, match=r"^a\.b: GPTQ needs the statistics"):
        gptq.quantize(weights(), config, name="a.b")
    with pytest.raises(Int4Error, match=r"^a\.b: GPTQ needs the statistics of its 200 inputs"):
        gptq.quantize(weights(), config, name="a.b", inputs=Inputs(64))
    bad = statistics(rows())
    bad.gram[3, 3] = float("nan")
    with pytest.raises(Int4Error, match=r"^a\.b: its inputs hold NaN"):
        gptq.quantize(weights(), config, name="a.b", inputs=bad)


def test_a_row_of_enormous_energy_does_not_drown_all_others():
    x, w = rows(count=800), weights()
    spoiled = x.clone()
    spoiled[3] = 3000 * torch.randn(200, generator=torch.Generator().manual_seed(5))
    config = Int4Config(recipe="gptq", group_size=64)
    want = product_error(w, gptq.quantize(w, config, inputs=statistics(x)), x)
    got = product_error(w, gptq.quantize(w, config, inputs=statistics(spoiled)), x)
    assert got < 1.5 * want
    assert statistics(x.zero_()).gram.count_nonzero() == 0


def test_the_first_row_of_a_window_keeps_its_product():
    """It is one of many, in a direction of its own, and every other token reads it."""
    windows = rows(count=800).view(8, 100, 200)
    windows[:, 0] = torch.randn(200, generator=torch.Generator().manual_seed(5))
    w, config = weights(), Int4Config(recipe="gptq", group_size=64)
    inputs = Inputs(200)
    inputs.add(windows)
    balanced = gptq.quantize(w, config, inputs=inputs)
    plain = gptq.quantize(w, config, inputs=statistics(windows.view(-1, 200)))
    first, rest = windows[:1, 0], windows[:, 1:].reshape(-1, 200)
    assert product_error(w, balanced, first) < 0.5 * product_error(w, plain, first)
    assert product_error(w, balanced, rest) < 1.2 * product_error(w, plain, rest)


@pytest.mark.parametrize("energy", [1e-3, 1.0, 1e5])
def test_first_rows_count_alike_whatever_their_energy(energy):
    windows = rows(count=400).view(4, 100, 200)
    windows[:, 0] *= energy**0.5
    balanced = windows * row_factors(windows)
    assert torch.allclose(balanced[:, 0].square().sum(), FIRST * balanced[:, 1:].square().sum(), rtol=1e-4)
    assert torch.equal(balanced[:, 1:], windows[:, 1:])


def test_windows_without_energy_or_of_one_row_are_left_as_they_are():
    for windows in (torch.zeros(2, 5, 8), torch.ones(6, 1, 8), torch.ones(6, 8)):
        assert torch.equal(row_factors(windows), torch.ones(*windows.shape[:-1], 1))
