"""Throughput of encoders and encoder-decoders, random weights in the shapes of models that people run.

Each row: sentences (or clips) a second of the whole model in float32, in bfloat16, patched, and, where packages onnx
and onnxruntime are installed, in ONNX Runtime after its dynamic int8 quantization. Engines take turns; the best of the
rounds counts. The error is that of the patched model's outputs against float32: norm of the difference over the norm.
Run:
    python evals/tables/encoders.py [--rounds 5] [--only bert-base]
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from torch_int4 import patch
from torch_int4.support.markdown import markdown_table

VOCABULARY = 30522


class Shape(NamedTuple):
    """A model and its input.

    Attributes:
        make: builds the model in float32.
        inputs: its arguments for a batch.
        batches: sizes of batches.
    """

    make: Callable[[], nn.Module]
    inputs: Callable[[int], dict[str, Tensor]]
    batches: tuple[int, ...]


def main() -> None:
    """Prints the table in Markdown, row by row as they are measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="turns of each engine (default 5)")
    parser.add_argument("--only", action="append", choices=sorted(SHAPES), help="this model alone; may be repeated")
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    columns = ("model", "batch", "float32", "bfloat16", "ours", "ONNX Runtime int8", "ours / best other", "error")
    rows = [row for name in given.only or SHAPES for row in _rows(name, given.rounds)]
    print(markdown_table(columns, rows))


def _rows(name: str, rounds: int) -> list[tuple[str, ...]]:
    shape = SHAPES[name]
    torch.manual_seed(0)
    model = shape.make().eval()
    half, ours = copy.deepcopy(model).to(torch.bfloat16), patch(copy.deepcopy(model), head="float")
    rows = []
    for batch in shape.batches:
        inputs = shape.inputs(batch)
        halves = {key: x.bfloat16() if x.is_floating_point() else x for key, x in inputs.items()}
        engines: dict[str, Callable[[], Any]] = {
            "float32": lambda inputs=inputs: model(**inputs),  # type: ignore[misc]
            "bfloat16": lambda halves=halves: half(**halves),  # type: ignore[misc]
            "ours": lambda inputs=inputs: ours(**inputs),  # type: ignore[misc]
        }
        onnx = _onnx_runtime(model, inputs)
        if onnx is not None:
            engines["onnx"] = onnx
        with torch.inference_mode():
            want, got = _output(engines["float32"]()), _output(engines["ours"]())
            seconds = _best(engines, rounds)
        others = [seconds[engine] for engine in seconds if engine != "ours"]
        rates = [f"{batch / seconds[engine]:.2f}" if engine in seconds else "" for engine in (*engines, "onnx")[:4]]
        error = float((got - want).norm() / want.norm())
        rows.append((name, str(batch), *rates, f"{min(others) / seconds['ours']:.2f}", f"{error:.3f}"))
        print(rows[-1], flush=True)
    return rows


def _best(engines: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Seconds of each engine, the least of its turns; the first turn warms up."""
    best = dict.fromkeys(engines, float("inf"))
    for turn in range(rounds + 1):
        for name, run in engines.items():
            begin = time.perf_counter()
            run()
            if turn:
                best[name] = min(best[name], time.perf_counter() - begin)
    return best


def _output(result: Any) -> Tensor:
    found: Tensor = result.logits if hasattr(result, "logits") else result.last_hidden_state
    return found.float()


def _onnx_runtime(model: nn.Module, inputs: dict[str, Tensor]) -> Callable[[], Any] | None:
    """The model in ONNX Runtime with int8 weights and activations; None where it does not get there."""
    try:
        import onnxruntime
        from onnxruntime.quantization import QuantType, quantize_dynamic

        with tempfile.TemporaryDirectory() as folder:
            plain, small = Path(folder) / "model.onnx", Path(folder) / "int8.onnx"
            torch.onnx.export(model, (), str(plain), kwargs=inputs, input_names=list(inputs), dynamo=False)
            quantize_dynamic(str(plain), str(small), weight_type=QuantType.QInt8)
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = torch.get_num_threads()
            session = onnxruntime.InferenceSession(str(small), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # whatever an exporter raises
        print(f"ONNX Runtime: left out ({type(error).__name__}: {str(error).splitlines()[0][:80]})", flush=True)
        return None
    given = {entry.name: inputs[entry.name].numpy() for entry in session.get_inputs()}
    return lambda: session.run(None, given)


def _bert(**fields: int) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import transformers

        return transformers.BertModel(transformers.BertConfig(vocab_size=VOCABULARY, **fields))

    return make


def _sentences(tokens: int) -> Callable[[int], dict[str, Tensor]]:
    def inputs(batch: int) -> dict[str, Tensor]:
        ids = torch.randint(5, VOCABULARY, (batch, tokens), generator=torch.Generator().manual_seed(batch))
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    return inputs


def _t5() -> nn.Module:
    import transformers

    config = transformers.T5Config(vocab_size=VOCABULARY, d_model=512, d_ff=2048, num_layers=6, num_heads=8)
    return transformers.T5ForConditionalGeneration(config)


def _bart() -> nn.Module:
    import transformers

    sizes = {"encoder_layers": 6, "decoder_layers": 6, "encoder_ffn_dim": 3072, "decoder_ffn_dim": 3072}
    heads = {"encoder_attention_heads": 12, "decoder_attention_heads": 12}
    return transformers.BartModel(transformers.BartConfig(vocab_size=VOCABULARY, d_model=768, **sizes, **heads))


def _whisper() -> nn.Module:
    import transformers

    sizes = {"encoder_layers": 6, "decoder_layers": 6, "encoder_ffn_dim": 2048, "decoder_ffn_dim": 2048}
    heads = {"encoder_attention_heads": 8, "decoder_attention_heads": 8}
    return transformers.WhisperForConditionalGeneration(transformers.WhisperConfig(d_model=512, **sizes, **heads))


def _pairs(tokens: int, answer: int) -> Callable[[int], dict[str, Tensor]]:
    def inputs(batch: int) -> dict[str, Tensor]:
        ids = _sentences(tokens)(batch)
        return {**ids, "decoder_input_ids": ids["input_ids"][:, :answer].contiguous()}

    return inputs


def _clips(batch: int) -> dict[str, Tensor]:
    sound = torch.randn(batch, 80, 3000, generator=torch.Generator().manual_seed(batch))
    return {"input_features": sound, "decoder_input_ids": torch.ones(batch, 8, dtype=torch.long)}


SHAPES = {
    "all-MiniLM-L6": Shape(
        _bert(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536),
        _sentences(128),
        (1, 32),
    ),
    "bert-base": Shape(_bert(), _sentences(128), (1, 16)),
    "bert-large": Shape(
        _bert(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096),
        _sentences(128),
        (1, 8),
    ),
    "t5-small": Shape(_t5, _pairs(128, 32), (1, 16)),
    "bart-base": Shape(_bart, _pairs(128, 32), (1, 16)),
    "whisper-base": Shape(_whisper, _clips, (1, 4)),
}

if __name__ == "__main__":
    main()
