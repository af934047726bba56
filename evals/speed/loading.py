"""Memory and time of loading: a random checkpoint of a given shape, and a measured load of it.

Peak memory is that of a process of its own (code, libraries and mapped pages included).
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from torch_int4.errors import Int4Error
from torch_int4.support.atomic import replaced_folder

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "num_attention_heads": 4},
    "1b": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32},
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
}
VOCABULARY = 32000
BLOCK = (1 << 22) + 37


@dataclass(frozen=True)
class Load:
    """One measured load.

    Attributes:
        seconds: of the load alone, without imports.
        peak_bytes: most memory the process ever held.
        resident_bytes: memory after the load.
        base_bytes: memory before it, with everything imported.
        linear_bytes: packed weights of the linears.
    """

    seconds: float
    peak_bytes: int
    resident_bytes: int
    base_bytes: int
    linear_bytes: int


def write_random(folder: str | Path, shape: str = "7b", *, seed: int = 0) -> int:
    """Write a float16 Llama checkpoint with random weights, one shard per layer; returns its bytes.

    Never more than one layer is in memory.

    Raises:
        Int4Error: there is no such shape, or the folder cannot be written.
    """
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    if shape not in SHAPES:
        raise Int4Error(f"unknown shape {shape!r}; there are: {', '.join(SHAPES)}")
    config = LlamaConfig(**SHAPES[shape], vocab_size=VOCABULARY, tie_word_embeddings=False, dtype="float16")
    config.architectures = ["LlamaForCausalLM"]
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(BLOCK, generator=generator).mul_(0.02).half()
    total, where = 0, {}
    with replaced_folder(folder) as partial:
        config.save_pretrained(partial)
        parts = list(_parts(config))
        for index, shapes in enumerate(parts):
            name = f"model-{index + 1:05}-of-{len(parts):05}.safetensors"
            tensors = {key: _random(size, values, generator) for key, size in shapes.items()}
            save_file(tensors, partial / name, metadata={"format": "pt"})
            total += sum(tensor.nbytes for tensor in tensors.values())
            where.update(dict.fromkeys(tensors, name))
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": where})
        (partial / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    return total


def _parts(config: Any) -> Iterator[dict[str, tuple[int, ...]]]:
    """Names and shapes of the tensors of each shard, from the model on the meta device."""
    from transformers import LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    prefixes = [f"model.layers.{i}." for i in range(config.num_hidden_layers)]
    for prefix in prefixes:
        yield {key: shape for key, shape in shapes.items() if key.startswith(prefix)}
    yield {key: shape for key, shape in shapes.items() if not key.startswith("model.layers.")}


def _random(shape: tuple[int, ...], values: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Cut out of a block of random values, at a random place: to draw billions would take longer than loading."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.float16)
    count, start = math.prod(shape), int(torch.randint(values.numel(), (1,), generator=generator))
    tiled = values.roll(-start).repeat(-(-count // values.numel()))
    return tiled[:count].clone().view(shape)


MEASURE = """
import json, sys, time
import torch, transformers.models.llama.modeling_llama
import torch_int4
from torch_int4 import Int4Config, Int4Linear
from torch_int4.evals.speed.process import peak_bytes, resident_bytes
transformers.utils.logging.disable_progress_bar()

fields, dtype = json.loads(sys.argv[2]), sys.argv[3]
base, start = resident_bytes(), time.perf_counter()
model = torch_int4.from_pretrained(sys.argv[1], dtype=dtype, **fields)
seconds = time.perf_counter() - start
packed = sum(m.nbytes for m in model.modules() if isinstance(m, Int4Linear))
with torch.no_grad():
    model(input_ids=torch.tensor([[1, 2, 3]]))
print(json.dumps([seconds, peak_bytes(), resident_bytes(), base, packed]))
"""


def measure(folder: str | Path, *, dtype: str = "auto", **fields: Any) -> Load:
    """Load a checkpoint and run three tokens through it, in a process of its own.

    Args:
        folder: of the checkpoint.
        dtype: of what stays in float.
        **fields: of `Int4Config`.

    Raises:
        Int4Error: that process failed; the message ends with its last line.
    """
    command = [sys.executable, "-P", "-c", MEASURE, str(folder), json.dumps(fields), dtype]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise Int4Error(f"{folder}: could not be loaded: {reason}")
    return Load(*json.loads(done.stdout.strip().splitlines()[-1]))
