"""The bench on tiny shapes: points, roofs, peers' results and reports; no assertion about time."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from torch_int4 import Int4Error, ops
from torch_int4.cli import app
from torch_int4.evals.bench import contestants, peers, points, report, roofline, run
from torch_int4.evals.bench.peers import dense, onnx_runtime

ROTATE = 1 << 16
needs_avx2 = pytest.mark.skipif(not roofline.probe_names(), reason="the probes need AVX2")
needs_matplotlib = pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="needs matplotlib")


def some_roofline() -> roofline.Roofline:
    """Limits of an imaginary machine: 10 GB/s, and 100 billion a second of everything else."""
    roofs = (roofline.roof_name(isa, compute) for isa in ops.isas(only_supported=False) for compute in points.COMPUTE)
    peaks = dict.fromkeys(filter(None, [*roofs, roofline.ISSUE]), 1e11)
    return roofline.Roofline(read={"2 MiB": (1e10, 4, 0), "4 KiB": (5e9, 1, 0)}, peaks=peaks, huge_granted=1.0)


def row(name: str, min_s: float, *, rows: int = 1, compute: str = "int8", kernels: str = "avx2") -> run.Row:
    point = points.Point(points.WeightPoint(1000, 1000, 32, "symmetric"), rows, compute)
    is_ours = name == "ours"
    return run.Row(point, name, is_ours, kernels, 1_000_000, 2, 3, min_s, 2 * min_s, 0.0, 4e9, 5e10)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> run.Result:
    """Two points for every kernel set and peer of this machine, against imaginary roofs."""
    monkeypatch.setattr(roofline.Roofline, "refresh", lambda self, isa: None)
    monkeypatch.setattr(roofline.Roofline, "issue_now", lambda self: 5e10)
    chosen = points.select(rows=[1, 17], shapes=[(48, 128)], groups=[32])
    return run.run(chosen, isas=ops.isas(), seconds=0, rotate=ROTATE, roofline=some_roofline())


def test_quick_points_are_the_goals_points() -> None:
    quick = points.select()
    assert {p.rows for p in quick} == {1, 4, 16, 128, 512}
    assert {p.weight.group for p in quick} == {32, 128}
    assert [p.rows for p in quick if p.compute == "fp32"] == [512]
    assert len(quick) == len(set(quick))


def test_full_points_are_the_whole_grid() -> None:
    full = points.select(full=True)
    sizes = [len(s) for s in (points.ROWS, points.SHAPES, points.GROUPS, points.COMPUTE, points.OFFSETS)]
    assert len(full) == len(set(full)) == math.prod(sizes)
    assert len(points.by_weight(full)) == len(full) // len(points.ROWS) // len(points.COMPUTE)


def test_filters_replace_the_values_of_a_set() -> None:
    chosen = points.select(rows=[3], shapes=[(64, 32)], groups=[-1], compute=["bf16"], offsets=["integer"])
    assert chosen == [points.Point(points.WeightPoint(64, 32, -1, "integer"), 3, "bf16")]
    assert chosen[0].operations == 2 * 3 * 64 * 32
    assert chosen[0].weight.label == "64x32 row asym"
    assert {p.compute for p in points.select(compute=["fp32"])} == {"fp32"}
    assert points.parse_shape("11008X4096") == (11008, 4096)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"groups": [48]}, "group 48"),
        ({"rows": [0]}, "rows"),
        ({"compute": ["int3"]}, "int8x2"),
        ({"offsets": ["float"]}, "symmetric"),
    ],
)
def test_wrong_filters_say_what_is_right(arguments: dict[str, list[object]], message: str) -> None:
    with pytest.raises(Int4Error, match=message):
        points.select(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["4096", "4096x", "0x32", "axb", "1x2x3"])
def test_wrong_shapes(text: str) -> None:
    with pytest.raises(Int4Error, match="11008x4096"):
        points.parse_shape(text)


def test_copies_reach_the_rotation() -> None:
    assert contestants.copies_of(100, 1000) == 10
    assert contestants.copies_of(300, 1000) == 4
    assert contestants.copies_of(5000, 1000) == 2
    layers = contestants.ours(run.random_weight(points.WeightPoint(48, 128, 32, "integer")), ROTATE)
    assert sum(layer.nbytes for layer in layers) >= ROTATE
    assert len({layer.packed.data_ptr() for layer in layers}) == len(layers)
    assert run.rotation() >= 256 << 20


@pytest.mark.parametrize("offset", points.OFFSETS)
@pytest.mark.parametrize("group", [32, 64, 128])
def test_every_peer_multiplies_the_same_weight(group: int, offset: str) -> None:
    weight = run.random_weight(points.WeightPoint(64, 256, group, offset))
    x = torch.randn(5, 256, generator=torch.Generator().manual_seed(0))
    expected = x @ weight.dequantize().T
    builders = peers.builders(weight, ROTATE)
    assert {"torch fp32", "torch bf16"} <= set(builders)
    for name, build in builders.items():
        peer = build()
        peer.bind(x)
        y = peer.run().float()
        assert peer.name == name
        assert peer.nbytes * peer.copies >= ROTATE
        assert y.shape == expected.shape
        assert (y - expected).norm() <= peer.tolerance * expected.norm(), name


def test_peers_leave_out_what_they_cannot_do() -> None:
    for group in (1024, -1):
        names = peers.builders(run.random_weight(points.WeightPoint(32, 2048, group, "symmetric")), ROTATE)
        assert set(names) - {"llama.cpp Q4_0"} == {"torch fp32", "torch bf16"}


def test_onnxruntime_keeps_every_copy() -> None:
    """Equal nodes would be merged, and the remaining one would be measured in the cache."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    weight = run.random_weight(points.WeightPoint(64, 256, 32, "integer"))
    peer = peers.builders(weight, ROTATE)[onnx_runtime.OnnxRuntime.name]()
    assert isinstance(peer, onnx_runtime.OnnxRuntime)
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(0))
    first, *others = (torch.from_numpy(y) for y in peer.session.run(None, {"x": x.numpy()}))
    assert len(others) + 1 == peer.copies > 2
    for i, y in enumerate(others, start=1):
        torch.testing.assert_close(y, first.roll(i, 1))
        assert not torch.equal(y, first)


def test_rows_name_the_kernels_that_ran(measured: run.Result) -> None:
    mine = [r for r in measured.rows if r.ours]
    assert [r.kernels for r in mine] == ops.isas() * 2
    assert all(r.contestant == f"torch_int4 {r.kernels}" for r in mine)
    assert all(r.rounds >= run.MIN_ROUNDS and 0 < r.min_s <= r.median_s for r in measured.rows)
    assert all(r.nbytes * r.copies >= ROTATE for r in measured.rows)
    assert all(r.best_peer and r.speedup for r in mine)
    assert all(r.best_peer is None and r.roof is None for r in measured.rows if not r.ours)


def test_the_kernels_in_use_come_back() -> None:
    before = ops.isa()
    chosen = points.select(rows=[1], shapes=[(16, 32)], groups=[32])
    arguments = {"seconds": 0.0, "rotate": ROTATE, "roofline": some_roofline(), "with_peers": False}
    with pytest.raises(Int4Error, match="TORCH_INT4_ISA=z80 is unknown"):
        run.run(chosen, isas=["reference", "z80"], **arguments)  # type: ignore[arg-type]
    assert ops.isa() == before


def test_a_wrong_result_stops_the_bench(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense.Dense, "run", lambda self: torch.zeros(self.x.shape[0], 16))
    chosen = points.select(rows=[1], shapes=[(16, 32)], groups=[32])
    with pytest.raises(Int4Error, match=r"torch bf16: its result is off by 1 "):
        run.run(chosen, seconds=0, rotate=ROTATE, roofline=some_roofline())


def test_ratios_to_the_best_peer() -> None:
    ours, slow, fast = run.compare([row("ours", 1e-3), row("slow", 4e-3), row("fast", 2e-3)], some_roofline())
    assert (ours.best_peer, ours.speedup) == ("fast", 2.0)
    assert slow.speedup is None
    assert fast.speedup is None
    assert run.compare([row("ours", 1e-3)], some_roofline())[0].speedup is None


@pytest.mark.parametrize(
    ("rows", "compute", "kernels", "roof", "share"),
    [
        (1, "int8", "avx2", "read, 2 MiB pages", 0.1),
        (4, "int8", "avx2", "read, 2 MiB pages", 0.1),
        (4, "fp32", "avx2", "read, 2 MiB pages", 0.1),
        (8, "fp32", "avx2", "fma_256", 0.16),
        (16, "int8", "avx2", "maddubs_add16_256", 0.32),
        (16, "int8x2", "avx2", "maddubs_add16_256 / 2", 0.64),
        (16, "int8", "avx512_vnni", "dpbusd_512", 0.32),
        (16, "bf16", "avx512", "fma_512", 0.32),
        (1, "int8", "reference", "read, 2 MiB pages", 0.1),
        (16, "int8", "reference", None, None),
    ],
)
def test_roofs(rows: int, compute: str, kernels: str, roof: str | None, share: float | None) -> None:
    (found,) = run.compare([row("ours", 1e-3, rows=rows, compute=compute, kernels=kernels)], some_roofline())
    assert found.roof == roof
    assert found.of_roof == pytest.approx(share)
    assert found.of_read == (pytest.approx(0.25) if rows <= 4 else None)  # 1 MB in 1 ms, where the loop read 4 GB/s
    assert found.of_issue == pytest.approx(0.5)


def test_reports_hold_every_row(measured: run.Result) -> None:
    assert report.table(measured).row_count == len(measured.rows) + 1  # and a gap between the points
    text = report.markdown(measured)
    assert sum(line.startswith("| 48x128 g32") for line in text.splitlines()) == len(measured.rows)
    data = json.loads(json.dumps(report.as_json(measured), allow_nan=False))
    assert [r["kernels"] for r in data["rows"]] == [r.kernels for r in measured.rows]
    assert data["rows"][0].keys() >= {"N", "K", "group", "offset", "rows", "compute", "min_s", "median_s", "gb_s"}
    assert data["roofs"]["read"]["2 MiB"]["bytes_per_s"] == 1e10


def test_weights_from_a_cache_are_called_out() -> None:
    def notes(min_s: float) -> str:
        machine = {"cpu": "", "threads": 1, "cpus": 1, "load": 0.0, "version": "", "torch": "", "rotate_bytes": 0}
        return "\n".join(report.machine_lines(run.Result(machine, some_roofline(), [row("fast", min_s)])))

    assert "from a cache: fast" in notes(5e-5)
    assert "cache" not in notes(2e-4)


@needs_matplotlib
def test_plot_is_a_picture(measured: run.Result, tmp_path: Path) -> None:
    report.plot(measured, tmp_path / "roofline.png")
    assert (tmp_path / "roofline.png").read_bytes().startswith(b"\x89PNG")


def test_plot_without_matplotlib_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: None)
    result = CliRunner().invoke(app, ["bench", "--plot", "x.png"])
    assert result.exit_code == 2
    assert "pip install matplotlib" in result.output


@needs_avx2
def test_probes_measure_something() -> None:
    limits = roofline.Roofline(size=4 << 20).start(repeats=1)
    assert set(limits.read) == set(roofline.PAGES)
    assert set(limits.peaks) == set(roofline.probe_names())
    assert all(peak > 0 for peak in limits.peaks.values())
    for isa in ops.isas():
        limits.refresh(isa)
        integer = limits.peak(isa, "int8")
        assert (integer is None) == (not roofline.roof_name(isa, "int8"))
    assert 0 < limits.read_now() <= limits.bandwidth().per_second or limits.read["2 MiB"] < limits.read["4 KiB"]
    assert limits.bandwidth().per_second == max(speed for speed, *_ in limits.read.values())
    assert 0 < limits.issue_now() <= limits.peaks[roofline.ISSUE]


@needs_avx2
def test_probes_reject_what_they_cannot_run() -> None:
    with pytest.raises(RuntimeError, match="no probe 'nothing'"):
        torch.ops.torch_int4.probe_compute("nothing", 1)
    with pytest.raises(RuntimeError, match="compute must be int8, bf16 or fp32, not 'int4'"):
        torch.ops.torch_int4.probe_roof("avx2", "int4")
    with pytest.raises(RuntimeError, match="iterations"):
        torch.ops.torch_int4.probe_compute("fma_256", 0)
    with pytest.raises(RuntimeError, match="multiple"):
        torch.ops.torch_int4.probe_read(torch.zeros(100, dtype=torch.uint8), 1, 0)
    with pytest.raises(RuntimeError, match="streams"):
        torch.ops.torch_int4.probe_read(torch.zeros(4096, dtype=torch.uint8), 0, 0)


@needs_avx2
def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "rotation", lambda: ROTATE)
    monkeypatch.setattr(roofline.Roofline, "size", 4 << 20)
    threads = torch.get_num_threads()
    files = {"--json": tmp_path / "b.json", "--markdown": tmp_path / "b.md"}
    arguments = ["bench", "--rows", "2", "--shape", "32x64", "--group", "32", "--seconds", "0", "--threads", "1"]
    try:
        result = CliRunner().invoke(app, arguments + [str(a) for pair in files.items() for a in pair])
    finally:
        torch.set_num_threads(threads)
    assert result.exit_code == 0, result.output
    assert "32x64 g32" in result.output
    data = json.loads(files["--json"].read_text())
    assert data["machine"]["threads"] == 1
    assert {r["rows"] for r in data["rows"]} == {2}
    assert "32x64 g32" in files["--markdown"].read_text()
