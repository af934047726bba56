"""The commands of ``optimum-cli torch-int4``. optimum finds them by a file of the plug-in in ``plugins/optimum``.

optimum has no entry points: its command line imports every file of the namespace ``optimum.commands.register``. That
file cannot be part of this package, because a folder named ``optimum`` makes transformers believe that optimum is
installed.
"""

from __future__ import annotations

from argparse import ArgumentParser
from typing import Any

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo

from torch_int4.config import HEADS, ZEROS, Int4Config


class QuantizeCommand(BaseOptimumCLICommand):
    """``optimum-cli torch-int4 quantize``: what ``torch-int4 quantize`` does, in optimum's way of naming."""

    COMMAND = CommandInfo(name="quantize", help="Quantize a checkpoint to INT4 for CPUs while it is read.")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Add the options."""
        default = Int4Config()
        parser.add_argument("-m", "--model", required=True, help="Folder, or repository of the Hub, of the model.")
        parser.add_argument("-o", "--output", required=True, help="Folder to write, replaced in one step.")
        parser.add_argument("--group-size", type=int, default=default.group_size, help="Inputs that share a scale.")
        parser.add_argument("--asymmetric", action="store_true", help="An offset per group besides the scale.")
        parser.add_argument("--zeros", choices=ZEROS, default=default.zeros, help="With --asymmetric: which offset.")
        parser.add_argument("--recipe", default=default.recipe, help="How weights are rounded; one without data.")
        parser.add_argument("--clip", action="store_true", help="Search a smaller range per group.")
        parser.add_argument("--head", choices=HEADS, default=default.head, help="Type of the output head.")
        parser.add_argument("--skip", action="append", default=[], help="Pattern of linears left in float.")
        parser.add_argument("--dtype", default="auto", help="Type of what stays in float.")
        parser.add_argument("--trust-remote-code", action="store_true", help="Run code that the model brings along.")

    def run(self) -> None:
        """Quantize, save, and print what was done."""
        from torch_int4.errors import Int4Error
        from torch_int4.hf.convert import convert

        args: Any = self.args
        names = ("group_size", "zeros", "recipe", "clip", "head")
        fields = {**{name: getattr(args, name) for name in names}, "skip": tuple(args.skip)}
        options = {"trust_remote_code": True} if args.trust_remote_code else None
        try:
            report = convert(
                args.model,
                args.output,
                dtype=args.dtype,
                options=options,
                symmetric=not args.asymmetric,
                **fields,
            )
        except Int4Error as error:
            raise SystemExit(f"optimum-cli torch-int4: {error}") from error
        print(f"{report}\nsaved to {args.output}")


class TorchInt4Command(BaseOptimumCLICommand):
    """``optimum-cli torch-int4``."""

    COMMAND = CommandInfo(name="torch-int4", help="INT4 inference on CPUs.")
    SUBCOMMANDS = (CommandInfo(name="quantize", help=QuantizeCommand.COMMAND.help, subcommand_class=QuantizeCommand),)
