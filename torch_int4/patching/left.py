"""Linears that models need in float, whatever the config says: task heads, and those whose weight is read."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator

from torch import nn

from torch_int4.support.weight_reads import weights_read

# Names of heads that people train for a task (those that PEFT knows, and BART's), and of models that are made for one.
HEADS = ("classifier", "score", "qa_outputs", "classification_head")
TASKS = re.compile(r"For\w*(Classification|QuestionAnswering|MultipleChoice|NextSentencePrediction|XVector)$")
TASK_HEAD = "a head for a task, which is small and is what people train; name it in int8=… for 8 bits"


def reasons_of(model: nn.Module) -> dict[int, str]:
    """{id of a module in a model: why it has to stay in float}."""
    found = {id(part): TASK_HEAD for head in _task_heads(model) for part in head.modules()}
    for module in model.modules():
        for linear in weights_read(module):
            found[id(linear)] = f"{type(module).__name__}.forward reads its weight itself instead of calling it"
    return found


def _task_heads(model: nn.Module) -> Iterator[nn.Module]:
    """The modules beside the base model, in models of transformers that are made for a task."""
    if "transformers" not in sys.modules:  # then there are none
        return
    from transformers import PreTrainedModel

    for module in model.modules():
        if not isinstance(module, PreTrainedModel) or module.base_model is module:
            continue
        for_task = any(TASKS.search(kind.__name__) for kind in type(module).__mro__)
        for name, child in module.named_children():
            if name in HEADS or (for_task and child is not module.base_model):
                yield child
