"""transformers' own OpenAI-compatible server (`transformers serve`), with every model that it loads patched.

Routes, streaming, tool calls and continuous batching are those of transformers; what is ours is the model manager:
it patches what it loads, serves one model only, and never fetches another one because a request names it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch_int4.errors import Int4Error

HOST = "127.0.0.1"  # the server asks nobody who they are, so only this machine may reach it
CACHE_SHARE = 0.1  # of the free memory, for the paged cache of continuous batching

Prepare = Callable[[Any], Any]


def require_server() -> None:
    """Raises Int4Error if what transformers' server needs is not installed."""
    from transformers.utils.import_utils import is_serve_available

    if not is_serve_available():
        raise Int4Error('the server needs fastapi, uvicorn and openai: pip install "torch-int4[serve]"')


def serve(
    model: str,
    prepare: Prepare,
    *,
    load: Callable[[str], Any] | None = None,
    port: int = 8000,
    dtype: str = "auto",
    continuous_batching: bool = False,
    background: bool = False,
    log_level: str = "warning",
) -> Any:
    """Serve a model on 127.0.0.1 until interrupted; in the background, returns transformers' server at once.

    Args:
        model: a local directory, a GGUF file or a Hub name, and the name that clients give.
        prepare: what is done with the model once it is loaded, `torch_int4.patch` with its options; returns it.
        load: what makes the model from its name, instead of transformers' server: for quantized checkpoints.
        port: where to listen; 0 is not accepted, for nobody would learn which one it is.
        dtype: dtype to load the model in, as of transformers.
        continuous_batching: whether requests share batches through transformers' paged cache.
        background: run in a thread; end it with `.kill_server()`.
        log_level: of transformers.

    Raises:
        Int4Error: where a package is missing, or the model cannot be batched continuously.
    """
    require_server()
    if not 0 < port < 65536:
        raise Int4Error(f"port must be 1 to 65535; got {port}")
    from transformers.cli.serve import Serve

    def checked(loaded: Any) -> Any:
        loaded = prepare(loaded)
        if continuous_batching:
            from torch_int4.nn.continuous import require_paged

            require_paged(loaded)
        return loaded

    with _patched_manager(checked, load):
        return Serve(
            force_model=model,
            continuous_batching=continuous_batching,
            cb_max_memory_percent=CACHE_SHARE if continuous_batching else None,
            device="cpu",
            dtype=dtype,
            trust_remote_code=False,
            host=HOST,
            port=port,
            enable_cors=False,
            log_level=log_level,
            non_blocking=background,
        )


@contextlib.contextmanager
def _patched_manager(prepare: Prepare, load: Callable[[str], Any] | None) -> Iterator[None]:
    """Has `Serve` make our manager: it takes no other from its caller, and looks the class up when it is called."""
    from transformers.cli.serving import model_manager

    stock = model_manager.ModelManager
    model_manager.ModelManager = _manager(stock, prepare, load)
    try:
        yield
    finally:
        model_manager.ModelManager = stock


def _manager(stock: Any, prepare: Prepare, load: Callable[[str], Any] | None) -> Any:
    class PatchedModels(stock):
        """transformers' model manager, pinned to one model, which is patched once it is loaded."""

        def _load_model(self, *args: Any, **kwargs: Any) -> Any:
            return prepare(super()._load_model(*args, **kwargs) if load is None else load(self.force_model))

        def _load_processor(self, *args: Any, **kwargs: Any) -> Any:
            if not self.force_model.endswith(".gguf"):
                return super()._load_processor(*args, **kwargs)
            from torch_int4.hf.gguf import load_tokenizer

            return load_tokenizer(self.force_model)

        def load_model_and_processor(self, model_id_and_revision: str, *args: Any, **kwargs: Any) -> Any:
            """As of transformers; the route /load_model could otherwise name any model of the Hub."""
            pinned = self.process_model_name(self.force_model)
            if model_id_and_revision != pinned or kwargs.get("gguf_file") is not None:
                raise Int4Error(f"this server serves {self.force_model!r} only; asked for {model_id_and_revision!r}")
            return super().load_model_and_processor(model_id_and_revision, *args, **kwargs)

        def get_gen_models(self) -> list[dict[str, Any]]:
            """The model that is served, instead of all that lie in the cache of the Hub."""
            return [{"owned_by": "torch_int4", "id": self.force_model, "object": "model", "created": 0}]

    return PatchedModels
