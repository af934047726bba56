"""GGUF files as models: their blocks are packed as they are, and nothing is rounded again."""

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
from torch_int4.formats.parts.gguf_split import parts_of, whole_file
from torch_int4.hf.gguf_blocks import load_direct


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
    (`hf/gguf_blocks.py`). Other linears are quantized as the config says, and the report names them and the types of
    the file that are to blame. Where tensors and parameters do not go one by one, as with experts, transformers builds
    the model in float32, and each linear whose weight is an expansion of blocks takes them over, found by the bits of
    the weight and therefore right by construction.

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
        direct = load_direct(whole, file, floats, model_class, head=config.head != "float")
        if direct is None:
            model = _expand(whole, model_class)
            taken = take_over(model, file, config)
            _cast(model, floats)
        else:
            model, taken = direct
            del direct
    model = patch(model, config)
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
