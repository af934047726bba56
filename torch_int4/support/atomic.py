"""Files and folders that appear whole or not at all, whenever the process that writes them is killed."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import glob
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock

from torch_int4.errors import Int4Error

_PARTIAL = ".partial-"
_LONG_AGO = 24 * 3600  # seconds
_LOCK, _ASIDE = ".lock", ".old"  # follow the name of the new folder, beside it
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
    partial = final.with_name(f"{_prefix(final)}{secrets.token_hex(8)}")
    lock = _lock_of(partial)
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        _sweep(final)
        with contextlib.suppress(OSError, NotImplementedError):  # network file systems without locks: nothing is swept
            lock.acquire()
        partial.mkdir()
        if final.is_dir():
            partial.chmod(final.stat().st_mode & 0o7777)
    except OSError as error:
        _remove(final, partial, lock)
        raise Int4Error(f"{final}: cannot be written ({error})") from error
    try:
        yield partial
        _carry_over(final, partial)
        _flush(partial)
        _publish(partial, final)
    except OSError as error:
        raise Int4Error(f"{final}: cannot be written ({error}); what was there is unchanged") from error
    finally:
        _remove(final, partial, lock)


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


def _mask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _prefix(final: Path) -> str:
    return f".{final.name}.saving-"


def _lock_of(partial: Path) -> FileLock:
    """Held while somebody writes to that folder; the system drops it with the process."""
    return FileLock(f"{partial}{_LOCK}")


def _remove(final: Path, partial: Path, lock: FileLock) -> None:
    """Remove what a save made besides its target; where it got stuck between two renames, the old target comes back."""
    aside = Path(f"{partial}{_ASIDE}")
    with contextlib.suppress(OSError):  # if it cannot come back, it stays until the next save
        if aside.is_dir() and not final.exists():
            os.rename(aside, final)
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(aside, ignore_errors=True)
        os.unlink(lock.lock_file)
    lock.release()


def _sweep(final: Path) -> None:
    """Remove what killed processes left behind."""
    for left in final.parent.glob(f"{glob.escape(_prefix(final))}*{_LOCK}"):
        partial = left.with_suffix("")
        lock = _lock_of(partial)
        try:
            lock.acquire(timeout=0)
        except (OSError, NotImplementedError):  # somebody writes there, or there are no locks
            continue
        _remove(final, partial, lock)


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
    return weights and name.endswith((".safetensors", ".index.json", ".bin"))


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
    try:
        os.rename(partial, final)  # also onto an empty folder
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        if not _exchange(partial, final):
            _swap_in_steps(partial, final)
    flush = os.open(final.parent, os.O_RDONLY)
    try:
        os.fsync(flush)
    finally:
        os.close(flush)


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
    aside = f"{partial}{_ASIDE}"
    os.rename(final, aside)
    try:
        os.rename(partial, final)
    except OSError:
        os.rename(aside, final)
        raise
