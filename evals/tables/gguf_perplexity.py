"""Perplexity of the default model's GGUF file: expanded to floats, and with its blocks taken over.

python evals/tables/gguf_perplexity.py TEXT [TOKENS]
"""

from __future__ import annotations

import sys
from pathlib import Path

from torch_int4.evals import models
from torch_int4.evals.accuracy.perplexity import Perplexity, compare, perplexity

WINDOW = 256


def run(text: str, tokens: int = 2048) -> dict[str, Perplexity]:
    """Scores of "float" and of each kind of compute, on the first `tokens` tokens."""
    from torch_int4.hf.gguf import from_gguf

    model, tokenizer = models.load()
    text = text[: 16 * tokens]  # more than that many tokens
    scores = {"float": perplexity(model, tokenizer, text, window=WINDOW, max_tokens=tokens)}
    del model
    for compute in ("fp32", "int8"):
        with models.quiet_transformers():
            patched = from_gguf(models.find_gguf(), compute=compute, kv_cache="fp32")
        scores[compute] = perplexity(patched, tokenizer, text, window=WINDOW, max_tokens=tokens)
    return scores


def main() -> None:
    """Prints one line per model."""
    tokens = int(sys.argv[2]) if len(sys.argv) > 2 else 2048
    scores = run(Path(sys.argv[1]).read_text(encoding="utf-8"), tokens)
    for name, score in scores.items():
        change = compare(scores["float"], score).relative
        print(f"{name:6} perplexity {score.ppl:.5f} on {score.tokens} tokens, {change:+.6%}")


if __name__ == "__main__":
    main()
