"""``torch-int4 quantize``: a checkpoint in INT4."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def main(
    model: Annotated[str, typer.Argument(help="Folder, or repository of the Hub, of the model.")],
    out: Annotated[Path, typer.Argument(help="Folder to write; replaced in one step if it is there.")],
    group_size: Annotated[int, typer.Option(help="Inputs that share a scale: 32 to 1024, or -1.")] = 32,
    symmetric: Annotated[
        bool, typer.Option("--symmetric/--asymmetric", help="A scale per group, or a zero point too.")
    ] = True,
    zeros: Annotated[str, typer.Option(help="With --asymmetric: integer zero points, or a float minimum.")] = "integer",
    recipe: Annotated[str, typer.Option(help="How weights are rounded; one that needs no data.")] = "rtn",
    clip: Annotated[bool, typer.Option("--clip", help="Search a smaller range per group.")] = False,
    head: Annotated[str, typer.Option(help="Output head: float, int8 or int4.")] = "int8",
    skip: Annotated[list[str] | None, typer.Option(help="Pattern of linears left in float; may be repeated.")] = None,
    dtype: Annotated[str, typer.Option(help="Type of what stays in float; auto: that of the checkpoint.")] = "auto",
    max_shard_size: Annotated[str, typer.Option(help="Size of a file of weights, at most.")] = "5GB",
) -> None:
    """Quantize a checkpoint while it is read, linear by linear, and save it with its tokenizer.

    Memory peaks at the INT4 model, twice while it is saved, and one float weight. A checkpoint of another INT4 format
    (GPTQ, AWQ, ...) is taken over without rounding again; then only --head and --skip may be given.
    The result is compressed-tensors where that can express it, and says so on a line of its own where it cannot.

    Examples:

        torch-int4 quantize ./my-llama ./my-llama-int4

        torch-int4 quantize ./my-llama ./out --group-size 128 --asymmetric --skip "*.down_proj"
    """
    from torch_int4.hf.convert import convert

    fields: dict[str, Any] = {
        "group_size": group_size,
        "symmetric": symmetric,
        "zeros": zeros,
        "recipe": recipe,
        "clip": clip,
        "head": head,
        "skip": tuple(skip or ()),
    }
    report = convert(model, out, dtype=dtype, max_shard_size=max_shard_size, **fields)
    typer.echo(f"{report}\nsaved to {out}")
