"""GGUF files by the commands and in parts: tokenizer and template are the file's, and what is no model is refused."""

import shutil

import pytest
import torch
from tiny_models import IDS, int4s, llama, logits
from typer.testing import CliRunner

import torch_int4
from torch_int4 import Int4Error
from torch_int4.cli import app
from torch_int4.commands import _model

pytest.importorskip("gguf", reason="the package gguf is not installed")
from gguf_files import SIZES, gguf, write

from torch_int4.formats.parts.gguf_file import open_gguf
from torch_int4.formats.parts.gguf_split import parts_of, whole_file
from torch_int4.hf.gguf import from_gguf, load_tokenizer

runner = CliRunner()
CHAT = {**SIZES, "vocab_size": 272}


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return write(tmp_path_factory.mktemp("chat") / "chat.gguf", llama(**CHAT), ["Q4_0", "Q8_0"], tokenizer=True)


@pytest.fixture
def parts(tmp_path):
    """The same model in parts of 5 tensors."""
    write(tmp_path / "chat.gguf", llama(**CHAT), ["Q4_0", "Q8_0"], tokenizer=True, part=5)
    found = sorted(tmp_path.glob("*.gguf"))
    assert [path.name for path in found] == [f"chat-{i:05}-of-00005.gguf" for i in range(1, 6)]
    return found


def test_generate_answers_with_the_tokenizer_and_the_template_of_the_file(file):
    options = ["--tokens", "6", "--kv-cache", "fp32"]
    result = runner.invoke(app, ["generate", str(file), "--prompt", "Hello", *options])
    assert result.exit_code == 0, result.output
    tokenizer, model = load_tokenizer(file), from_gguf(file, kv_cache="fp32")
    asked = "<user>Hello<bot>"
    ids = tokenizer(asked, return_tensors="pt")["input_ids"]
    assert ids.shape == (1, len(asked))  # a token for every byte
    assert tokenizer.decode(ids[0]) == asked
    answer = model.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
    assert result.stdout == tokenizer.decode(answer, skip_special_tokens=True) + "\n"


def test_chat_takes_a_file(file):
    result = runner.invoke(app, ["chat", str(file), "--tokens", "3"], input="Hi\n/exit\n")
    assert result.exit_code == 0, result.output
    assert "tokens/s" in result.stderr


def test_files_that_are_not_there_are_named():
    result = runner.invoke(app, ["chat", "nowhere.gguf"], input="Hi\n")
    assert result.exit_code == 2
    assert "'nowhere.gguf': does not exist" in " ".join(result.output.split())


@pytest.mark.parametrize("which", [0, 2, 4])
def test_any_part_is_the_model(file, parts, which):
    model = torch_int4.from_pretrained(parts[which], kv_cache="fp32")
    whole = torch_int4.from_pretrained(file, kv_cache="fp32")
    assert int4s(model).keys() == int4s(whole).keys()
    assert torch.equal(logits(model), logits(whole))
    assert load_tokenizer(parts[which]).chat_template == load_tokenizer(file).chat_template
    assert sorted(parts[0].parent.iterdir()) == parts  # what was joined is gone


def test_joined_parts_are_the_file_that_was_not_split(file, parts):
    want = open_gguf(file)
    with whole_file(parts[1]) as path:
        got = open_gguf(path)
        assert {key: value for key, value in want.metadata.items() if not key.startswith("split.")} == got.metadata
        assert got.tensors.keys() == want.tensors.keys()
        for name in want.tensors:
            assert torch.equal(got.read(name), want.read(name)), name
        assert gguf.GGUFReader(path).fields.keys() >= {"tokenizer.ggml.tokens", "tokenizer.chat_template"}


def test_missing_parts_are_named(parts):
    parts[1].unlink()
    parts[3].unlink()
    for call in (from_gguf, load_tokenizer):
        with pytest.raises(Int4Error, match=r"chat-00003-of-00005\.gguf: is one of 5 .*-00002-of-.*, chat-00004-of"):
            call(parts[2])


def test_parts_that_do_not_belong_together_are_named(parts, tmp_path):
    shutil.copy(parts[2], parts[1])
    with pytest.raises(Int4Error, match=r"chat-00002-of-00005\.gguf: split\.no is 2"):
        from_gguf(parts[0])
    shutil.copy(parts[0], tmp_path / "x-00001-of-00002.gguf")
    shutil.copy(parts[1], tmp_path / "x-00002-of-00002.gguf")
    with pytest.raises(Int4Error, match=r"split\.count is 5"):
        from_gguf(tmp_path / "x-00001-of-00002.gguf")
    with pytest.raises(Int4Error, match="part 7 of 2"):
        parts_of(tmp_path / "x-00007-of-00002.gguf")
    parts[4].write_bytes(parts[4].read_bytes()[:-50])
    shutil.copy(parts[2], parts[1])
    with pytest.raises(Int4Error, match=r"chat-00005-of-00005\.gguf"):
        from_gguf(parts[0])


@pytest.mark.parametrize(("fields", "reason"), [
    ({"general.type": "mmproj"}, "mmproj"),
    ({"general.architecture": "clip"}, "mmproj"),
    ({"general.type": "adapter"}, "holds no model"),
])  # fmt: skip
def test_what_is_no_language_model_is_refused(tmp_path, fields, reason):
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", fields.get("general.architecture", "llama"))
    if "general.type" in fields:
        writer.add_type(fields["general.type"])
    writer.add_tensor("v.blk.0.weight", torch.zeros(4, 32).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    for call in (torch_int4.from_pretrained, load_tokenizer):
        with pytest.raises(Int4Error, match=rf"other\.gguf: holds .*{reason}|other\.gguf: {reason}"):
            call(tmp_path / "other.gguf")


def test_floats_take_the_dtype_and_buffers_keep_theirs(file):
    model = torch_int4.from_pretrained(file, dtype="bfloat16", kv_cache="fp32")
    assert model.dtype == torch.bfloat16
    assert model.model.norm.weight.dtype == torch.bfloat16
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    want = logits(torch_int4.from_pretrained(file, kv_cache="fp32"))
    got = logits(model)
    assert got.dtype == torch.bfloat16
    assert (got.float() - want).norm() < 0.05 * want.norm()
    with pytest.raises(Int4Error, match="dtype must be"):
        torch_int4.from_pretrained(file, dtype="int8")


def test_choice_loads_model_and_tokenizer(file):
    choice = _model.Choice(str(file), 32, None, "int8", "int8", "fp32", "auto", None)
    model, tokenizer = choice.load()
    assert choice.prepare(model) is model
    assert torch.equal(logits(model, IDS), logits(from_gguf(file, kv_cache="fp32"), IDS))
    assert tokenizer.eos_token == "<end>"


def test_a_file_without_a_tokenizer_is_named(tmp_path):
    path = write(tmp_path / "plain.gguf", llama(**SIZES), ["Q4_0"])
    with pytest.raises(Int4Error, match=r"plain\.gguf: transformers does not read its tokenizer"):
        load_tokenizer(path)
