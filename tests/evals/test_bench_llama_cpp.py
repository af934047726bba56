"""llama.cpp as a peer of the bench: its blocks, without it; its products and the path they took, where it is found."""

from __future__ import annotations

from ctypes import CDLL
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import torch

from torch_int4 import Int4Error, Int4Weight
from torch_int4.evals.bench import ggml, peers, points, run
from torch_int4.evals.bench.peers import llama_cpp

ROTATE = 1 << 16


@pytest.fixture
def library() -> CDLL:
    found = ggml.library()
    if found is None:
        pytest.skip(f"llama.cpp is not found: set {ggml.VARIABLE} to the folder of its libggml.so")
    return found


def decode(blocks: numpy.ndarray) -> torch.Tensor:  # type: ignore[type-arg]
    """Weights `[N, K]` of Q4_0 or Q4_1 blocks, one weight at a time, as ggml's scalar code reads them."""
    rows = []
    for row in blocks:
        values: list[float] = []
        for block in row:
            numbers = block[:-16].view(numpy.float16).astype(numpy.float32)
            scale, minimum = numbers if len(numbers) == 2 else (numbers[0], -8 * numbers[0])
            values += [scale * (byte & 15) + minimum for byte in block[-16:]]
            values += [scale * (byte >> 4) + minimum for byte in block[-16:]]
        rows.append(values)
    return torch.tensor(rows, dtype=torch.float32)


@pytest.mark.parametrize("group", [32, 64, 96, 128, -1])
@pytest.mark.parametrize("offset", points.OFFSETS)
def test_blocks_hold_the_weight(group: int, offset: str) -> None:
    weight = run.random_weight(points.WeightPoint(3, 384, group, offset))
    blocks = llama_cpp.q4_blocks(weight)
    assert blocks.dtype == numpy.uint8
    assert blocks.shape == (3, 12, 18 if offset == "symmetric" else 20)
    exact = offset == "symmetric"  # the minimum of Q4_1, zero * scale, is rounded to fp16
    torch.testing.assert_close(decode(blocks), weight.dequantize(), rtol=0, atol=0 if exact else 1e-4)


def test_one_block_byte_by_byte() -> None:
    codes = torch.arange(32, dtype=torch.uint8).remainder(16).flip(0)[None]
    weight = Int4Weight(codes, torch.tensor([[-1.5]], dtype=torch.float16), None, None, None, 32)
    expected = [0x00, 0xBE, *(17 * (15 - i) for i in range(16))]
    assert llama_cpp.q4_blocks(weight).ravel().tolist() == expected
    weight = replace(weight, codes=torch.cat([torch.full((1, 16), 3), torch.full((1, 16), 12)], 1).to(torch.uint8))
    assert llama_cpp.q4_blocks(weight).ravel().tolist() == [0x00, 0xBE, *[0xC3] * 16]


def test_weights_that_have_no_type() -> None:
    def kind(N: int, K: int, group: int) -> str | None:
        return llama_cpp.weight_type(run.random_weight(points.WeightPoint(N, K, group, "symmetric")))

    assert kind(8, 256, 128) == kind(8, 96, -1) == "Q4_0"
    assert kind(8, 40, -1) is kind(8, 80, 32) is kind(8, 160, 128) is None
    weight = run.random_weight(points.WeightPoint(8, 64, 32, "symmetric"))
    assert llama_cpp.weight_type(replace(weight, codebook="nf4")) is None
    assert llama_cpp.weight_type(replace(weight, bits=8)) is None
    assert llama_cpp.weight_type(replace(weight, perm=torch.arange(64))) is None


def test_a_folder_without_the_library_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ggml.VARIABLE, str(tmp_path))
    with pytest.raises(Int4Error, match=r"no libggml\.so there"):
        peers.missing()
    (tmp_path / "libggml.so").write_bytes(b"not a library")
    ggml._load.cache_clear()
    with pytest.raises(Int4Error, match=rf"libggml\.so does not work: .*set {ggml.VARIABLE}"):
        peers.builders(run.random_weight(points.WeightPoint(8, 64, 32, "symmetric")), ROTATE)


def test_without_the_library_the_bench_says_how_to_name_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_cpp, "library", lambda: None)
    assert any(ggml.VARIABLE in text for text in peers.missing())
    assert not any("llama" in name for name in peers.builders(some_weight(), ROTATE))


def some_weight(N: int = 64, group: int = 32, offset: str = "symmetric") -> Int4Weight:
    return run.random_weight(points.WeightPoint(N, 256, group, offset))


@pytest.mark.parametrize("rows", [1, 3, 4, 17])
@pytest.mark.parametrize("group", [32, 128, -1])
@pytest.mark.parametrize("offset", points.OFFSETS)
def test_products(library: CDLL, rows: int, group: int, offset: str) -> None:
    weight = some_weight(group=group, offset=offset)
    peer = llama_cpp.LlamaCpp(weight, ROTATE, library)
    assert peer.name == ("llama.cpp Q4_0" if offset == "symmetric" else "llama.cpp Q4_1")
    for seed in (0, 1):  # binding again replaces the graph
        x = torch.randn(rows, 256, generator=torch.Generator().manual_seed(seed))
        peer.bind(x)
        expected = x @ weight.dequantize().T
        y = peer.run()
        assert (y - expected).norm() <= peer.tolerance * expected.norm()
        assert torch.equal(peer.others, y)  # the last copy's


def test_the_graph_multiplies_every_copy(library: CDLL) -> None:
    peer = llama_cpp.LlamaCpp(some_weight(), ROTATE, library)
    peer.bind(torch.ones(2, 256))
    assert peer.ggml.ggml_graph_n_nodes(peer.graph) == peer.copies == -(-ROTATE // peer.nbytes)
    assert len(set(peer.weights)) == peer.copies


def test_the_path_that_ran_is_named(library: CDLL) -> None:
    repacked = llama_cpp.LlamaCpp(some_weight(), ROTATE, library).kernels()
    if "avx2" in Path("/proc/cpuinfo").read_text():
        assert repacked.endswith((" CPU_REPACK", " AMX"))
    assert (
        llama_cpp.LlamaCpp(some_weight(N=67), ROTATE, library).kernels().endswith(" CPU")
    )  # repacking takes 8 rows at once
