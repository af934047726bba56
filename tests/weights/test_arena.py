"""Small weights that lie next to each other are the same weights, packed where they stay."""

import copy
import pickle

import pytest
import torch
from oracle import random_weight
from tiny_models import llama
from torch import nn

import torch_int4
from torch_int4 import Int4Linear, patch
from torch_int4.weights import arena
from torch_int4.weights.arena import Arena, Size
from torch_int4.weights.packed import PackedWeight

OPS = torch.ops.torch_int4
KINDS = ({"kind": "symmetric"}, {"kind": "integer"}, {"kind": "float"}, {"codebook": "nf4"}, {"bits": 8})


def linears(model):
    return [module for module in model.modules() if isinstance(module, Int4Linear)]


def storages(modules):
    return {t.untyped_storage().data_ptr() for m in modules for t in m.buffers() if t is not None}


def places(model):
    """{first byte: bytes} of the packed tensors of a model."""
    held = [linear._buffers[name] for linear in linears(model) for name in ("packed", "packed_scales")]
    return {tensor.data_ptr(): tensor.nbytes for tensor in held}


@pytest.fixture
def anything_goes(monkeypatch):
    """Slabs of 4 KiB, so that tiny models fill several, and nothing is too little."""
    monkeypatch.setattr(arena, "SLAB", 4096)
    monkeypatch.setattr(arena, "LEAST", 1)


@pytest.fixture
def packed(monkeypatch):
    """{first byte: bytes} of the codes and scales of every weight that is packed."""
    found, pack = {}, PackedWeight.pack.__func__

    def watching(cls, weight, memory=None):
        made = pack(cls, weight, memory)
        found.update({tensor.data_ptr(): tensor.nbytes for tensor in (made.packed, made.scales)})
        return made

    monkeypatch.setattr(PackedWeight, "pack", classmethod(watching))
    return found


def made(symmetric=True):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(70, 33), nn.Linear(33, 100, bias=False), nn.Linear(100, 7), nn.Linear(7, 1))
    return patch(model, symmetric=symmetric, zeros="float" if not symmetric else "integer")


@pytest.mark.parametrize("symmetric", [True, False])
def test_weights_stay_what_they_were(anything_goes, monkeypatch, symmetric):
    with monkeypatch.context() as patching:
        patching.setattr(arena, "LEAST", 1 << 20)
        plain = made(symmetric)
    together = made(symmetric)
    assert 1 < len(storages(linears(together))) < len(storages(linears(plain)))
    x = torch.randn(3, 70)
    assert torch.equal(together(x), plain(x))
    for a, b in zip(linears(together), linears(plain), strict=True):
        for mine, other in zip(a.buffers(), b.buffers(), strict=True):
            assert torch.equal(mine, other)
            assert mine.is_contiguous()
            assert mine.data_ptr() % arena.LINE == 0


@pytest.mark.parametrize("least", [1, 1 << 20])
def test_every_kind_of_weight_has_the_same_bits_as_in_memory_of_its_own(monkeypatch, least):
    monkeypatch.setattr(arena, "LEAST", least)
    weights = [random_weight(17 + i, 72, 32, **fields) for i, fields in enumerate(KINDS)]
    weights[2].perm = torch.randperm(72, generator=torch.Generator().manual_seed(0))
    memory = Arena(map(Size.of, weights))
    together = [PackedWeight.pack(weight, memory.take) for weight in weights]
    for weight, one in zip(weights, together, strict=True):
        other = PackedWeight.pack(weight)
        assert one.check().weight_type == other.weight_type
        for mine, alone in zip(one.tensors().values(), other.tensors().values(), strict=True):
            assert (mine is None and alone is None) or torch.equal(mine, alone)
        assert torch.equal(one.to_weight().codes, weight.codes)
    storages_of_codes = {one.packed.untyped_storage().data_ptr() for one in together}
    assert (len(storages_of_codes) == 1) == (least == 1)


def test_a_slab_is_as_large_as_what_was_expected(anything_goes):
    weights = [random_weight(32, 64, 32, "integer") for _ in range(3)]
    memory = Arena(map(Size.of, weights))
    made = [PackedWeight.pack(weight, memory.take) for weight in weights]
    assert made[0].packed.untyped_storage().nbytes() == sum(w.packed.nbytes + w.offsets.nbytes for w in made)
    assert made[0].scales.untyped_storage().nbytes() == sum(w.scales.nbytes for w in made)


def test_what_was_not_expected_has_a_place_too(anything_goes):
    memory = Arena([Size(16, 64, 32, "int4"), Size(16, 64, -1, "int4")])
    for _ in range(4):
        weight = random_weight(48, 96, 32, "float")
        weight.scales, weight.offsets = weight.scales.float(), weight.offsets.float()
        one, other = PackedWeight.pack(weight, memory.take), PackedWeight.pack(weight)
        assert all(map(torch.equal, (one.packed, one.scales, one.offsets), (other.packed, other.scales, other.offsets)))


def test_what_is_large_or_too_little_has_memory_of_its_own(anything_goes, monkeypatch):
    monkeypatch.setattr(arena, "SMALL", 500)
    model = made()
    alone = [t for m in linears(model) for t in m.buffers() if t.untyped_storage().nbytes() == t.nbytes]
    assert {t.nbytes for t in alone} >= {t.nbytes for m in linears(model) for t in m.buffers() if t.nbytes >= 500}
    assert len(alone) < sum(1 for m in linears(model) for _ in m.buffers())
    monkeypatch.setattr(arena, "LEAST", 1 << 20)
    assert all(t.untyped_storage().nbytes() == t.nbytes for m in linears(made()) for t in m.buffers())


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


def test_a_patched_model_has_fewer_pieces(anything_goes):
    model = patch(llama())
    modules = linears(model)
    assert len(storages(modules)) < len(modules)


@pytest.mark.parametrize("how", ["patched", "quantized while loading", "read"])
def test_packed_weights_stay_where_they_were_packed(anything_goes, packed, tmp_path, how):
    model = llama(tied=False)
    if how == "patched":
        model = patch(model)
    else:
        (patch(model) if how == "read" else model).save_pretrained(tmp_path)
        packed.clear()
        model = torch_int4.from_pretrained(tmp_path)
    assert len(places(model)) == 2 * len(linears(model))
    assert places(model) == packed
    assert len(storages(linears(model))) < len(linears(model))


def test_packing_into_memory_checks_it():
    weight = random_weight(16, 64, 32, "integer")
    given = (weight.codes, weight.scales, weight.zeros, None)
    codes, stream = torch.empty(1, 8, 64, dtype=torch.uint8), torch.empty(1, 2, 16, dtype=weight.scales.dtype)
    zeros, options = torch.empty(1, 2, 16, dtype=torch.uint8), {"group_size": 32}
    OPS.pack_into(*given, codes, stream, zeros, **options)
    for wrong in (
        (codes[:, :7], stream, zeros),
        (codes.float(), stream, zeros),
        (codes, stream.float(), zeros),
        (codes, stream, None),
        (codes, stream, stream.clone()),
        (codes, stream.transpose(0, 1), zeros),
    ):
        with pytest.raises(RuntimeError, match="torch_int4: "):
            OPS.pack_into(*given, *wrong, **options)


def test_advice_needs_bytes():
    with pytest.raises(RuntimeError, match="memory must be uint8"):
        OPS.advise_huge_pages(torch.zeros(4))
    with pytest.raises(RuntimeError, match="memory must be contiguous"):
        OPS.advise_huge_pages(torch.zeros(8, dtype=torch.uint8)[::2])
    for size in (0, 1, 4095, 3 << 20):
        OPS.advise_huge_pages(torch.zeros(size, dtype=torch.uint8))
