"""Atomic writing on Windows, and beside another writer. (What a kill or a full disk leaves is tested with checkpoints and trainings.)"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import filelock
import pytest

from recursify.utils import atomic


def test_as_windows_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders cannot be opened, only handles that may write be synced, and renaming never replaces."""
    own_open, own_rename, own_fsync = os.open, Path.rename, os.fsync
    handles: dict[int, int] = {}

    def opened(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        if os.path.isdir(path) and not kwargs:
            raise PermissionError(13, "Permission denied")
        handle = own_open(path, flags, *args, **kwargs)
        handles[handle] = flags
        return handle

    def synced(handle: int) -> None:
        if not handles[handle] & os.O_RDWR:
            raise OSError(9, "Bad file descriptor")
        own_fsync(handle)

    def renamed(self: Path, target: Any) -> Path:
        if os.path.lexists(target):
            raise FileExistsError(17, "File exists")
        return own_rename(self, target)

    monkeypatch.setattr(atomic, "_WINDOWS", True)
    monkeypatch.setattr(os, "open", opened)
    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "rename", renamed)
    for text in ("one", "two"):
        folder = tmp_path / "folder"
        atomic.write_atomic(
            {
                tmp_path / "file.pt": lambda target, text=text: target.write_text(text),
                folder: lambda target, text=text: (target / "part.json").write_text(text),
            },
            folders={folder: lambda entry: entry.suffix == ".json"},
        )
        assert ((tmp_path / "file.pt").read_text(), (folder / "part.json").read_text()) == (text, text)
    assert handles and sorted(path.name for path in tmp_path.iterdir()) == ["file.pt", "folder"]


@pytest.mark.parametrize("moment", ["before it is locked", "while it is deleted"])
def test_a_folder_that_another_writer_takes_for_a_leftover(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    """Between the making of a lock file and its locking a temporary folder looks like that of a killed process."""
    own, first = atomic._locked, []

    def locked(temporary: Path) -> Any:
        if first:
            return own(temporary)
        first.append(temporary)
        (temporary / atomic._LOCK).touch()
        if moment == "before it is locked":
            atomic.clear_leftovers(tmp_path)
            assert not temporary.exists()
            return own(temporary)
        other = own(temporary)  # of the writer that deletes it
        assert other is not None
        with pytest.raises(filelock.Timeout):
            own(temporary)
        atomic._remove(temporary, other)
        raise filelock.Timeout(str(temporary))

    monkeypatch.setattr(atomic, "_locked", locked)
    atomic.write_atomic({tmp_path / "file.txt": lambda target: target.write_text("whole")})
    assert first and [path.name for path in tmp_path.iterdir()] == ["file.txt"]
    assert (tmp_path / "file.txt").read_text() == "whole"
