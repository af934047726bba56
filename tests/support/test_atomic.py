"""A folder is replaced whole or not at all: killed at every system call that changes something, and on refusals."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from torch_int4 import Int4Error
from torch_int4.support import atomic

FILES = {"config.json": "{}", "model-00001-of-00002.safetensors": "a" * 5000, "sub/nested.txt": "deep"}


def write(folder, files):
    for name, text in files.items():
        path = Path(folder) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def read(folder):
    return {str(p.relative_to(folder)): p.read_text() for p in Path(folder).rglob("*") if p.is_file()}


def test_a_new_folder_appears_with_everything(tmp_path):
    target = tmp_path / "a" / "b"
    with atomic.replaced_folder(target) as partial:
        write(partial, FILES)
        assert not target.exists()
    assert read(target) == FILES
    assert os.listdir(target.parent) == ["b"]
    assert target.stat().st_mode & 0o777 == (tmp_path / "a").stat().st_mode & 0o777


@pytest.mark.parametrize("swap", [True, False])
def test_an_old_folder_is_replaced_and_keeps_other_files(swap, tmp_path, monkeypatch):
    if not swap:
        monkeypatch.setattr(atomic, "_exchange", lambda *folders: False)
    target = tmp_path / "m"
    weights = ("model.safetensors", "model.safetensors.index.json", "model-00003-of-00003.safetensors")
    kept = {"tokenizer.json": "tok", "notes/a.txt": "mine", "model_card.md": "x", "adapter_model.safetensors": "y"}
    write(target, {**dict.fromkeys((*weights, "pytorch_model.bin"), "old"), **kept, "config.json": "old"})
    target.chmod(0o750)
    with atomic.replaced_folder(target) as partial:
        write(partial, FILES)
    assert read(target) == {**FILES, **kept}
    assert target.stat().st_mode & 0o777 == 0o750
    assert os.listdir(tmp_path) == ["m"]


def test_a_failure_changes_nothing(tmp_path):
    target = tmp_path / "m"
    write(target, {"config.json": "old"})

    def fail():
        with atomic.replaced_folder(target) as partial:
            write(partial, FILES)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert read(target) == {"config.json": "old"}
    assert os.listdir(tmp_path) == ["m"]


@pytest.mark.parametrize("stuck", [False, True])
def test_an_old_folder_that_was_moved_aside_is_never_lost(stuck, tmp_path, monkeypatch):
    """Where two folders cannot be swapped, the second rename may fail, and the way back too."""
    target, rename = tmp_path / "m", os.rename
    write(target, {"config.json": "old"})

    def failing(one, other):
        if Path(other) == target and not target.exists() and (stuck or not str(one).endswith(".old")):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        rename(one, other)

    monkeypatch.setattr(atomic, "_exchange", lambda *folders: False)
    with monkeypatch.context() as broken:
        broken.setattr(os, "rename", failing)
        with pytest.raises(Int4Error, match="cannot be written"), atomic.replaced_folder(target) as partial:
            write(partial, FILES)
        assert target.exists() != stuck
    with atomic.replaced_folder(target):
        assert read(target) == {"config.json": "old"}
    assert os.listdir(tmp_path) == ["m"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EACCES])
def test_a_full_disk_is_an_error_that_names_the_folder(number, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(number, os.strerror(number))

    target = tmp_path / "m"
    write(target, {"config.json": "old"})
    monkeypatch.setattr(os, "fsync", full)
    with (
        pytest.raises(Int4Error, match=r"m: cannot be written .*unchanged"),
        atomic.replaced_folder(target) as partial,
    ):
        write(partial, FILES)
    assert read(target) == {"config.json": "old"}
    assert os.listdir(tmp_path) == ["m"]


def test_refusals(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(Int4Error, match="is a file"), atomic.replaced_folder(tmp_path / "file"):
        pass
    with pytest.raises(Int4Error, match="cannot be written"), atomic.replaced_folder(tmp_path / "file" / "below"):
        pass


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    target = tmp_path / "f.json"
    with atomic.replaced_file(target) as partial:
        partial.write_text("new")
        assert not target.exists()
    assert target.read_text() == "new"
    plain = tmp_path / "plain"
    plain.write_text("")
    assert target.stat().st_mode == plain.stat().st_mode
    target.chmod(0o640)

    def fail(text):
        with atomic.replaced_file(target) as partial:
            partial.write_text(text)
            raise KeyError

    with pytest.raises(KeyError):
        fail("half")
    assert target.read_text() == "new"
    with atomic.replaced_file(target) as partial:
        partial.write_text("newer")
    assert target.read_text() == "newer"
    assert target.stat().st_mode & 0o777 == 0o640
    monkeypatch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    with pytest.raises(OSError, match="full"), atomic.replaced_file(target) as partial:
        partial.write_text("newest")
    assert target.read_text() == "newer"
    assert sorted(os.listdir(tmp_path)) == ["f.json", "plain"]


def test_files_that_killed_processes_left_are_removed_a_day_later(tmp_path):
    old, young = tmp_path / ".partial-old", tmp_path / ".partial-young"
    for left in (old, young):
        left.write_text("half")
    os.utime(old, (0, 0))
    with atomic.replaced_file(tmp_path / "f") as partial:
        partial.write_text("whole")
    assert sorted(os.listdir(tmp_path)) == [".partial-young", "f"]


def test_a_link_to_a_folder_stays_a_link(tmp_path):
    write(tmp_path / "real", {"config.json": "old"})
    (tmp_path / "link").symlink_to("real")
    with atomic.replaced_folder(tmp_path / "link") as partial:
        write(partial, FILES)
    assert (tmp_path / "link").is_symlink()
    assert read(tmp_path / "real") == FILES


def test_what_a_killed_save_left_is_swept_and_what_a_live_one_writes_is_not(tmp_path):
    target = tmp_path / "m[1]*"
    with atomic.replaced_folder(target) as live:
        write(live, FILES)
        dead = tmp_path / ".m[1]*.saving-dead"
        write(dead, {"x": "y"})
        (tmp_path / f"{dead.name}.lock").touch()
        young = tmp_path / ".m[1]*.saving-young.lock"  # killed before its folder was made
        young.touch()
        foreign = tmp_path / ".m1.saving-of-another-target.lock"
        foreign.touch()
        with atomic.replaced_folder(target) as other:
            write(other, {"config.json": "other"})
        assert not dead.exists()
        assert not young.exists()
        assert foreign.exists()
        assert live.exists()
    assert read(target) == FILES
    assert sorted(os.listdir(tmp_path)) == [foreign.name, target.name]


def test_a_folder_that_a_killed_save_had_moved_aside_comes_back(tmp_path):
    write(tmp_path / ".m.saving-dead.old", {"tokenizer.json": "tok", "model.safetensors": "old"})
    write(tmp_path / ".m.saving-dead", {"model.safetensors": "new"})
    (tmp_path / ".m.saving-dead.lock").touch()
    with atomic.replaced_folder(tmp_path / "m") as partial:
        assert read(tmp_path / "m") == {"tokenizer.json": "tok", "model.safetensors": "old"}
        write(partial, FILES)
    assert read(tmp_path / "m") == {**FILES, "tokenizer.json": "tok"}
    assert os.listdir(tmp_path) == ["m"]


def test_without_locks_folders_are_written_and_nothing_is_swept(tmp_path, monkeypatch):
    def none(self, *args, **options):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(atomic.FileLock, "acquire", none)
    (tmp_path / ".m.saving-dead.lock").touch()
    with atomic.replaced_folder(tmp_path / "m") as partial:
        write(partial, FILES)
    assert read(tmp_path / "m") == FILES
    assert sorted(os.listdir(tmp_path)) == [".m.saving-dead.lock", "m"]


KILLED = """
import os, signal, sys
from pathlib import Path
from torch_int4.support import atomic

point, count = int(sys.argv[2]), 0

def killing(name):
    real = getattr(os, name)
    def call(*args, **options):
        global count
        count += 1
        if count == point:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **options)
    setattr(os, name, call)

os.fsync = lambda handle: None  # the disk is slow, and no power fails here
for name in ("open", "close", "rename", "unlink", "fsync", "link", "mkdir", "chmod", "rmdir", "scandir"):
    killing(name)
real = atomic._exchange
def exchange(*args):
    global count
    count += 2
    if point == count - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    done = real(*args)
    if point == count:
        os.kill(os.getpid(), signal.SIGKILL)
    return done
atomic._exchange = exchange
for child in range(int(sys.argv[3]), int(sys.argv[4])):
    target, pid = Path(sys.argv[1]) / str(child), os.fork()
    if pid == 0:
        point, count = child, 0
        with atomic.replaced_folder(target) as partial:
            for i in range(8):
                handle = os.open(partial / f"model-{i}.safetensors", os.O_CREAT | os.O_WRONLY)
                os.write(handle, b"new")
                os.close(handle)
        os._exit(7)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""


def test_killed_at_a_hundred_points_the_folder_is_the_old_or_the_new(tmp_path):
    old = {**{f"model-{i}.safetensors": "old" for i in range(9)}, "tokenizer.json": "t"}
    new = {**{f"model-{i}.safetensors": "new" for i in range(8)}, "tokenizer.json": "t"}
    for point in range(1, 121):
        write(tmp_path / str(point), old)
    run = [sys.executable, "-P", "-c", KILLED, str(tmp_path), "0", "1", "121"]
    done = subprocess.run(run, capture_output=True, text=True, check=True, timeout=300)
    codes = [int(line) for line in done.stdout.split()]
    assert len(codes) == 120
    assert set(codes) <= {-signal.SIGKILL, 7}
    states = [read(tmp_path / str(point)) for point in range(1, 121)]
    assert all(state in (old, new) for state in states)
    assert old in states
    assert new in states
    assert codes.count(-signal.SIGKILL) >= 50
    points = [point for point in range(1, 121) if codes[point - 1] != 7]
    for point in points[::7]:  # the next save heals what was left behind
        with atomic.replaced_folder(tmp_path / str(point)) as partial:
            write(partial, FILES)
        assert read(tmp_path / str(point)) == {**FILES, "tokenizer.json": "t"}
