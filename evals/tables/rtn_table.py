"""The cost of plain rounding: perplexity, KL and top-1 agreement for every group size and offset kind.

Run ``python evals/tables/rtn_table.py --help``. The table is meant to be unflattering: a model of
135M parameters suffers far more from 4 bits than one of 7B, and rounding to nearest is the simplest recipe.
"""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

OFFSETS: dict[str, dict[str, Any]] = {
    "symmetric": {"symmetric": True},
    "integer": {"symmetric": False, "zeros": "integer"},
    "float": {"symmetric": False, "zeros": "float"},
}
HEADER = ("group", "offset", "clip", "head", "bits", "perplexity", "vs float", "+-", "KL", "top-1 equal")


@dataclass(frozen=True)
class Row:
    """One configuration; the first row is the float model.

    `bits` per weight counts scales and offsets, without the head; `relative` and `stderr` are of perplexity
    against float, `kl` in nats per token.
    """

    group_size: int | None
    offset: str
    clip: bool
    head: str
    bits: float
    ppl: float
    relative: float
    stderr: float
    kl: float
    agreement: float
    seconds: float

    def cells(self) -> tuple[str, ...]:
        """The row as text, in the order of HEADER."""
        group = "-" if self.group_size is None else "row" if self.group_size == -1 else str(self.group_size)
        return (
            group,
            self.offset,
            "yes" if self.clip else "no",
            self.head,
            f"{self.bits:.2f}",
            f"{self.ppl:.3f}",
            f"{self.relative:+.2%}",
            f"{self.stderr:.2%}",
            f"{self.kl:.4f}",
            f"{self.agreement:.1%}",
        )


def configurations(groups: Iterable[int], *, clip: bool, heads: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Options of each row: group x offset x clip with a float head, then other heads at the first group."""
    groups = list(groups)
    for group, offset, clipped in itertools.product(groups, OFFSETS, (False, True) if clip else (False,)):
        yield {"group_size": group, "offset": offset, "clip": clipped, "head": "float"}
    for head, offset in itertools.product(heads, OFFSETS):
        yield {"group_size": groups[0], "offset": offset, "clip": False, "head": head}


def table(
    model: Any, tokens: Any, options: Iterable[dict[str, Any]], *, compute: str = "int8", window: int = 512
) -> Iterator[Row]:
    """Patches a copy of the float `model` for each of `options` and scores it on `tokens` (int64 [T]).

    Memory: the float model twice. Time: two forward passes of the text and one quantization per row.
    """
    import torch_int4
    from torch_int4.evals.accuracy.perplexity import compare, perplexity
    from torch_int4.evals.speed.memory import linear_bytes, patched_memory
    from torch_int4.tuning.footprint import weight_bytes

    before = linear_bytes(model)
    bits = 8.0 * sum(weight_bytes(model).values()) / sum(p.numel() for p in model.parameters())
    float_shown = False
    for option in options:
        start = time.perf_counter()
        config = torch_int4.Int4Config(
            recipe="rtn",
            group_size=option["group_size"],
            clip=option["clip"],
            head=option["head"],
            compute=compute,
            **OFFSETS[option["offset"]],
        )
        patched = torch_int4.patch(copy.deepcopy(model), config)
        score = perplexity(patched, tokens, window=window, reference=model)
        base, kl, agreement = score.reference, score.kl, score.agreement
        if base is None or kl is None or agreement is None:
            raise AssertionError("a score with a reference has all of these")
        if not float_shown:
            yield Row(None, "-", False, "float", bits, base.ppl, 0.0, 0.0, 0.0, 1.0, 0.0)
            float_shown = True
        versus = compare(base, score)
        yield Row(
            group_size=option["group_size"],
            offset=option["offset"],
            clip=option["clip"],
            head=option["head"],
            bits=patched_memory(patched, before).bits_per_weight,
            ppl=score.ppl,
            relative=versus.relative,
            stderr=versus.stderr,
            kl=kl,
            agreement=agreement,
            seconds=round(time.perf_counter() - start, 2),
        )


def main(
    model: Annotated[
        Path | None, typer.Option(help="Local model directory; without it, SmolLM2-135M-Instruct.")
    ] = None,
    text: Annotated[Path | None, typer.Option(help="UTF-8 text file; without it, built-in English.")] = None,
    tokens: Annotated[int, typer.Option(min=2, help="Use the first so many tokens of the text.")] = 2048,
    window: Annotated[int, typer.Option(min=2, help="Tokens per window.")] = 512,
    group: Annotated[list[int] | None, typer.Option(help="Repeat for more. [32 64 128 -1]")] = None,
    clip: Annotated[bool, typer.Option("--clip/--no-clip", help="Also rows with a clip search.")] = True,
    head: Annotated[list[str] | None, typer.Option(help="Besides float. [int8]")] = None,
    compute: Annotated[str, typer.Option(help="fp32 shows the weights' error alone.")] = "int8",
    json: Annotated[Path | None, typer.Option(help="Also write the rows to this file.")] = None,
) -> None:
    """Print perplexity after plain rounding for group sizes, offset kinds and clip search, as markdown.

    Examples:

        python evals/tables/rtn_table.py --group 32 --no-clip

        python evals/tables/rtn_table.py --text wiki.test.raw --tokens 12288 --window 1024 --compute fp32
    """
    from torch_int4.errors import Int4Error
    from torch_int4.evals import models, output
    from torch_int4.support.markdown import markdown_table

    try:
        float_model, tokenizer = models.load(model)
        ids = models.encode_text(tokenizer, text, tokens)
        heads = ["int8"] if head is None else head
        options = configurations(group or (32, 64, 128, -1), clip=clip, heads=heads)
        rows = []
        for row in table(float_model, ids, options, compute=compute, window=window):
            typer.echo(f"{row.seconds:6.1f} s  {'  '.join(row.cells())}", err=True)
            rows.append(row)
    except (Int4Error, OSError) as error:
        typer.secho(f"rtn_table: {error}", fg=typer.colors.RED, err=True)
        raise typer.Exit(2) from error
    typer.echo(f"{ids.numel()} tokens of {text or 'built-in English'}, window {window}, compute={compute}\n")
    typer.echo(markdown_table(HEADER, [row.cells() for row in rows]))
    if json is not None:
        output.write_json(json, [asdict(row) for row in rows])


if __name__ == "__main__":
    command = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    command.command()(main)
    command()
