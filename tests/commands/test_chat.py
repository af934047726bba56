"""`torch-int4 generate` and `chat`: the text of plain `generate`, streaming, and a cache kept between turns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from chatting import save_tiny_chat_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from torch_int4 import Int4Error, patch
from torch_int4.cli import app
from torch_int4.commands import _model
from torch_int4.hf import interactive

runner = CliRunner()
LOADED: dict[str, Any] = {
    "group_size": 32,
    "symmetric": None,
    "compute": "int8",
    "head": "int8",
    "kv_cache": "fp32",
    "dtype": "auto",
    "threads": None,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_chat_model(tmp_path_factory.mktemp("chat"))


@pytest.fixture(scope="module")
def loaded(folder: Path) -> tuple[Any, Any]:
    return _model.Choice(str(folder), **LOADED).load()


def fresh(folder: Path, ids: torch.Tensor, tokens: int) -> list[int]:
    """What an own model, patched by hand, generates without any cache from before."""
    model = patch(AutoModelForCausalLM.from_pretrained(folder), kv_cache="fp32")
    return model.generate(ids, max_new_tokens=tokens, do_sample=False)[0, ids.shape[1] :].tolist()


def test_generate_prints_what_the_model_generates(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("Hello", return_tensors="pt")["input_ids"]
    arguments = ["--prompt", "Hello", "--raw", "--tokens", "6", "--kv-cache", "fp32"]
    result = runner.invoke(app, ["generate", str(folder), *arguments])
    assert result.exit_code == 0, result.output
    assert result.stdout == tokenizer.decode(fresh(folder, ids, 6), skip_special_tokens=True) + "\n"
    assert "tokens/s" in result.stderr


@pytest.mark.parametrize("guess", ["--prompt-lookup", "--assistant"])
def test_guessing_changes_no_token(folder: Path, guess: str) -> None:
    base = ["generate", str(folder), "--prompt", "abcabcabc", "--tokens", "12", "--kv-cache", "fp32"]
    plain = runner.invoke(app, base)
    other = runner.invoke(app, [*base, guess, "4" if guess == "--prompt-lookup" else str(folder)])
    assert other.exit_code == 0, other.output
    assert other.stdout == plain.stdout


def test_sampling_follows_its_seed(folder: Path) -> None:
    base = ["generate", str(folder), "--prompt", "abc", "--tokens", "12", "--sample", "--temperature", "5"]
    texts = [runner.invoke(app, [*base, "--seed", seed]).stdout for seed in ("1", "1", "2")]
    assert texts[0] == texts[1] != texts[2]


def test_generate_reads_the_standard_input(folder: Path) -> None:
    piped = runner.invoke(app, ["generate", str(folder), "--prompt", "-", "--tokens", "3"], input="text from a pipe")
    given = runner.invoke(app, ["generate", str(folder), "--prompt", "text from a pipe", "--tokens", "3"])
    assert piped.exit_code == 0
    assert piped.stdout == given.stdout


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--prompt", ""], "--prompt"),
        (["--prompt", "x", "--prompt-lookup", "3", "--assistant", "y"], "--assistant"),
        (["--prompt", "x", "--dtype", "float64"], "--dtype"),
        (["--prompt", "x", "--group-size", "7"], "group_size"),
    ],
)
def test_bad_options_are_named(folder: Path, options: list[str], named: str) -> None:
    result = runner.invoke(app, ["generate", str(folder), *options])
    assert result.exit_code == 2
    assert named in result.output


def test_broken_directory_is_an_error_not_a_traceback(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "no_such_type"}')
    result = runner.invoke(app, ["generate", str(tmp_path), "--prompt", "x"])
    assert result.exit_code == 2
    assert str(tmp_path) in result.output


def test_turns_reuse_the_cache_and_change_nothing(folder: Path, loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    chat = interactive.Chat(model, tokenizer, max_new_tokens=7, do_sample=False)
    said: list[str] = []
    reused = []
    for text in ("Hi", "and then?", "x" * 70, "ok"):
        answer = chat.turn(text, write=said.append)
        messages = chat.messages[:-1]
        encoded = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        assert list(answer.ids) == fresh(folder, encoded["input_ids"], 7)
        reused.append(answer.reused)
    assert reused[0] == 0
    assert reused == sorted(set(reused))
    assert "".join(said) == "".join(m["content"] for m in chat.messages if m["role"] == "assistant")
    chat.reset()
    assert chat.turn("Hi", write=said.append).reused == 0


def test_same_question_again_recomputes_its_last_token(loaded: tuple[Any, Any]) -> None:
    """The cache then holds the whole prompt, and `generate` needs one token to start from."""
    chat = interactive.Chat(*loaded, max_new_tokens=5, do_sample=False)
    first = chat.turn("Hi", write=lambda text: None)
    chat.messages = []  # a client that edits its history
    again = chat.turn("Hi", write=lambda text: None)
    assert again.ids == first.ids
    assert again.reused == first.prompt_tokens - 1


def test_interrupted_answer_is_kept_and_its_cache_is_not(loaded: tuple[Any, Any]) -> None:
    chat = interactive.Chat(*loaded, max_new_tokens=50, do_sample=False)
    pieces: list[str] = []

    def write(text: str) -> None:
        pieces.append(text)
        if len(pieces) == 3:
            raise KeyboardInterrupt

    answer = chat.turn("Hi", write=write)
    assert answer.interrupted
    assert 0 < len(answer.ids) < 50
    assert chat.turn("Go on", write=lambda text: None).reused == 0


def test_chat_command_keeps_a_conversation(folder: Path) -> None:
    lines = "Hi\n\nand you?\n/reset\nHi\n/exit\nnever read\n"
    result = runner.invoke(app, ["chat", str(folder), "--tokens", "5", "--system", "Be brief"], input=lines)
    assert result.exit_code == 0, result.output
    answers = result.stdout.splitlines()
    assert result.stderr.count("kept") == 1  # the second turn only
    assert answers[0] == answers[-1]


def test_quantized_checkpoints_are_taken_over(folder: Path, loaded: tuple[Any, Any], tmp_path: Path) -> None:
    """What `save_pretrained` of a patched model wrote gives the same text, whatever group size is asked for."""
    patch(AutoModelForCausalLM.from_pretrained(folder)).save_pretrained(tmp_path)
    loaded[1].save_pretrained(tmp_path)
    arguments = ["--prompt", "Hello", "--tokens", "6", "--kv-cache", "fp32"]
    saved = runner.invoke(app, ["generate", str(tmp_path), *arguments, "--group-size", "64"])
    float_ = runner.invoke(app, ["generate", str(folder), *arguments])
    assert saved.exit_code == 0, saved.output
    assert saved.stdout == float_.stdout


def test_chat_needs_a_template(tmp_path: Path) -> None:
    save_tiny_chat_model(tmp_path, template=None)
    result = runner.invoke(app, ["chat", str(tmp_path)], input="Hi\n")
    assert result.exit_code == 2
    assert "chat template" in result.output


def test_threads_and_patched_models(folder: Path) -> None:
    before = torch.get_num_threads()
    try:
        choice = _model.Choice(str(folder), **{**LOADED, "threads": 1})
        model, _ = choice.load()
        assert torch.get_num_threads() == 1
        assert choice.prepare(model) is model  # a checkpoint that brings int4 linears is not patched again
    finally:
        torch.set_num_threads(before)
    with pytest.raises(Int4Error, match="group_size"):
        _model.Choice(str(folder), **{**LOADED, "group_size": 5}).load()
