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
    text = json.dumps(value, default=str)
    return text if len(text) <= most else text[: most - 3] + "..."
