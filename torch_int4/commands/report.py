"""``torch-int4 report``: size, memory, speed and accuracy of one model in float, in INT4, and in peers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def main(
    model: Annotated[str, typer.Argument(help="Model directory; `default` for SmolLM2-135M-Instruct.")],
    config: Annotated[
        list[str] | None,
        typer.Option(help="Fields of Int4Config, as group_size=128,recipe=rtn. Repeat. [recipes, g32 and g128]"),
    ] = None,
    peers: Annotated[bool, typer.Option("--peers/--no-peers", help="Also measure installed peers.")] = True,
    text: Annotated[Path | None, typer.Option(help="Text file for perplexity; without it, built-in English.")] = None,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of that text.")] = 2048,
    window: Annotated[int, typer.Option(min=2, help="Tokens per window.")] = 512,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Prompt of the timed generations.")] = 128,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens generated, in each repeat.")] = 32,
    repeats: Annotated[int, typer.Option(min=1, help="Timed generations.")] = 3,
    data: Annotated[Path | None, typer.Option(help="Folder with data of tasks; adds mean accuracy (lm-eval).")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first items of each task.")] = None,
    calibration: Annotated[Path | None, typer.Option(help="Text file; adds the recipes that need one.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of torch; without it, as it is set.")] = None,
    json: Annotated[Path | None, typer.Option(help="Also write the figures to this file.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Also write the table to this file.")] = None,
    png: Annotated[Path | None, typer.Option(help="Also write the plots into this folder.")] = None,
    html: Annotated[Path | None, typer.Option(help="Also write one page with table and plots to this file.")] = None,
) -> None:
    """Print the table of Faster and Lighter LLMs for one model on this machine.

    Rows are float32, bfloat16, our recipes, and peers that are installed; each is measured in a process of its own.
    Columns are bytes of weights, largest resident memory while generating, tokens per second of prompts and of new
    tokens, perplexity, and with --data the mean accuracy of tasks; differences are paired with float32. Speeds are
    taken one after the other: run it on a quiet machine.

    Examples:

        torch-int4 report default --html report.html

        torch-int4 report ./my-llama --config group_size=32 --config group_size=128 --data ./data --limit 100
    """
    from rich.console import Console

    from torch_int4.config.text import parse_config
    from torch_int4.evals import figures, output
    from torch_int4.evals.accuracy import olmo_data
    from torch_int4.evals.accuracy import tasks as local
    from torch_int4.evals.report import methods, page, plots
    from torch_int4.evals.report import run as report

    if png is not None or html is not None:
        figures.require_matplotlib(plots.OPTIONS)  # before minutes are spent on measuring
    data = olmo_data.resolve(data)
    settings: dict[str, Any] = {
        "text": None if text is None else str(text),
        "calibration": None if calibration is None else str(calibration),
        "tasks": () if data is None else tuple(name for name in local.PAPER if name in local.accuracies(data)),
        "data": None if data is None else str(data),
    }
    configs = None if config is None else [parse_config(line) for line in config]
    chosen = methods.methods(configs, with_peers=peers, calibrated=calibration is not None)
    console, log = Console(), Console(stderr=True)
    result = report.run(
        None if model == "default" else model,
        chosen,
        note=lambda label: log.print(f"measuring {label}", highlight=False, markup=False),
        tokens=tokens,
        window=window,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        repeats=repeats,
        limit=limit,
        threads=threads,
        **settings,
    )
    console.print(page.markdown(result), highlight=False, markup=False, soft_wrap=True)
    if peers and (missing := methods.missing_peers()):
        console.print(f"not installed, so not compared: {', '.join(missing)}", highlight=False)
    if json is not None:
        output.write_json(json, page.as_json(result))
    if markdown is not None:
        markdown.write_text(page.markdown(result), encoding="utf-8")
    if png is not None or html is not None:
        drawn = plots.draw(result)
        if png is not None:
            png.mkdir(parents=True, exist_ok=True)
            for name, content in drawn.items():
                (png / f"{name}.png").write_bytes(content)
        if html is not None:
            html.write_text(page.page(result, drawn), encoding="utf-8")
