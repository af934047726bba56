"""The cost of the KV cache's storage: perplexity of a patched model whose attention reads each kind of cache.

Run ``python evals/tables/cache_table.py --help``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

CACHES = ("fp32", "bf16", "fp16", "int8")
HEADER = ("cache", "bytes per token and head", "perplexity", "vs bf16", "+-", "top-1 equal")


@dataclass(frozen=True)
class Row:
    """One kind of cache; `relative`, `stderr` and `agreement` are against the bf16 cache."""

    cache: str
    nbytes: int  # of key and value, with their scales
    ppl: float
    relative: float
    stderr: float
    agreement: float

    def cells(self) -> tuple[str, ...]:
        """The row as text, in the order of HEADER."""
        return (
            self.cache,
            str(self.nbytes),
            f"{self.ppl:.4f}",
            f"{self.relative:+.3%}",
            f"{self.stderr:.3%}",
            f"{self.agreement:.1%}",
        )


def table(model: Any, ids: Any, *, window: int) -> Iterator[Row]:
    """Perplexity of a patched model on token ids [T] with each of CACHES."""
    from torch_int4 import Int4Cache
    from torch_int4.evals.accuracy.perplexity import compare, perplexity

    sizes: dict[str, int] = {}

    def score(dtype: str) -> Any:
        made: list[Any] = []

        def new() -> Any:
            made[:] = [Int4Cache(model.config, dtype=dtype)]
            return made[0]

        found = perplexity(model, ids, window=window, cache=new)
        layer = made[0].layers[0]
        tensors = [
            t for t in (layer.stored_keys, layer.stored_values, layer.key_scales, layer.value_scales) if t is not None
        ]
        sizes[dtype] = sum(t[0, 0, 0].nbytes for t in tensors)
        return found

    scores = {dtype: score(dtype) for dtype in ("bf16", *(c for c in CACHES if c != "bf16"))}
    for dtype in CACHES:
        versus = compare(scores["bf16"], scores[dtype])
        yield Row(dtype, sizes[dtype], scores[dtype].ppl, versus.relative, versus.stderr, versus.agreement)


def main(
    model: Annotated[
        Path | None, typer.Option(help="Local model directory; without it, SmolLM2-135M-Instruct.")
    ] = None,
    text: Annotated[Path | None, typer.Option(help="UTF-8 text file; without it, built-in English.")] = None,
    tokens: Annotated[int, typer.Option(min=2, help="Use the first so many tokens of the text.")] = 2048,
    window: Annotated[int, typer.Option(min=2, help="Tokens per window.")] = 512,
    compute: Annotated[str, typer.Option(help="fp32 shows the cache's error alone.")] = "fp32",
    json: Annotated[Path | None, typer.Option(help="Also write the rows to this file.")] = None,
) -> None:
    """Print perplexity with each kind of KV cache, as markdown. Weights are rounded with a float minimum per 32.

    Example:

        python evals/tables/cache_table.py --text wiki.test.raw --tokens 12288 --window 1024
    """
    from torch_int4 import patch
    from torch_int4.errors import Int4Error
    from torch_int4.evals import models, output
    from torch_int4.support.markdown import markdown_table

    try:
        loaded, tokenizer = models.load(model)
        ids = models.encode_text(tokenizer, text, tokens)
        patch(loaded, group_size=32, symmetric=False, zeros="float", compute=compute)
        rows = list(table(loaded, ids, window=window))
    except (Int4Error, OSError) as error:
        typer.secho(f"cache_table: {error}", fg=typer.colors.RED, err=True)
        raise typer.Exit(2) from error
    typer.echo(f"{ids.numel()} tokens of {text or 'built-in English'}, window {window}, compute={compute}\n")
    typer.echo(markdown_table(HEADER, [row.cells() for row in rows]))
    if json is not None:
        output.write_json(json, [asdict(row) for row in rows])


if __name__ == "__main__":
    command = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    command.command()(main)
    command()
