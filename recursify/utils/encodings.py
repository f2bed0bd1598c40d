"""Text files: UTF-8 is read, anything else is named, with a remedy that fits it.

Reading UTF-16 as a single-byte encoding succeeds and gives text full of NULs, so no encoding is guessed from the fact that it decodes.
"""

from __future__ import annotations

from pathlib import Path
from typing import TextIO

from ..errors import UserError

_HEAD = 2**16  # bytes that are looked at
_MARKS = (  # byte order marks; those of UTF-32 begin like those of UTF-16
    (b"\xff\xfe\x00\x00", "UTF-32LE"),
    (b"\x00\x00\xfe\xff", "UTF-32BE"),
    (b"\xff\xfe", "UTF-16LE"),
    (b"\xfe\xff", "UTF-16BE"),
)
_WESTERN = 0.25  # a file in a Western European single-byte encoding has at most this share of bytes beyond ASCII


def open_text(path: Path, newline: str | None = None) -> TextIO:
    """Open a UTF-8 file, with or without a byte order mark.

    Raises:
        UserError: The file begins as another encoding or as binary data does.
    """
    with path.open("rb") as file:
        head = file.read(_HEAD)
    if fault := _fault(head):
        raise UserError(f"{path}: expected UTF-8 text, {fault}{_remedy(path, head)}")
    return path.open(encoding="utf-8-sig", newline=newline)


def read_text(path: Path) -> str:
    """The contents of a UTF-8 file, with line ends as they are.

    Raises:
        UserError: Another encoding, or binary data.
        OSError: As `open`.
    """
    try:
        with open_text(path, newline="") as file:
            return file.read()
    except UnicodeDecodeError as error:
        raise not_utf8(path, error) from error


def not_utf8(path: Path, error: UnicodeDecodeError) -> UserError:
    """The error for a file that begins as UTF-8 and does not go on as such."""
    found = f"got the byte {error.object[error.start]:#04x} ({error.reason})"
    return UserError(f"{path}: expected UTF-8 text, {found}{_remedy(path, error.object)}")


def check_characters(text: str, place: str) -> None:
    """Raise a UserError for half of a character, as JSON may spell it (`"\\ud83d"`): it is no text, and cannot be tokenized."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"{place}: expected text, got {text[error.start]!a} at character {error.start}, half of a surrogate pair; replace or remove it"
        ) from error


def encoding_of(head: bytes) -> str | None:
    """UTF-16 or UTF-32, by a byte order mark or by where the zero bytes are; None for anything else."""
    for mark, name in _MARKS:
        if head.startswith(mark):
            return name
    head = head[: len(head) // 4 * 4]
    zero = [head[place::4].count(0) / max(1, len(head) // 4) for place in range(4)]
    if min(zero[2:]) > 0.9:
        return "UTF-32LE"
    if min(zero[:2]) > 0.9:
        return "UTF-32BE"
    little, big = zero[1] + zero[3], zero[0] + zero[2]
    if max(little, big) > 0.05 and min(little, big) < 0.1 * max(little, big):
        return "UTF-16LE" if little > big else "UTF-16BE"
    return None


def _fault(head: bytes) -> str | None:
    if name := encoding_of(head):
        return f"got {name}"
    return f"got a NUL at byte {head.index(0)}, as binary files have them" if 0 in head else None


def _remedy(path: Path, data: bytes) -> str:
    if name := encoding_of(data[:_HEAD]):
        return f"; convert it: iconv -f {name} -t UTF-8 {path} > NEW_FILE"
    if 0 in data[:_HEAD]:
        return "; name a text file"
    beyond = sum(byte > 127 for byte in data[:_HEAD])
    if beyond <= _WESTERN * len(data[:_HEAD]):
        return f"; if it is Western European text, convert it: iconv -f WINDOWS-1252 -t UTF-8 {path} > NEW_FILE"
    return f"; find out its encoding and convert it: iconv -f ITS_ENCODING -t UTF-8 {path} > NEW_FILE"
