"""The console command ``torch-int4``. Commands live in `torch_int4.commands`, one file each."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

import typer
from typer.core import TyperGroup

from torch_int4 import commands
from torch_int4.errors import Int4Error


class _Group(TyperGroup):
    """Prints an Int4Error as one line: it says what is wrong and what to do, which a traceback would bury."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except Int4Error as error:
            typer.secho(f"torch-int4: {error}", fg=typer.colors.RED, err=True)
            raise typer.Exit(2) from error


def _build() -> typer.Typer:
    cli = typer.Typer(cls=_Group, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False)

    @cli.callback()
    def root() -> None:
        """INT4 inference of Hugging Face models on CPUs. Start with: torch-int4 demo"""

    for found in pkgutil.iter_modules(commands.__path__):
        if found.name.startswith("_"):  # what commands share
            continue
        module = importlib.import_module(f"{commands.__name__}.{found.name}")
        name = found.name.replace("_", "-")
        if hasattr(module, "app"):  # a command with commands of its own
            cli.add_typer(module.app, name=name)
        else:
            cli.command(name, context_settings=getattr(module, "CONTEXT", None))(module.main)
    return cli


app = _build()


def main() -> None:
    """Entry point of the console script."""
    app()


if __name__ == "__main__":
    main()
