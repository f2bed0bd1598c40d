"""Read small files, and hash large ones."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from ..errors import UserError, first_line, short


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: Not JSON, or nested more deeply or with a longer number than Python reads.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        UserError: The file is not a JSON object.
    """
    try:
        fields = parse_json(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UserError(f"{path}: is not JSON ({first_line(error)}); download or copy it again") from error
    if not isinstance(fields, dict):
        raise UserError(f"{path}: expected a JSON object, got {short(fields)}; download or copy it again")
    return fields


def sha256(path: Path) -> str:
    """The SHA-256 of a file's contents, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
