"""Measures one method in a process of its own, so that its memory is its own: ``python -m … SPEC RESULT``."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from torch_int4.config import Int4Config
from torch_int4.errors import Int4Error
from torch_int4.evals import models, output
from torch_int4.evals.accuracy.perplexity import perplexity
from torch_int4.evals.speed import generation as speed
from torch_int4.evals.speed import process
from torch_int4.tuning.footprint import weight_bytes


@dataclass(frozen=True)
class Spec:
    """The measurements to make, and their settings.

    Attributes:
        model_dir: the float model.
        kind, options: as in `methods.Method`.
        reference: file of the float model's hidden states; written by the first row, read by the others.
        text: text file for perplexity; None for the built-in text.
        tokens, window: of that text, in windows.
        prompt_tokens, new_tokens, repeats: of the timed generations.
        tasks, data, limit: lm-eval tasks on local data; no tasks without data.
        calibration: text file for recipes that need one.
        threads: of torch; None leaves its own choice.
    """

    model_dir: str
    kind: str
    options: dict[str, Any]
    reference: str
    text: str | None = None
    tokens: int = 2048
    window: int = 512
    prompt_tokens: int = 128
    new_tokens: int = 32
    repeats: int = 3
    tasks: tuple[str, ...] = ()
    data: str | None = None
    limit: int | None = None
    calibration: str | None = None
    threads: int | None = None


def measure(spec: Spec) -> dict[str, Any]:
    """Everything about one method as plain data; see `run.Row`.

    Raises:
        Int4Error: the model cannot be loaded or quantized.
    """
    if spec.threads is not None:
        torch.set_num_threads(spec.threads)
    model, tokenizer = build(spec)
    ids = models.encode_text(tokenizer, spec.text, spec.tokens)
    clean = process.reset_peak()
    prompt = ids[None, : spec.prompt_tokens]
    speed.time_generate(model, prompt, 4)  # first calls allocate and start threads
    timings = [speed.time_generate(model, prompt, spec.new_tokens) for _ in range(spec.repeats)]
    peak = process.peak_bytes()  # of generating; evaluation below holds the logits of a whole window
    score = perplexity(model, ids, window=spec.window)
    return {
        "weight_bytes": sum(weight_bytes(model).values()) + packed_bytes(model),
        "run_bytes": peak,
        "run_bytes_with_loading": not clean,
        "speed": asdict(speed.summarize(timings)),
        "ppl": score.ppl,
        "window_nll": score.window_nll,
        "window_tokens": score.window_tokens,
        "layer_error": layer_errors(model, ids[: spec.prompt_tokens], Path(spec.reference), write=_is_first(spec)),
        "items": _task_items(model, tokenizer, spec),
    }


def build(spec: Spec) -> tuple[Any, Any]:
    """(model, tokenizer) as the method has it."""
    if spec.kind == "float":
        return models.load(spec.model_dir, dtype=getattr(torch, spec.options["dtype"]))
    if spec.kind == "peer":
        from transformers import AutoTokenizer

        from torch_int4.evals.report import peers

        tokenizer = AutoTokenizer.from_pretrained(spec.model_dir, local_files_only=True)
        return peers.known()[spec.options["peer"]].build(spec.model_dir), tokenizer
    from torch_int4.evals.accuracy.quantize import to_int4

    model, tokenizer = models.load(spec.model_dir)
    options: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in spec.options.items()
    }
    return to_int4(model, tokenizer, Int4Config(**options), spec.calibration), tokenizer


def packed_bytes(model: Any) -> int:
    """Bytes of weights that torch's own quantized linears keep out of sight of `parameters()`."""
    total = 0
    for module in model.modules():
        packed = getattr(module, "_packed_params", None)
        if packed is not None and hasattr(module, "weight") and callable(module.weight):
            weight = module.weight()
            total += weight.int_repr().nbytes + 12 * weight.shape[0]  # a double and an int32 a row, at most
    return total


@torch.inference_mode()
def layer_errors(model: Any, ids: torch.Tensor, reference: Path, *, write: bool) -> list[float]:
    """Relative error ||h - h_float|| / ||h_float|| of the hidden states after each layer.

    Args:
        ids: int64 [T].
        reference: file of the float model's states, fp32 [layers + 1, T, hidden].
        write: this is the float model; writes the file.
    """
    states = model(ids[None], output_hidden_states=True, use_cache=False).hidden_states
    stacked = torch.stack([state[0].float() for state in states]).numpy()
    if write:
        np.save(reference, stacked, allow_pickle=False)
    expected = np.load(reference, allow_pickle=False)
    scale = np.maximum(np.linalg.norm(expected, axis=(1, 2)), np.finfo(np.float32).tiny)
    return (np.linalg.norm(stacked - expected, axis=(1, 2)) / scale).tolist()


def _is_first(spec: Spec) -> bool:
    return spec.kind == "float" and spec.options["dtype"] == "float32"


def _task_items(model: Any, tokenizer: Any, spec: Spec) -> list[dict[str, Any]]:
    """Scores per item of the tasks' deciding accuracies, empty without tasks."""
    if not spec.tasks:
        return []
    from torch_int4.evals.accuracy import harness, scores, tasks

    chosen = {name: task.scores for name, task in tasks.available().items()}
    lm = harness.CpuLM(model, tokenizer=tokenizer, batch_size="auto", max_length=spec.window)
    with harness.task_manager(spec.tasks, spec.data) as manager:
        found = scores.items(harness.evaluate(lm, spec.tasks, manager, limit=spec.limit))
    by_task = {entry.task: [other.metric for other in found if other.task == entry.task] for entry in found}
    return [
        asdict(entry)
        for entry in found
        if entry.kind == "accuracy" and entry.metric in scores.decisive(entry.task, by_task[entry.task], chosen)
    ]


def main(spec_file: str, result_file: str) -> None:
    """Entry point of the process."""
    spec = Spec(**json.loads(Path(spec_file).read_text(encoding="utf-8")))
    output.write_json(result_file, measure(spec))


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except Int4Error as error:
        sys.exit(f"torch_int4: {error}")
