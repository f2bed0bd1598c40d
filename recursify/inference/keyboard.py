"""Reading a line at a terminal: editing, history and completion from prompt_toolkit; plain `input` where there is no terminal."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path


def line_reader(commands: Callable[[], Iterable[str]]) -> Callable[[str], str]:
    """A replacement for `input` with line editing, a persistent history and completion of commands.

    Pasted text with line breaks stays one text. The history is a file that only the user can read; where it cannot be written, it lasts
    as long as the process.

    Args:
        commands: Returns the words to complete at the beginning of a line.

    Returns:
        `input` itself unless stdin and stdout are both a terminal.
    """
    if sys.stdin is None or not sys.stdin.isatty() or not sys.stdout.isatty():
        return input
    # Imported here: a tenth of a second that no other command has to pay.
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import WordCompleter
    from prompt_toolkit.history import FileHistory, History, InMemoryHistory

    class PrivateFileHistory(FileHistory):
        def store_string(self, string: str) -> None:
            with suppress(OSError):  # a full disk must not end the conversation
                super().store_string(string)

    file = history_file()
    history: History = PrivateFileHistory(str(file)) if _make_private(file) else InMemoryHistory()
    completer = WordCompleter(lambda: list(commands()), sentence=True)
    session: PromptSession[str] = PromptSession(history=history, completer=completer, complete_while_typing=False)
    return session.prompt


def history_file() -> Path:
    """Path of the history: below XDG_STATE_HOME, or its default ~/.local/state."""
    state = os.environ.get("XDG_STATE_HOME")
    return (Path(state) if state and Path(state).is_absolute() else Path.home() / ".local" / "state") / "recursify" / "history"


def _make_private(file: Path) -> bool:
    """Create the file with mode 600 if it is absent; False where it cannot be read and written."""
    try:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        file.touch(mode=0o600)
        file.chmod(0o600)
        return os.access(file, os.R_OK | os.W_OK)
    except OSError:
        return False
