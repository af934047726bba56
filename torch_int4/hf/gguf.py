"""GGUF files as models: their blocks are packed as they are, and nothing is rounded again."""

from __future__ import annotations

import dataclasses
import os
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torch_int4.config import Int4Config
from torch_int4.errors import Int4Error
from torch_int4.formats.gguf import BLOCKS, GgufBlocks, dense
from torch_int4.formats.parts.gguf_file import GgufFile, open_gguf
from torch_int4.formats.parts.gguf_split import parts_of, whole_file
from torch_int4.hf.gguf_blocks import FLOATS, NotServedError, load_direct


def from_gguf(
    path: str | os.PathLike[str],
    config: Int4Config | None = None,
    *,
    model_class: Any = None,
    dtype: str | torch.dtype = "auto",
    **options: Any,
) -> Any:
    """A patched model from a GGUF file on disk.

    Linears whose tensor has blocks on a grid that kernels have (`formats/gguf.py`) take over these blocks as they are
    (`hf/gguf_blocks.py`), and those whose tensor is of floats among such blocks keep their floats. Other linears, and
    the head, are quantized as the config says, and the report names them and the types of the file that are to blame.
    Where a tensor or a parameter has no counterpart by the names that are known here, transformers builds the model in
    float32, and each linear whose weight is an expansion of blocks takes them over,
    found by the bits of the weight and therefore right by construction.

    Args:
        path: the file; of a model in parts (`-00001-of-00003.gguf`) any of them.
        config: how to quantize the rest, and how to compute; the head is taken over unless `head="float"`.
        model_class: class to load with; transformers' `AutoModelForCausalLM` by default.
        dtype: of the activations and of what stays in float: float32 ("auto"), bfloat16 or float16.
        **options: fields of `Int4Config`.

    Raises:
        Int4Error: naming the tensor of a file that is damaged, a part that is missing, or what transformers cannot
            read; or the file holds no language model.
    """
    from torch_int4.patching.patcher import patch

    config = Int4Config.with_overrides(config, **options)
    floats = _float_type(dtype)
    with whole_file(Path(path)) as whole:
        file = open_gguf(whole)
        _require_language_model(file)
        model: Any
        try:
            model, taken, left = load_direct(whole, file, floats, model_class, head=config.head != "float")
        except NotServedError as reason:
            model = _expand(whole, model_class, str(reason))
            taken, left = take_over(model, file, config)
            _cast(model, floats)
        if taken:  # a file that is quantized as somebody chose
            config = dataclasses.replace(config, skip=(*config.skip, *left))
        model = patch(model, config)  # which reads blocks
    model.torch_int4_report.notices += _rounded(model, file, taken)
    return model


def load_tokenizer(path: str | os.PathLike[str]) -> Any:
    """The tokenizer of a GGUF file, with the chat template that the file holds.

    Args:
        path: the file; of a model in parts any of them.

    Raises:
        Int4Error: the file is damaged, or holds no tokenizer that transformers reads.
    """
    from transformers import AutoTokenizer

    first = parts_of(Path(path))[0]
    _require_language_model(open_gguf(first))
    try:
        return AutoTokenizer.from_pretrained(str(first.parent), gguf_file=first.name, local_files_only=True)
    except Exception as error:  # tokenizers raises this very type, and transformers whatever a lookup fails with
        raise Int4Error(f"{first.name}: transformers does not read its tokenizer: {error!r}") from error


def _float_type(dtype: str | torch.dtype) -> torch.dtype:
    found = torch.float32 if dtype == "auto" else getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if found not in (torch.float32, torch.bfloat16, torch.float16):
        raise Int4Error(f"dtype must be auto, float32, bfloat16 or float16; got {dtype!r}")
    return found


def _rounded(model: Any, file: GgufFile, taken: list[str]) -> list[str]:
    """For the report: the linears that are not what the file holds."""
    names = [entry.name for entry in model.torch_int4_report.linears if entry.name not in taken]
    if not names:
        return []
    others = {entry.kind for entry in file.tensors.values() if len(entry.shape) == 2 and entry.kind not in BLOCKS}
    return [
        f"rounded as the config says, because kernels have no grid for the blocks of the file "
        f"({', '.join(sorted(others)) or 'merged or reshaped'}): {', '.join(names)}"
    ]


def _cast(model: nn.Module, dtype: torch.dtype) -> None:
    """What transformers' `from_pretrained(dtype=...)` makes of a float32 model: buffers, such as the frequencies of
    rotary embeddings, and what the class keeps in float32 stay.
    """
    kept = {*(getattr(model, "_keep_in_fp32_modules", None) or ())}
    kept |= {*(getattr(model, "_keep_in_fp32_modules_strict", None) or ())}
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and kept.isdisjoint(name.split(".")):
            parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype


def _require_language_model(file: GgufFile) -> None:
    kind = file.metadata.get("general.type", "model")
    if kind == "mmproj" or file.metadata.get("general.architecture") == "clip":
        raise Int4Error(
            f"{file.path.name}: holds the image or audio encoder of a multimodal model (mmproj) and no language model; "
            "give the file of the language model, which then runs on text alone"
        )
    if kind != "model":
        raise Int4Error(f"{file.path.name}: holds no model (general.type is {kind!r})")


def take_over(model: nn.Module, file: GgufFile, config: Int4Config | None = None) -> tuple[list[str], list[str]]:
    """Put the blocks of a file into the place of every linear of `model` whose weight is their expansion.

    A tensor of the file may have its rows in another order than the model: llama.cpp orders those of q and k by its
    own rotary embedding. `patch` packs the blocks.

    Returns:
        The names of the linears, and of those but the head whose weight is a tensor of floats.
    """
    linears = _linears(model, config or Int4Config())
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if callable(getter) else None
    taken, left = [], []
    for name, entry in file.tensors.items():
        if entry.kind not in (*BLOCKS, *FLOATS) or len(entry.shape) != 2 or entry.shape not in linears:
            continue
        raw = file.read(name)
        values = dense(raw, entry.kind, entry.shape, name)
        for place in linears[entry.shape].pop(_fingerprint(values), ()):
            module = model.get_submodule(place)
            if entry.kind in FLOATS:
                left += [place] if module is not head else []
                continue
            order = _row_order(values, module.weight)  # type: ignore[arg-type]
            if order is not None:
                new = GgufBlocks(raw[order], entry.kind, entry.shape, getattr(module, "bias", None))
                parent, _, attribute = place.rpartition(".")
                setattr(model.get_submodule(parent), attribute, new.train(module.training))
                taken.append(place)
    return taken, left


def _expand(path: Path, model_class: Any, reason: str) -> Any:
    """The float model that transformers makes of a file which has no direct way, for a reason."""
    import transformers

    options: dict[str, Any] = {"gguf_file": path.name, "dtype": torch.float32, "local_files_only": True}
    if hasattr(transformers, "GgufConfig"):  # older versions always expand
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    loader = model_class or transformers.AutoModelForCausalLM
    try:
        model, info = loader.from_pretrained(str(path.parent), output_loading_info=True, **options)
    except (AssertionError, ImportError, KeyError, NotImplementedError, RuntimeError, ValueError) as error:
        raise Int4Error(f"{path.name}: transformers cannot load this GGUF file: {error} ({reason})") from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise Int4Error(f"{path.name}: transformers finds no values of {missing[0]} in this GGUF file ({reason})")
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
