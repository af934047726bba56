"""GGUF files of random weights, written a tensor at a time, for engines that read that format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy

from torch_int4 import Int4Error
from torch_int4.evals.bench.shapes import Shape
from torch_int4.support.atomic import replaced_file

# model_type: llama.cpp's name of the architecture. What is not here it does not run.
ARCHITECTURES = {"llama": "llama", "gpt_neox": "gptneox", "falcon": "falcon"}
_CHUNK = 16 << 20  # bytes of random blocks, repeated through the file: each tensor still has pages of its own


def architecture(shape: Shape) -> str | None:
    """llama.cpp's name of the shape's architecture, None if it has none."""
    return ARCHITECTURES.get(shape.model_type)


def write(shape: Shape, folder: Path) -> Path:
    """The file of a shape: Q4_0 linears and embedding, a Q6_K head (as llama-quantize writes them), fp32 norms.

    Raises:
        Int4Error: if llama.cpp does not know the family.
    """
    target = folder / f"{shape.name}-q4_0.gguf"
    if target.is_file():
        return target
    if architecture(shape) is None:
        raise Int4Error(f"shape {shape.name}: llama.cpp has no {shape.model_type} models")
    folder.mkdir(parents=True, exist_ok=True)
    with replaced_file(target) as partial:
        _write(shape, partial)
    return target


def read_bytes(path: Path) -> int:
    """Bytes that a token reads: all tensors but the embedding, which is read too where it is the head as well."""
    from gguf import GGUFReader

    sizes = {tensor.name: int(tensor.n_bytes) for tensor in GGUFReader(path).tensors}
    if "output.weight" in sizes:
        sizes.pop("token_embd.weight", None)
    return sum(sizes.values())


def _write(shape: Shape, path: Path) -> None:
    import gguf

    config, name = shape.config(), architecture(shape)
    writer = gguf.GGUFWriter(path, name)
    _write_metadata(writer, config)
    tensors = list(_tensors(shape, name))
    for tensor, size, kind in tensors:
        writer.add_tensor_info(tensor, size, numpy.dtype(numpy.float32), _nbytes(size, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    chunks: dict[Any, numpy.ndarray[Any, Any]] = {}
    for _, size, kind in tensors:
        if kind not in chunks:
            chunks[kind] = _blocks(kind)
        nbytes = _nbytes(size, kind)
        writer.write_tensor_data(numpy.resize(chunks[kind], nbytes))
    writer.close()


def _tensors(shape: Shape, name: Any) -> Any:
    """(name in the file, size, type) of every parameter."""
    import gguf

    kinds = gguf.GGMLQuantizationType
    skeleton: Any = shape.skeleton()
    arch = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == name)
    names = gguf.get_tensor_name_map(arch, skeleton.config.num_hidden_layers)
    for parameter, tensor in skeleton.named_parameters():
        found = names.get_name(parameter, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise Int4Error(f"shape {shape.name}: gguf has no name for {parameter}; update the package gguf")
        size = tuple(tensor.shape)
        if tensor.dim() == 1:
            yield found, size, kinds.F32
        else:
            blocks_fit = size[-1] % 256 == 0
            yield found, size, kinds.Q6_K if found == "output.weight" and blocks_fit else kinds.Q4_0


def _nbytes(size: tuple[int, ...], kind: Any) -> int:
    import gguf

    block, nbytes = gguf.GGML_QUANT_SIZES[kind]
    if size[-1] % block:
        raise Int4Error(f"a row of {size[-1]} weights does not divide into blocks of {block} ({kind.name})")
    return int(numpy.prod(size)) // block * nbytes


def _blocks(kind: Any) -> numpy.ndarray[Any, Any]:
    """Random blocks of a type; their scale, an fp16, keeps weights at a standard deviation of about 0.02."""
    import gguf

    nbytes = gguf.GGML_QUANT_SIZES[kind][1]
    if kind == gguf.GGMLQuantizationType.F32:
        return numpy.ones(_CHUNK // 4, dtype=numpy.float32).view(numpy.uint8)
    count = _CHUNK // nbytes
    blocks = numpy.random.default_rng(0).integers(0, 256, (count, nbytes), dtype=numpy.uint8)
    if kind == gguf.GGMLQuantizationType.Q4_0:
        scale, at = 0.02 / 4.6, 0
    else:  # Q6_K: 128 + 64 bytes of codes, 16 int8 scales, the fp16
        scale, at = 0.02 / 18.5 / 8, nbytes - 2
        blocks[:, 192:208] = 8
    blocks[:, at : at + 2] = numpy.array([scale], dtype=numpy.float16).view(numpy.uint8)
    return blocks.reshape(-1)


def _write_metadata(writer: Any, config: Any) -> None:
    heads = config.num_attention_heads
    size = config.hidden_size // heads
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(
        getattr(config, "intermediate_size", None) or getattr(config, "ffn_hidden_size", None) or 4 * config.hidden_size
    )
    writer.add_head_count(heads)
    multi_query = getattr(config, "multi_query", False)
    writer.add_head_count_kv(1 if multi_query else getattr(config, "num_key_value_heads", heads))
    writer.add_rope_dimension_count(_rotary_dim(config, size))
    if config.model_type == "llama":
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    else:
        writer.add_layer_norm_eps(getattr(config, "layer_norm_eps", None) or config.layer_norm_epsilon)
    if config.model_type == "gpt_neox":
        writer.add_parallel_residual(config.use_parallel_residual)
    writer.add_file_type(2)  # mostly Q4_0
    writer.add_quantization_version(2)
    writer.add_tokenizer_model("no_vocab")


def _rotary_dim(config: Any, head_size: int) -> int:
    parameters = getattr(config, "rope_parameters", None) or {}
    return int(head_size * parameters.get("partial_rotary_factor", 1.0))
