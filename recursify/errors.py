"""The one error that means "the input is wrong, not the program", and words for messages.

Its message names the place, what was expected, what was given, and how to mend it. A command prints it
as ``error: <message>`` on stderr and ends with status 2; from Python it is a ``ValueError``.
"""

from __future__ import annotations

import json
from typing import Any


class UserError(ValueError):
    """Bad input: a file, a flag, a dataset or a checkpoint that cannot be used as given."""


def first_line(error: Exception) -> str:
    """What an error says, as far as it goes into a message of ours."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def short(value: Any, most: int = 60) -> str:
    """A value as JSON, cut to what goes into a message of ours."""
    text = json.dumps(_beginning(value, most), default=str)
    return text if len(text) <= most else text[: most - 3] + "..."


def shown(value: Any, most: int = 200) -> str:
    """A value as Python writes it, cut to what goes into a message of ours."""
    text = repr(_beginning(value, most))
    return text if len(text) <= most else text[: most - 3] + "..."


def _beginning(value: Any, most: int) -> Any:
    """The value, or as much of it as fills `most` characters: it may be larger than memory (YAML refers to what it has said before), or
    contain itself, and Python refuses to write a number of more than 4300 digits."""
    left = most

    def begun(part: Any, depth: int) -> Any:
        nonlocal left
        left -= 1
        if isinstance(part, str | bytes):
            return part[: most + 1]
        if isinstance(part, int) and part.bit_length() > 4 * most:
            return hex(part)[: most + 1]
        if not isinstance(part, dict | list | tuple) or not part:
            return part
        if depth > most:
            return "..."
        if isinstance(part, dict):
            return {begun(key, depth): begun(inner, depth + 1) for key, inner in part.items() if left > 0}
        found = [begun(inner, depth + 1) for inner in part if left > 0]
        return tuple(found) if isinstance(part, tuple) else found

    return begun(value, 0)
