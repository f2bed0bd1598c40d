"""What the package says while it works goes through loggers under `recursify`; a command shows it on stderr, a program decides for itself.

logging.getLogger("recursify").setLevel(logging.WARNING)     # from Python: less of it
log_to_stderr()                                              # what every command does first
"""

from __future__ import annotations

import logging
import sys
from typing import TextIO


class _ToStderr(logging.StreamHandler[TextIO]):
    """Writes to what `sys.stderr` is when a message comes, not to what it was when the handler was made."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        return sys.stderr


_HANDLER = _ToStderr()


def log_to_stderr(level: int = logging.INFO) -> None:
    """Show messages of this level and above on stderr, one line each and nothing before it; calling it again changes the level only."""
    logger = logging.getLogger("recursify")
    if _HANDLER not in logger.handlers:
        logger.addHandler(_HANDLER)
    logger.setLevel(level)
    logger.propagate = False  # a handler of the root, which some libraries install, would print every line twice
