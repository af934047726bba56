"""Figures, tables and plots of the whole-model bench, from workers that answer by a plan."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from torch_int4 import Int4Error
from torch_int4.evals.bench import generate, generate_report, token_profile, worker


class Fake:
    """A worker that answers at once, from a plan of speeds."""

    def __init__(self, seconds: float, fails: str = "") -> None:
        self.seconds, self.fails, self.asked = seconds, fails, []  # type: ignore[var-annotated]

    def ask(self, what: str, *arguments: Any) -> Any:
        self.asked.append((what, *arguments))
        if what == self.fails:
            raise Int4Error("it broke")
        if what == "extend":
            tokens, new = arguments
            return [self.seconds * max(len(tokens), 1) / 4] + [self.seconds] * (new - 1)
        return 1000


def result(fails: str = "") -> generate.Result:
    plan = generate.Plan(tokens=4, rounds=3, prefill=64, batches=(4,), contexts=(200, 100))
    rows = [
        (generate.Row(name, worker.Loaded("v", 10**9, name != "slow", 10, 20)), Fake(seconds, broken))
        for name, seconds, broken in (("torch_int4", 0.5, ""), ("slow", 1.0, ""), ("broken", 0.25, fails))
    ]
    pairs: Any = rows
    note = lambda text: None  # noqa: E731
    generate.PAUSE = 0
    reads = itertools.cycle([4e9, 2e9])  # before and after each round; the warm-up round has one less
    generate._rounds(pairs, plan, lambda: next(reads), note)
    generate._contexts(pairs, plan, note)
    generate._batches(pairs, plan, note)
    machine = {"cpu": "x", "threads": 1, "cpus": 2, "load": 0.1, "version": "0", "torch": "2"}
    profile = token_profile.Profile(0.01, 0.008, {"int4_linear": (0.005, 60.0)}, 0.001, 200.0)
    return generate.Result(machine, "tiny", plan, [row for row, _ in rows], {"absent": "not there"}, profile)


def test_figures_follow_from_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "PAUSE", 0)
    found = result()
    ours, slow, _ = found.rows
    assert ours.decode_tps() == (2.0, 2.0)
    assert ours.read == [4e9] * 3
    assert ours.of_bandwidth() == pytest.approx(0.5)
    assert found.bandwidths() == (4e9, 4e9)
    assert ours.prefill == [8.0, 8.0]
    assert list(ours.contexts) == [100, 200]
    assert ours.batches == {4: [0.5, 0.5]}
    assert slow.batches == {}
    cells = {row[0]: row for row in generate_report.table(found)}
    assert cells["slow"][3] == "2.00"
    assert cells["torch_int4"][3] == ""
    text = generate_report.markdown(found)
    for part in ("absent: not there", "| 8.0 ", "int4_linear", "generate's loop", "50%"):
        assert part in text
    data = json.loads(json.dumps(generate_report.as_json(found)))
    assert data["rows"][0]["decode_tps"] == 2.0


def panels(results: list[generate.Result], path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What `plot` draws: the title or the label below each panel that is not blank."""
    figure = pytest.importorskip("matplotlib.figure")
    drawn: list[Any] = []
    save = figure.Figure.savefig
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, *a, **k: (drawn.append(self), save(self, *a, **k)))
    generate_report.plot(results, path)
    assert path.read_bytes().startswith(b"\x89PNG")
    return [axes.get_title() or axes.get_xlabel() for axes in drawn[0].axes if axes.axison]


def test_plot_has_a_panel_for_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "PAUSE", 0)
    found, other, path = result(), result(), tmp_path / "speed.png"
    other.shape = "another"
    decode, prefill, context, size = (
        "decode tok/s",
        "prefill tok/s",
        "tokens in the cache",
        "GB of weights that a token reads",
    )
    assert panels([found, other], path, monkeypatch) == [decode, prefill, context, size]
    assert panels([found], path, monkeypatch) == [decode, prefill, context]  # one shape does not grow
    for row in found.rows:
        row.prefill = []
    assert panels([found], path, monkeypatch) == [decode, context]
    for row in found.rows:
        row.contexts = {}
    assert panels([found], path, monkeypatch) == [decode]


def test_contexts_grow_without_repeating_what_is_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "PAUSE", 0)
    fake: Any = Fake(0.1)
    row = generate.Row("a", worker.Loaded("v", 1, True, 1, 1))
    generate._contexts([(row, fake)], generate.Plan(tokens=4, contexts=(300, 100)), lambda text: None)
    fed = [len(entry[1]) for entry in fake.asked if entry[0] == "extend"]
    assert fed == [100, 300 - 105]
    assert sum(entry[0] == "clear" for entry in fake.asked) == 1


@pytest.mark.parametrize("what", ["clear", "extend"])
def test_an_engine_that_breaks_does_not_stop_the_others(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "PAUSE", 0)
    found = result(fails=what)
    assert [row.failed for row in found.rows] == ["", "", "it broke"]
    assert len(found.rows[0].decode) == 3
    assert "broken failed: it broke" in generate_report.markdown(found)
    assert all(row[0] != "broken" for row in generate_report.table(found))


def test_noise_is_told() -> None:
    rows = [generate.Row("a", worker.Loaded("v", 1, True, 1, 1), decode=[0.1, 0.1, 0.1])]
    machine = {"cpu": "x", "threads": 1, "cpus": 2, "load": 0.1, "version": "0", "torch": "2"}
    found = generate.Result(machine, "tiny", generate.Plan(), rows, {})
    assert not any("do not quote" in line for line in generate_report.lines(found))
    rows[0].decode = [0.1, 0.2, 0.3]
    assert any("do not quote" in line for line in generate_report.lines(found))
    rows[0].decode, found.machine["load"] = [0.1], 3.0
    assert any("do not quote" in line for line in generate_report.lines(found))
