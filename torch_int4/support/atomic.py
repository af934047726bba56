"""Files and folders that appear whole or not at all, whenever the process that writes them is killed."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from torch_int4.errors import Int4Error

_LOCK = ".torch_int4.lock"
_PARTIAL = ".partial-"
_JUST_MADE = 600  # seconds
_LONG_AGO = 24 * 3600
_EXCHANGE = 2  # RENAME_EXCHANGE of renameat2(2)
_HERE = -100  # AT_FDCWD


@contextlib.contextmanager
def replaced_folder(target: str | os.PathLike[str]) -> Iterator[Path]:
    """A new, empty folder to write into, which takes the place of `target` when the block ends.

    Files of an older `target` that the block does not write are carried over (as hard links where possible), but for
    shards and indexes of weights, which belong to the old model. If the block fails, nothing has changed. The new
    folder is flushed to the disk and swapped with the old one in one system call; where a file system cannot swap
    (`renameat2`), the old folder is moved aside first, and for that moment there is none.

    Raises:
        Int4Error: the folder cannot be made, flushed or swapped; the message names it.
    """
    final = Path(os.path.realpath(Path(target).expanduser()))
    if final.exists() and not final.is_dir():
        raise Int4Error(f"{final}: is a file; give a folder to save into")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        _sweep(final)
        partial = Path(tempfile.mkdtemp(prefix=_prefix(final), dir=final.parent))
        os.chmod(partial, _mode(final))
    except OSError as error:
        raise Int4Error(f"{final}: cannot be written ({error})") from error
    try:
        with _locked(partial):
            yield partial
            _carry_over(final, partial)
            _flush(partial)
            _publish(partial, final)
    except OSError as error:
        raise Int4Error(f"{final}: cannot be written ({error}); what was there is unchanged") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def replaced_file(target: str | os.PathLike[str]) -> Iterator[Path]:
    """A path beside `target` to write a file to, which takes the place of `target` when the block ends.

    If the block fails, nothing has changed, and what it wrote is removed.

    Raises:
        OSError: the file cannot be made, flushed or renamed.
    """
    final = Path(target)
    partial = new_file(final.parent)
    try:
        os.chmod(partial, final.stat().st_mode & 0o7777 if final.exists() else 0o666 & ~_mask())
        yield partial
        put_in_place(partial, final)
    finally:
        partial.unlink(missing_ok=True)


def new_file(folder: Path) -> Path:
    """An empty, hidden file for the owner alone, whose name no other process has; removes those left behind long ago.

    Raises:
        OSError: it cannot be made.
    """
    for left in folder.glob(f"{_PARTIAL}*"):
        with contextlib.suppress(OSError):  # somebody else removes it, or it is a folder
            if time.time() - left.stat().st_mtime > _LONG_AGO:
                left.unlink()
    handle, name = tempfile.mkstemp(prefix=_PARTIAL, dir=folder)
    os.close(handle)
    return Path(name)


def put_in_place(partial: Path, final: Path) -> None:
    """Flush a file to the disk and give it its name; an older file of that name is gone.

    Raises:
        OSError: it cannot be flushed or renamed.
    """
    _flush_one(partial)  # a rename may overtake the data otherwise
    os.replace(partial, final)


def _prefix(final: Path) -> str:
    return f".{final.name}.saving-"


def _mode(final: Path) -> int:
    """What a folder made here by mkdir would get; mkdtemp's are for the owner alone."""
    if final.is_dir():
        return final.stat().st_mode & 0o7777
    return 0o777 & ~_mask()


def _mask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold a lock, by which others see that somebody still writes here; the system drops it with the process."""
    lock = os.open(folder / _LOCK, os.O_CREAT | os.O_RDWR, 0o600)
    try:
        with contextlib.suppress(OSError):  # some network file systems have no locks: then nothing is swept either
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _sweep(final: Path) -> None:
    """Remove what killed processes left behind."""
    for left in final.parent.glob(f"{_glob_escape(_prefix(final))}*"):
        try:
            lock = os.open(left / _LOCK, os.O_RDWR)
        except OSError:  # a folder that was swapped out, or one that is just being made
            if time.time() - left.stat().st_ctime > _JUST_MADE:
                shutil.rmtree(left, ignore_errors=True)
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            continue
        else:
            shutil.rmtree(left, ignore_errors=True)
        finally:
            os.close(lock)


def _glob_escape(text: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in text)


def _carry_over(final: Path, partial: Path) -> None:
    if not final.is_dir():
        return
    for old in final.iterdir():
        new = partial / old.name
        if new.exists() or new.is_symlink() or _is_weights(old.name):
            continue
        if old.is_dir() and not old.is_symlink():
            shutil.copytree(old, new, symlinks=True, copy_function=_link_or_copy)
        else:
            _link_or_copy(str(old), str(new))


def _is_weights(name: str) -> bool:
    stem = name.split(".")[0]
    weights = stem in ("model", "pytorch_model") or stem.startswith(("model-", "pytorch_model-"))
    return name == _LOCK or (weights and name.endswith((".safetensors", ".index.json", ".bin")))


def _link_or_copy(old: str, new: str) -> None:
    try:
        os.link(old, new, follow_symlinks=False)
    except OSError:
        shutil.copy2(old, new, follow_symlinks=False)


def _flush(folder: Path) -> None:
    """Have the disk hold everything before the name says so."""
    for root, _, files in os.walk(folder):
        for name in [*files, ""]:
            path = os.path.join(root, name)
            if not os.path.islink(path):
                _flush_one(path)


def _flush_one(path: str | os.PathLike[str]) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # folders of some file systems cannot be flushed
            raise
    finally:
        os.close(handle)


def _publish(partial: Path, final: Path) -> None:
    (partial / _LOCK).unlink()
    try:
        os.rename(partial, final)  # also onto an empty folder
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        if not _exchange(partial, final):
            _swap_in_steps(partial, final)
    _flush_one(final.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two folders in one system call; False where the system or the file system cannot."""
    swap = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if swap is None:
        return False
    done = swap(_HERE, os.fsencode(one), _HERE, os.fsencode(other), ctypes.c_uint(_EXCHANGE))
    if done != 0 and ctypes.get_errno() not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(other))
    return bool(done == 0)


def _swap_in_steps(partial: Path, final: Path) -> None:
    aside = Path(tempfile.mkdtemp(prefix=_prefix(final), dir=final.parent))
    os.rename(final, aside)
    try:
        os.rename(partial, final)
    except OSError:
        os.rename(aside, final)
        raise
    shutil.rmtree(aside, ignore_errors=True)
