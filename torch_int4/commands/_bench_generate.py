"""``torch-int4 bench generate``: whole models next to other engines."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def generate(
    shape: Annotated[list[str] | None, typer.Option(help="Shape of the model. Repeat for more.")] = None,
    engine: Annotated[list[str] | None, typer.Option(help="Engine by name; all without it. Repeat for more.")] = None,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens decoded in a round.")] = 32,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds through all engines.")] = 5,
    prefill: Annotated[int, typer.Option(min=0, help="Prompt whose time is measured; 0 for none.")] = 512,
    prefill_rounds: Annotated[int, typer.Option(min=1, help="Rounds that measure it too.")] = 2,
    batch: Annotated[list[int] | None, typer.Option(min=2, help="Also so many sequences at once. Repeat.")] = None,
    context: Annotated[list[int] | None, typer.Option(min=1, help="Also decode at this length. Repeat.")] = None,
    profile: Annotated[int, typer.Option(min=0, help="Profile so many tokens of torch_int4.")] = 0,
    speculate: Annotated[int, typer.Option(min=0, help="Also decode so many tokens by prompt lookup.")] = 0,
    group_size: Annotated[int, typer.Option(help="Of torch_int4; others use blocks of 32.")] = 32,
    dtype: Annotated[str, typer.Option(help="Of torch_int4's activations: float32 or bfloat16.")] = "float32",
    compute: Annotated[str, typer.Option(help="Of torch_int4: int8, int8x2, bf16 or fp32.")] = "int8",
    kv_cache: Annotated[str, typer.Option(help="Of torch_int4: auto, fp32, bf16, fp16 or int8.")] = "auto",
    head: Annotated[str, typer.Option(help="Of torch_int4: int8, int4 or float.")] = "int8",
    threads: Annotated[int, typer.Option(min=1, help="Threads of every engine.")] = 2,
    folder: Annotated[
        Path | None, typer.Option(help="For files of random weights; without it, in the cache folder.")
    ] = None,
    only_prepare: Annotated[
        bool, typer.Option("--only-prepare", help="Write those files and measure nothing.")
    ] = False,
    json: Annotated[Path | None, typer.Option(help="Also write the figures to this file.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Also write the report to this file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Also write plots to this PNG file.")] = None,
) -> None:
    """Time whole models: decode and prefill, against other engines, in one run and in turns.

    Shapes are those of known checkpoints with random weights (tinyllama-1.1b, llama-2-7b, gpt-j-6b, falcon-7b,
    gpt-neox-20b), or smollm2-135m with its real ones; tiny is for trying out. Every engine runs in a process of its
    own: torch_int4 through plain `generate`, transformers in bf16 and fp32, llama.cpp (llama-cpp-python), ONNX
    Runtime GenAI, OpenVINO GenAI, torchao; what is not installed, or does not fit into memory, is told. Files for
    engines that load some (4 GB for a 7B shape) are written once, tensor by tensor. Compare figures within one run.

    Examples:

        torch-int4 bench generate --shape smollm2-135m --engine torch_int4 --engine llama.cpp --profile 32

        torch-int4 bench generate --shape tinyllama-1.1b --batch 4 --batch 16 --plot speed.png
    """
    import torch
    from rich.console import Console

    from torch_int4.evals import figures, models, output
    from torch_int4.evals.bench import generate as bench
    from torch_int4.evals.bench import generate_report as report
    from torch_int4.evals.bench import shapes
    from torch_int4.support.markdown import markdown_table

    chosen = [shapes.find(name) for name in shape or ["smollm2-135m"]]
    plan = bench.Plan(
        tokens, rounds, prefill, prefill_rounds, tuple(batch or ()), tuple(context or ()), profile, speculate
    )
    options = {"group_size": group_size, "dtype": dtype, "compute": compute, "kv_cache": kv_cache, "head": head}
    if plot is not None:
        figures.require_matplotlib("--plot")  # before the minutes of measuring
    torch.set_num_threads(threads)
    console = Console()
    wide = console if console.is_terminal else Console(width=200)  # a file or a pipe has no width to keep
    results = []
    for one in chosen:
        spec = bench.spec_of(one, plan, threads, folder or models.cache_dir() / "bench", options)
        with console.status("") as status:
            if only_prepare:
                bench.prepare(bench.choose(engine or (), spec)[0], spec, status.update)
                continue
            results.append(bench.measure(spec, plan, engine or (), status.update))
        for header, rows in report.tables(results[-1]):
            wide.print(markdown_table(header, rows), "", highlight=False, markup=False, soft_wrap=True)
        for line in report.lines(results[-1]):
            wide.print(line, highlight=False, markup=False, soft_wrap=True)
        wide.print("")
    if json is not None and results:
        output.write_json(json, [report.as_json(result) for result in results])
    if markdown is not None and results:
        markdown.write_text("\n".join(map(report.markdown, results)), encoding="utf-8")
    if plot is not None and results:
        report.plot(results, plot)
