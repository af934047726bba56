"""The bench of attention on tiny caches: points, comparisons and reports; no assertion about time."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from torch_int4 import Int4Error, ops
from torch_int4.cli import app
from torch_int4.evals.bench import attention as bench
from torch_int4.evals.bench import attention_points, attention_report, roofline

ROTATE = 1 << 14
needs_avx2 = pytest.mark.skipif(not roofline.probe_names(), reason="the probes need AVX2")


def some_roofline() -> roofline.Roofline:
    """An imaginary machine that reads 10 GB/s."""
    return roofline.Roofline(read={"2 MiB": (1e10, 4, 0), "4 KiB": (5e9, 1, 0)}, huge_granted=1.0)


def row(kind: str, name: str, cache: str, min_s: float) -> bench.Row:
    point = attention_points.Point(kind, 4, 2, 16, 100, 100 if kind == "prefill" else 1)
    return bench.Row(point, name, name == "ours", cache, 1_000_000, 2, 3, min_s, 2 * min_s, 0.0, 1e10)


def test_standard_points() -> None:
    points = attention_points.select()
    assert len(points) == len(set(points)) == 2 * (3 + 2 + 4)
    assert {p.context for p in points if p.kind == "decode"} == {512, 4096, 16384}
    assert all(p.tokens == (p.context if p.kind == "prefill" else 1) for p in points)


def test_filters() -> None:
    points = attention_points.select(kinds=["decode"], contexts=[7], geometries=[(4, 2, 16)])
    assert points == [attention_points.Point("decode", 4, 2, 16, 7, 1)]
    assert points[0].label == "decode 7, 4/2x16"
    assert attention_points.parse_geometry("32/8X128") == (32, 8, 128)
    assert attention_points.parse_geometry("32x64") == (32, 32, 64)
    for text in ("32", "a/bxc", "4/0x16", "x"):
        with pytest.raises(Int4Error, match="geometry"):
            attention_points.parse_geometry(text)
    with pytest.raises(Int4Error, match="decode, prefill, append"):
        attention_points.select(kinds=["train"])
    with pytest.raises(Int4Error, match="multiple of kv heads"):
        attention_points.select(geometries=[(4, 3, 16)])
    with pytest.raises(Int4Error, match="context"):
        attention_points.select(kinds=["decode"], contexts=[0])


def test_a_step_stands_against_the_faster_torch_and_a_prompt_against_its_own_type() -> None:
    def speedups(kind: str) -> list[float | None]:
        rows = [row(kind, "ours", name, 1e-3) for name in ("fp32", "bf16", "int8")]
        peers = [row(kind, "torch", "fp32", 2e-3), row(kind, "torch", "bf16", 3e-3)]
        compared = bench.compare([*rows, *peers, replace(peers[0], point=attention_points.Point(kind, 1, 1, 2, 1, 1))])
        assert all(r.speedup is None for r in compared[3:])
        assert all((r.of_read is None) == (kind != "decode") for r in compared)
        return [r.speedup for r in compared[:3]]

    assert speedups("decode") == [2.0, 2.0, 2.0]
    assert speedups("prefill") == [2.0, 3.0, 2.0]
    [alone] = bench.compare([row("decode", "ours", "bf16", 2e-4)])
    assert alone.speedup is None
    assert alone.of_read == pytest.approx(0.5)


def test_operations_of_a_prompt_are_those_of_a_triangle() -> None:
    prompt = row("prefill", "ours", "bf16", 1.0)
    assert prompt.gop_s * 1e9 == pytest.approx(4 * 4 * 16 * 100 * 101 / 2)
    assert row("decode", "ours", "bf16", 1.0).gop_s * 1e9 == pytest.approx(4 * 4 * 16 * 100)


def test_every_contestant_is_measured_and_checked(isa: str) -> None:
    points = attention_points.select(contexts=[5, 33], geometries=[(4, 2, 16), (2, 2, 32)])
    result = bench.run(points, isa=isa, seconds=0, rotate=ROTATE, roofline=some_roofline())
    assert result.machine["isa"] == isa
    assert ops.isa() == isa
    assert {r.point for r in result.rows} == set(points)
    for r in result.rows:
        assert r.rounds >= 3
        assert 0 < r.min_s <= r.median_s
        assert r.copies * r.nbytes >= ROTATE or r.point.kind == "append"
        assert r.error < 0.03
        assert (r.speedup is not None) == (r.ours and r.point.kind != "append")
    for kind, count in (("decode", 5), ("prefill", 5), ("append", 3)):
        assert sum(r.point.kind == kind for r in result.rows) == 4 * count


def test_a_wrong_result_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "_torch_attention", lambda point: lambda q, k, v: q + 1)
    with pytest.raises(Int4Error, match="is off by"):
        bench.run(
            attention_points.select(kinds=["decode"], contexts=[5]), seconds=0, rotate=1, roofline=some_roofline()
        )


def test_reports() -> None:
    rows = [row("decode", "ours", "bf16", 1e-3), row("decode", "torch", "bf16", 3e-3), row("append", "ours", "int8", 1)]
    machine = {"cpu": "", "threads": 1, "cpus": 1, "load": 0.0, "version": "", "torch": "", "rotate_bytes": 0}
    result = bench.Result(machine, some_roofline(), bench.compare(rows))
    text = attention_report.markdown(result)
    assert "caches rotate through" in text
    assert "| 3.00 " in text
    assert attention_report.table(result).row_count == 4
    data = json.loads(json.dumps(attention_report.as_json(result)))
    assert [r["kind"] for r in data["rows"]] == ["decode", "decode", "append"]
    assert data["rows"][0]["gb_s"] == pytest.approx(1.0)
    assert data["roofs"]["read"]["2 MiB"]["bytes_per_s"] == 1e10


@needs_avx2
def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "rotation", lambda: ROTATE)
    monkeypatch.setattr(roofline.Roofline, "size", 4 << 20)
    threads = torch.get_num_threads()
    files = {"--json": tmp_path / "b.json", "--markdown": tmp_path / "b.md"}
    arguments = ["bench", "attention", "--context", "9", "--geometry", "4/2x16", "--seconds", "0", "--threads", "1"]
    try:
        result = CliRunner().invoke(app, arguments + [str(a) for pair in files.items() for a in pair])
    finally:
        torch.set_num_threads(threads)
    assert result.exit_code == 0, result.output
    assert "decode 9, 4/2x16" in result.output
    data = json.loads(files["--json"].read_text())
    assert data["machine"]["threads"] == 1
    assert {r["kind"] for r in data["rows"]} == {"decode", "prefill", "append"}
    assert "append 9" in files["--markdown"].read_text()


def test_command_names_its_errors() -> None:
    result = CliRunner().invoke(app, ["bench", "attention", "--kind", "train"])
    assert result.exit_code == 2
    assert "decode, prefill, append" in result.output
