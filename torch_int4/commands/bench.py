"""``torch-int4 bench``: speed against the machine's limits and against other libraries."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from torch_int4.commands import _bench_generate

app = typer.Typer(invoke_without_command=True, rich_markup_mode=None)
app.command()(_bench_generate.generate)


@app.callback()
def main(
    context: typer.Context,
    full: Annotated[bool, typer.Option("--full/--quick", help="All points (hours), or a few (minutes).")] = False,
    shape: Annotated[list[str] | None, typer.Option(help="Outputs x inputs, as 11008x4096. Repeat for more.")] = None,
    rows: Annotated[list[int] | None, typer.Option(help="Rows of the input, M. Repeat for more.")] = None,
    group: Annotated[list[int] | None, typer.Option(help="Inputs that share a scale, or -1. Repeat.")] = None,
    offset: Annotated[list[str] | None, typer.Option(help="symmetric, or integer for zero points. Repeat.")] = None,
    compute: Annotated[list[str] | None, typer.Option(help="int8, int8x2, bf16 or fp32. Repeat.")] = None,
    isa: Annotated[list[str] | None, typer.Option(help="Kernel set, see torch-int4 info. Repeat.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of torch; without it, as it is set.")] = None,
    peers: Annotated[bool, typer.Option("--peers/--no-peers", help="Also time other libraries found here.")] = True,
    seconds: Annotated[float, typer.Option(min=0, help="Time for a point; three rounds happen anyway.")] = 4.0,
    json: Annotated[Path | None, typer.Option(help="Also write the figures to this file.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Also write the report to this file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Also draw the roofline to this file (PNG, SVG or PDF).")] = None,
) -> None:
    """Time the INT4 product next to what the machine and other libraries can do.

    First it measures the roofs: bytes that can be read in a second, with 4 KiB and 2 MiB pages, and operations of
    each instruction that kernels use. Then all contestants take turns at every point, each going through copies of
    the weight that no cache holds (256 MiB or more). The table shows the best and the median time of one product,
    weight bytes and operations per second, the speed over the best peer, and the share of the roof: bandwidth up to
    4 rows, arithmetic from 16. "of read" is the share of what a reading loop got between the rounds of that point,
    where the roof is the best of the whole run: the bandwidth of virtual machines changes within minutes.

    Peers are found by what is installed (pip install "torch-int4[bench]"): ONNX Runtime, torch's own int4, bf16 and
    fp32; and llama.cpp, if TORCH_INT4_LLAMA_CPP names the folder of its libggml.so. Every result is checked against
    the dequantized weight. Compare figures within one run only.

    Examples:

        torch-int4 bench --plot roofline.png

        torch-int4 bench --rows 1 --rows 512 --shape 4096x4096 --group 128 --isa avx2 --isa avx512

        torch-int4 bench --full --no-peers --compute fp32 --json fp32.json
    """
    if context.invoked_subcommand is not None:
        return
    import torch
    from rich.console import Console

    from torch_int4.evals import figures, output
    from torch_int4.evals.bench import peers as known
    from torch_int4.evals.bench import points, report, run

    chosen = points.select(
        full=full,
        rows=rows or (),
        shapes=[points.parse_shape(text) for text in shape or ()],
        groups=group or (),
        compute=compute or (),
        offsets=offset or (),
    )
    if plot is not None:
        figures.require_matplotlib("--plot")  # before the minutes of measuring
    if threads is not None:
        torch.set_num_threads(threads)
    console = Console()
    with console.status("") as status:
        result = run.run(chosen, isas=isa or (), with_peers=peers, seconds=seconds, note=status.update)
    wide = console if console.is_terminal else Console(width=200)  # a file or a pipe has no width to keep
    wide.print(report.table(result), "")
    for line in (*report.machine_lines(result), *report.roof_lines(result.roofline)):
        wide.print(line, highlight=False, markup=False, soft_wrap=True)
    if peers and (missing := known.missing()):
        wide.print(f"not found, so not compared: {', '.join(missing)}", highlight=False)
    if json is not None:
        output.write_json(json, report.as_json(result))
    if markdown is not None:
        markdown.write_text(report.markdown(result), encoding="utf-8")
    if plot is not None:
        report.plot(result, plot)


@app.command()
def attention(
    kind: Annotated[list[str] | None, typer.Option(help="decode, prefill or append. Repeat for more.")] = None,
    context: Annotated[list[int] | None, typer.Option(help="Tokens in the cache. Repeat for more.")] = None,
    geometry: Annotated[list[str] | None, typer.Option(help="Heads/kv heads x head size, as 32/8x128.")] = None,
    isa: Annotated[str, typer.Option(help="Kernel set, see torch-int4 info.")] = "",
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of torch; without it, as it is set.")] = None,
    seconds: Annotated[float, typer.Option(min=0, help="Time for a point; three rounds happen anyway.")] = 4.0,
    json: Annotated[Path | None, typer.Option(help="Also write the figures to this file.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Also write the report to this file.")] = None,
) -> None:
    """Time attention next to torch's scaled_dot_product_attention, and the step that appends to the cache.

    decode is one token against a cache, prefill a whole prompt, append the rotation and storing of one token. Caches
    are fp32, bf16 and int8; the cache rotates through 256 MiB or more. The table shows the best and the median time of
    one call, cache bytes and operations per second, the speed over torch (the faster of its fp32 and bf16; for
    prompts the same type), and for decode the share of the read bandwidth. Compare figures within one run only.

    Example:

        torch-int4 bench attention --kind decode --context 4096
    """
    import torch
    from rich.console import Console

    from torch_int4.evals import output
    from torch_int4.evals.bench import attention as bench
    from torch_int4.evals.bench import attention_points, attention_report, report

    geometries = [attention_points.parse_geometry(text) for text in geometry or ()]
    points = attention_points.select(kinds=kind or (), contexts=context or (), geometries=geometries)
    if threads is not None:
        torch.set_num_threads(threads)
    console = Console()
    with console.status("") as status:
        result = bench.run(points, isa=isa, seconds=seconds, note=status.update)
    wide = console if console.is_terminal else Console(width=200)  # a file or a pipe has no width to keep
    wide.print(attention_report.table(result), "")
    for line in (*report.machine_lines(result, "caches"), *report.roof_lines(result.roofline)):
        wide.print(line, highlight=False, markup=False, soft_wrap=True)
    if json is not None:
        output.write_json(json, attention_report.as_json(result))
    if markdown is not None:
        markdown.write_text(attention_report.markdown(result), encoding="utf-8")
