"""The model type ``torch_int4`` of lm-eval: a Hugging Face model that is patched after loading.

Its arguments are those of lm-eval's ``hf`` model plus every field of `Int4Config`::

    lm_eval.simple_evaluate("torch_int4", "pretrained=DIR,recipe=rtn,group_size=128,compute=int8", tasks=["piqa"])

This module needs lm-eval; `torch_int4.harness_hook` names it to lm-eval without importing it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch_int4
from torch_int4.config.text import pattern_fields, patterns
from torch_int4.errors import Int4Error
from torch_int4.evals.accuracy import tasks
from torch_int4.evals.accuracy.quantize import is_patched, to_int4
from torch_int4.hf.harness_hook import NAME

try:
    import lm_eval
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
except ImportError as error:
    raise Int4Error(f'lm-eval cannot be imported ({error}); run: pip install "torch-int4[eval]"') from error

BATCH_TOKENS = 1024  # tokens of an automatic batch: CPUs gain nothing from more, and logits of more fill the memory


class CpuLM(HFLM):
    """lm-eval's Hugging Face model with what CPUs need: the device, and batches of a bounded size.

    ``batch_size="auto"`` tries batches of 64 full contexts on GPUs until one fits. A CPU would swap, or be killed,
    and the size would differ from run to run; here it is as many of the longest request as make 1024 tokens, so
    that it depends on the requests alone, and two models that are compared run in equal batches.
    """

    def __init__(self, pretrained: Any, *, device: str | None = None, **arguments: Any) -> None:
        if device not in (None, "cpu"):  # lm-eval's command line says cuda:0 where the user says nothing
            logging.getLogger("lm_eval").info("device %s is not used: torch_int4 runs on CPUs", device)
        super().__init__(pretrained, device="cpu", **arguments)

    def _detect_batch_size(self, requests: Sequence[Any] | None = None, pos: int = 0) -> int:
        longest = self.max_length
        if requests:
            _, context, continuation = requests[pos]
            longest = min(len(context) + len(continuation) - 1, longest)
        return max(1, min(self.max_batch_size, BATCH_TOKENS // max(longest, 1)))

    def _loglikelihood_tokens(
        self, requests: list[Any], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        rolling = override_bs is not None  # a call for every few windows, each with a progress bar of its own
        return super()._loglikelihood_tokens(requests, disable_tqdm or rolling, override_bs)


@register_model(NAME)
class Int4LM(CpuLM):
    """A causal language model in int4.

    Args:
        pretrained: what lm-eval's ``hf`` takes: a directory, a name on the hub, or a model. A model that is
            patched already, or was saved so, is used as it is.
        calibration: a text file for recipes that need one.
        arguments: fields of `Int4Config` (patterns of ``skip`` and ``int8`` are joined by ``;``), and arguments of
            lm-eval's ``hf``.

    Raises:
        Int4Error: a field has a value that is not accepted, or the model is int4 already and a field is given.
    """

    def __init__(self, pretrained: Any, *, calibration: str | None = None, **arguments: Any) -> None:
        names = {field.name for field in dataclasses.fields(torch_int4.Int4Config)}
        fields = {name: arguments.pop(name) for name in names & arguments.keys()}
        for name in pattern_fields() & fields.keys():
            fields[name] = patterns(fields[name]) if isinstance(fields[name], str) else fields[name]
        config = torch_int4.Int4Config(**fields)  # raises before minutes are spent on loading
        super().__init__(pretrained, **arguments)
        if not is_patched(self.model):
            to_int4(self.model, self.tokenizer, config, calibration)
        elif fields:
            raise Int4Error(
                f"{', '.join(sorted(fields))}: the model is int4 already and keeps its config; leave these out, or "
                "give the float model"
            )

    def get_model_info(self) -> dict[str, Any]:
        """The entries that lm-eval writes into its results: also the config and the kernels that ran."""
        report = getattr(self.model, "torch_int4_report", None)
        config = None if report is None else dataclasses.asdict(report.config)
        return super().get_model_info() | {"torch_int4": torch_int4.info() | {"config": config}}


@contextlib.contextmanager
def task_manager(names: Sequence[str], data: str | Path | None = None) -> Iterator[TaskManager]:
    """lm-eval's tasks by name; with `data`, on the files of that folder instead of the hub's.

    Raises:
        Int4Error: a task is unknown here (with `data`) or to lm-eval (without).
    """
    if data is not None:
        with tempfile.TemporaryDirectory(prefix="torch_int4-tasks-") as folder:
            tasks.write(names, data, folder)
            yield TaskManager(include_path=folder, include_defaults=False)  # reading all of them takes ten seconds
        return
    manager = TaskManager()
    unknown = [name for name in names if name not in manager.task_index]
    if unknown:
        raise Int4Error(f"lm-eval has no task {', '.join(unknown)}; see: torch-int4 lm-eval ls tasks")
    yield manager


def evaluate(lm: HFLM, names: Sequence[str], manager: TaskManager, *, limit: int | None = None) -> dict[str, Any]:
    """lm-eval's results with samples, without its bootstrapped errors: those of pairs come from the samples.

    Raises:
        Int4Error: a data set cannot be loaded, most often because there is no network.
    """
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        found = lm_eval.simple_evaluate(
            lm, tasks=list(names), task_manager=manager, limit=limit, bootstrap_iters=0, log_samples=True
        )
    except (DatasetsError, HfHubHTTPError, OfflineModeIsEnabled, ConnectionError) as error:
        raise Int4Error(f"the data of {', '.join(names)} cannot be loaded ({error}); offline, give --data") from error
    return dict(found or {})
