"""``torch-int4 serve``: an OpenAI-compatible server on this machine."""

from __future__ import annotations

from typing import Annotated

import typer

from torch_int4.commands import _model


def main(
    model: _model.Model = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port on 127.0.0.1.")] = 8000,
    continuous_batching: Annotated[
        bool, typer.Option(help="Let requests share batches, where the model's attention can.")
    ] = False,
    group_size: _model.GroupSize = 32,
    symmetric: _model.Symmetric = None,
    compute: _model.Compute = "int8",
    head: _model.Head = "int8",
    kv_cache: _model.KvCache = "auto",
    dtype: _model.Dtype = "auto",
    threads: _model.Threads = None,
    log_level: Annotated[str, typer.Option(help="Log level of transformers: info, warning, error.")] = "warning",
) -> None:
    """Serve a patched model with transformers' OpenAI-compatible server.

    The routes are those of `transformers serve`: /v1/chat/completions, /v1/completions, /v1/responses, /v1/models,
    /health; with streaming. The server listens on 127.0.0.1 only, since it asks nobody who they are, and serves the
    one model that it was started with: clients name it as this command does. Ctrl-C ends it. Needs the extra `serve`:
    pip install "torch-int4[serve]".

    Examples:

        torch-int4 serve ./my-llama --port 8000

        curl http://127.0.0.1:8000/v1/chat/completions -H "Content-Type: application/json" -d '{"messages": [{"role": "user", "content": "Hello"}]}'
    """  # noqa: E501
    from torch_int4 import Int4Config
    from torch_int4.hf import serving

    serving.require_server()
    choice = _model.Choice(model, group_size, symmetric, compute, head, kv_cache, _model.require_dtype(dtype), threads)
    Int4Config.with_overrides(**choice.options())  # before a model is loaded for minutes
    folder = choice.folder()
    typer.echo(f"loading {folder}; then listening on http://{serving.HOST}:{port}/v1", err=True)
    serving.serve(
        folder,
        choice.prepare,
        load=choice.model,
        port=port,
        dtype=choice.dtype,
        continuous_batching=continuous_batching,
        log_level=log_level,
    )
