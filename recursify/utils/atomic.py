"""Atomic writes of files and folders: write to a temporary place, then rename.

The temporary place is a folder `.recursify-...` beside the result, locked as long as its process lives. What a killed process left there is
deleted by the next write beside it.
"""

from __future__ import annotations

import errno
import filecmp
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import filelock

from ..errors import UserError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_ASIDE, _LOCK = ".recursify-", ".lock"
_GRACE = 60.0  # seconds in which an empty temporary folder may be about to be locked
_WINDOWS = sys.platform == "win32"


def write_atomic(
    writers: Mapping[Path, Callable[[Path], Any]],
    folders: Mapping[Path, Callable[[Path], bool]] | None = None,
    approve: Callable[[], Any] = lambda: None,
) -> None:
    """Write files and folders in one parent folder, all or none.

    Args:
        writers: Path -> function that writes to a temporary path. After all have succeeded, the results are renamed in this order.
        folders: Those of the paths that are folders, which exist and are empty when their writers are called. The value tells whether an
            entry of an older folder of that name is replaced; other entries are kept.
        approve: Called after everything is written and before anything is renamed; an exception in it leaves everything unchanged.

    Raises:
        UserError: The disk is full, or the folder is not writable; nothing is changed.
    """
    folders = folders or {}
    last = [*writers][-1]
    temporary, lock = None, None
    try:
        clear_leftovers(last.absolute().parent)
        temporary, lock = _temporary(last.absolute().parent)
        for path, write in writers.items():
            target = temporary / path.name
            if path in folders:
                target.mkdir()
            write(target)
            _flush(target)
        approve()
        for path in writers:
            _put(temporary / path.name, path, folders.get(path))
        _sync(last.absolute().parent)
    except UserError:
        raise
    except Exception as error:  # safetensors and tokenizers have their own error types for a full disk
        if (reason := _disk_fault(error)) is None:
            raise
        free = shutil.disk_usage(last.absolute().parent).free / 1e6
        raise UserError(
            f"{last}: could not be written: {reason} ({free:.0f} MB free in {last.absolute().parent}); nothing was changed. "
            "Free some space or choose another output path"
        ) from error
    finally:
        if temporary is not None:
            _remove(temporary, lock)


def clear_leftovers(folder: Path) -> None:
    """Delete what killed writes left beside their results, and restore a folder that one of them was replacing."""
    with suppress(OSError):  # a folder that cannot be read or written has other troubles, which the caller meets
        for temporary in folder.glob(f"{_ASIDE}*"):
            if (lock := _lock_of_the_dead(temporary)) is not None:
                for old in temporary.glob("*.old"):
                    _restore_or_delete(old, folder / old.stem)
                if not any(temporary.glob("*.old")):
                    _remove(temporary, lock)
                lock.release()
            elif not any(temporary.iterdir()) and time.time() - temporary.stat().st_mtime > _GRACE:
                temporary.rmdir()


def _temporary(parent: Path) -> tuple[Path, filelock.BaseFileLock | None]:
    """A new temporary folder and its lock. One whose lock another process took between its making and its locking, to delete it, is left to
    that process."""
    while True:
        temporary = Path(tempfile.mkdtemp(prefix=_ASIDE, dir=parent))
        try:
            lock = _locked(temporary)
        except filelock.Timeout:
            continue
        if lock is None or (temporary / _LOCK).exists():
            return temporary, lock
        lock.release()


def _locked(temporary: Path) -> filelock.BaseFileLock | None:
    """The lock of a temporary folder, taken; None on a disk without locks. `filelock.Timeout` where another process has it."""
    lock = filelock.FileLock(temporary / _LOCK, timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise
    except NotImplementedError:
        return None
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.EINVAL):
            raise
        return None
    return lock


def _lock_of_the_dead(temporary: Path) -> filelock.BaseFileLock | None:
    """The lock of a temporary folder whose process is gone, taken; None if the process lives, or the folder has no lock."""
    with suppress(filelock.Timeout):
        return _locked(temporary) if (temporary / _LOCK).is_file() else None
    return None


def _remove(temporary: Path, lock: filelock.BaseFileLock | None) -> None:
    """Delete a temporary folder, its lock last, so that a kill in between leaves what the next write deletes."""
    with suppress(OSError):
        for entry in temporary.iterdir():
            if entry.is_dir():
                shutil.rmtree(entry, ignore_errors=True)
            elif entry.name != _LOCK:
                entry.unlink()
    if lock is not None:
        lock.release()
    shutil.rmtree(temporary, ignore_errors=True)


def _restore_or_delete(old: Path, place: Path) -> None:
    """A folder that a killed write was replacing: restore it if the new one is missing; delete it if all of its files exist in the new one.
    Files of a user are kept."""
    if not place.exists():
        old.rename(place)
    elif all((place / entry.name).exists() for entry in old.iterdir()):
        shutil.rmtree(old, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write a small text file atomically.

    Raises:
        OSError: The file cannot be written; it is unchanged.
    """
    temporary = path.with_name(f".{path.name}.partial")
    try:
        temporary.write_text(text, encoding="utf-8", errors="replace", newline="\n")
        temporary.replace(path)
    finally:
        with suppress(OSError):  # the disk that failed the write fails this, too
            temporary.unlink(missing_ok=True)


def _flush(target: Path) -> None:
    """Flush to disk, so that the contents survive a power failure after the rename."""
    _sync(target)
    if target.is_dir():
        for entry in target.rglob("*"):
            _sync(entry)


def _sync(path: Path) -> None:
    """fsync a file, or the entries of a folder. Windows cannot sync a folder, and a file only through a handle that may write."""
    if _WINDOWS and path.is_dir():
        return
    handle = os.open(path, os.O_RDWR if _WINDOWS else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _put(new: Path, path: Path, is_ours: Callable[[Path], bool] | None) -> None:
    """Rename into place. An existing folder is moved away first, and its entries that are not replaced are moved to the new one. An
    existing folder with the same contents stays, so that it is never absent."""
    if is_ours is None or not path.is_dir():
        new.replace(path)
        return
    if _has_all_of(path, new, is_ours):
        return
    old = new.with_name(new.name + ".old")
    path.rename(old)
    try:
        new.rename(path)
    except BaseException:
        old.rename(path)
        raise
    for entry in old.iterdir():
        if (entry.is_dir() or not is_ours(entry)) and not (path / entry.name).exists():
            entry.rename(path / entry.name)


def _has_all_of(path: Path, new: Path, is_ours: Callable[[Path], bool]) -> bool:
    """Whether a folder has the same files as a new one, and no others that a save replaces."""
    names = [entry.name for entry in new.iterdir()]
    extra = [entry for entry in path.iterdir() if entry.is_file() and is_ours(entry) and entry.name not in names]
    return not extra and filecmp.cmpfiles(path, new, names, shallow=False)[0] == names


def _disk_fault(error: Exception) -> str | None:
    """The reason of a disk error; None for other errors."""
    cause: BaseException | None = error
    while cause is not None:
        in_words = re.search(r"os error (\d+)", str(cause))
        code = cause.errno if isinstance(cause, OSError) else int(in_words[1]) if in_words else None
        if code is not None:
            return "the disk is full" if code in _FULL else os.strerror(code)
        cause = cause.__context__  # torch raises its own error while it closes the file
    return "the disk is full" if "inline_container" in str(error) else None  # torch's writer, when given a path
