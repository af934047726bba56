"""Text from a model as it comes: one answer, or a conversation that keeps its KV cache between turns."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import TextStreamer

from torch_int4.cache.int4_cache import Int4Cache
from torch_int4.errors import Int4Error
from torch_int4.support.forwards import cache_keyword

Write = Callable[[str], None]


@dataclass(frozen=True)
class Answer:
    """The generated tokens, and the speed."""

    text: str
    ids: tuple[int, ...]
    prompt_tokens: int  # of which all but `reused` were computed
    reused: int
    first_s: float  # until the first new token
    rest_s: float  # for all others
    interrupted: bool = False

    def summary(self) -> str:
        """One line for people."""
        computed = self.prompt_tokens - self.reused
        kept = f" ({self.reused} kept)" if self.reused else ""
        line = f"{self.prompt_tokens} tokens{kept} in {self.first_s:.2f} s ({computed / self.first_s:.0f}/s)"
        if len(self.ids) > 1:
            line += f", {len(self.ids)} out at {(len(self.ids) - 1) / self.rest_s:.1f} tokens/s"
        return line


class _Stream(TextStreamer):
    """Hands text on in whole words, and keeps tokens and the time of the first one."""

    def __init__(self, tokenizer: Any, write: Write) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._write, self._seen_prompt = write, False
        self.ids: list[int] = []
        self.start = self.first = time.perf_counter()

    def put(self, value: Tensor) -> None:
        if self._seen_prompt:
            if not self.ids:
                self.first = time.perf_counter()
            self.ids += value.flatten().tolist()
        self._seen_prompt = True
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Called by transformers with each piece that cannot change any more."""
        self._write(text)


@torch.inference_mode()
def answer(model: Any, tokenizer: Any, ids: Tensor, *, write: Write, reused: int = 0, **arguments: Any) -> Answer:
    """Generates after `ids` `[1, T]` and writes the text as it comes; arguments are those of `generate`.

    Ctrl-C ends the answer, and what there is of it is returned.
    """
    stream, interrupted = _Stream(tokenizer, write), False
    try:
        model.generate(ids, attention_mask=torch.ones_like(ids), streamer=stream, **arguments)
    except KeyboardInterrupt:
        interrupted = True
        stream.end()
    end = time.perf_counter()
    first = (stream.first if stream.ids else end) - stream.start
    text = tokenizer.decode(stream.ids, skip_special_tokens=True)
    return Answer(text, tuple(stream.ids), ids.shape[1], reused, first, end - stream.start - first, interrupted)


class Chat:
    """A conversation through the tokenizer's chat template; arguments are those of `generate`.

    Raises:
        Int4Error: if the tokenizer has no chat template.
    """

    def __init__(self, model: Any, tokenizer: Any, *, system: str | None = None, **arguments: Any) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise Int4Error("chat: the model's tokenizer has no chat template; use `torch-int4 generate --raw`")
        self.model, self.tokenizer, self._arguments = model, tokenizer, arguments
        self._system = [{"role": "system", "content": system}] if system else []
        self.reset()

    def reset(self) -> None:
        """Forgets what was said."""
        self.messages: list[dict[str, str]] = list(self._system)
        self._cache: Any = None
        self._cached: list[int] = []  # the tokens whose keys and values the cache holds

    def turn(self, text: str, *, write: Write) -> Answer:
        """One question and its answer."""
        self.messages.append({"role": "user", "content": text})
        encoded = self.tokenizer.apply_chat_template(
            self.messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        ids = encoded["input_ids"]
        reused = self._reuse(ids[0].tolist())
        given = answer(
            self.model,
            self.tokenizer,
            ids,
            write=write,
            reused=reused,
            **cache_keyword(self.model, self._cache),
            **self._arguments,
        )
        self.messages.append({"role": "assistant", "content": given.text})
        self._cached = [*ids[0].tolist(), *given.ids][: int(self._cache.get_seq_length())]
        if given.interrupted:  # some layers may have got a token that others have not
            self._cache = None
        return given

    def _reuse(self, ids: list[int]) -> int:
        """Cuts the cache to what it shares with the new prompt, but for its last token, and says how much that is."""
        if self._cache is None:
            kind = getattr(self.model, "torch_int4_kv_cache", "auto")
            self._cache, self._cached = Int4Cache(self.model.config, dtype=kind), []
        limit = min(len(self._cached), len(ids) - 1)
        shared = next((i for i in range(limit) if self._cached[i] != ids[i]), limit)
        if excess := len(self._cached) - shared:
            self._cache.crop(-excess)
        return shared
