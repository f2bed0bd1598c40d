"""Files and folders written aside and renamed into place: what is there is whole."""

from __future__ import annotations

import errno
import filecmp
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..errors import UserError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def write_whole(
    writers: Mapping[Path, Callable[[Path], Any]],
    folders: Mapping[Path, Callable[[Path], bool]] | None = None,
    approve: Callable[[], Any] = lambda: None,
) -> None:
    """Write files and folders side by side in one folder, all or none.

    Args:
        writers: Path -> what writes it, on a fresh path. When all have succeeded, the results are put in their places, in this order.
        folders: Those of the paths that are folders, which are there and empty when their writers are called; each with what tells the
            entries of an older folder that the new one replaces from those that are somebody's, and stay.
        approve: Called when all is written, and before anything is where it belongs: what it raises leaves everything as it was.

    Raises:
        UserError: The disk is full, or the folder cannot be written; what was there is as it was.
    """
    folders = folders or {}
    last = [*writers][-1]
    aside = None
    try:
        aside = Path(tempfile.mkdtemp(prefix=".recursify-", dir=last.absolute().parent))
        for path, write in writers.items():
            target = aside / path.name
            if path in folders:
                target.mkdir()
            write(target)
            _flush(target)
        approve()
        for path in writers:
            _put(aside / path.name, path, folders.get(path))
        _sync(last.absolute().parent)
    except UserError:
        raise
    except Exception as error:  # safetensors and tokenizers report a full disk with errors of their own
        if (reason := _disk_fault(error)) is None:
            raise
        free = shutil.disk_usage(last.absolute().parent).free / 1e6
        raise UserError(
            f"{last}: could not be written: {reason} ({free:.0f} MB free in {last.absolute().parent}); nothing was changed. "
            "Free some space or choose another output path"
        ) from error
    finally:
        if aside is not None:
            shutil.rmtree(aside, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write a small text file, whole or not at all.

    Raises:
        OSError: It cannot be written; what was there is as it was.
    """
    aside = path.with_name(f".{path.name}.partial")
    try:
        aside.write_text(text, encoding="utf-8", errors="replace", newline="\n")
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def _flush(target: Path) -> None:
    """To the disk, so that a power cut after the rename finds contents behind the name."""
    _sync(target)
    if target.is_dir():
        for entry in target.rglob("*"):
            _sync(entry)


def _sync(path: Path) -> None:
    """A file's contents, or the names in a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _put(new: Path, path: Path, is_ours: Callable[[Path], bool] | None) -> None:
    """Rename into place. A folder that is there makes way first, and hands over what no save of ours would have written; one that has all
    of the new one already stays, so that there is no moment without it."""
    if is_ours is None or not path.is_dir():
        new.rename(path)
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
    """Whether a folder of files holds the same ones as a new one, and of ours no others."""
    names = [entry.name for entry in new.iterdir()]
    extra = [entry for entry in path.iterdir() if entry.is_file() and is_ours(entry) and entry.name not in names]
    return not extra and filecmp.cmpfiles(path, new, names, shallow=False)[0] == names


def _disk_fault(error: Exception) -> str | None:
    """Why the disk did not take it; None where the disk is not to blame."""
    cause: BaseException | None = error
    while cause is not None:
        in_words = re.search(r"os error (\d+)", str(cause))
        code = cause.errno if isinstance(cause, OSError) else int(in_words[1]) if in_words else None
        if code is not None:
            return "the disk is full" if code in _FULL else os.strerror(code)
        cause = cause.__context__  # torch raises an error of its own while it closes the file
    return "the disk is full" if "inline_container" in str(error) else None  # torch's writer, when it was given a path
