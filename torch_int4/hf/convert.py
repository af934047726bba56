"""From a checkpoint to an INT4 checkpoint: what `torch-int4 quantize` and `optimum-cli torch-int4 quantize` do."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

from torch_int4.config import Int4Config
from torch_int4.errors import Int4Error
from torch_int4.hf.load import OF_FETCHING, from_pretrained, load_config, quantization_of
from torch_int4.patching.report import PatchReport


def convert(
    source: str,
    target: str | os.PathLike[str],
    *,
    dtype: str = "auto",
    max_shard_size: str = "5GB",
    options: dict[str, Any] | None = None,
    **fields: Any,
) -> PatchReport:
    """Load a checkpoint in INT4 and save it, with its tokenizer if it has one.

    Args:
        source: as for `from_pretrained`.
        target: folder; replaced in one step when everything is written.
        dtype: of what stays in float; "auto" is the checkpoint's.
        max_shard_size: of a file of weights.
        options: for transformers' `from_pretrained`.
        **fields: of `Int4Config`. Of a checkpoint that is quantized already, those that are not the default's must be
            ones that it does not decide.

    Raises:
        Int4Error: the model cannot be found, read, quantized or saved.
    """
    options = dict(options or {})
    if os.path.realpath(source) == os.path.realpath(target):
        raise Int4Error(f"{target}: is the model itself; choose another folder to save into")
    try:
        model_config = load_config(source, options)
        if quantization_of(model_config) is not None:
            default = Int4Config().to_dict() | {"skip": ()}
            fields = {name: value for name, value in fields.items() if value != default[name]}
        model = from_pretrained(source, model_config=model_config, dtype=dtype, **options, **fields)
    except OSError as error:
        raise Int4Error(f"{source}: cannot be loaded ({str(error).strip().splitlines()[0]})") from error
    model.save_pretrained(Path(target), max_shard_size=max_shard_size, beside=_tokenizers(source, options))
    report: PatchReport = model.torch_int4_report
    return report


def _tokenizers(source: str, options: dict[str, Any]) -> list[Any]:
    from transformers import AutoTokenizer

    given = {key: options[key] for key in OF_FETCHING if key in options}
    try:
        return [AutoTokenizer.from_pretrained(source, **{"trust_remote_code": False, **given})]
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        warnings.warn(f"{source}: has no tokenizer that could be loaded ({reason}); none is saved", stacklevel=3)
        return []
