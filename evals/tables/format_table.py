"""The table of docs/measurements/formats.md: for each format a linear, of its own tool or random bytes, read by us.

The error is that of our product (compute="fp32", so that only the reading counts) against the product with the tool's
own dequantized weight: norm of the difference over norm of the result. Run:
    python evals/tables/format_table.py
"""

from __future__ import annotations

import importlib.metadata
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from torch_int4 import Int4Linear, formats
from torch_int4.errors import Int4Error
from torch_int4.formats import Settings
from torch_int4.recipes import rtn
from torch_int4.support.markdown import markdown_table
from torch_int4.weights.canonical import Int4Weight

ROWS, INPUTS, GROUP = 96, 512, 64
Case = tuple[str, Int4Weight, Tensor]  # what, as we read it, the tool's own dequantized weight


def run() -> list[tuple[str, str, str, str]]:
    """(format, tool and version, what, error) of every case; the reason where a tool is not installed."""
    rows = []
    for name, (package, cases) in CASES.items():
        try:
            tool = f"{package} {importlib.metadata.version(package)}"
            rows += [(name, tool, what, f"{_error(ours, theirs):.1e}") for what, ours, theirs in cases()]
        except importlib.metadata.PackageNotFoundError:
            rows.append((name, package, "", "not installed"))
        except (ImportError, RuntimeError, AttributeError) as error:
            rows.append((name, package, "", f"does not run here: {str(error).splitlines()[0][:80]}"))
    return rows


def main() -> None:
    """Prints the table in Markdown."""
    print(markdown_table(("format", "made by", "what", "error of the logits"), run()))


def _error(weight: Int4Weight, theirs: Tensor) -> float:
    x = torch.randn(16, weight.in_features, generator=torch.Generator().manual_seed(1))
    want = x.double() @ theirs.double().T
    got = Int4Linear.from_weight(weight, compute="fp32")(x)
    return float((got.double() - want).norm() / want.norm())


def _dense() -> Tensor:
    return torch.randn(ROWS, INPUTS, generator=torch.Generator().manual_seed(0)) * 0.05


def _grid(symmetric: bool) -> Int4Weight:
    from torch_int4 import Int4Config

    return rtn.quantize(_dense(), Int4Config(group_size=GROUP, symmetric=symmetric))


def _linear(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight.data = weight.clone()
    return linear


def _read_module(module: nn.Module) -> Int4Weight:
    weight = formats.convert_module(module, name="linear")
    if weight is None:
        raise Int4Error(f"{type(module).__name__}: is not recognised")
    return weight


def _compressed_tensors() -> Iterator[Case]:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    form = formats.get("compressed_tensors")
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    for symmetric in (True, False):
        grid = _grid(symmetric)
        args = QuantizationArgs(num_bits=4, symmetric=symmetric, group_size=GROUP, strategy="group")
        scheme = QuantizationScheme(targets=["Linear"], weights=args, format="pack-quantized")
        state = {"weight": _dense(), "weight_scale": grid.scales.float()}
        if grid.zeros is not None:
            state["weight_zero_point"] = (grid.zeros.int() - 8).to(torch.int8)
        packed = compressor.compress(state, scheme)
        settings = Settings(4, GROUP, symmetric, "group")
        ours = form.read(packed, settings, shape=(ROWS, INPUTS), name="linear")
        yield _name(symmetric), ours, compressor.decompress(dict(packed), scheme)["weight"]
        written = form.write(ours, settings, name="linear")
        yield f"{_name(symmetric)}, written by us, read by it", ours, compressor.decompress(written, scheme)["weight"]


def _gptqmodel() -> Iterator[Case]:
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear

    form = formats.get("gptq")
    for symmetric in (True, False):
        for order in (False, True):
            grid = _grid(symmetric)
            zeros = torch.full(grid.scales.shape, 8) if grid.zeros is None else grid.zeros.int()
            index = torch.arange(INPUTS) // GROUP
            if order:
                index = index[torch.randperm(INPUTS, generator=torch.Generator().manual_seed(2))]
            module = TorchLinear(4, GROUP, symmetric, order, INPUTS, ROWS, register_buffers=True)
            module.pack_original(_linear(_dense()), grid.scales.float(), zeros.float(), index.int())
            module.qzero_format(2)  # what it packs; its files are turned into version 1 afterwards
            module.post_init()
            what = _name(symmetric) + (", act-order" if order else "")
            ours = _read_module(module)
            yield what, ours, module.dequantize_weight().T.float()
            fresh = TorchLinear(4, GROUP, symmetric, order, INPUTS, ROWS, register_buffers=True)
            for key, value in form.write(ours, Settings(4, GROUP, layout="v2"), name="linear").items():
                fresh.register_buffer(key, value)
            fresh.qzero_format(2)
            fresh.post_init()
            yield f"{what}, written by us, read by it", ours, fresh.dequantize_weight().T.float()


def _awq() -> Iterator[Case]:
    from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear
    from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm

    grid = _grid(False)
    assert grid.zeros is not None
    module = AwqTorchLinear(4, GROUP, False, False, INPUTS, ROWS, register_buffers=True)
    module.pack(_linear(grid.dequantize()), grid.scales.half(), grid.zeros)
    ours = _read_module(module)
    theirs = dequantize_gemm(module.qweight, module.qzeros, module.scales.float(), 4, GROUP).T
    yield "asymmetric, gemm", ours, theirs
    written = formats.get("awq").write(ours, Settings(), name="linear")
    theirs = dequantize_gemm(written["qweight"], written["qzeros"], written["scales"].float(), 4, GROUP).T
    yield "asymmetric, gemm, written by us, read by it", ours, theirs


def _auto_round() -> Iterator[Case]:
    from auto_round_extension.torch import qlinear_torch, qlinear_torch_zp

    for kind, source in (("auto_gptq packing", qlinear_torch_zp), ("gptqmodel packing", qlinear_torch)):
        grid = _grid(False)
        assert grid.zeros is not None
        zeros = grid.zeros.clamp(min=1).float()
        module = source.QuantLinear(4, GROUP, INPUTS, ROWS, False)
        module.device = torch.device("cpu")
        module.pack(_linear(grid.dequantize()), grid.scales.float(), zeros, device="cpu")
        theirs = module(torch.eye(INPUTS, dtype=torch.float32)).T
        yield kind, _read_module(module), theirs


def _bitsandbytes() -> Iterator[Case]:
    import bitsandbytes

    for kind, nested in itertools.product(("nf4", "fp4"), (False, True)):
        module = bitsandbytes.nn.Linear4bit(INPUTS, ROWS, bias=False, compress_statistics=nested, quant_type=kind)
        module.weight.data = _dense()
        module = module.to("cpu")
        theirs = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
        yield kind.upper() + (", double quantization" if nested else ""), _read_module(module), theirs


def _gguf() -> Iterator[Case]:
    import gguf

    form = formats.get("gguf")
    for kind in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4"):
        number = getattr(gguf.GGMLQuantizationType, kind)
        raw = gguf.quants.quantize(_dense().numpy(), number)
        settings = Settings(layout=kind)
        ours = form.read({"weight": torch.from_numpy(raw)}, settings, shape=(ROWS, INPUTS), name="linear")
        yield kind, ours, torch.from_numpy(gguf.quants.dequantize(raw, number))
    generator = torch.Generator().manual_seed(3)
    for kind, halves in (("Q4_K", 2), ("Q5_K", 2), ("IQ4_NL", 1), ("IQ4_XS", 1)):  # gguf-py reads these only
        number = getattr(gguf.GGMLQuantizationType, kind)
        per_block, size = gguf.GGML_QUANT_SIZES[number]
        blocks = torch.randint(0, 256, (ROWS, INPUTS // per_block, size), generator=generator, dtype=torch.uint8)
        scales = torch.rand(ROWS, INPUTS // per_block, halves, generator=generator).half()
        blocks[..., : 2 * halves] = scales.view(torch.uint8)
        raw = blocks.view(ROWS, -1)
        ours = form.read({"weight": raw}, Settings(layout=kind), shape=(ROWS, INPUTS), name="linear")
        yield f"{kind}, random blocks", ours, torch.from_numpy(gguf.quants.dequantize(raw.numpy(), number))


def _hqq() -> Iterator[Case]:
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    for bits in (4, 8):
        config = BaseQuantizeConfig(nbits=bits, group_size=GROUP, axis=1)
        module = HQQLinear(_linear(_dense()), config, compute_dtype=torch.float32, device="cpu")
        yield f"{bits} bits", _read_module(module), module.dequantize()


def _torchao() -> Iterator[Case]:
    from torchao.prototype.quantization.int4.int4_opaque_tensor import Int4OpaqueTensor
    from torchao.quantization import IntxWeightOnlyConfig, MappingType, quantize_
    from torchao.quantization.granularity import PerGroup

    for mapping in (MappingType.SYMMETRIC, MappingType.ASYMMETRIC):
        holder = nn.Sequential(_linear(_dense()))
        int4: Any = torch.int4  # type: ignore[attr-defined]
        quantize_(holder, IntxWeightOnlyConfig(int4, PerGroup(GROUP), mapping))
        what = f"IntxUnpackedToInt8Tensor, {mapping.name.lower()}"
        yield what, _read_module(holder[0]), holder[0].weight.dequantize()  # type: ignore[operator]
    linear: Any = _linear(_dense())
    linear.weight = nn.Parameter(Int4OpaqueTensor.from_hp(_dense(), [1, GROUP]), requires_grad=False)
    yield "Int4OpaqueTensor (CPU packing)", _read_module(linear), linear(torch.eye(INPUTS)).T


def _mxfp4() -> Iterator[Case]:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    args = QuantizationArgs(num_bits=4, type="float", strategy="group", group_size=32, scale_dtype=torch.uint8)
    scheme = QuantizationScheme(targets=["Linear"], weights=args, format="mxfp4-pack-quantized")
    generator = torch.Generator().manual_seed(4)
    tensors = {
        "weight_packed": torch.randint(0, 256, (ROWS, INPUTS // 2), generator=generator, dtype=torch.uint8),
        "weight_scale": torch.randint(100, 140, (ROWS, INPUTS // 32), generator=generator, dtype=torch.uint8),
    }
    settings = Settings(4, 32, layout="packed")
    ours = formats.get("mxfp4").read(tensors, settings, shape=(ROWS, INPUTS), name="linear")
    compressor = BaseCompressor.get_value_from_registry("mxfp4-pack-quantized")
    yield "random values", ours, compressor.decompress(dict(tensors), scheme)["weight"].float()


def _name(symmetric: bool) -> str:
    return "symmetric" if symmetric else "asymmetric"


CASES: dict[str, tuple[str, Callable[[], Iterator[Case]]]] = {
    "compressed_tensors": ("compressed-tensors", _compressed_tensors),
    "gptq": ("gptqmodel", _gptqmodel),
    "awq": ("gptqmodel", _awq),
    "auto_round": ("auto-round", _auto_round),
    "bitsandbytes": ("bitsandbytes", _bitsandbytes),
    "gguf": ("gguf", _gguf),
    "hqq": ("hqq", _hqq),
    "torchao": ("torchao", _torchao),
    "mxfp4": ("compressed-tensors", _mxfp4),
}

if __name__ == "__main__":
    main()
