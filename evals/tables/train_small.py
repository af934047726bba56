"""Trains a small model of a family on a text, so that families without a small published model can be measured.

Run ``python evals/tables/train_small.py --help``. Models of a few million parameters trained for minutes barely
react to 4 bits: they show that a family is quantized right, and say little about quality.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from torch_int4.errors import Int4Error

SHAPES: dict[str, dict[str, Any]] = {  # model_type -> fields besides the common ones
    "llama": {"num_key_value_heads": 2},
    "gptj": {"rotary_dim": 16},
    "gpt_neox": {"rope_parameters": {"partial_rotary_factor": 0.25, "rope_theta": 1e4, "rope_type": "default"}},
    "falcon": {"multi_query": True, "parallel_attn": True, "alibi": False},
}


def make_tokenizer(text: str, vocabulary: int) -> Any:
    """A byte-level BPE tokenizer trained on `text`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(text.splitlines(keepends=True), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")


def make_model(family: str, vocabulary: int, *, width: int, layers: int, context: int, seed: int) -> Any:
    """An untrained model; `width` must be a multiple of 32.

    Raises:
        Int4Error: a family that is not in SHAPES, or an unusable width.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    if family not in SHAPES:
        raise Int4Error(f"train_small: unknown family {family!r}; there are {', '.join(SHAPES)}")
    if width < 64 or width % 32:
        raise Int4Error(f"train_small: width must be a multiple of 32 from 64 on; got {width}")
    heads = max(2, width // 64)
    shape = dict(SHAPES[family])
    if family == "llama":
        shape.update(intermediate_size=width * 8 // 3 // 32 * 32, num_key_value_heads=max(1, heads // 2))
    elif family == "gpt_neox":
        shape.update(intermediate_size=4 * width)
    config = AutoConfig.for_model(
        family,
        vocab_size=vocabulary,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=context,
        bos_token_id=0,
        eos_token_id=0,
        tie_word_embeddings=False,
        **shape,
    )
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config)


def train(model: Any, ids: Tensor, *, steps: int, batch: int, window: int, rate: float, seed: int) -> Iterator[float]:
    """Trains with AdamW on random windows of `ids` `[T]`, with a warm-up and a cosine; yields the loss of each step."""
    if ids.numel() <= window:
        raise Int4Error(f"train_small: {ids.numel()} tokens are too few for windows of {window}; give a longer text")
    order = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.1)
    model.train()
    for step in range(steps):
        progress = step / steps
        factor = min(1.0, (step + 1) / max(1, steps // 20)) * (0.55 + 0.45 * math.cos(math.pi * progress))
        for group in optimizer.param_groups:
            group["lr"] = rate * factor
        starts = torch.randint(ids.numel() - window, (batch,), generator=order)
        rows = torch.stack([ids[start : start + window] for start in starts])
        loss = model(input_ids=rows, labels=rows, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        yield loss.item()
    model.eval()


def main(
    text: Annotated[Path, typer.Option(help="UTF-8 text to train on.")],
    out: Annotated[Path, typer.Option(help="Directory for the model and its tokenizer.")],
    family: Annotated[str, typer.Option(help="llama, gptj, gpt_neox or falcon.")] = "llama",
    width: Annotated[int, typer.Option(help="Features of a token.")] = 256,
    layers: Annotated[int, typer.Option(min=1, help="Blocks.")] = 6,
    vocabulary: Annotated[int, typer.Option(min=300, help="Tokens of the BPE tokenizer.")] = 4096,
    window: Annotated[int, typer.Option(min=8, help="Tokens per window.")] = 256,
    batch: Annotated[int, typer.Option(min=1, help="Windows per step.")] = 8,
    steps: Annotated[int, typer.Option(min=1, help="Steps of AdamW.")] = 500,
    rate: Annotated[float, typer.Option(help="Largest learning rate.")] = 1e-3,
    seed: Annotated[int, typer.Option(help="Of weights and windows.")] = 0,
) -> None:
    """Train a small model, and save it in Hugging Face form.

    Examples:

        python evals/tables/train_small.py --family falcon --text wiki.train.tokens --out falcon-small
    """
    try:
        content = text.read_text(encoding="utf-8")
        tokenizer = make_tokenizer(content, vocabulary)
        model = make_model(family, len(tokenizer), width=width, layers=layers, context=2 * window, seed=seed)
        ids = tokenizer(content, return_tensors="pt", verbose=False)["input_ids"][0]
        start = time.monotonic()
        losses = train(model, ids, steps=steps, batch=batch, window=window, rate=rate, seed=seed)
        for step, loss in enumerate(losses):
            if step % 20 == 0 or step + 1 == steps:
                left = (time.monotonic() - start) / (step + 1) * (steps - step - 1)
                typer.echo(f"step {step + 1}/{steps}  loss {loss:.3f}  {left:.0f} s left", err=True)
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)
    except (Int4Error, OSError) as error:
        typer.secho(f"train_small: {error}", fg=typer.colors.RED, err=True)
        raise typer.Exit(2) from error


if __name__ == "__main__":
    command = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    command.command()(main)
    command()
