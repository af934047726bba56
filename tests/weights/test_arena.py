"""Small weights that lie next to each other are the same weights."""

import copy
import pickle

import pytest
import torch
from tiny_models import llama
from torch import nn

from torch_int4 import Int4Linear, patch
from torch_int4.weights import arena

OPS = torch.ops.torch_int4


def linears(model):
    return [module for module in model.modules() if isinstance(module, Int4Linear)]


def storages(modules):
    return {t.untyped_storage().data_ptr() for m in modules for t in m.buffers() if t is not None}


@pytest.fixture
def anything_goes(monkeypatch):
    """Slabs of 4 KiB, so that tiny models fill several, and nothing is too little."""
    monkeypatch.setattr(arena, "SLAB", 4096)
    monkeypatch.setattr(arena, "LEAST", 1)


def made(symmetric=True):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(70, 33), nn.Linear(33, 100, bias=False), nn.Linear(100, 7), nn.Linear(7, 1))
    return patch(model, symmetric=symmetric, zeros="float" if not symmetric else "integer")


@pytest.mark.parametrize("symmetric", [True, False])
def test_weights_stay_what_they_were(anything_goes, monkeypatch, symmetric):
    with monkeypatch.context() as patching:
        patching.setattr(arena, "LEAST", 1 << 20)
        plain = made(symmetric)
    gathered = copy.deepcopy(plain)
    count = len(storages(linears(gathered)))
    assert arena.gather(linears(gathered)) > 0
    assert 1 < len(storages(linears(gathered))) < count
    x = torch.randn(3, 70)
    assert torch.equal(gathered(x), plain(x))
    for a, b in zip(linears(gathered), linears(plain), strict=True):
        for mine, other in zip(a.buffers(), b.buffers(), strict=True):
            assert torch.equal(mine, other)
            assert mine.is_contiguous()
            assert mine.data_ptr() % arena.LINE == 0


def test_copies_files_and_new_values(anything_goes, tmp_path):
    model = made()
    x = torch.randn(2, 70)
    want = model(x)
    torch.save(model, tmp_path / "model.pt")
    for other in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(tmp_path / "model.pt", weights_only=False),
    ):
        assert not storages(linears(other)) & storages(linears(model))
        for linear in linears(model):
            linear.packed.fill_(0)
        assert torch.equal(other(x), want)
        model.load_state_dict(other.state_dict())
        assert torch.equal(model(x), want)
    model.half()
    assert model(x.half()).isfinite().all()


def test_what_is_large_or_too_little_stays_where_it_is(monkeypatch):
    model = made()
    before = storages(linears(model))
    assert arena.gather(linears(model)) == 0
    assert arena.gather([]) == 0
    assert storages(linears(model)) == before
    monkeypatch.setattr(arena, "SMALL", 500)
    monkeypatch.setattr(arena, "LEAST", 1)
    places = {id(t): (t.data_ptr(), t.nbytes) for m in linears(model) for t in m.buffers()}
    large = {pointer for pointer, size in places.values() if size >= 500}
    assert 0 < len(large) < len(places)
    arena.gather(linears(model))
    assert large == storages(linears(model)) & {pointer for pointer, _ in places.values()}


def test_a_patched_model_has_fewer_pieces(anything_goes):
    model = patch(llama())
    modules = linears(model)
    assert len(storages(modules)) < len(modules)


def test_advice_needs_bytes():
    with pytest.raises(RuntimeError, match="memory must be uint8"):
        OPS.advise_huge_pages(torch.zeros(4))
    with pytest.raises(RuntimeError, match="memory must be contiguous"):
        OPS.advise_huge_pages(torch.zeros(8, dtype=torch.uint8)[::2])
    for size in (0, 1, 4095, 3 << 20):
        OPS.advise_huge_pages(torch.zeros(size, dtype=torch.uint8))
