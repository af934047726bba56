"""``torch-int4 bench-load``: memory and time of loading."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def main(
    model: Annotated[Path, typer.Argument(help="Folder of a checkpoint; with --random, one to write first.")],
    random: Annotated[
        str | None, typer.Option(help="Write a random float16 Llama of this size there: tiny, 1b or 7b.")
    ] = None,
    group_size: Annotated[int | None, typer.Option(help="Of a float checkpoint: inputs that share a scale.")] = None,
    dtype: Annotated[str, typer.Option(help="Type of what stays in float; auto: that of the checkpoint.")] = "auto",
    times: Annotated[int, typer.Option(min=1, help="Loads, one after the other.")] = 1,
    json: Annotated[Path | None, typer.Option(help="Also write the figures to this file.")] = None,
) -> None:
    """Load a checkpoint in a process of its own, and print its peak memory and how long it took.

    A checkpoint of floats is quantized while it is loaded. With TORCH_INT4_PANELS=1 the second load maps what the first
    one kept. A random checkpoint of size 7b takes 13.5 GB on the disk.

    Examples:

        torch-int4 bench-load ./my-llama

        TORCH_INT4_PANELS=1 torch-int4 bench-load ./random-7b --random 7b --times 2
    """
    from dataclasses import asdict

    from torch_int4.evals import output
    from torch_int4.evals.speed import loading

    if random is not None and not (model / "config.json").exists():
        typer.echo(f"writing {loading.write_random(model, random) / 1e9:.1f} GB to {model}")
    fields = {} if group_size is None else {"group_size": group_size}
    loads = []
    for _ in range(times):
        load = loading.measure(model, dtype=dtype, **fields)
        loads.append(load)
        typer.echo(
            f"{load.seconds:.1f} s, peak {load.peak_bytes / 1e9:.2f} GB, then {load.resident_bytes / 1e9:.2f} GB "
            f"(before {load.base_bytes / 1e9:.2f} GB; int4 linears {load.linear_bytes / 1e9:.2f} GB)"
        )
    if json is not None:
        output.write_json(json, [asdict(load) for load in loads])
