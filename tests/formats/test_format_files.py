"""Broken files: a clear error each, that names file and tensor, before anything large is allocated."""

import json
import os
import tracemalloc

import pytest
import torch
from broken_files import GGUF, PAYLOAD, SAFETENSORS, break_safetensors, gguf, safetensors
from safetensors.torch import save_file

from torch_int4 import Int4Error
from torch_int4.formats.parts.files import INDEX, open_checkpoint, read_quantization_file
from torch_int4.formats.parts.safetensors import open_safetensors


def refuses(call, message, size):
    """`call` raises an Int4Error with that message, and allocates at most twice the file, and a little for itself."""
    tracemalloc.start()
    try:
        with pytest.raises(Int4Error) as caught:
            call()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert message in str(caught.value)
    assert len(str(caught.value)) < 600
    assert peak <= 2 * size + (1 << 18), peak
    return str(caught.value)


@pytest.mark.parametrize("broken", SAFETENSORS)
def test_broken_safetensors(tmp_path, broken):
    message, parts = SAFETENSORS[broken]
    path = break_safetensors(tmp_path / "model.safetensors", **parts)
    text = refuses(lambda: open_safetensors(path), message, path.stat().st_size)
    assert text.startswith("model.safetensors")


def test_the_corpus_is_large_and_its_unbroken_files_are_read(tmp_path):
    assert len(SAFETENSORS) + len(GGUF) + len(FOLDERS) >= 60
    file = open_safetensors(safetensors(tmp_path / "good.safetensors"))
    assert file.read("b.weight").shape == (PAYLOAD // 32, 4)
    with pytest.raises(Int4Error, match="has no tensor 'c'"):
        file.read("c")


def test_a_long_header_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "model.safetensors"
    with path.open("wb") as stream:  # sparse: it takes no space
        stream.write((1 << 30).to_bytes(8, "little"))
        stream.truncate(2 << 30)
    refuses(lambda: open_safetensors(path), "header too large", 0)


@pytest.mark.parametrize("message", GGUF)
def test_broken_gguf(tmp_path, message):
    pytest.importorskip("gguf", reason="the package gguf is not installed")
    from torch_int4.formats.parts.gguf_file import open_gguf

    parts = dict(GGUF[message])
    path = tmp_path / "model.gguf"
    if "raw" in parts:
        path.write_bytes(parts["raw"])
    else:
        gguf(path, **parts)
    text = refuses(lambda: open_gguf(path), message, path.stat().st_size)
    assert text.startswith("model.gguf")


def test_a_good_gguf_is_read(tmp_path):
    pytest.importorskip("gguf", reason="the package gguf is not installed")
    from torch_int4 import formats
    from torch_int4.formats.parts.gguf_file import open_gguf

    file = open_gguf(gguf(tmp_path / "model.gguf"))
    assert file.metadata == {"general.architecture": "llama"}
    entry = file.tensors["a.weight"]
    assert (entry.kind, entry.shape) == ("Q4_0", (4, 64))
    settings = formats.Settings(layout=entry.kind)
    weight = formats.get("gguf").read({"weight": file.read("a.weight")}, settings, shape=entry.shape, name="a")
    assert weight.codes.unique().tolist() == [3, 8]  # of 0x38, all the file is made of
    (tmp_path / "model.gguf").write_bytes(b"short")
    with pytest.raises(Int4Error, match="has changed since"):
        file.read("a.weight")


def checkpoint(folder, index=None, shards=2):
    """Two shards with tensors t0 and t1, and their index."""
    names = [f"model-0000{i + 1}-of-0000{shards}.safetensors" for i in range(shards)]
    for i, name in enumerate(names):
        save_file({f"t{i}": torch.full((4,), float(i))}, folder / name)
    table = {f"t{i}": name for i, name in enumerate(names)}
    (folder / INDEX).write_text(json.dumps({"weight_map": table if index is None else index}))
    return names


def _remove_shard(folder, names):
    (folder / names[1]).unlink()


def _hang(folder, names):
    (folder / names[1]).unlink()
    os.mkfifo(folder / names[1])


def _link_to_nothing(folder, names):
    (folder / names[1]).unlink()
    (folder / names[1]).symlink_to(folder / "nowhere")


def _link_to_device(folder, names):
    (folder / names[1]).unlink()
    (folder / names[1]).symlink_to("/dev/zero")


def _truncate(folder, names):
    path = folder / names[1]
    path.write_bytes(path.read_bytes()[:-3])


def _twice(folder, names):
    save_file({"t1": torch.zeros(4), "t0": torch.ones(4)}, folder / names[1])


def _raw_index(raw):
    return lambda folder, names: (folder / INDEX).write_bytes(raw)


def _map(**table):
    return lambda folder, names: (folder / INDEX).write_text(json.dumps({"weight_map": {"t0": names[0], **table}}))


def _only(name):
    def change(folder, names):
        for path in list(folder.iterdir()):
            path.unlink()
        (folder / name).write_bytes(b"\x80\x04.")

    return change


def _no_index(folder, names):
    (folder / INDEX).unlink()


def _empty(folder, names):
    for path in list(folder.iterdir()):
        path.unlink()


PLAIN = "t1: its file must be a plain name"
FOLDERS = {
    "model-00002-of-00002.safetensors: this shard is missing; it should hold t1": _remove_shard,
    "model-00002-of-00002.safetensors: is not a regular file": _hang,
    "model-00002-of-00002.safetensors: this shard is missing": _link_to_nothing,
    "model-00002-of-00002.safetensors: is not a regular file (": _link_to_device,
    "model-00002-of-00002.safetensors: is cut off": _truncate,
    "t0: is also in model-00001-of-00002.safetensors": _twice,
    f"{INDEX}: says that model-00001-of-00002.safetensors holds t1": lambda f, n: _map(t1=n[0])(f, n),
    PLAIN + " that ends in .safetensors, got '../x.safetensors'": _map(t1="../x.safetensors"),
    PLAIN + " that ends in .safetensors, got '/etc/x.safetensors'": _map(t1="/etc/x.safetensors"),
    PLAIN + " that ends in .safetensors, got 'a\\\\b": _map(t1="a\\b.safetensors"),
    PLAIN + " that ends in .safetensors, got 'sub/": _map(t1="sub/x.safetensors"),
    PLAIN + " that ends in .safetensors, got '.x": _map(t1=".x.safetensors"),
    PLAIN + " that ends in .safetensors, got 'a.bin'": _map(t1="a.bin"),
    PLAIN + " that ends in .safetensors, got 7": _map(t1=7),
    "weight_map must be a table": _raw_index(b'{"weight_map": [1]}'),
    "weight_map must be": _raw_index(b"{}"),
    f"{INDEX}: holds no valid JSON": _raw_index(b'{"weight_map"'),
    f"{INDEX}: holds 't0' twice": _raw_index(b'{"weight_map": {"t0": "a.safetensors", "t0": "b.safetensors"}}'),
    "holds pickled weights only": _only("pytorch_model.bin"),
    "holds pickled weights only, which": _only("model.pth"),
    "holds 2 .safetensors files and no": _no_index,
    "holds no model.safetensors and no": _empty,
}


@pytest.mark.parametrize("message", FOLDERS)
def test_broken_folders(tmp_path, message):
    names = checkpoint(tmp_path)
    FOLDERS[message](tmp_path, names)
    with pytest.raises(Int4Error) as caught:
        open_checkpoint(tmp_path)
    assert message in str(caught.value)


def test_good_folders(tmp_path):
    (tmp_path / "sharded").mkdir()
    checkpoint(tmp_path / "sharded")
    found = open_checkpoint(tmp_path / "sharded")
    assert sorted(found) == ["t0", "t1"]
    assert len(found) == 2
    assert "t1" in found
    assert found.shape("t1") == (4,)
    assert torch.equal(found.read("t1"), torch.ones(4))
    with pytest.raises(Int4Error, match="no tensor 'x' is there"):
        found.read("x")
    found.close()
    (tmp_path / "single").mkdir()
    real = tmp_path / "blob"
    save_file({"a": torch.arange(3)}, real, metadata={"format": "pt"})
    (tmp_path / "single" / "anything.safetensors").symlink_to(real)  # the hub's cache consists of links
    found = open_checkpoint(tmp_path / "single")
    assert found.file("a") == str(tmp_path / "single" / "anything.safetensors")
    assert torch.equal(found.read("a"), torch.arange(3))
    with pytest.raises(Int4Error, match="is not a folder"):
        open_checkpoint(tmp_path / "nothing")


def test_files_of_settings_that_older_tools_wrote(tmp_path):
    assert read_quantization_file(tmp_path) is None
    settings = tmp_path / "quant_config.json"
    settings.write_text('{"bits": 4}')
    assert read_quantization_file(tmp_path) == {"bits": 4, "quant_method": "awq"}
    (tmp_path / "quantize_config.json").write_text('{"bits": 8, "quant_method": "gptq_v2"}')
    assert read_quantization_file(tmp_path) == {"bits": 8, "quant_method": "gptq_v2"}
    for broken, message in {
        '{"bits": 4, "bits": 3}': r"quantize_config\.json: holds 'bits' twice",
        "[4]": r"quantize_config\.json: must hold a JSON table, got list",
        '{"bits": NaN}': r"quantize_config\.json: holds NaN",
        '{"bits"': r"quantize_config\.json: holds no valid JSON",
    }.items():
        (tmp_path / "quantize_config.json").write_text(broken)
        with pytest.raises(Int4Error, match=message):
            read_quantization_file(tmp_path)


@pytest.mark.parametrize("cut", [0.1, 0.5, 0.9, 0.999])
def test_every_truncation_of_a_real_file_is_an_error(tmp_path, cut):
    path = tmp_path / "model.safetensors"
    save_file({f"layer.{i}.weight": torch.randn(32, 32) for i in range(8)}, path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * cut)])
    with pytest.raises(Int4Error, match=r"model\.safetensors"):
        open_safetensors(path)


def test_random_damage_to_a_header_never_gets_through_unnoticed(tmp_path):
    """Flip bytes of the header: either an error, or tensors that lie in the file and have their size."""
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(4, 4), "b": torch.zeros(8)}, path)
    data = bytearray(path.read_bytes())
    end = 8 + int.from_bytes(data[:8], "little")
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        damaged = bytearray(data)
        for _ in range(2):
            at = int(torch.randint(0, end, (1,), generator=generator))
            damaged[at] = int(torch.randint(0, 256, (1,), generator=generator))
        path.write_bytes(damaged)
        try:
            file = open_safetensors(path)
        except Int4Error:
            continue
        for key in file.shapes:
            assert file.read(key).numel() in (8, 16)
