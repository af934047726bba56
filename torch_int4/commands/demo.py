"""``torch-int4 demo``: the same model in float and in INT4."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def main(
    model: Annotated[
        Path | None, typer.Option(help="Local model directory; without it, SmolLM2-135M-Instruct.")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="What to answer.")] = None,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens to generate, in each of three repeats.")] = 64,
    group_size: Annotated[int, typer.Option(help="Inputs that share a scale: 32 to 1024, or -1.")] = 32,
    symmetric: Annotated[
        bool, typer.Option("--symmetric/--asymmetric", help="A scale per group, or a float minimum too.")
    ] = False,
    compute: Annotated[str, typer.Option(help="Arithmetic: int8, int8x2, bf16 or fp32.")] = "int8",
    head: Annotated[str | None, typer.Option(help="Output head: float, int8 or int4.")] = None,
    max_loss: Annotated[float, typer.Option(help="Accepted relative change of perplexity.")] = 0.02,
    json: Annotated[Path | None, typer.Option(help="Also write the figures to this file.")] = None,
) -> None:
    """Answer a prompt in float and in INT4, and compare speed, memory and perplexity.

    Ends with exit code 1 if INT4 moves perplexity by more than --max-loss. The default model's file lies on a
    grid of 32 inputs with a float minimum, which the default options recover exactly; other options show what
    plain rounding costs a model this small. Its first load converts it once, 540 MB in the cache folder.

    Examples:

        torch-int4 demo

        torch-int4 demo --prompt "Write a haiku about cores." --tokens 100

        torch-int4 demo --model ./my-llama --symmetric --max-loss 0.1
    """
    from dataclasses import asdict

    from rich.console import Console

    from torch_int4.evals import demo, output

    overrides: dict[str, Any] = {"group_size": group_size, "symmetric": symmetric, "compute": compute}
    if not symmetric:
        overrides["zeros"] = "float"
    if head is not None:
        overrides["head"] = head
    console = Console()
    result = demo.run(
        model,
        prompt=prompt or demo.PROMPT,
        new_tokens=tokens,
        max_loss=max_loss,
        console=console,
        **overrides,
    )
    demo.show(result, console)
    if json is not None:
        derived = {"speedup": result.speedup, "ratio_to_bf16": result.memory.ratio_to_bf16}
        output.write_json(json, asdict(result) | derived | {"passed": result.passed})
    raise typer.Exit(0 if result.passed else 1)
