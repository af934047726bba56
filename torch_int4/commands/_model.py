"""Parts that commands share which run a model: their options, and a loaded and patched model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from torch_int4.errors import Int4Error

Model = Annotated[
    str | None, typer.Argument(help="Local model directory, .gguf file or Hub name; without it, SmolLM2-135M-Instruct.")
]
GroupSize = Annotated[int, typer.Option(help="Inputs that share a scale: 32 to 1024, or -1.")]
Symmetric = Annotated[
    bool | None,
    typer.Option("--symmetric/--asymmetric", help="A scale per group, or a float minimum too. Default: symmetric."),
]
Compute = Annotated[str, typer.Option(help="Arithmetic: int8, int8x2, bf16 or fp32.")]
Head = Annotated[str, typer.Option(help="Output head: int8, int4 or float.")]
KvCache = Annotated[str, typer.Option(help="KV cache: auto (16 bits), fp32, bf16, fp16 or int8.")]
Dtype = Annotated[str, typer.Option(help="Dtype of what stays in float: auto, float32, bfloat16 or float16.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads of torch; without it, as it is set.")]


@dataclass(frozen=True)
class Choice:
    """A model and how to patch it, as the command line says.

    The default model's file lies on a grid of 32 inputs with a float minimum, so that is its default.
    """

    name: str | None
    group_size: int
    symmetric: bool | None
    compute: str
    head: str
    kv_cache: str
    dtype: str
    threads: int | None

    def folder(self) -> str:
        """The model that is loaded: a directory, a GGUF file or a name on the Hub.

        Raises:
            Int4Error: if it looks like a directory without a model, or a file that is not there.
        """
        if self.name is None:
            from torch_int4.evals import models

            return str(models.default_model_dir())
        path = Path(self.name).expanduser()
        if path.is_dir() and not (path / "config.json").is_file():
            raise Int4Error(f"model directory {self.name!r}: no config.json there; name one written by save_pretrained")
        if is_gguf(self.name) and not path.is_file():
            raise Int4Error(f"model file {self.name!r}: does not exist")
        if not path.exists() and self.name.startswith((".", "/", "~")):
            raise Int4Error(f"model directory {self.name!r}: does not exist")
        return str(path) if path.exists() else self.name

    def prepare(self, model: Any) -> Any:
        """Sets the threads, and patches the model unless its checkpoint brought int4 linears along."""
        import torch

        import torch_int4

        if self.threads is not None:
            torch.set_num_threads(self.threads)
        if any(isinstance(module, torch_int4.Int4Linear) for module in model.modules()):
            return model
        return torch_int4.patch(model, **self.options())

    def options(self) -> dict[str, Any]:
        """Fields of `Int4Config`."""
        symmetric = self.name is not None if self.symmetric is None else self.symmetric
        return {
            "group_size": self.group_size,
            "symmetric": symmetric,
            "zeros": "integer" if symmetric else "float",
            "compute": self.compute,
            "head": self.head,
            "kv_cache": self.kv_cache,
        }

    def load(self) -> tuple[Any, Any]:
        """(patched model, tokenizer).

        Raises:
            Int4Error: if there is no such model, or it cannot be patched.
        """
        from transformers import AutoTokenizer

        folder = self.folder()
        model = self.model(folder)
        if is_gguf(folder):
            from torch_int4.hf.gguf import load_tokenizer

            return model, load_tokenizer(folder)
        try:
            return model, AutoTokenizer.from_pretrained(folder)
        except (OSError, ValueError) as error:
            raise Int4Error(f"model {folder!r}: transformers does not load its tokenizer: {error}") from error

    def model(self, folder: str) -> Any:
        """The patched model alone; a checkpoint that is quantized already is taken over as it is.

        Raises:
            Int4Error: if there is no such model, or it cannot be patched.
        """
        from transformers import AutoConfig, AutoModelForCausalLM

        import torch_int4
        from torch_int4.evals import models

        with models.quiet_transformers():
            try:
                if is_gguf(folder):
                    return self.prepare(torch_int4.from_pretrained(folder, dtype=self.dtype, **self.options()))
                if getattr(AutoConfig.from_pretrained(folder), "quantization_config", None) is None:
                    model = AutoModelForCausalLM.from_pretrained(folder, dtype=self.dtype)
                else:
                    model = torch_int4.from_pretrained(
                        folder, dtype=self.dtype, compute=self.compute, kv_cache=self.kv_cache
                    )
            except Int4Error:
                raise
            except (OSError, ValueError) as error:
                raise Int4Error(f"model {folder!r}: transformers does not load it: {error}") from error
        return self.prepare(model.eval())


def is_gguf(name: str) -> bool:
    """Whether a model is a GGUF file, by its name."""
    return name.endswith(".gguf")


def require_dtype(dtype: str) -> str:
    """The dtype's name, if a model can be loaded in it."""
    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise Int4Error(f"--dtype must be auto, float32, bfloat16 or float16; got {dtype!r}")
    return dtype
