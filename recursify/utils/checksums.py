"""Checksums of some files, in a file that `sha256sum --check` reads."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from .files import sha256

NAME = "SHA256SUMS"


def write_sums(folder: Path, files: Iterable[Path]) -> None:
    """Write SHA256SUMS into a folder, with the files' paths as they are from there."""
    lines = [f"{sha256(file)}  {Path(os.path.relpath(file, folder)).as_posix()}\n" for file in sorted(files)]
    (folder / NAME).write_text("".join(lines), encoding="utf-8")


def first_damaged(folder: Path) -> Path | None:
    """A file that is not as SHA256SUMS of a folder says, or is not there; SHA256SUMS itself if it cannot be read. None if all are well, or
    the folder has no checksums."""
    sums = folder / NAME
    try:
        lines = sums.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        return sums
    for line in lines:
        digest, _, name = line.partition("  ")
        try:
            if not name or sha256(folder / name) != digest:
                return Path(os.path.normpath(folder / name)) if name else sums
        except (OSError, ValueError):
            return Path(os.path.normpath(folder / name)) if name.isprintable() else sums
    return None
