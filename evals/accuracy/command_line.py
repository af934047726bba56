"""Calls the command line of lm-eval, with our model type registered and, if asked, tasks on local files."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

from torch_int4.errors import Int4Error
from torch_int4.evals.accuracy import tasks


def run(arguments: Sequence[str], data: str | Path | None = None) -> None:
    """Runs ``lm-eval ARGUMENTS``; with `data`, those tasks whose files are in that folder read them.

    Raises:
        Int4Error: lm-eval is not installed, or `data` holds no task's files.
        SystemExit: as lm-eval ends.
    """
    tasks.harness_folder()  # says how to install lm-eval
    if data is None:
        _call(arguments)
        return
    names = tasks.present(data)
    if not names:
        raise Int4Error(f"--data {str(data)!r}: holds no files of {', '.join(tasks.available())}")
    if any(argument.split("=")[0] == "--include_path" for argument in arguments):
        raise Int4Error("--data and --include_path exclude each other: lm-eval takes one folder of tasks")
    with tempfile.TemporaryDirectory(prefix="torch_int4-tasks-") as folder:
        tasks.write(names, data, folder)
        _call([*arguments, "--include_path", folder])


def _call(arguments: Sequence[str]) -> None:
    import lm_eval.models  # noqa: F401  # the hook registers after it
    from lm_eval.__main__ import cli_evaluate

    from torch_int4.hf import harness_hook

    harness_hook.install()
    with mock.patch.object(sys, "argv", ["lm-eval", *arguments]):
        cli_evaluate()
