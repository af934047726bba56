"""GGUF files: their 4-bit blocks are packed as they are, and nothing is rounded again."""

from __future__ import annotations

import os
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torch_int4.config import Int4Config
from torch_int4.errors import Int4Error
from torch_int4.formats.gguf import BLOCKS, GgufBlocks
from torch_int4.formats.parts.gguf_file import GgufFile, GgufTensor, open_gguf


def from_gguf(
    path: str | os.PathLike[str], config: Int4Config | None = None, *, model_class: Any = None, **options: Any
) -> Any:
    """A patched model from a GGUF file on disk.

    transformers builds the model, with expanded weights; each linear whose weight is an expansion of blocks on a grid
    that kernels have (`formats/gguf.py`) then takes over these blocks, found by the bits of the weight and therefore
    right by construction. Other linears are quantized as the config says. The model is held in fp32 meanwhile.

    Args:
        path: the file.
        config: how to quantize the rest, and how to compute; the head is taken over unless `head="float"`.
        model_class: class to load with; transformers' `AutoModelForCausalLM` by default.
        **options: fields of `Int4Config`.

    Raises:
        Int4Error: naming the tensor of a file that is damaged, or what transformers cannot read.
    """
    from torch_int4.patching.patcher import patch

    config = Int4Config.with_overrides(config, **options)
    file = open_gguf(Path(path))
    model = _expand(Path(path), model_class)
    take_over(model, file, config)
    return patch(model, config)


def take_over(model: nn.Module, file: GgufFile, config: Int4Config | None = None) -> list[str]:
    """Put the blocks of a file into the place of every linear of `model` whose weight is their expansion.

    A tensor of the file may have its rows in another order than the model: llama.cpp orders those of q and k by its
    own rotary embedding. `patch` packs the blocks.

    Returns:
        The names of the linears.
    """
    linears = _linears(model, config or Int4Config())
    taken = []
    for name, entry in file.tensors.items():
        if entry.kind not in BLOCKS or len(entry.shape) != 2 or entry.shape not in linears:
            continue
        raw = file.read(name)
        dense = _dense(raw, entry, name)
        for place in linears[entry.shape].pop(_fingerprint(dense), ()):
            module = model.get_submodule(place)
            order = _row_order(dense, module.weight)  # type: ignore[arg-type]
            if order is not None:
                new = GgufBlocks(raw[order], entry.kind, entry.shape, getattr(module, "bias", None))
                parent, _, attribute = place.rpartition(".")
                setattr(model.get_submodule(parent), attribute, new.train(module.training))
                taken.append(place)
    return taken


def _expand(path: Path, model_class: Any) -> Any:
    import transformers

    options: dict[str, Any] = {"gguf_file": path.name, "dtype": torch.float32, "local_files_only": True}
    if hasattr(transformers, "GgufConfig"):  # older versions always expand
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    loader = model_class or transformers.AutoModelForCausalLM
    try:
        model = loader.from_pretrained(str(path.parent), **options)
    except (ImportError, KeyError, NotImplementedError, ValueError) as error:
        raise Int4Error(f"{path.name}: transformers cannot load this GGUF file: {error}") from error
    if hasattr(model.config, "quantization_config"):  # a float model from here on
        del model.config.quantization_config
    model.hf_quantizer = None
    return model.eval()


def _linears(model: nn.Module, config: Int4Config) -> dict[tuple[int, ...], dict[int, list[str]]]:
    """{shape: {fingerprint: names}} of the linears."""
    found: dict[tuple[int, ...], dict[int, list[str]]] = defaultdict(lambda: defaultdict(list))
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if callable(getter) and config.head == "float" else None
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module is not head and module.weight is not None and name:
            found[tuple(module.weight.shape)][_fingerprint(module.weight.detach())].append(name)
    return found


def _dense(raw: Tensor, entry: GgufTensor, name: str) -> Tensor:
    from torch_int4 import formats

    settings = formats.Settings(layout=entry.kind)
    rows, inputs = entry.shape
    return formats.get("gguf").read({"weight": raw}, settings, shape=(rows, inputs), name=name).dequantize()


def _fingerprint(weight: Tensor) -> int:
    """The same for every order of the rows: the sum of all bits. (-0 counts as 0.)"""
    return int((weight.float() + 0.0).view(torch.int32).sum(dtype=torch.int64))


def _row_order(dense: Tensor, weight: Tensor) -> Tensor | None:
    """int64 [N]: row i of `weight` is row order[i] of `dense`; None where a row is none of them."""
    weight = weight.detach().float()
    if torch.equal(dense, weight):
        return torch.arange(dense.shape[0])
    rows: dict[bytes, list[int]] = defaultdict(list)
    for index, row in enumerate((dense + 0.0).numpy()):
        rows[row.tobytes()].append(index)
    order = []
    for row in (weight + 0.0).numpy():
        if not rows.get(row.tobytes()):
            return None
        order.append(rows[row.tobytes()].pop())
    return torch.tensor(order)
