"""`torch-int4 quantize`."""

import json
import os

import pytest
import torch
from tiny_models import llama, logits
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from typer.testing import CliRunner

import torch_int4
from torch_int4.cli import app

FULL = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    llama(tied=False, **FULL).to(torch.bfloat16).save_pretrained(folder)
    words = {f"w{i}": i for i in range(99)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(folder)
    return folder


def run(*args):
    return CliRunner().invoke(app, ["quantize", *map(str, args)])


def test_it_writes_a_checkpoint_with_its_tokenizer_and_a_card(model, tmp_path):
    done = run(model, tmp_path / "out", "--group-size", "64", "--asymmetric", "--skip", "*.down_proj")
    assert done.exit_code == 0, done.output
    assert "int4: 12 linears" in done.output
    got = torch_int4.from_pretrained(tmp_path / "out", dtype="auto")
    want = torch_int4.from_pretrained(model, dtype="auto", group_size=64, symmetric=False, skip="*.down_proj")
    assert torch.equal(logits(got), logits(want))
    assert got.dtype == torch.bfloat16
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("w5 w7")["input_ids"] == [5, 7]
    assert "from_pretrained" in (tmp_path / "out" / "README.md").read_text()
    assert sorted(os.listdir(tmp_path)) == ["model", "out"]


def test_a_quantized_checkpoint_is_taken_over_as_it_is(model, tmp_path):
    assert run(model, tmp_path / "one").exit_code == 0
    done = run(tmp_path / "one", tmp_path / "two", "--max-shard-size", "20KB")
    assert done.exit_code == 0, done.output
    assert (tmp_path / "two" / "model.safetensors.index.json").exists()
    one, two = (torch_int4.from_pretrained(tmp_path / name) for name in ("one", "two"))
    assert torch.equal(logits(one), logits(two))
    done = run(tmp_path / "one", tmp_path / "three", "--group-size", "64")
    assert (done.exit_code, "group_size" in done.output) == (2, True)
    assert not (tmp_path / "three").exists()


def test_errors_are_one_line(model, tmp_path):
    for args, message in (
        ((tmp_path / "nowhere", tmp_path / "out"), "nowhere"),
        ((model, model), "is the model itself"),
        ((model, tmp_path / "out", "--group-size", "33"), "group_size"),
        ((model, tmp_path / "out", "--recipe", "magic"), "recipe"),
    ):
        done = run(*args)
        assert done.exit_code == 2
        assert message in done.output
        assert not (tmp_path / "out").exists()


def test_a_model_without_a_tokenizer_is_saved_with_a_warning(model, tmp_path):
    for name in os.listdir(model):
        if "token" in name:
            (model / name).unlink()
    with pytest.warns(UserWarning, match="no tokenizer"):
        assert run(model, tmp_path / "out").exit_code == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]


def test_tokenizer_files_travel_with_a_model_that_is_saved_by_itself(model, tmp_path):
    torch_int4.from_pretrained(model).save_pretrained(tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (model / "tokenizer.json").read_bytes()
