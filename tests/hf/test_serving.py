"""`torch-int4 serve`: transformers' server with a patched model, asked over HTTP by the `openai` package."""

from __future__ import annotations

import json
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from chatting import save_tiny_chat_model
from transformers.utils.import_utils import is_serve_available
from typer.testing import CliRunner

from torch_int4 import Int4Error, Int4Linear, patch
from torch_int4.cli import app
from torch_int4.hf import serving

needs_server = pytest.mark.skipif(not is_serve_available(), reason='needs pip install "torch-int4[serve]"')


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((serving.HOST, 0))
        return int(probe.getsockname()[1])


class Served:
    def __init__(self, folder: Path, **options: Any) -> None:
        import openai

        self.models: list[Any] = []
        self.name, self.port = str(folder), free_port()
        self.server = serving.serve(self.name, self._prepare, port=self.port, background=True, **options)
        self.url = f"http://{serving.HOST}:{self.port}"
        for _ in range(200):
            try:
                urllib.request.urlopen(f"{self.url}/health", timeout=5).read()
                break
            except OSError:
                time.sleep(0.05)
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", timeout=60, max_retries=0)

    def _prepare(self, model: Any) -> Any:
        is_patched = any(isinstance(module, Int4Linear) for module in model.modules())
        self.models.append(model if is_patched else patch(model, kv_cache="fp32"))
        return self.models[-1]

    def ask(self, text: str, **options: Any) -> Any:
        arguments = {"temperature": 0, "max_tokens": 8, "seed": 0, **options}
        messages: Any = [{"role": "user", "content": text}]
        return self.client.chat.completions.create(model=self.name, messages=messages, **arguments)

    def tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        if self.name.endswith(".gguf"):
            from torch_int4.hf.gguf import load_tokenizer

            return load_tokenizer(self.name)
        return AutoTokenizer.from_pretrained(self.name)

    def expected(self, text: str, tokens: int = 8) -> str:
        tokenizer = self.tokenizer()
        messages = [{"role": "user", "content": text}]
        encoded = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        new = self.models[-1].generate(**encoded, max_new_tokens=tokens, do_sample=False)
        return tokenizer.decode(new[0, encoded["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_chat_model(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module", params=[False, True], ids=["sequential", "continuous"])
def served(folder: Path, request: pytest.FixtureRequest) -> Iterator[Served]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(serving, "CACHE_SHARE", 0.02)
        found = Served(folder, continuous_batching=request.param)
        yield found
        found.server.kill_server()


@needs_server
def test_chat_gives_what_generate_gives(served: Served) -> None:
    answer = served.ask("Hello")
    assert answer.choices[0].message.content == served.expected("Hello")
    assert answer.usage.completion_tokens == 8
    assert any(isinstance(module, Int4Linear) for module in served.models[0].modules())


@needs_server
def test_streaming_comes_in_pieces_with_the_same_text(served: Served) -> None:
    chunks = list(served.ask("Stream this", stream=True))
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(pieces) == served.expected("Stream this")
    assert sum(bool(piece) for piece in pieces) > 1
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] in ("stop", "length")


@needs_server
def test_many_clients_at_once(served: Served) -> None:
    from concurrent.futures import ThreadPoolExecutor

    texts = [f"{'x' * n} number {n}" for n in (1, 30, 7, 90)]
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(served.ask, texts))
    assert [answer.choices[0].message.content for answer in answers] == [served.expected(text) for text in texts]


@needs_server
def test_completions_and_the_list_of_models(served: Served) -> None:
    assert [model.id for model in served.client.models.list()] == [served.name]
    done = served.client.completions.create(model=served.name, prompt="abc", max_tokens=4, temperature=0)
    assert isinstance(done.choices[0].text, str)
    assert done.usage is not None
    assert done.usage.completion_tokens == 4


@needs_server
def test_serves_no_other_model(served: Served) -> None:
    import openai

    with pytest.raises(openai.BadRequestError):
        served.client.chat.completions.create(model="gpt2", messages=[{"role": "user", "content": "x"}])
    body = json.dumps({"model": "somebody/else"}).encode()
    request = urllib.request.Request(
        f"{served.url}/load_model", data=body, headers={"Content-Type": "application/json"}
    )
    events = urllib.request.urlopen(request, timeout=30).read().decode()
    assert "error" in events
    assert "only" in events
    assert len(served.models) == 1


@needs_server
def test_listens_on_this_machine_only(served: Served) -> None:
    assert served.server.server.config.host == "127.0.0.1"
    sockets = [s.getsockname()[0] for server in served.server.server.servers for s in server.sockets]
    assert sockets == ["127.0.0.1"]


@needs_server
def test_stock_manager_is_put_back(served: Served) -> None:
    from transformers.cli.serving import model_manager

    assert model_manager.ModelManager.__name__ == "ModelManager"
    assert model_manager.ModelManager.__module__ == model_manager.__name__


@needs_server
def test_loads_by_what_it_is_given(folder: Path) -> None:
    """How `torch-int4 serve` loads, so that quantized checkpoints do not go through transformers' own loading."""
    from torch_int4.commands import _model

    choice = _model.Choice(str(folder), 32, None, "int8", "int8", "fp32", "auto", None)
    asked: list[str] = []

    def load(name: str) -> Any:
        asked.append(name)
        return choice.model(name)

    found = Served(folder, load=load)
    try:
        assert found.ask("Hello").choices[0].message.content == found.expected("Hello")
        assert asked == [str(folder)]
    finally:
        found.server.kill_server()


@needs_server
def test_serves_a_gguf_file_with_its_tokenizer(tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="the package gguf is not installed")
    from gguf_files import SIZES, write
    from tiny_models import llama

    from torch_int4.commands import _model

    path = write(tmp_path / "chat.gguf", llama(**{**SIZES, "vocab_size": 272}), ["Q4_0"], tokenizer=True)
    choice = _model.Choice(str(path), 32, None, "int8", "int8", "fp32", "auto", None)
    found = Served(path, load=choice.model)
    try:
        assert found.ask("Hello").choices[0].message.content == found.expected("Hello")
        assert any(isinstance(module, Int4Linear) for module in found.models[0].modules())
    finally:
        found.server.kill_server()


@needs_server
def test_refuses_what_cannot_be_batched(tmp_path: Path) -> None:
    folder = save_tiny_chat_model(tmp_path, family="falcon")
    with pytest.raises(Int4Error, match="wrong tokens"):
        serving.serve(str(folder), partial(patch, kv_cache="fp32"), port=free_port(), continuous_batching=True)


def test_bad_options_are_refused_before_a_model_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "require_server", lambda: None)
    for port in (0, -1, 65536):
        with pytest.raises(Int4Error, match="port"):
            serving.serve(str(tmp_path), lambda model: model, port=port)
    runner = CliRunner()
    for options, named in (
        (["--group-size", "33"], "group_size"),
        (["--dtype", "int8"], "--dtype"),
        (["--compute", "int3"], "compute"),
    ):
        result = runner.invoke(app, ["serve", str(tmp_path), *options])
        assert result.exit_code == 2
        assert named in result.output
    assert "no config.json" in runner.invoke(app, ["serve", str(tmp_path)]).output
    assert "does not exist" in runner.invoke(app, ["serve", "./no/such/folder"]).output


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from transformers.utils import import_utils

    monkeypatch.setattr(import_utils, "is_serve_available", lambda: False)
    result = CliRunner().invoke(app, ["serve", str(tmp_path)])
    assert result.exit_code == 2
    assert 'pip install "torch-int4[serve]"' in result.output


def test_threads_of_torch_reach_the_thread_that_generates() -> None:
    from concurrent.futures import ThreadPoolExecutor

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(lambda: (torch.ones(1) + 1, torch.get_num_threads())[1]).result() == 1
    finally:
        torch.set_num_threads(before)
