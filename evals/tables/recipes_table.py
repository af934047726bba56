"""The accuracy that each recipe recovers: perplexity at several group sizes, and accuracy on LAMBADA if asked for.

Run ``python evals/tables/recipes_table.py --help``. Every row is written to a JSON lines file as soon as it is
measured, and rows that are there already are not measured again: a run that was stopped goes on.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

import recipe_peers
from rtn_table import OFFSETS

HEADER = ("recipe", "group", "offset", "bits", "perplexity", "vs float", "±", "vs rtn", "±", "recovers", "seconds")
ACCURACY = ("LAMBADA", "lost", "±")
TASK = "lambada_openai"


@dataclass(frozen=True)
class Row:
    """One recipe at one group size; `recipe="float"` is the model itself.

    Attributes:
        nll: mean negative log-likelihood of each window, nats, which all comparisons are made of.
        tokens: scored tokens of each window.
        bits: per weight, scales and offsets included, head not counted.
        seconds: to quantize.
        settings: what else the row depends on.
        correct: 1 or 0 for each item of LAMBADA; empty where it was not asked for.
    """

    recipe: str
    group: int
    offset: str
    nll: tuple[float, ...]
    tokens: tuple[int, ...]
    bits: float
    seconds: float
    settings: dict[str, Any]
    correct: tuple[float, ...] = ()

    @property
    def key(self) -> str:
        """Rows with the same key are the same measurement."""
        return json.dumps([self.recipe, self.group, self.offset, self.settings], sort_keys=True)


def cells(row: Row, rows: Sequence[Row]) -> tuple[str, ...]:
    """A row as text, compared with float and with plain rounding at the same group and offset."""
    from torch_int4.tuning.paired import perplexity_loss

    base = next((r for r in rows if r.recipe == "float"), None)
    plain = next((r for r in rows if (r.recipe, r.group, r.offset) == ("rtn", row.group, row.offset)), None)
    here = perplexity_loss(row.nll, row.nll, row.tokens)
    group = "-" if row.recipe == "float" else "row" if row.group == -1 else str(row.group)
    start = (row.recipe, group, row.offset, f"{row.bits:.2f}", f"{here.base:.3f}")
    if base is None or row.recipe == "float":
        return (*start, "", "", "", "", "", "")
    loss = perplexity_loss(base.nll, row.nll, row.tokens)
    if plain is None or plain is row:
        return (*start, f"{loss.loss:+.2%}", f"{loss.stderr:.2%}", "", "", "", f"{row.seconds:.0f}")
    change = perplexity_loss(plain.nll, row.nll, row.tokens)
    lost = plain_loss(base, plain)
    recovered = (lost - loss.loss) / lost if lost > 0 else float("nan")
    versus = (f"{loss.loss:+.2%}", f"{loss.stderr:.2%}", f"{change.loss:+.2%}", f"{change.stderr:.2%}")
    return (*start, *versus, f"{recovered:.0%}", f"{row.seconds:.0f}")


def accuracy_cells(row: Row, rows: Sequence[Row]) -> tuple[str, ...]:
    """Accuracy on LAMBADA and its relative drop from float, as text; nothing where it was not measured.

    Where the float model answers nothing right, there is no drop.
    """
    from torch_int4.tuning.paired import accuracy_loss

    base = next((r for r in rows if r.recipe == "float"), None)
    if base is None or not row.correct:
        return ()
    score = f"{sum(row.correct) / len(row.correct):.4f}"
    if row is base or not any(base.correct):
        return (score, "", "")
    loss = accuracy_loss(base.correct, row.correct)
    return (score, f"{loss.loss:+.1%}", f"{loss.stderr:.1%}")


def against_peers(rows: Sequence[Row]) -> list[str]:
    """The difference of each of our rows to its peers, in words: perplexity with its paired error, and seconds."""
    from torch_int4.tuning.paired import perplexity_loss

    found = []
    for theirs in rows:
        tool, _, recipe = theirs.recipe.partition(":")
        ours = next((r for r in rows if (r.recipe, r.group, r.offset) == (recipe, theirs.group, theirs.offset)), None)
        if ours is not None:
            change = perplexity_loss(theirs.nll, ours.nll, ours.tokens)
            found.append(
                f"{recipe} in groups of {ours.group}: ours differs from {tool}'s by {change.loss:+.2%} ± "
                f"{change.stderr:.2%} in perplexity; {ours.seconds:.0f} s against {theirs.seconds:.0f} s"
            )
    return found


def plain_loss(base: Row, plain: Row) -> float:
    """The loss of plain rounding against float."""
    from torch_int4.tuning.paired import perplexity_loss

    return perplexity_loss(base.nll, plain.nll, plain.tokens).loss


def measure(
    load: Any,
    tokens: Any,
    options: Sequence[tuple[str, int, str]],
    settings: dict[str, Any],
    calibration: Any,
    answer: Callable[[Any], tuple[float, ...]] = lambda model: (),
) -> Iterator[Row]:
    """Rows for (recipe, group, offset), each on a model that `load()` gives.

    `settings` has window and more; `answer` gives a model's score on each item of a task.
    """
    import torch_int4
    from torch_int4.evals.accuracy.perplexity import perplexity
    from torch_int4.evals.speed.memory import linear_bytes, patched_memory
    from torch_int4.tuning.footprint import weight_bytes

    for recipe, group, offset in options:
        model, seconds = load(), 0.0
        before = linear_bytes(model)
        bits = 8.0 * sum(weight_bytes(model).values()) / sum(p.numel() for p in model.parameters())
        if recipe != "float":
            config = torch_int4.Int4Config(
                recipe="rtn" if recipe in recipe_peers.PEERS else recipe,
                group_size=group,
                head=settings["head"],
                compute=settings["compute"],
                preset=settings["preset"],
                **OFFSETS[offset],
            )
            model, seconds = _quantized(model, recipe, config, calibration)
            bits = patched_memory(model, before).bits_per_weight
        score = perplexity(model, tokens, window=settings["window"])
        scores = (score.window_nll, score.window_tokens)
        yield Row(recipe, group, offset, *scores, bits, seconds, settings, answer(model))


def _quantized(model: Any, recipe: str, config: Any, calibration: Any) -> tuple[Any, float]:
    """The model after one of our recipes or a peer's, and the seconds it took."""
    import torch_int4

    if recipe in recipe_peers.PEERS:
        return recipe_peers.quantize(recipe, recipe_peers.Job(model, calibration, config))
    start = time.perf_counter()
    needs = recipe != "rtn" and recipe != "hqq"
    torch_int4.patch(model, config, calibration=calibration if needs else None, progress=True)
    return model, time.perf_counter() - start


@contextlib.contextmanager
def lambada(tokenizer: Any, data: Path | None, items: int, window: int) -> Iterator[Callable[[Any], Any]]:
    """A function that answers the first items of LAMBADA with a model, through lm-eval; without data, it answers none.

    Raises:
        Int4Error: lm-eval is missing, or the folder has no such data.
    """
    if data is None:
        yield lambda model: ()
        return
    from torch_int4.evals.accuracy import harness, scores

    with harness.task_manager((TASK,), data) as manager:

        def answer(model: Any) -> tuple[float, ...]:
            lm = harness.CpuLM(model, tokenizer=tokenizer, batch_size="auto", max_length=window)
            found = scores.items(harness.evaluate(lm, (TASK,), manager, limit=items))
            return next(entry.values for entry in found if entry.metric == "acc")

        yield answer


def read_rows(path: Path) -> list[Row]:
    """The rows of a JSON lines file, none if there is no such file."""
    if not path.exists():
        return []
    found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
    lists = ("nll", "tokens", "correct")
    return [Row(**{**row, **{name: tuple(row.get(name, ())) for name in lists}}) for row in found]


def main(
    text: Annotated[Path, typer.Option(help="UTF-8 text to measure on.")],
    calibration: Annotated[Path, typer.Option(help="UTF-8 text to calibrate on; never the one measured on.")],
    out: Annotated[Path, typer.Option(help="JSON lines file of rows; rows in it are not measured again.")],
    model: Annotated[
        Path | None, typer.Option(help="Local model directory; without it, SmolLM2-135M-Instruct.")
    ] = None,
    recipe: Annotated[
        list[str] | None,
        typer.Option(help=f"Repeat for more. [rtn gptq awq awq+gptq] Other tools': {', '.join(recipe_peers.PEERS)}."),
    ] = None,
    group: Annotated[list[int] | None, typer.Option(help="Repeat for more. [32 128 -1]")] = None,
    offset: Annotated[list[str] | None, typer.Option(help="symmetric, integer or float. [symmetric]")] = None,
    tokens: Annotated[int, typer.Option(min=2, help="Measure on the first so many tokens.")] = 8192,
    window: Annotated[int, typer.Option(min=2, help="Tokens per window.")] = 1024,
    samples: Annotated[int, typer.Option(min=1, help="Windows to calibrate on.")] = 32,
    length: Annotated[int, typer.Option(min=2, help="Tokens of each.")] = 1024,
    batch: Annotated[int, typer.Option(min=1, help="Windows that run at a time.")] = 4,
    seed: Annotated[int, typer.Option(help="Chooses the windows.")] = 0,
    preset: Annotated[str, typer.Option(help="Effort of trained recipes: light, default or best.")] = "default",
    compute: Annotated[str, typer.Option(help="fp32 shows the weights' error alone.")] = "fp32",
    head: Annotated[str, typer.Option(help="float shows the blocks' error alone.")] = "float",
    data: Annotated[Path | None, typer.Option(help="Folder with lambada_openai/test.jsonl; needs lm-eval.")] = None,
    items: Annotated[int, typer.Option(min=1, help="Answer the first so many items of LAMBADA.")] = 500,
) -> None:
    """Measure recipes at group sizes and print a markdown table with paired standard errors.

    Examples:

        python evals/tables/recipes_table.py --text wiki.test.raw --calibration wiki.train.tokens --out rows.jsonl
    """
    from torch_int4.calibration.data import Calibration
    from torch_int4.errors import Int4Error
    from torch_int4.evals import models
    from torch_int4.support.markdown import markdown_table

    settings = {
        "tokens": tokens,
        "window": window,
        "samples": samples,
        "length": length,
        "batch": batch,
        "seed": seed,
        "preset": preset,
        "compute": compute,
        "head": head,
        "model": str(model) if model else "default",
        "items": items if data else 0,
    }
    try:
        _, tokenizer = models.load(model)
        ids = tokenizer(text.read_text(encoding="utf-8")[: 12 * tokens], return_tensors="pt", verbose=False)
        source = Calibration(calibration.read_text(encoding="utf-8"), tokenizer, samples, length, batch, seed)
        wanted = [("float", 0, "-")]
        for size in group or (32, 128, -1):
            for kind in offset or ("symmetric",):
                wanted += [(name, size, kind) for name in recipe or ("rtn", "gptq", "awq", "awq+gptq")]
        rows = read_rows(out)
        known = {row.key for row in rows}
        todo = [w for w in wanted if Row(*w, (), (), 0, 0, settings).key not in known]
        measured = ids["input_ids"][0, :tokens]
        with lambada(tokenizer, data, items, window) as answer:
            for row in measure(lambda: models.load(model)[0], measured, todo, settings, source, answer):
                rows.append(row)
                with out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(asdict(row)) + "\n")
                typer.echo("  ".join(cells(row, [r for r in rows if r.settings == settings])), err=True)
    except (Int4Error, OSError) as error:
        typer.secho(f"recipes_table: {error}", fg=typer.colors.RED, err=True)
        raise typer.Exit(2) from error
    mine = [row for row in rows if row.settings == settings]
    header = (*HEADER, *(ACCURACY if data else ()))
    typer.echo(markdown_table(header, [cells(row, mine) + accuracy_cells(row, mine) for row in mine]))
    typer.echo("\n".join(against_peers(mine)))


if __name__ == "__main__":
    command = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    command.command()(main)
    command()
