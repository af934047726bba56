"""``torch-int4 bench-cycles``: what the inner loops cost on processors that are not at hand."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def main(
    source: Annotated[Path, typer.Option(help="Folder of a source checkout.")] = Path(),
    cpu: Annotated[list[str] | None, typer.Option(help="Processor, by LLVM's name. Repeat for more.")] = None,
    mca: Annotated[str, typer.Option(help="The program llvm-mca: newer ones know more processors.")] = "llvm-mca",
    compiler: Annotated[str, typer.Option(envvar="CXX", help="C++ compiler that makes the loops.")] = "c++",
    json: Annotated[Path | None, typer.Option(help="Also write the figures to this file.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Also write the table to this file.")] = None,
) -> None:
    """Simulate the inner loops of every kernel set with llvm-mca.

    Compiles the kernels of a source checkout, cuts the loops over int4 weights out of the assembly, and shows the
    cycles for 128 weights times one row of the input: as simulated, and as the busiest unit alone would allow. The
    column `model` tells whose ports were simulated: LLVM gives some processors those of an older one. Caches and
    memory are not simulated.

    Examples:

        torch-int4 bench-cycles

        torch-int4 bench-cycles --cpu znver4 --cpu sapphirerapids --mca llvm-mca-19 --markdown cycles.md
    """
    from rich.console import Console
    from rich.table import Table

    from torch_int4.evals import output
    from torch_int4.evals.bench import cycles

    rows, notes = cycles.run(source, cpu or (), mca, compiler)
    table = Table(*cycles.HEADER, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*cycles.cells(row))
    console = Console()
    wide = console if console.is_terminal else Console(width=200)  # a file or a pipe has no width to keep
    wide.print(table, "")
    for line in notes:
        wide.print(line, highlight=False, markup=False, soft_wrap=True)
    if json is not None:
        output.write_json(json, cycles.as_json(rows, notes))
    if markdown is not None:
        text = "\n".join(f"- {line}" for line in notes) + "\n\n" + cycles.markdown(rows) + "\n"
        markdown.write_text(text, encoding="utf-8")
