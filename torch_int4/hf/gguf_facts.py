"""What the tensors and the metadata of a GGUF file mean for a model of transformers.

Families whose file in patches/ has a `GGUF` are read by that. transformers' own loader tells about all others; its
list of architectures is shorter, and its configs have neither scaled rotations nor sizes of heads and experts.
"""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from torch_int4.errors import Int4Error
from torch_int4.formats.gguf import require_gguf
from torch_int4.formats.parts.gguf_file import GgufFile
from torch_int4.layouts.gguf import HEADS, PAIRS, GgufLayout
from torch_int4.patching import families

FIELDS = {  # of all architectures; names that a config does not know are left out
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.layer_norm_epsilon": "layer_norm_eps",
    "attention.sliding_window": "sliding_window",
    "vocab_size": "vocab_size",
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
}
TOKENS = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "padding_token_id": "pad_token_id"}
# Llama 3.1 and later: of all that scale rotations so, transformers' "llama3" with these
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
YARN = {"yarn_attn_factor": "attention_factor", "yarn_beta_fast": "beta_fast", "yarn_beta_slow": "beta_slow"}
FREQUENCIES = "rope_freqs.weight"


class Facts(Protocol):
    """What a file's tensors and metadata mean.

    Attributes:
        config: of the model.
    """

    config: Any

    def names(self, model: Any) -> dict[str, str]:
        """{tensor of the file: parameter of the model}."""

    def order(self, name: str, rows: int) -> Tensor | None:
        """int64 `[rows]`: row i of the model's tensor is row order[i] of the file's; None where it is none of them."""

    def values(self, name: str, values: Tensor) -> Tensor | None:
        """The model's values for those of a tensor that has no such order; None where they belong to no tensor."""

    def unused(self, name: str) -> bool:
        """Whether the model does without this tensor of the file."""


def facts_of(path: Path, file: GgufFile) -> Facts:
    """The facts about a file, by the family's own file, or by transformers.

    Args:
        path: the file, as transformers reads its metadata.
        file: the same, opened.

    Raises:
        Int4Error: naming the metadata that make no config.
        Exception: whatever transformers raises for what it does not know.
    """
    architecture = str(file.metadata.get("general.architecture"))
    for model_type in families.available():
        layout = families.extra(model_type, "GGUF")
        if isinstance(layout, GgufLayout) and layout.architecture == architecture and _is_of(file, layout):
            return FamilyFacts(file, model_type, layout)
    return TransformersFacts(path, file)


def _is_of(file: GgufFile, layout: GgufLayout) -> bool:
    def has(key: str) -> bool:
        return bool(file.metadata.get(f"{layout.architecture}.{key}"))

    return all(map(has, layout.needs)) and not any(map(has, layout.lacks))


def _vocabulary(file: GgufFile) -> int:
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise Int4Error(f"{file.path.name}: has no tensor 'token_embd.weight', so it holds no language model")
    return embedding.shape[0]


class FamilyFacts:
    """Facts by the `GGUF` of a family's file."""

    def __init__(self, file: GgufFile, model_type: str, layout: GgufLayout) -> None:
        import transformers

        self.file, self.layout = file, layout
        kind = transformers.CONFIG_MAPPING[model_type]
        known = kind()
        settings = {name: value for name, value in self._settings().items() if hasattr(known, name)}
        if (getattr(known, "pad_token_id", None) or 0) >= settings["vocab_size"]:
            settings.setdefault("pad_token_id", None)
        self.config = kind(**settings)
        rotation = self._rotation(settings)
        if rotation:
            parameters = getattr(known, "rope_parameters", None) or {}
            kinds = [name for name in parameters if isinstance(parameters[name], dict)]  # of layers
            each = {"rope_theta": parameters.get("rope_theta", 1e4), **rotation}
            settings["rope_parameters"] = dict.fromkeys(kinds, each) if kinds else each
            self.config = kind(**settings)

    def _get(self, key: str) -> Any:
        value = self.file.metadata.get(f"{self.layout.architecture}.{key}")
        if isinstance(value, tuple):
            if len(set(value)) > 1 and key != "attention.sliding_window_pattern":
                raise Int4Error(f"{self.file.path.name}: layers differ in {key}, which torch_int4 does not read")
            return value if key == "attention.sliding_window_pattern" else value[0]
        return value

    def _settings(self) -> dict[str, Any]:
        metadata, tensors = self.file.metadata, self.file.tensors
        found = {name: self._get(key) for key, name in {**FIELDS, **self.layout.fields}.items() if name is not None}
        found["vocab_size"] = _vocabulary(self.file)
        found |= {name: metadata.get(f"tokenizer.ggml.{key}") for key, name in TOKENS.items()}
        found = {name: value for name, value in found.items() if value is not None}
        found["num_hidden_layers"] -= self._get("nextn_predict_layers") or 0  # which guess more tokens at once
        if self._get("attention.head_count_kv") is None:
            found["num_key_value_heads"] = found.get("num_attention_heads")
        if "head_dim" not in found and not found.get("hidden_size", 0) % (found.get("num_attention_heads") or 1):
            found["head_dim"] = found["hidden_size"] // found["num_attention_heads"]
        pattern = self._get("attention.sliding_window_pattern")
        if pattern is not None:
            layers = found["num_hidden_layers"]
            slides = [(i + 1) % pattern != 0 for i in range(layers)] if isinstance(pattern, int) else pattern
            found["layer_types"] = ["sliding_attention" if one else "full_attention" for one in slides]
        found["attention_bias"] = not tensors.keys().isdisjoint(("blk.0.attn_q.bias", "blk.0.attn_qkv.bias"))
        found["tie_word_embeddings"] = "output.weight" not in tensors
        return {**found, **self.layout.settings}

    def _rotation(self, settings: dict[str, Any]) -> dict[str, Any]:
        """The `rope_parameters` that metadata give."""
        head, turned = settings.get("head_dim"), self._get("rope.dimension_count")
        found: dict[str, Any] = {}
        if (base := self._get("rope.freq_base")) is not None:
            found["rope_theta"] = base
        if head and turned and turned != head:
            found["partial_rotary_factor"] = turned / head
        kind = self._get("rope.scaling.type") or "none"
        factor, before = self._get("rope.scaling.factor"), self._get("rope.scaling.original_context_length")
        if kind == "linear":
            found |= {"rope_type": "linear", "factor": factor}
        elif kind == "yarn":
            found |= {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": before}
            given = {name: self._get(f"rope.scaling.{key}") for key, name in YARN.items()}
            found |= {name: value for name, value in given.items() if value is not None}
        elif kind != "none":
            raise Int4Error(f"{self.file.path.name}: rope.scaling.type {kind!r} is not read")
        if FREQUENCIES in self.file.tensors:
            found |= scaled_frequencies(self.file, found.get("rope_theta", 1e4), int(turned or head or 0))
        return found

    def names(self, model: Any) -> dict[str, str]:
        """See `Facts`."""
        gguf = require_gguf(self.file.path.name)
        number = next(n for n, name in gguf.MODEL_ARCH_NAMES.items() if name == self.layout.architecture)
        known = gguf.get_tensor_name_map(number, self.config.num_hidden_layers)
        found = {}
        for name in model.state_dict():
            place, _, suffix = name.rpartition(".")
            if suffix.endswith("_bias"):  # of routers
                place, suffix = name.removesuffix("_bias"), "bias"
            tensor = self._own_name(place) or known.get_name(place)
            if tensor is not None:
                found[f"{tensor}.{suffix}"] = name
        return found

    def _own_name(self, place: str) -> str | None:
        parts = place.split(".")
        numbers = [i for i, part in enumerate(parts) if part.isdigit()]
        if not numbers:
            return None
        tensor = self.layout.names.get(".".join(parts[numbers[0] + 1 :]))
        return None if tensor is None else f"blk.{parts[numbers[0]]}.{tensor}"

    def order(self, name: str, rows: int) -> Tensor | None:
        """See `Facts`."""
        tensor = name.split(".")[2] if name.startswith("blk.") else ""
        kind, numbers = self.layout.rows.get(tensor), torch.arange(rows)
        if kind == PAIRS:
            heads = self.config.num_key_value_heads if tensor == "attn_k" else self.config.num_attention_heads
            return numbers.view(heads, -1, 2).swapaxes(1, 2).flatten()
        if kind == HEADS:
            return numbers.view(3, self.config.num_attention_heads, -1).swapaxes(0, 1).flatten()
        return numbers

    def values(self, name: str, values: Tensor) -> Tensor | None:
        """See `Facts`."""
        if self.layout.norms_hold_one and name.endswith("norm.weight"):
            return values - 1
        if values.dim() == 1 and (order := self.order(name, len(values))) is not None:
            return values[order]
        return values

    def unused(self, name: str) -> bool:
        """See `Facts`: what the config says already, and layers that guess more tokens at once."""
        layer = name.split(".")[1] if name.startswith("blk.") else ""
        return name == FREQUENCIES or (layer.isdigit() and int(layer) >= self.config.num_hidden_layers)


class TransformersFacts:
    """Facts by what transformers' own loader does to one tensor at a time.

    What it does to the rows of a matrix is found by giving it numbers of rows in their place.
    """

    def __init__(self, path: Path, file: GgufFile) -> None:
        import transformers
        from transformers import modeling_gguf_pytorch_utils as gguf_loader

        self.file, self._names = file, gguf_loader.get_gguf_hf_weights_map
        settings = gguf_loader.load_gguf_checkpoint(str(path))["config"]
        kind = gguf_loader.TENSOR_PROCESSORS.get(file.metadata["general.architecture"], gguf_loader.TensorProcessor)
        self.processor: Any = kind(config=settings)
        settings["vocab_size"] = _vocabulary(file)
        self.config = transformers.CONFIG_MAPPING[settings["model_type"]].from_dict(settings)

    def names(self, model: Any) -> dict[str, str]:
        """See `Facts`.

        transformers looks a model's names up again for each of its modules, as names in some files begin inside of it,
        and makes its table each time: seconds, where the names of the whole are enough.
        """
        whole = SimpleNamespace(config=model.config, state_dict=model.state_dict, named_children=tuple)
        names: dict[str, str] = self._names(whole, self.processor)
        unknown = [name for name in self.file.tensors if name not in names and name != FREQUENCIES]
        return self._names(model, self.processor) if unknown else names

    def order(self, name: str, rows: int) -> Tensor | None:
        """See `Facts`."""
        numbers = self._process(name, np.arange(rows, dtype=np.float32)[:, None])  # exact below 2^24
        if numbers is None or numbers.shape != (rows, 1) or rows >= 1 << 24:
            return None
        order = numbers[:, 0].long()
        return order if torch.equal(order.sort().values, torch.arange(rows)) else None

    def values(self, name: str, values: Tensor) -> Tensor | None:
        """See `Facts`."""
        return self._process(name, values.numpy())

    def unused(self, name: str) -> bool:
        """See `Facts`. transformers does without scaled rotations, too, and so do the families that it alone reads."""
        return name == FREQUENCIES

    def _process(self, name: str, values: Any) -> Tensor | None:
        result = self.processor.process(values, name, tensor_key_mapping={}, parsed_parameters={"tensors": {}})
        return torch.from_numpy(np.ascontiguousarray(result.weights)) if result.name == name else None


def scaled_frequencies(file: GgufFile, base: float, size: int) -> dict[str, Any]:
    """The `rope_parameters` of a file that holds what each frequency of its rotations is divided by.

    Args:
        file: with such a tensor, `[size / 2]`.
        base: of the rotations.
        size: of what is rotated of a head.

    Raises:
        Int4Error: they are not those of Llama 3.1.
    """
    given = file.read(FREQUENCIES).view(torch.float32).flatten().double()
    factor = float(given.max())
    if bool((given == 1).all()):
        return {}
    lowest, highest = LLAMA3["low_freq_factor"], LLAMA3["high_freq_factor"]
    turns = LLAMA3["original_max_position_embeddings"] * base ** (-torch.arange(0, size, 2).double() / size) / math.tau
    smooth = ((turns - lowest) / (highest - lowest)).clamp(0, 1)
    wanted = 1 / ((1 - smooth) / factor + smooth)
    if given.shape != wanted.shape or not torch.allclose(given, wanted, rtol=1e-3):
        raise Int4Error(f"{file.path.name}: {FREQUENCIES}: scales rotations in another way than Llama 3.1 does")
    return {"rope_type": "llama3", "factor": factor, **LLAMA3}
