"""``torch-int4 chat``: talk with a model in the terminal."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from torch_int4.commands import _model


def main(
    model: _model.Model = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    tokens: Annotated[int, typer.Option(min=1, help="New tokens of an answer at most.")] = 512,
    sample: Annotated[bool, typer.Option(help="Sample instead of taking the likeliest token.")] = False,
    temperature: Annotated[float, typer.Option(min=0.01, help="With --sample.")] = 1.0,
    top_p: Annotated[float, typer.Option(min=0.01, max=1, help="With --sample.")] = 1.0,
    group_size: _model.GroupSize = 32,
    symmetric: _model.Symmetric = None,
    compute: _model.Compute = "int8",
    head: _model.Head = "int8",
    kv_cache: _model.KvCache = "auto",
    dtype: _model.Dtype = "auto",
    threads: _model.Threads = None,
) -> None:
    """Chat with a patched model; the KV cache is kept between turns, so that only what is new is computed.

    A line is a turn. /reset forgets the conversation, /exit or the end of the input ends it. Ctrl-C stops an answer.

    Examples:

        torch-int4 chat

        torch-int4 chat ./my-llama --system "Answer in one sentence." --sample --temperature 0.7
    """
    import sys

    from torch_int4.hf import interactive

    options = (group_size, symmetric, compute, head, kv_cache, _model.require_dtype(dtype), threads)
    loaded, tokenizer = _model.Choice(model, *options).load()
    arguments: dict[str, Any] = {"max_new_tokens": tokens, "do_sample": sample}
    if sample:
        arguments |= {"temperature": temperature, "top_p": top_p}
    chat = interactive.Chat(loaded, tokenizer, system=system, **arguments)
    typer.echo("one line is a turn; /reset forgets, /exit ends", err=True)
    while (line := _read(sys.stdin)) is not None and line != "/exit":
        if line == "/reset":
            chat.reset()
        elif line:
            answer = chat.turn(line, write=lambda text: typer.echo(text, nl=False))
            typer.echo("")
            typer.echo(answer.summary(), err=True)


def _read(source: Any) -> str | None:
    """The next line, None at the end; the sign that it is your turn is not part of what is piped on."""
    typer.echo("> ", nl=False, err=True)
    try:
        line = source.readline()
    except KeyboardInterrupt:
        return None
    return line.strip() if line else None
