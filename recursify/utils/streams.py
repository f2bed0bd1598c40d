"""Output streams of terminals that cannot show every character."""

from __future__ import annotations

import io
from typing import Any


def replace_unencodable(stream: Any) -> None:
    """Make a stream print ? for characters outside its encoding instead of raising; other streams than text files are left alone."""
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="replace")
