"""``torch-int4 info``: which kernels this machine runs."""

from __future__ import annotations

from typing import Annotated

import typer


def main(json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False) -> None:
    """Show the version, the kernels of this build, and which of them runs on this CPU.

    The fastest kernel set that the CPU supports is chosen when the package is imported. TORCH_INT4_ISA forces
    another one, for a comparison or to rule a kernel out; an unknown or unsupported name is an error.

    Examples:

        torch-int4 info

        TORCH_INT4_ISA=reference torch-int4 info --json
    """
    import torch_int4

    info = torch_int4.info()
    if json:
        import json as encoder

        typer.echo(encoder.dumps(info, indent=2))
        return
    forced = "; ".join(f"TORCH_INT4_ISA={name}" for name in info["available"])
    for name, value in (
        ("torch_int4", info["version"]),
        ("torch", info["torch"]),
        ("kernels", f"{info['isa']} (runs now)"),
        ("built", " ".join(info["built"])),
        ("supported here", " ".join(info["available"])),
        ("to force one", forced),
        ("threads", f"{info['threads']} (OMP_NUM_THREADS or torch.set_num_threads)"),
    ):
        typer.echo(f"{name:<16}{value}")
