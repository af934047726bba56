"""Loops cut out of assembly, and their simulation where llvm-mca is installed; no assertion about the figures' size."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from torch_int4 import Int4Error
from torch_int4.cli import app
from torch_int4.evals.bench import cycles

ROOT = Path(__file__).resolve().parents[2]
NESTED = """\
\tmovl\t$1, %eax
.L2:
\tincl\t%eax
.L3:
\tvpmaddubsw\t%ymm0, %ymm1, %ymm2
\tvpmaddubsw\t(%rax), %xmm1, %xmm16
\tjne\t.L3
\tje\t.L4
\tjmp\t.L2
.L4:
\tvfmadd231ps\t(%rax){1to16}, %zmm0, %zmm31
\tjb\t.L9
""".splitlines()


def compiler() -> str:
    found = shutil.which("c++") or shutil.which("g++")
    if found is None:
        pytest.skip("no C++ compiler")
    return found


def simulator() -> str:
    found = shutil.which("llvm-mca")
    if found is None:
        pytest.skip("no llvm-mca (Debian: llvm)")
    return found


def test_only_innermost_loops_are_taken() -> None:
    (loop,) = cycles.inner_loops(NESTED)
    assert loop == NESTED[3:7]
    assert cycles._products(loop, "int8") == 32 + 16
    assert cycles._products(loop, "fp32") == 0
    assert cycles._products(NESTED, "fp32") == 16


def test_models_are_named_by_their_ports() -> None:
    for first, model in {"Zn3AGU0": "Zn3", "SKXDivider": "SKX", "SPRPort00": "SPR", "ADLPPort00": "ADLP"}.items():
        assert cycles._model([first]) == model


def test_bottlenecks() -> None:
    pressure = {"P0": 4.0, "P1": 3.95, "P5": 1.0, "Load.\0": 0.5, "Load.\1": 0.5}
    assert cycles._bottleneck(pressure, 3.0, 4.1) == "P0 P1"
    assert cycles._bottleneck(pressure, 4.2, 4.3) == "dispatch"
    assert cycles._bottleneck(pressure, 3.0, 8.0) == "latency"
    assert cycles._bottleneck({"Load.\0": 2.0, "Load.\1": 2.0}, 1.0, 2.0) == "Load"


def test_what_is_missing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(Int4Error, match="--source"):
        cycles.kernel_files(tmp_path)
    with pytest.raises(Int4Error, match="no-such-program does not run"):
        cycles.known("znver3", "no-such-program")
    with pytest.raises(Int4Error, match="z80: not among"):
        cycles.run(ROOT, ["z80"], "no-such-program", "no-such-program")


@pytest.mark.parametrize("path", cycles.kernel_files(ROOT), ids=lambda path: path.stem)
def test_loops_are_the_kernels_own(path: Path) -> None:
    loops = cycles.compile_loops(path, compiler())
    assert {loop.kernels for loop in loops} == {path.stem}
    assert {loop.rows for loop in loops} >= {1, 4}
    for loop in loops:
        lines = loop.assembly.splitlines()
        label = lines[0].rstrip(":")
        assert re.fullmatch(rf"\tj\w+\t{re.escape(label)}", lines[-1])
        assert not any(line.endswith(":") for line in lines[1:]), "another label: not one straight body"
        products = sum(bool(cycles._PRODUCT[loop.compute].search(line)) for line in lines)
        traffic = sum(bool(re.search(r"\(%rsp.*%[xyz]mm|%[xyz]mm.*\(%rsp", line)) for line in lines)
        assert traffic <= products // 4, "accumulators on the stack: not the loop of the library"
        slab = 32 * 16 * loop.rows  # a step of integer loops: 32 inputs of 16 outputs
        if loop.compute == "fp32":
            assert slab % loop.products == 0
        else:
            panels = loop.products / slab
            several = loop.rows == 1 or (loop.loop == "tile" and path.stem == "avx512_vnni")
            assert panels in (2, 4) if several else panels == 1, "one row and wide tiles take several panels"


def test_command(tmp_path: Path) -> None:
    files = {"--json": tmp_path / "c.json", "--markdown": tmp_path / "c.md"}
    arguments = ["bench-cycles", "--source", str(ROOT), "--mca", simulator(), "--compiler", compiler()]
    arguments += ["--cpu", "znver3", "--cpu", "skylake-avx512", *(str(a) for pair in files.items() for a in pair)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    rows = json.loads(files["--json"].read_text())["rows"]
    assert {row["processor"] for row in rows if row["kernels"] == "avx2"} == {"znver3", "skylake-avx512"}
    assert {row["processor"] for row in rows if row["kernels"] == "avx512"} == {"skylake-avx512"}
    assert not any(row["kernels"] in ("avx512_vnni", "avx_vnni") for row in rows)
    for row in rows:
        assert 0 < row["throughput"] <= 1.01 * row["cycles"]
        assert row["uops"] > 0
    table = [line for line in files["--markdown"].read_text().splitlines() if line.startswith("| avx")]
    assert len(table) == len(rows)


def test_instructions_without_figures_give_no_row() -> None:
    loop = cycles.Loop("amx", "tile", "int8", 16, frozenset(), "\ttdpbsud\t%tmm2, %tmm1, %tmm0\n", 8192)
    assert cycles.simulate(loop, "sapphirerapids", simulator()) is None
