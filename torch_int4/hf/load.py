"""`torch_int4.from_pretrained`: checkpoints of int4 weights in any format that we read, and float ones."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from torch_int4.config import OF_RUNNING, Int4Config, is_group_size
from torch_int4.errors import Int4Error
from torch_int4.formats.parts.files import open_checkpoint, read_quantization_file

OF_FETCHING = ("trust_remote_code", "revision", "subfolder", "token", "cache_dir", "local_files_only", "code_revision")


def from_pretrained(
    name_or_path: str | os.PathLike[str],
    config: Int4Config | None = None,
    *,
    model_class: Any = None,
    model_config: Any = None,
    **options: Any,
) -> Any:
    """A patched model, from a folder or a repository of the Hub.

    A float checkpoint is quantized while it is loaded, linear by linear. A checkpoint that is quantized already, by
    `save_pretrained` of a patched model or by another tool in one of the formats in `torch_int4/formats`, is taken over
    as it is: its codes are packed, nothing is rounded again, and what it left in float stays in float unless `head` or
    `skip` say otherwise.

    Args:
        name_or_path: as for transformers' `from_pretrained`; or a file that ends in .gguf, whose blocks are taken over
            if kernels have their grid; linears of other types are rounded, which the report says (`hf/gguf.py`; then
            `options` are fields of `Int4Config` and `dtype` only).
        config: how to quantize a float checkpoint, and how to compute. For a quantized one only `compute`, `head`,
            `attention`, `kv_cache`, `embeddings` and `skip` may be given, and only as keywords.
        model_class: class to load with; transformers' `AutoModelForCausalLM` by default.
        model_config: the model's own config, where it is loaded already; otherwise it is read from there.
        **options: fields of `Int4Config`, and whatever transformers' `from_pretrained` takes. Unless said otherwise no
            code of the checkpoint runs (`trust_remote_code=False`) and pickled weights are refused.

    Raises:
        Int4Error: naming the tensor and its file, or the setting, that cannot be served.
    """
    from transformers import AutoModelForCausalLM

    if os.fspath(name_or_path).endswith(".gguf"):
        from torch_int4.hf.gguf import from_gguf

        return from_gguf(name_or_path, config, model_class=model_class, **options)
    names = {field.name for field in fields(Int4Config)}
    ours = {key: options.pop(key) for key in list(options) if key in names}
    options = {"trust_remote_code": False, "use_safetensors": True, **options}
    model_config = load_config(name_or_path, options) if model_config is None else copy.deepcopy(model_config)
    source = quantization_of(model_config)
    if source is None:
        options["quantization_config"] = Int4Config.with_overrides(config, **ours)
    else:
        if config is not None:
            raise Int4Error(
                f"{name_or_path}: is quantized already, so a config cannot choose how; give {', '.join(OF_RUNNING)} as "
                "keywords, or load the float checkpoint"
            )
        model_config.quantization_config = _adopted(source, ours, str(name_or_path))
    _check_files(name_or_path, options)
    loader = AutoModelForCausalLM if model_class is None else model_class
    return loader.from_pretrained(name_or_path, config=model_config, **options)


def _check_files(name_or_path: str | os.PathLike[str], options: Mapping[str, Any]) -> None:
    """Look at index and headers of a folder before anything is loaded from it."""
    elsewhere = any(options.get(name) for name in ("subfolder", "variant", "gguf_file", "state_dict"))
    if options["use_safetensors"] and not elsewhere and os.path.isdir(name_or_path):
        open_checkpoint(os.fspath(name_or_path)).close()


def load_config(name_or_path: str | os.PathLike[str], options: Mapping[str, Any]) -> Any:
    """The config of a model, found by those of `options` that say where; older tools' quantization files included."""
    from transformers import AutoConfig

    given = {key: options[key] for key in OF_FETCHING if key in options}
    model_config = AutoConfig.from_pretrained(name_or_path, **{"trust_remote_code": False, **given})
    if quantization_of(model_config) is None:
        found = read_quantization_file(os.path.join(name_or_path, options.get("subfolder") or ""))
        if found is not None:
            model_config.quantization_config = found
    return model_config


def quantization_of(model_config: Any) -> dict[str, Any] | None:
    """The `quantization_config` of a model's config; None for a float checkpoint."""
    for owner in (model_config, model_config.get_text_config(decoder=True)):
        found = getattr(owner, "quantization_config", None)
        if found is not None:
            return dict(found) if isinstance(found, Mapping) else found.to_dict()
    return None


def _adopted(source: Mapping[str, Any], ours: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The `quantization_config` by which our quantizer reads this checkpoint, with the user's wishes in it."""
    from torch_int4.checkpoint.stored import BLOCK, parse, wrap

    wrong = [name for name in ours if name not in OF_RUNNING]
    if wrong:
        raise Int4Error(
            f"{where}: is quantized already, so {', '.join(wrong)} cannot be chosen; only {', '.join(OF_RUNNING)} can"
        )
    if BLOCK in source:
        return {**source, BLOCK: Int4Config.with_overrides(parse(source), **ours).to_dict()}
    return wrap(source, Int4Config.with_overrides(_config_of(source), **ours))


def _config_of(source: Mapping[str, Any]) -> Int4Config:
    """The `Int4Config` of weights of another tool, as far as it can say it."""
    from torch_int4 import formats

    settings = formats.find(source).settings(source)
    size = settings.group_size if is_group_size(settings.group_size) else Int4Config.group_size
    return Int4Config(group_size=size, symmetric=settings.symmetric, head="float")
