"""``torch-int4 report`` on a tiny model: rows, files, and rows that cannot be measured."""

from __future__ import annotations

import html.parser
import json
import math
import re
import types
from pathlib import Path
from typing import Any

import pytest
import saved_model
import torch
from typer.testing import CliRunner

from torch_int4 import Int4Config, Int4Error
from torch_int4.cli import app
from torch_int4.evals import figures, models
from torch_int4.evals.report import measure, methods, page, peers, plots
from torch_int4.evals.report import run as report
from torch_int4.evals.speed import process
from torch_int4.tuning.paired import PairedLoss

SETTINGS: dict[str, Any] = {"tokens": 96, "window": 32, "prompt_tokens": 16, "new_tokens": 3, "repeats": 1}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_model.save(tmp_path_factory.mktemp("model"), initializer_range=0.2)


def spec(model_dir: Path, folder: Path, kind: str, **options: Any) -> measure.Spec:
    return measure.Spec(str(model_dir), kind, options, str(folder / "states.npy"), **SETTINGS)


def test_rows_are_discovered() -> None:
    found = methods.methods()
    assert [method.label for method in found[:2]] == ["float32", "bfloat16"]
    labels = [method.label for method in found]
    assert {"rtn g32", "rtn g128"} <= set(labels)
    assert "gptq g32" not in labels
    assert "gptq g128" in [method.label for method in methods.methods(calibrated=True)]
    assert len(labels) == len(set(labels))
    assert all(method.kind in methods.KINDS for method in found)
    installed = {name for name, peer in peers.known().items() if peer.missing() is None}
    assert {method.options["peer"] for method in found if method.kind == "peer"} == installed
    assert not any(method.kind == "peer" for method in methods.methods(with_peers=False))
    chosen = methods.methods([Int4Config(group_size=-1, compute="bf16")], with_peers=False)
    assert [method.label for method in chosen[2:]] == ["rtn row compute=bf16"]


@pytest.mark.parametrize("name", sorted(peers.known()))
def test_every_peer_says_what_it_needs(name: str) -> None:
    peer = peers.known()[name]
    assert peer.LABEL
    assert peer.missing() is None or isinstance(peer.missing(), str)


@pytest.mark.parametrize("name", [name for name, peer in sorted(peers.known().items()) if peer.missing() is None])
def test_installed_peers_build_a_model(name: str, model_dir: Path) -> None:
    model = peers.known()[name].build(str(model_dir))
    logits = model(torch.tensor([[1, 2, 3]])).logits
    expected = models.load(model_dir)[0](torch.tensor([[1, 2, 3]])).logits
    assert 0 < (logits.float() - expected).norm() / expected.norm() < 0.5


def test_measures_of_one_process_each(model_dir: Path, tmp_path: Path) -> None:
    plain = measure.measure(spec(model_dir, tmp_path, "float", dtype="float32"))
    half = measure.measure(spec(model_dir, tmp_path, "float", dtype="bfloat16"))
    ours = measure.measure(spec(model_dir, tmp_path, "int4", group_size=32, skip=["*.layers.0.*"], compute="fp32"))
    assert plain["layer_error"] == [0.0] * 3
    assert half["weight_bytes"] == pytest.approx(plain["weight_bytes"] / 2, rel=0.01)
    assert plain["weight_bytes"] > ours["weight_bytes"]
    assert all(0 < error < 0.02 for error in half["layer_error"])
    assert ours["layer_error"][0] == 0  # embeddings are float
    assert ours["layer_error"][1] < 0.01 < ours["layer_error"][2] < 0.5  # the first layer was left out
    assert ours["run_bytes"] > 50e6
    assert len(ours["window_nll"]) == 3


def test_peak_starts_over() -> None:
    if not process.reset_peak():
        pytest.skip("this system cannot start the peak over")
    before = process.peak_bytes()
    block = torch.ones(40_000_000)
    assert process.peak_bytes() - before > 100e6
    del block
    process.reset_peak()
    assert process.peak_bytes() - before < 60e6


def test_report_of_a_tiny_model(model_dir: Path, tmp_path: Path) -> None:
    """The whole command, a process for each row."""
    arguments = ["report", str(model_dir), "--no-peers", "--config", "group_size=128"]
    arguments += ["--tokens", "96", "--window", "32", "--prompt-tokens", "16", "--new-tokens", "3", "--repeats", "1"]
    files = {name: tmp_path / f"r.{name}" for name in ("json", "markdown")}
    for name, file in files.items():
        arguments += [f"--{name}", str(file)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    rows = json.loads(files["json"].read_text())["rows"]
    assert [row["label"] for row in rows] == ["float32", "bfloat16", "rtn g128"]
    assert rows[0]["ppl_loss"]["loss"] == 0
    assert rows[2]["weight_bytes"] < rows[1]["weight_bytes"]
    assert all(row["error"] is None and row["speed"]["decode_best"] > 0 for row in rows)
    assert "rtn g128" in files["markdown"].read_text()


def test_a_method_that_fails_is_a_row(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, whole = report._in_process, measure.measure

    def in_process(spec: measure.Spec, scratch: Path) -> Any:
        """Only what fails gets a process."""
        return real(spec, scratch) if spec.kind == "int4" else json.loads(json.dumps(whole(spec)))

    monkeypatch.setattr(report, "_in_process", in_process)
    chosen = [methods.Method("float32", "float", {"dtype": "float32"}), methods.Method("bad", "int4", {"head": "int3"})]
    found = report.run(model_dir, chosen, **SETTINGS)
    assert found.rows[0].error is None
    assert "head must be one of" in str(found.rows[1].error)
    assert "not measured" in page.markdown(found)
    monkeypatch.setattr(report, "_in_process", lambda *_: "no memory")
    with pytest.raises(Int4Error, match="float model cannot be measured: no memory"):
        report.run(model_dir, chosen[1:], **SETTINGS)


def made(label: str, kind: str, **fields: Any) -> report.Row:
    speed = {"prefill_best": 10.0, "decode_best": 5.0, "prefill_median": 9.0, "decode_median": 4.0, "repeats": 1}
    usual = {"weight_bytes": 1 << 20, "run_bytes": 1 << 24, "speed": speed, "ppl": 20.0, "layer_error": (0.0, 0.1)}
    return report.Row(label, kind, **(usual | fields))


def example() -> report.Report:
    rows = (
        made("float32", "float", layer_error=(0.0, 0.0)),
        made("<b>&ours", "int4", ppl_loss=PairedLoss("perplexity", 20.0, 21.0, 0.05, 0.01, 4)),
        made("nan", "peer", ppl=None, layer_error=(math.nan, 0.2), run_bytes_with_loading=True),
        report.Row("gone", "peer", error="needs <a card>"),
    )
    info = {"version": "0", "torch": "0", "isa": "reference", "threads": 1}
    return report.Report("tiny", info, {}, rows)


class Reader(html.parser.HTMLParser):
    """Texts of table rows, list items and captions."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.items: list[str] = []
        self.figures: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.text = ""
        if tag == "tr":
            self.rows.append([])

    def handle_data(self, data: str) -> None:
        self.text += data

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self.rows[-1].append(self.text)
        elif tag == "li":
            self.items.append(self.text)
        elif tag == "figcaption":
            self.figures.append(self.text)


def test_page_needs_no_other_file() -> None:
    drawn = dict.fromkeys(page.CAPTIONS, b"\x89PNG")
    document = page.page(example(), drawn)
    assert document.count("data:image/png;base64,") == 3
    assert not re.search(r"(src|href)=[\"'](?!data:)|<script|https?://", document)
    assert "&lt;b&gt;&amp;ours" in document
    assert "<b>" not in document
    assert "needs &lt;a card&gt;" in document
    read = Reader()
    read.feed(document)
    header, *rows = read.rows
    assert tuple(header) == page.HEADER
    assert rows == [list(page.cells(row)) for row in example().rows[:3]] + [["gone", "needs <a card>"]]
    assert read.items == list(page.notes(example()))
    assert read.figures == list(page.CAPTIONS.values())


def test_plots_are_png() -> None:
    pytest.importorskip("matplotlib")
    drawn = plots.draw(example())
    assert sorted(drawn) == sorted(page.CAPTIONS)
    assert all(png.startswith(b"\x89PNG") for png in drawn.values())


def test_plots_without_matplotlib_are_refused_early(monkeypatch: pytest.MonkeyPatch, model_dir: Path) -> None:
    real = figures.importlib.util.find_spec
    stand_in = types.SimpleNamespace(find_spec=lambda name: None if name == "matplotlib" else real(name))
    monkeypatch.setattr(figures, "importlib", types.SimpleNamespace(util=stand_in))
    result = CliRunner().invoke(app, ["report", str(model_dir), "--html", "x.html"])
    assert result.exit_code == 2
    assert "pip install matplotlib" in result.output


def test_json_and_markdown_of_every_kind_of_row() -> None:
    shown = page.markdown(example())
    assert "+5.00%" in shown
    assert "NaN" in shown
    assert "16.0*" in shown
    assert json.dumps(page.as_json(example()), default=str)
