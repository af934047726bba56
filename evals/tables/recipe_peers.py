"""Recipes of other tools, on the model and the windows that ours are measured on: rows of `recipes_table`.

A peer is named ``tool:recipe``. Its weights are taken over code by code and multiplied by our linears, so that rows
differ by codes and scales alone; gptqmodel's AWQ also rounds all else to bfloat16.
"""

from __future__ import annotations

import importlib.metadata
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import torch_int4
from torch_int4 import Int4Config, Int4Linear
from torch_int4.calibration.data import Calibration
from torch_int4.errors import Int4Error
from torch_int4.weights.canonical import Int4Weight

STEPS = {"light": 50, "default": 200, "best": 1000}  # of a block, as our trained recipes take them


@dataclass(frozen=True)
class Job:
    """The task of a peer.

    Attributes:
        model: the float model as it was loaded from a directory, which is `model.name_or_path`.
        calibration: windows, how many of them are trained on at a time, seed and tokenizer.
        config: group size, preset, and what our linears compute in; symmetric.
    """

    model: Any
    calibration: Calibration
    config: Int4Config


def quantize(name: str, job: Job) -> tuple[Any, float]:
    """The model with the peer's weights, and the seconds that the peer took for them, loading left out.

    Raises:
        Int4Error: the tool is not installed, or is asked for an asymmetric weight.
    """
    if not job.config.symmetric:
        raise Int4Error(f"recipe {name!r}: peers are compared with symmetric weights only")
    package = name.partition(":")[0]
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError as error:
        raise Int4Error(f"recipe {name!r}: needs {package}; run: pip install {package}") from error
    return PEERS[name](job)


def _auto_round(job: Job, **options: Any) -> tuple[Any, float]:
    from auto_round import AutoRound

    from torch_int4.evals import models

    windows = job.calibration.windows(job.model)
    rows = [{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in windows]
    start = time.perf_counter()
    tool = AutoRound(
        job.model,
        job.calibration.tokenizer,
        bits=4,
        group_size=job.config.group_size,
        sym=True,
        dataset=rows,
        nsamples=len(rows),
        seqlen=windows.shape[1],
        batch_size=job.calibration.batch,
        seed=job.calibration.seed,
        device_map="cpu",
        enable_torch_compile=False,
        **options,
    )
    rounded, _ = tool.quantize()
    seconds = time.perf_counter() - start
    fresh = models.load(job.model.name_or_path)[0]  # the tool has turned all else to bfloat16
    for path, linear in rounded.named_modules():
        if isinstance(linear, nn.Linear) and isinstance(getattr(linear, "scale", None), Tensor):
            fresh.set_submodule(path, on_grid(linear, job.config))
    return fresh, seconds


def on_grid(linear: Any, config: Int4Config) -> Int4Linear:
    """auto-round's weight, held as rounded products `codes * scale`, as codes."""
    scales = linear.scale.detach().float().reshape(linear.out_features, -1)
    size = linear.in_features if config.group_size == -1 else config.group_size
    spread = scales.repeat_interleave(size, 1)[:, : linear.in_features]
    codes = (linear.weight.detach().float() / spread).nan_to_num(0).round().clamp(-8, 7).add(8).to(torch.uint8)
    weight = Int4Weight(codes, scales.half(), group_size=config.group_size)
    bias = None if linear.bias is None else linear.bias.detach().float()
    return Int4Linear.from_weight(weight, bias, compute=config.compute)


def _gptqmodel(job: Job, dtype: torch.dtype, **options: Any) -> tuple[Any, float]:
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # with fewer it refuses to start
    from gptqmodel import GPTQModel, QuantizeConfig

    group = job.config.group_size
    config = QuantizeConfig(bits=4, group_size=group, sym=True, device="cpu", offload_to_disk=False, **options)
    tool = GPTQModel.load(job.model.name_or_path, config, dtype=dtype)
    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in job.calibration.windows(job.model)]
    start = time.perf_counter()
    tool.quantize(rows, batch_size=job.calibration.batch)
    seconds = time.perf_counter() - start
    model = tool.model.eval()
    torch_int4.patch(model, compute=job.config.compute, head=job.config.head, progress=False)
    for parameter in model.parameters():
        parameter.data = parameter.data.float()
    return model, seconds


PEERS: dict[str, Callable[[Job], tuple[Any, float]]] = {
    "auto-round:rtn": lambda job: _auto_round(job, iters=0, disable_opt_rtn=True, disable_model_free=True),
    "auto-round:signround": lambda job: _auto_round(job, iters=STEPS[job.config.preset]),
    "gptqmodel:gptq": lambda job: _gptqmodel(job, torch.float32),
    # its linears for AWQ take no float32; scales in bfloat16 are held in fp32 by ours
    "gptqmodel:awq": lambda job: _gptqmodel(job, torch.bfloat16, method="awq", format="gemm"),
}
