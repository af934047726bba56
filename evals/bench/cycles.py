"""Cycles of the inner loops on processors that are not at hand, as llvm-mca simulates them.

Each kernel file of a source checkout is compiled with small functions in place of its table, one for each inner loop;
the loops are cut out of the compiler's assembly as they are, so nothing is measured that the library does not run.
llvm-mca knows ports, latencies and dependencies; caches, page walks and the decoder do not exist for it.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch_int4.errors import Int4Error
from torch_int4.support.markdown import markdown_table

_AVX2 = frozenset({"avx2", "fma", "f16c"})
_AVX512 = _AVX2 | {"avx512f", "avx512bw", "avx512dq", "avx512vl"}
_AMX = {"amx-tile", "amx-int8", "amx-bf16"}
# Features of each processor, of those that kernel files ask for: llvm-mca simulates any instruction on any model.
PROCESSORS: dict[str, frozenset[str]] = {
    "haswell": _AVX2,
    "skylake-avx512": _AVX512,
    "icelake-server": _AVX512 | {"avx512vnni"},
    "alderlake": _AVX2 | {"avxvnni"},
    "sapphirerapids": _AVX512 | {"avx512vnni", "avxvnni"} | _AMX,
    "znver3": _AVX2,
    "znver4": _AVX512 | {"avx512vnni"},
}
DEFAULT = ("znver3", "znver4", "icelake-server", "sapphirerapids", "alderlake")
LOOPS = {"one": "int8", "few": "int8", "tile": "int8", "float": "fp32"}  # functions of the driver, and their compute
FLAGS = ("-O3", "-g0", "-std=c++17", "-ffp-contract=off", "-fno-asynchronous-unwind-tables")  # those of setup.py

# In place of a kernel file's table: its own loops for int4 weights, each in a function that can be found by its name.
_DRIVER = """
using Loops = Int8Loops<{V}, WeightType::kInt4, Offset::kSymmetric>;
using Tiles = TileLoops<{V}, WeightType::kInt4, Offset::kSymmetric>;
using Block = Tiles::Weights<{V}::kTileWidth>;
}}
extern "C" {{
#define TI4_ROWS(name, rows) extern const int ti4_rows_##name; const int ti4_rows_##name = rows;
TI4_ROWS(one, 1) TI4_ROWS(few, 4) TI4_ROWS(tile, {V}::kTileRows) TI4_ROWS(float, {V}::kFloatRows)
void ti4_one(const PackedWeight& w, const QuantizedRows& a, const Output& out) {{
  OneRow<{V}, WeightType::kInt4, Offset::kSymmetric>::panels<0, {V}::kRowStreams>(w, a, 0, 1, out);
}}
void ti4_few(const PackedWeight& w, const QuantizedRows& a, const Output& out, const Block& block,
              const Tiles::Sums& sums) {{
  if constexpr ({V}::kDirectRows >= 4) Loops::direct_panels<4, 1>(w, a, 0, 0, 0, out);
  else Tiles::tile<{V}::kTileWidth, 4, 0, kQuads>(block, a, a.codes, 0, sums);
}}
void ti4_tile(const Block& block, const QuantizedRows& a, const Tiles::Sums& sums) {{
  Tiles::tile<{V}::kTileWidth, {V}::kTileRows, 0, kQuads>(block, a, a.codes, 0, sums);
}}
void ti4_float(const float* weights, int64_t n, const float* x, int64_t step, float* c) {{
  FloatLoops<{V}, WeightType::kInt4>::tile<{V}::kFloatRows>(weights, n, x, step, c);
}}
}}
namespace {{
"""
_PRODUCT = {"int8": re.compile(r"vpmaddubsw|vpdpbusd"), "fp32": re.compile(r"vfn?madd\d+ps")}
_WIDTH = {"x": 16, "y": 32, "z": 64}  # bytes


@dataclass(frozen=True)
class Loop:
    """An inner loop: its instructions, and the multiplications of one turn."""

    kernels: str
    loop: str  # its function in the driver
    compute: str
    rows: int
    features: frozenset[str]
    assembly: str
    products: int


@dataclass(frozen=True)
class Row:
    """A loop on a processor. Cycles and micro-operations are those of 128 weights times one row of the input.

    `cycles` is the simulation of many turns; `throughput` what the busiest unit alone would allow. Where `cycles` is
    larger, llvm-mca picked ports badly, or turns wait for each other's results ("latency"): kernels restart such chains
    with every block of 32 to 128 inputs, so processors overlap them, and the true cost lies between the two.
    """

    kernels: str
    loop: str
    compute: str
    rows: int
    processor: str
    model: str
    cycles: float
    throughput: float
    uops: float
    bottleneck: str


HEADER = ("kernels", "loop", "compute", "rows", "processor", "model", "cycles", "throughput", "uops", "bottleneck")


def run(source: Path, processors: Sequence[str], mca: str, compiler: str) -> tuple[list[Row], list[str]]:
    """Every loop on every processor that has its instructions (DEFAULT if none is named), and what to know about it.

    Raises:
        Int4Error: for a processor that is unknown here or to this llvm-mca, or if a program is missing or fails.
    """
    for name in processors:
        if name not in PROCESSORS or not known(name, mca):
            raise Int4Error(f"{name}: not among {', '.join(PROCESSORS)}, or unknown to {mca}; a newer one may know it")
    chosen = [name for name in processors or DEFAULT if known(name, mca)]
    notes = [f"{mca}: {version(mca)}; {compiler}: {_run([compiler, '--version'], '', 'no compiler').splitlines()[0]}"]
    if absent := [name for name in processors or DEFAULT if name not in chosen]:
        notes.append(f"unknown to this llvm-mca: {', '.join(absent)}")
    rows = []
    for path in kernel_files(source):
        for loop in compile_loops(path, compiler):
            for name in chosen:
                if not loop.features <= PROCESSORS[name]:
                    continue
                row = simulate(loop, name, mca)
                rows += [row] if row else []
                notes += [] if row else [f"{loop.kernels} on {name}: LLVM has no figures for its instructions"]
    notes.append("left out, as their loops are their own: " + ", ".join(_others(source)))
    return rows, list(dict.fromkeys(notes))


def kernel_files(source: Path) -> list[Path]:
    """Kernel files of a checkout that are built on the shared loops.

    Raises:
        Int4Error: if `source` is no checkout.
    """
    files = sorted((source / "csrc/kernels").glob("*.cpp"))
    if not files:
        raise Int4Error(f"{source}/csrc/kernels has no kernels: give the folder of a source checkout with --source")
    return [path for path in files if "TI4_KERNELS(" in path.read_text(encoding="utf-8")]


def _others(source: Path) -> list[str]:
    return [path.stem for path in sorted((source / "csrc/kernels").glob("*.cpp")) if path not in kernel_files(source)]


def compile_loops(path: Path, compiler: str) -> list[Loop]:
    """The inner loops of a kernel file, as the compiler makes them.

    Raises:
        Int4Error: if the file does not compile, or a loop cannot be told from others.
    """
    text = path.read_text(encoding="utf-8")
    table = re.search(r"^IsaKernels kernels = TI4_KERNELS\(\"(\w+)\", \d+, (\w+)\);$", text, re.MULTILINE)
    target = re.search(r'^TI4_TARGET\("([^"]+)"\)$', text, re.MULTILINE)
    if table is None or target is None:
        raise Int4Error(f"{path}: no TI4_TARGET and TI4_KERNELS on lines of their own")
    name, V = table.groups()
    driver = text[: table.start()] + _DRIVER.format(V=V) + text[table.end() :]
    driver = re.sub(r"^TI4_REGISTER.*$", "", driver, flags=re.MULTILINE)
    command = [compiler, *FLAGS, f"-I{path.parents[1]}", "-x", "c++", "-S", "-o", "-", "-"]
    assembly = _run(command, driver, f"{path.name} does not compile with {compiler}")
    features = frozenset(target[1].split(","))
    loops = (_loop(name, kind, compute, features, assembly) for kind, compute in LOOPS.items())
    # Where few rows have no loop of their own, theirs is the tile's.
    return list({(loop.compute, loop.rows, loop.assembly.count("\n")): loop for loop in loops}.values())


def inner_loops(lines: Sequence[str]) -> Iterator[list[str]]:
    """Lines from a label to the backward jump to it, where no other such loop lies inside."""
    labels = {line[:-1]: i for i, line in enumerate(lines) if re.fullmatch(r"\.L\w+:", line)}
    jumps = ((i, re.match(r"\tj\w+\t(\.L\w+)", line)) for i, line in enumerate(lines))
    spans = [(labels[jump[1]], i) for i, jump in jumps if jump and labels.get(jump[1], i) < i]
    for start, end in spans:
        if not any(span != (start, end) and start <= span[0] and span[1] <= end for span in spans):
            yield list(lines[start : end + 1])


def simulate(loop: Loop, processor: str, mca: str) -> Row | None:
    """One loop on one processor; None where its model has no figures for an instruction of the loop.

    Raises:
        Int4Error: if llvm-mca fails.
    """
    command = [mca, "-mtriple=x86_64", f"-mcpu={processor}", "--json"]
    data = json.loads(_run(command, loop.assembly, f"{mca} cannot simulate {loop.kernels} on {processor}"))
    (region,) = data["CodeRegions"]
    infos = region["InstructionInfoView"]["InstructionList"]
    # Default figures of instructions that nobody has described.
    if any(info["hasUnmodeledSideEffects"] and info["Latency"] >= 100 for info in infos):
        return None
    summary, names = region["SummaryView"], data["TargetInfo"]["Resources"]
    pressure = {
        names[entry["ResourceIndex"]]: entry["ResourceUsage"]
        for entry in region["ResourcePressureView"]["ResourcePressureInfo"]
        if entry["InstructionIndex"] == len(infos)
    }
    turns, scale = summary["Iterations"], 128 / loop.products
    cycles, uops = summary["TotalCycles"] / turns, summary["TotaluOps"] / turns
    return Row(
        kernels=loop.kernels,
        loop=loop.loop,
        compute=loop.compute,
        rows=loop.rows,
        processor=processor,
        model=_model(names),
        cycles=cycles * scale,
        throughput=summary["BlockRThroughput"] * scale,
        uops=uops * scale,
        bottleneck=_bottleneck(pressure, uops / summary["DispatchWidth"], cycles),
    )


def version(mca: str) -> str:
    """The version of llvm-mca, in its own words."""
    text = _run([mca, "--version"], "", f"{mca} does not run")
    return next((line.strip() for line in text.splitlines() if "version" in line), "unknown version")


def known(processor: str, mca: str) -> bool:
    """Whether this llvm-mca has the processor; it simulates a default one for a name it does not know."""
    command = [mca, "-mtriple=x86_64", f"-mcpu={processor}"]
    try:
        result = subprocess.run(command, input="nop\n", capture_output=True, text=True, check=False)
    except OSError as error:
        raise Int4Error(
            f"{mca} does not run: {error}; it comes with LLVM (Debian: llvm), name it with --mca"
        ) from error
    return "not a recognized processor" not in result.stderr


def cells(row: Row) -> tuple[str, ...]:
    """A row as text, in the order of HEADER."""
    return tuple(f"{value:.2f}" if isinstance(value, float) else str(value) for value in asdict(row).values())


def markdown(rows: Sequence[Row]) -> str:
    """All rows as a table."""
    return markdown_table(HEADER, [cells(row) for row in rows])


def as_json(rows: Sequence[Row], notes: Sequence[str]) -> dict[str, Any]:
    """All rows as plain data."""
    return {"notes": list(notes), "rows": [asdict(row) for row in rows]}


def _loop(name: str, kind: str, compute: str, features: frozenset[str], assembly: str) -> Loop:
    rows = re.search(rf"^ti4_rows_{kind}:\n\s+\.long\s+(\d+)$", assembly, re.MULTILINE)
    body = re.search(rf"^ti4_{kind}:\n(.*?)^\t\.size\tti4_{kind},", assembly, re.MULTILINE | re.DOTALL)
    loops = [loop for loop in inner_loops(body[1].splitlines() if body else []) if _products(loop, compute)]
    counts = {_products(loop, compute) for loop in loops}
    if rows is None or len(counts) != 1:  # copies of one loop, for each type of scales, do the same work
        raise Int4Error(f"{name}: cannot tell which loop of {kind} is the product's: {sorted(counts)}; try another CXX")
    return Loop(name, kind, compute, int(rows[1]), features, "\n".join(loops[0]) + "\n", counts.pop())


def _products(lines: Sequence[str], compute: str) -> int:
    """Multiplications of weights in one turn of a loop: one per byte of an integer product, or per float of an FMA."""
    found = (line for line in lines if _PRODUCT[compute].search(line))
    widths = (_WIDTH[line.rpartition("mm")[0][-1]] for line in found)
    return sum(widths) // (4 if compute == "fp32" else 1)


def _model(resources: Sequence[str]) -> str:
    """Whose ports they are: LLVM gives processors that nobody has described an older one's."""
    prefix = re.match(r"[A-Z][A-Za-z]*?\d*(?=AGU|ALU|Port|Divider)", resources[0])
    return prefix[0] if prefix else resources[0]


def _bottleneck(pressure: dict[str, float], dispatch: float, cycles: float) -> str:
    """The units that are busy for nearly all of the cycles, else what they wait for."""
    busiest = max(pressure.values())
    if max(busiest, dispatch) < 0.9 * cycles:
        return "latency"
    if dispatch > busiest:
        return "dispatch"
    # Copies of a unit share a name, but for a number after a dot.
    return " ".join(dict.fromkeys(name.partition(".")[0] for name, use in pressure.items() if use > 0.97 * busiest))


def _run(command: list[str], text: str, problem: str) -> str:
    try:
        result = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    except OSError as error:
        raise Int4Error(f"{problem}: {error}; install it, or name another") from error
    if result.returncode:
        raise Int4Error(f"{problem}: {result.stderr.strip()[:400]}")
    return result.stdout
