import json

import pytest
import torch
from calibrating import small, tokens
from decoders import decoder
from tiny_models import int4s, logits
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers import models as tokenizer_models
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

import torch_int4
from torch_int4 import Int4Config, Int4Error
from torch_int4.cli import app
from torch_int4.tuning.autotune import AutotuneResult, Tried, autotune, default_candidates, table
from torch_int4.tuning.bandwidth import ReadBuffer, read_bandwidth
from torch_int4.tuning.footprint import read_bytes
from torch_int4.tuning.paired import PairedLoss
from torch_int4.tuning.pristine import Pristine
from torch_int4.tuning.scoring import Scores, WindowTask

BASE = {"compute": "fp32", "kv_cache": "fp32", "head": "float"}
RTN, FINE, GPTQ = (
    Int4Config(recipe=recipe, group_size=size, **BASE) for recipe, size in (("rtn", -1), ("rtn", 32), ("gptq", 32))
)


class Scripted:
    """A task whose outcome is what the test says: the number of int4 linears decides."""

    name, kind = "scripted", "perplexity"

    def __init__(self, loss):
        self.loss, self.seen = loss, []

    def scores(self, model):
        bits = [module.to_weight().bits for module in int4s(model).values()]
        self.seen.append((bits.count(4), bits.count(8)))
        nll = self.loss(model) if bits else 1.0
        return Scores(torch.tensor([nll, nll + 1e-4, nll - 1e-4], dtype=torch.float64))


def share_of_int4(model):
    """Loss in proportion to the linears in int4: 14 of them cost 28 %."""
    return 1.0 + 0.02 * sum(module.to_weight().bits == 4 for module in int4s(model).values())


def test_the_first_that_passes_is_taken_and_the_model_becomes_it():
    model = decoder("llama")
    ids = tokens().view(16, 24)
    loss = {-1: 0.5, 32: 0.001}
    task = Scripted(lambda model: 1 + loss[model.torch_int4_report.config.group_size])
    result = autotune(model, candidates=[RTN, FINE, GPTQ], calibration=small(), tasks=[task])
    assert result.passed
    assert result.config == FINE
    assert [tried.config for tried in result.tried] == [RTN, FINE]
    assert result.model is model
    want = torch_int4.patch(decoder("llama"), FINE)
    assert torch.equal(logits(model, ids), logits(want, ids))
    assert "chosen: rtn g32 sym" in str(result)


def test_nothing_passes_and_the_model_stays_float():
    model = decoder("llama")
    before = {n: p.clone() for n, p in model.named_parameters()}
    task = Scripted(lambda model: 1.3 if model.torch_int4_report.config == FINE else 1.4)
    result = autotune(model, max_loss=1e-4, candidates=[RTN, FINE, GPTQ], calibration=small(), tasks=[task], int8=False)
    assert not result.passed
    assert result.config == FINE
    assert len(result.tried) == 3
    assert not int4s(model)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert "nothing passed the limit of 0.01%; the best was rtn g32 sym" in str(result)


def test_layers_are_raised_to_int8_by_damage_until_it_passes():
    model = decoder("llama")
    task = Scripted(share_of_int4)
    result = autotune(model, max_loss=0.05, candidates=[FINE], calibration=small(), tasks=[task])
    assert result.passed
    int4, int8 = task.seen[-1]
    assert int4 + int8 == 14
    assert 0 < int4 <= 2  # 2 % each
    assert result.tried[-1].int8 == int8 == len(result.config.int8)
    assert result.tried[-1].bits > result.tried[0].bits
    assert f"rtn g32 sym + {int8} int8" in str(result)


def test_a_nan_loss_never_passes():
    task = Scripted(lambda model: float("nan"))
    result = autotune(decoder("llama"), max_loss=0.5, candidates=[FINE], calibration=small(), tasks=[task])
    assert not result.passed
    assert len(result.tried) == 1


def test_an_evaluation_that_is_too_small_says_so():
    class Noisy(Scripted):
        def scores(self, model):
            spread = 0.1 if int4s(model) else 0.0
            return Scores(torch.tensor([1.0 + spread, 1.0 - spread, 1.002], dtype=torch.float64))

    result = autotune(decoder("llama"), candidates=[FINE], calibration=small(), tasks=[Noisy(None)])
    assert result.passed
    assert not result.decided
    assert "too small to decide: 3 items" in str(result)


def test_perplexity_of_held_out_windows_by_default():
    data = small(samples=6)
    result = autotune(decoder("llama"), candidates=[GPTQ], calibration=data, windows=1, int8=False, max_loss=9.0)
    assert list(result.tried[0].losses) == ["perplexity"]
    assert result.tried[0].losses["perplexity"].items == 10  # 16 windows, 6 of them calibrate


def test_calibration_and_evaluation_do_not_overlap(monkeypatch):
    seen = {}
    module = __import__("sys").modules["torch_int4.tuning.autotune"]
    real = module.patch

    def spy(model, config, calibration=None, **kwargs):
        seen["calibration"] = calibration.windows(model)
        return real(model, config, calibration=calibration, **kwargs)

    monkeypatch.setattr(module, "patch", spy)
    monkeypatch.setattr(module, "WindowTask", lambda windows: seen.setdefault("task", WindowTask(windows)))
    ids = torch.arange(16 * 24).remainder(97).view(16, 24) + 2
    ids = torch.cat([ids[:, :1].clone().fill_(2) + torch.arange(16)[:, None], ids[:, 1:]], 1)
    autotune(decoder("llama"), candidates=[GPTQ], calibration=small(ids, samples=6), int8=False, max_loss=9.0)
    rows = {tuple(row) for row in seen["calibration"].tolist()}
    assert len(rows) == 6
    assert not rows & {tuple(row) for row in seen["task"].windows.tolist()}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"candidates": []}, "at least one candidate"),
        ({"candidates": ["rtn"]}, "each an Int4Config"),
        ({"max_loss": 0.0}, "positive max_loss"),
        ({"calibration": tokens(24)}, "one window of text cannot serve both"),
    ],
)
def test_refusals(options, words):
    model = decoder("llama")
    with pytest.raises(Int4Error, match=words):
        autotune(model, **{"calibration": small(), "candidates": [FINE], **options})
    assert not int4s(model)


def test_a_failure_in_the_middle_gives_the_float_model_back(tmp_path):
    decoder("llama").save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    want = logits(model)

    def fails(model):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        autotune(model, candidates=[FINE], calibration=small(), tasks=[Scripted(fails)])
    assert torch.equal(logits(model), want)


def test_default_candidates_go_from_cheap_to_dear():
    candidates = default_candidates(Int4Config(head="int8", symmetric=False))
    assert candidates[0] == Int4Config(recipe="rtn", group_size=128, symmetric=False)
    assert candidates[1] == Int4Config(recipe="rtn", group_size=32, symmetric=False)
    assert [c.recipe for c in candidates[::2]] == ["rtn", "awq", "gptq", "awq+gptq", "signround"]


# Float weights between candidates


def test_models_from_disk_are_read_again_and_let_go_of(tmp_path):
    decoder("llama").save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    want = logits(model)
    pristine = Pristine(model)
    assert pristine.on_disk
    assert all(p.numel() == 0 for p in model.parameters())
    first, second = pristine.fresh(), pristine.fresh()
    assert first is not second
    torch_int4.patch(first)
    assert torch.equal(logits(second), want)
    pristine.restore()
    assert torch.equal(logits(model), want)


@pytest.mark.parametrize("change", ["weights", "memory"])
def test_changed_models_and_those_without_a_folder_are_copied(change, tmp_path):
    decoder("llama").save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path) if change == "weights" else decoder("llama")
    if change == "weights":
        model.model.norm.weight.data[3] += 1
    want = logits(model)
    pristine = Pristine(model)
    assert not pristine.on_disk
    torch_int4.patch(pristine.fresh())
    pristine.restore()
    assert torch.equal(logits(model), want)
    assert torch.equal(logits(pristine.fresh()), want)


def test_a_model_becomes_another_in_place():
    model, other = decoder("llama"), torch_int4.patch(decoder("llama"), FINE)
    name, want = model, logits(other)
    Pristine(model).become(other)
    assert torch.equal(logits(name), want)
    assert type(model) is type(other)


# Sizes and the table


def test_bytes_of_all_weights_that_a_token_meets():
    model = decoder("llama")
    linears = sum(p.nbytes for n, p in model.named_parameters() if p.dim() > 1 and "embed" not in n)
    rest = sum(p.nbytes for p in model.parameters() if p.dim() == 1) + sum(b.nbytes for b in model.buffers())
    assert read_bytes(model) == linears + rest
    torch_int4.patch(model, FINE)
    report = model.torch_int4_report
    assert read_bytes(model) == report.bytes_after() + model.lm_head.weight.nbytes + rest
    model.lm_head.weight = model.model.embed_tokens.weight
    assert read_bytes(model) == report.bytes_after() + model.lm_head.weight.nbytes + rest


@pytest.mark.parametrize("probe", [True, False])
def test_read_bandwidth_is_that_of_memory(probe, monkeypatch):
    if not probe:  # a processor without AVX2
        monkeypatch.setattr(torch.ops.torch_int4, "probe_names", lambda: "", raising=False)
    elif not torch.ops.torch_int4.probe_names():
        pytest.skip("the probe needs AVX2")
    assert 1e8 < read_bandwidth(ReadBuffer(16 << 20)) < 1e13


def test_the_table_has_a_row_per_candidate():
    loss = PairedLoss("perplexity", 10, 11, 0.1, 0.01, 20)
    text = table([Tried(FINE, {"perplexity": loss}, 4.5, (1.0, 2.0), 99.0, 3)], 0.01)
    assert "| rtn g32 sym + 3 int8 | +10.00% | 1.00% | fail" in text
    assert isinstance(AutotuneResult(True, FINE, None, 0.01, True).tried, list)


# The command


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    model = decoder("llama")
    model.save_pretrained(path)
    words = {f"w{i}": i for i in range(99)}
    backend = Tokenizer(tokenizer_models.WordLevel(words, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="w1").save_pretrained(path)
    torch.manual_seed(0)  # a text that the model itself wrote, so that every change of the model is a loss on it
    text = model.generate(torch.full((16, 1), 5), max_new_tokens=79, do_sample=True, pad_token_id=0)
    (path / "text.txt").write_text(" ".join(f"w{i}" for i in text.flatten().tolist()))
    return path


def test_the_command_reports_failure_and_success(folder, tmp_path):
    common = ["autotune", "--model", str(folder), "--text", str(folder / "text.txt"), "--samples", "4"]
    common += ["--length", "32", "--windows", "1", "--recipe", "rtn", "--compute", "fp32", "--head", "float"]
    failed = CliRunner().invoke(app, [*common, "--group", "-1", "--max-loss", "0.0001", "--no-int8"])
    assert failed.exit_code == 1, failed.output
    assert "nothing passed the limit of 0.01%" in failed.output
    report = tmp_path / "tried.json"
    passed = CliRunner().invoke(app, [*common, "--group", "32", "--max-loss", "9", "--json", str(report)])
    assert passed.exit_code == 0, passed.output
    found = json.loads(report.read_text())
    assert found["passed"]
    assert found["tried"][0]["name"] == "rtn g32 sym"


def test_the_command_names_a_text_that_cannot_be_read(folder):
    result = CliRunner().invoke(app, ["autotune", "--model", str(folder), "--text", str(folder / "none.txt")])
    assert result.exit_code == 2
    assert "none.txt" in result.output
