"""The scripts behind the tables of recipes: small models trained, rows measured once and resumed."""

import copy
import json
from dataclasses import asdict

import pytest
import torch

import recipe_peers
import recipes_table
import train_small
from recipes_table import Row, accuracy_cells, against_peers, cells, measure, read_rows
from torch_int4 import Int4Config, Int4Error
from torch_int4.calibration.data import Calibration
from torch_int4.evals import models
from torch_int4.nn.linear import Int4Linear

TEXT = "the quick brown fox jumps over the lazy dog and runs away from it.\n" * 60
SETTINGS = {"window": 24, "head": "float", "compute": "fp32", "preset": "light"}


def trained(family, steps=3, seed=0, width=64):
    tokenizer = train_small.make_tokenizer(TEXT, 300)
    ids = tokenizer(TEXT, return_tensors="pt")["input_ids"][0]
    model = train_small.make_model(family, len(tokenizer), width=width, layers=2, context=64, seed=seed)
    losses = list(train_small.train(model, ids, steps=steps, batch=2, window=24, rate=3e-3, seed=seed))
    return model, ids, losses


@pytest.mark.parametrize("family", train_small.SHAPES)
def test_every_family_can_be_trained_and_measured(family):
    model, ids, losses = trained(family, steps=12)
    assert losses[-1] < losses[0] - 0.5
    assert not model.training
    options = [("float", 0, "-"), ("rtn", 32, "symmetric"), ("gptq", 32, "symmetric")]
    data = Calibration(ids, samples=6, length=24, batch=3)
    found = list(measure(lambda: copy.deepcopy(model), ids[:240], options, SETTINGS, data))
    assert [row.recipe for row in found] == ["float", "rtn", "gptq"]
    assert found[0].bits == pytest.approx(32, rel=0.05)  # buffers count too
    assert found[1].bits == found[2].bits < 5
    shown = cells(found[2], found)
    assert shown[:3] == ("gptq", "32", "symmetric")
    assert shown[-2].endswith("%")


def test_training_repeats_by_seed():
    first, second, other = (trained("llama", seed=seed)[2] for seed in (1, 1, 2))
    assert first == second != other


def test_refusals():
    with pytest.raises(Int4Error, match="unknown family 'mamba'"):
        train_small.make_model("mamba", 300, width=64, layers=1, context=64, seed=0)
    with pytest.raises(Int4Error, match="width must be"):
        train_small.make_model("llama", 300, width=70, layers=1, context=64, seed=0)
    with pytest.raises(Int4Error, match="too few"):
        next(train_small.train(None, torch.arange(5), steps=1, batch=1, window=8, rate=1e-3, seed=0))


def test_rows_are_compared_with_float_and_with_rounding_of_the_same_kind():
    def row(recipe, group, nll, offset="symmetric"):
        return Row(recipe, group, offset, nll, (100, 100), 4.5, 7.0, SETTINGS)

    rows = [row("float", 0, (2.0, 3.0), "-"), row("rtn", 32, (2.2, 3.2)), row("rtn", 128, (2.9, 3.9))]
    better = row("gptq", 32, (2.1, 3.1))
    shown = dict(zip(recipes_table.HEADER, cells(better, [*rows, better]), strict=True))
    assert shown["vs float"] == "+10.52%"
    assert shown["recovers"] == "52%"
    assert shown["vs rtn"] == "-9.52%"
    assert cells(rows[0], rows)[5] == ""
    assert dict(zip(recipes_table.HEADER, cells(rows[1], rows), strict=True))["recovers"] == ""


def test_accuracy_is_compared_with_float():
    def row(recipe, correct):
        return Row(recipe, 32, "symmetric", (2.0, 3.0), (100, 100), 4.5, 7.0, SETTINGS, correct)

    base, worse = row("float", (1.0, 1.0, 0.0, 1.0)), row("rtn", (1.0, 0.0, 0.0, 1.0))
    assert accuracy_cells(base, [base, worse]) == ("0.7500", "", "")
    assert accuracy_cells(worse, [base, worse])[:2] == ("0.5000", "+33.3%")
    assert accuracy_cells(row("gptq", ()), [base]) == accuracy_cells(worse, [worse]) == ()
    lost = row("float", (0.0, 0.0, 0.0, 0.0))  # there is nothing to lose a share of
    assert accuracy_cells(worse, [lost, worse]) == ("0.5000", "", "")


def test_every_model_answers():
    model, ids, _ = trained("llama")
    seen = []

    def answer(found):
        seen.append(sum(isinstance(module, Int4Linear) for module in found.modules()))
        return (1.0, 0.0)

    options = [("float", 0, "-"), ("rtn", 32, "symmetric")]
    found = list(measure(lambda: copy.deepcopy(model), ids[:48], options, SETTINGS, None, answer))
    assert [row.correct for row in found] == [(1.0, 0.0)] * 2
    assert seen == [0, 14]


def test_lambada_is_answered_through_the_harness(tmp_path):
    pytest.importorskip("lm_eval")
    model, _, _ = trained("llama")
    tokenizer = train_small.make_tokenizer(TEXT, 300)
    (tmp_path / "lambada_openai").mkdir()
    lines = [json.dumps({"text": "the quick brown fox jumps over the lazy dog"}), json.dumps({"text": "runs away"})]
    (tmp_path / "lambada_openai" / "test.jsonl").write_text("\n".join(lines))
    with recipes_table.lambada(tokenizer, tmp_path, 2, 64) as answer:
        assert set(answer(model)) <= {0.0, 1.0}
        assert len(answer(model)) == 2
    with recipes_table.lambada(tokenizer, None, 2, 64) as answer:
        assert answer(model) == ()


def test_rows_are_read_back_as_they_were(tmp_path):
    path = tmp_path / "rows.jsonl"
    assert read_rows(path) == []
    row = Row("gptq", 32, "symmetric", (2.0, 3.0), (5, 6), 4.5, 7.0, SETTINGS, (1.0, 0.0))
    path.write_text(json.dumps(asdict(row)) + "\n")
    assert read_rows(path) == [row]
    assert read_rows(path)[0].key == row.key
    assert row.key != Row("gptq", 64, "symmetric", (2.0, 3.0), (5, 6), 4.5, 7.0, SETTINGS).key


def test_ours_is_compared_with_a_peer_of_the_same_group():
    def row(recipe, group, nll, seconds):
        return Row(recipe, group, "symmetric", nll, (100, 100), 4.5, seconds, SETTINGS)

    rows = [row("gptq", 128, (9.0, 9.0), 1.0), row("gptq", 32, (2.0, 3.0), 7.0)]
    assert against_peers(rows) == []
    (said,) = against_peers([*rows, row("gptqmodel:gptq", 32, (2.1, 3.1), 9.0)])
    assert said.startswith("gptq in groups of 32: ours differs from gptqmodel's by -9.52% ± ")
    assert said.endswith("7 s against 9 s")


def test_codes_of_rounded_products_are_found_again():
    codes = torch.randint(0, 16, (6, 80), generator=torch.Generator().manual_seed(0))
    scales = torch.rand(6, 3, generator=torch.Generator().manual_seed(1)).half() * 0.01 - 0.005
    scales[2, 1] = 0
    linear = torch.nn.Linear(80, 6).to(torch.bfloat16)
    linear.scale = scales.float()
    exact = (codes - 8) * scales.float().repeat_interleave(32, 1)[:, :80]
    linear.weight.data = exact.to(torch.bfloat16)
    found = recipe_peers.on_grid(linear, Int4Config(group_size=32, compute="fp32"))
    assert torch.equal(found.dequantize(), exact)
    assert found.compute == "fp32"
    assert torch.equal(found.bias, linear.bias.float())


@pytest.mark.parametrize("name", recipe_peers.PEERS)
def test_a_missing_tool_is_named(name, monkeypatch):
    def missing(package):
        raise recipe_peers.importlib.metadata.PackageNotFoundError

    monkeypatch.setattr(recipe_peers.importlib.metadata, "version", missing)
    with pytest.raises(Int4Error, match=f"pip install {name.partition(':')[0]}"):
        recipe_peers.quantize(name, recipe_peers.Job(None, None, Int4Config()))
    with pytest.raises(Int4Error, match="symmetric weights only"):
        recipe_peers.quantize(name, recipe_peers.Job(None, None, Int4Config(symmetric=False)))


@pytest.mark.parametrize("name", recipe_peers.PEERS)
def test_a_peer_is_measured_like_a_recipe(name, tmp_path):
    pytest.importorskip(name.partition(":")[0].replace("-", "_"))
    model, ids, _ = trained("llama", width=128)
    model.save_pretrained(tmp_path)
    train_small.make_tokenizer(TEXT, 300).save_pretrained(tmp_path)
    tokenizer = models.load(tmp_path)[1]
    data = Calibration(ids, tokenizer, samples=6, length=24, batch=1)
    options = [("float", 0, "-"), (name, 32, "symmetric"), ("rtn", 32, "symmetric")]
    found = list(measure(lambda: models.load(tmp_path)[0], ids[:240], options, SETTINGS, data))
    assert found[1].bits in (found[2].bits, found[2].bits + 0.5)  # scales in bfloat16 are held in fp32
    assert found[1].nll != found[0].nll
    assert sum(found[1].nll) == pytest.approx(sum(found[0].nll), rel=0.05)
