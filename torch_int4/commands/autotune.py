"""``torch-int4 autotune``: the cheapest recipe that keeps the loss."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def main(
    model: Annotated[
        Path | None, typer.Option(help="Local model directory; without it, SmolLM2-135M-Instruct.")
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="UTF-8 text to calibrate and evaluate on, in parts that do not overlap.")
    ] = None,
    evaluation: Annotated[Path | None, typer.Option(help="Another text to evaluate on.")] = None,
    max_loss: Annotated[float, typer.Option(help="Accepted relative rise of perplexity.")] = 0.01,
    recipe: Annotated[list[str] | None, typer.Option(help="Repeat for more; all of them by default.")] = None,
    group: Annotated[list[int] | None, typer.Option(help="Repeat for more. [128 32]")] = None,
    symmetric: Annotated[bool, typer.Option("--symmetric/--asymmetric", help="Offsets of the groups.")] = True,
    compute: Annotated[str, typer.Option(help="Arithmetic: int8, int8x2, bf16 or fp32.")] = "int8",
    head: Annotated[str, typer.Option(help="Output head: float, int8 or int4.")] = "int8",
    int8: Annotated[bool, typer.Option("--int8/--no-int8", help="Raise layers to int8 before giving up.")] = True,
    samples: Annotated[int, typer.Option(min=1, help="Windows to calibrate on.")] = 32,
    length: Annotated[int, typer.Option(min=2, help="Tokens per window.")] = 1024,
    windows: Annotated[int, typer.Option(min=1, help="Windows of 512 tokens to evaluate on.")] = 32,
    preset: Annotated[str, typer.Option(help="Effort of trained recipes: light, default or best.")] = "light",
    json: Annotated[Path | None, typer.Option(help="Also write what was tried to this file.")] = None,
) -> None:
    """Try recipes from cheap to dear on a model, and say which is the first that keeps the loss.

    Prints a table of everything that was tried. Ends with exit code 1 if nothing passed.

    Examples:

        torch-int4 autotune --text wiki.train.txt

        torch-int4 autotune --model ./my-llama --max-loss 0.02 --recipe gptq --recipe awq+gptq --group 32

        torch-int4 autotune --max-loss 0.0001 --recipe rtn --group -1 --no-int8
    """
    from dataclasses import asdict, replace

    from torch_int4 import Int4Config
    from torch_int4.calibration.data import Calibration
    from torch_int4.evals import models, output
    from torch_int4.tuning.autotune import EVALUATION_LENGTH, autotune, default_candidates

    float_model, tokenizer = models.load(model)
    base = Int4Config(symmetric=symmetric, compute=compute, head=head, preset=preset)
    candidates = default_candidates(base)
    if recipe or group:
        names = recipe or list(dict.fromkeys(candidate.recipe for candidate in candidates))
        candidates = [replace(base, recipe=name, group_size=size) for name in names for size in group or (128, 32)]
    calibration = Calibration(_read(text), tokenizer, samples=samples, length=length)
    held_out = None
    if evaluation is not None:
        held_out = Calibration(_read(evaluation), tokenizer, samples=windows, length=EVALUATION_LENGTH)
    result = autotune(
        float_model,
        tokenizer,
        max_loss=max_loss,
        candidates=candidates,
        calibration=calibration,
        evaluation=held_out,
        windows=windows,
        int8=int8,
        progress=True,
    )
    typer.echo(str(result))
    if json is not None:
        tried = [{**asdict(entry), "name": entry.name} for entry in result.tried]
        output.write_json(json, {"passed": result.passed, "config": asdict(result.config), "tried": tried})
    raise typer.Exit(0 if result.passed else 1)


def _read(path: Path | None) -> str | None:
    from torch_int4.errors import Int4Error

    if path is None:
        return None
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise Int4Error(f"{str(path)!r}: {error}") from error
