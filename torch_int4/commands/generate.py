"""``torch-int4 generate``: continue one prompt."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from torch_int4.commands import _model


def main(
    prompt: Annotated[str, typer.Option(help="What to continue or answer; - reads the standard input.")],
    model: _model.Model = None,
    tokens: Annotated[int, typer.Option(min=1, help="New tokens at most.")] = 128,
    raw: Annotated[bool, typer.Option(help="Continue the text as it is, without the chat template.")] = False,
    sample: Annotated[bool, typer.Option(help="Sample instead of taking the likeliest token.")] = False,
    temperature: Annotated[float, typer.Option(min=0.01, help="With --sample.")] = 1.0,
    top_p: Annotated[float, typer.Option(min=0.01, max=1, help="With --sample.")] = 1.0,
    seed: Annotated[int, typer.Option(help="With --sample.")] = 0,
    prompt_lookup: Annotated[
        int, typer.Option(min=0, help="Tokens to guess from the prompt at each step; for summaries and edits.")
    ] = 0,
    assistant: Annotated[str | None, typer.Option(help="Smaller model that guesses tokens, patched too.")] = None,
    group_size: _model.GroupSize = 32,
    symmetric: _model.Symmetric = None,
    compute: _model.Compute = "int8",
    head: _model.Head = "int8",
    kv_cache: _model.KvCache = "auto",
    dtype: _model.Dtype = "auto",
    threads: _model.Threads = None,
) -> None:
    """Answer one prompt with a patched model, as the text comes; the speed goes to the standard error output.

    Examples:

        torch-int4 generate --prompt "Write a haiku about cores."

        torch-int4 generate ./my-llama --prompt - --raw --prompt-lookup 8 < text.txt
    """
    import sys

    import torch

    from torch_int4 import Int4Error
    from torch_int4.evals import models
    from torch_int4.hf import interactive

    options = (group_size, symmetric, compute, head, kv_cache, _model.require_dtype(dtype), threads)
    if prompt_lookup and assistant is not None:
        raise Int4Error("--prompt-lookup and --assistant are two ways to guess tokens: give one of them")
    text = sys.stdin.read() if prompt == "-" else prompt
    if not text:
        raise Int4Error("--prompt: is empty; give some text, or - and the text on the standard input")
    loaded, tokenizer = _model.Choice(model, *options).load()
    ids = tokenizer(text, return_tensors="pt")["input_ids"] if raw else models.encode_prompt(tokenizer, text)
    if ids.numel() == 0:
        raise Int4Error("--prompt: the tokenizer makes no token of it; give other text")
    arguments: dict[str, Any] = {"max_new_tokens": tokens, "do_sample": sample}
    if sample:
        torch.manual_seed(seed)
        arguments |= {"temperature": temperature, "top_p": top_p}
    if prompt_lookup:
        arguments["prompt_lookup_num_tokens"] = prompt_lookup
    if assistant is not None:
        arguments["assistant_model"] = _model.Choice(assistant, *options).load()[0]
    answer = interactive.answer(loaded, tokenizer, ids, write=_write, **arguments)
    typer.echo("")
    typer.echo(answer.summary(), err=True)


def _write(text: str) -> None:
    typer.echo(text, nl=False)
