"""Lines, blocks and history: as they are read, and once at a real terminal."""

from __future__ import annotations

import codecs
import os
import re
import select
import stat
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from recursify.inference.console import read_text
from recursify.inference.keyboard import history_file

LOBSTER = '"""'


def reading(*lines: str | type[BaseException]) -> tuple[Callable[[str], str], list[str]]:
    """An input of these lines and then end of file, and the prompts shown."""
    left: Iterator[str | type[BaseException]] = iter(lines)
    asked: list[str] = []

    def ask(input_prompt: str) -> str:
        asked.append(input_prompt)
        line = next(left, EOFError)
        if isinstance(line, str):
            return line
        raise line

    return ask, asked


@pytest.mark.parametrize(
    ("lines", "text", "literal"),
    [
        (["one"], "one", False),
        (["/max 3"], "/max 3", False),
        (["one\\", "two\\", " three"], "one\ntwo\n three", False),
        (["one\\"], "one", False),  # the input ends
        ([LOBSTER, "/one", "", "two", LOBSTER], "/one\n\ntwo", True),
        ([f"{LOBSTER}one", f"two{LOBSTER}"], "one\ntwo", True),
        ([f"{LOBSTER}one{LOBSTER}"], "one", True),
        ([f"  {LOBSTER}", "  one", f"  {LOBSTER} "], "  one", True),
        ([LOBSTER, "one\\", LOBSTER], "one\\", True),
        ([LOBSTER, "one"], "one", True),  # the input ends
        ([LOBSTER, LOBSTER], "", True),
    ],
)
def test_texts_of_several_lines(lines: list[str], text: str, literal: bool) -> None:
    ask, asked = reading(*lines)
    assert read_text(ask, "You: ") == (text, literal)
    assert asked == ["You: ", *["... "] * (len(asked) - 1)]


def test_no_continuation_prompt_from_a_pipe() -> None:
    ask, asked = reading("one\\", "two")
    read_text(ask, "")
    assert asked == ["", ""]


@pytest.mark.parametrize("stop", [EOFError, KeyboardInterrupt])
def test_eof_and_ctrl_c_at_an_empty_line_are_raised(stop: type[BaseException]) -> None:
    with pytest.raises(stop):
        read_text(reading(stop)[0], "You: ")


def test_ctrl_c_drops_a_text_of_several_lines() -> None:
    with pytest.raises(KeyboardInterrupt):
        read_text(reading(LOBSTER, "one", KeyboardInterrupt)[0], "You: ")


def test_history_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert history_file() == tmp_path / "recursify" / "history"
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for unusable in ("", "relative/folder"):
        monkeypatch.setenv("XDG_STATE_HOME", unusable)
        assert history_file() == tmp_path / "home" / ".local" / "state" / "recursify" / "history"


# An answer repeats the input, or, to "slow", continues until Ctrl-C. Three sessions one after the other, the last of which cannot keep
# its lines.
SESSIONS = """
import os, time
from types import SimpleNamespace
from recursify.inference.console import Console
from recursify.inference.settings import GenerateSettings

class Echo(Console):
    input_prompt = "Say: "
    def greet(self): self.say("ready", self.err)
    def answer(self, text, pressed):
        self.out.write("heard " + repr(text)); self.out.flush()
        while text == "slow" and not pressed.is_set(): time.sleep(0.01)
        self.say("")

for session in range(3):
    if session == 2:
        os.environ["XDG_STATE_HOME"] = "/dev/null/nowhere"
    Echo(SimpleNamespace(config=None), None, GenerateSettings(checkpoint="x")).run()
"""


class Terminal:
    """A program at a terminal of its own."""

    def __init__(self, script: str, environment: dict[str, str]):
        import pty

        self.process, self.end = pty.fork()
        if self.process == 0:
            os.environ.update(environment)
            os.execv(sys.executable, [sys.executable, "-c", script])
        self.bytes = codecs.getincrementaldecoder("utf-8")()
        self.shown = ""

    def wait_for(self, text: str, seconds: float = 60) -> str:
        """The output up to this text, which is consumed."""
        limit = time.monotonic() + seconds
        while text not in self.shown:
            assert time.monotonic() < limit, f"waited for {text!r}, got {self.shown!r}"
            if select.select([self.end], [], [], 0.1)[0]:
                self.shown = re.sub(r"\x1b\[[?\d;]*[A-Za-z]", "", self.shown + self.bytes.decode(os.read(self.end, 65536)))
        before, _, self.shown = self.shown.partition(text)
        return before

    def type(self, text: str) -> None:
        os.write(self.end, text.encode())

    def close(self) -> int:
        status = os.waitstatus_to_exitcode(os.waitpid(self.process, 0)[1])
        os.close(self.end)
        return status


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_at_a_real_terminal(tmp_path: Path) -> None:
    up, ctrl_c = "\x1b[A", "\x03"
    environment = {
        "XDG_STATE_HOME": str(tmp_path / "state"),
        "TERM": "xterm",
        "PROMPT_TOOLKIT_NO_CPR": "1",  # no terminal answers cursor queries here
        "LC_ALL": "C.UTF-8",
        "PYTHONPATH": str(Path(__file__).resolve().parents[2]),
    }
    terminal = Terminal(textwrap.dedent(SESSIONS), environment)
    for text, answer in (("龙虾 🦞\r", "heard '龙虾 🦞'"), (up + "\r", "heard '龙虾 🦞'"), ('"""\r/one\rtwo\r"""\r', r"heard '/one\ntwo'")):
        terminal.wait_for("Say:")
        terminal.type(text)
        terminal.wait_for(answer)
    terminal.wait_for("Say:")
    terminal.type("slow\r")
    terminal.wait_for("heard 'slow'")
    terminal.type(ctrl_c)
    terminal.wait_for("(stopped)")
    for _ in range(2):  # at the prompt it prints how to quit, each time
        terminal.wait_for("Say:")
        terminal.type("unfinished")
        terminal.wait_for("unfinished")
        terminal.type(ctrl_c)
        terminal.wait_for("(/quit or Ctrl-D ends)")
    terminal.wait_for("Say:")
    terminal.type("/te\t")
    terminal.wait_for("mp")
    terminal.type("\r")
    terminal.wait_for("temperature 0.8")
    terminal.wait_for("Say:")
    terminal.type("\x1b[200~pasted\rin two lines\x1b[201~")
    terminal.wait_for("two lines")
    terminal.type("\r")
    terminal.wait_for(r"heard 'pasted\nin two lines'")
    terminal.wait_for("Say:")
    terminal.type("/quit\r")
    terminal.wait_for("Goodbye!")
    # the next session has the lines of the last one, and ends with Ctrl-D
    terminal.wait_for("Say:")
    file = tmp_path / "state" / "recursify" / "history"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600 and stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    terminal.type(f"{up * 5}\r")  # past /quit, the two pasted lines and /temp
    terminal.wait_for("heard 'slow'")
    terminal.type(ctrl_c)
    terminal.wait_for("Say:")
    terminal.type("\x04")
    terminal.wait_for("Goodbye!")
    # and no message where none can be kept
    terminal.wait_for("Say:")
    terminal.type("/quit\r")
    assert "rror" not in terminal.wait_for("Goodbye!")
    assert terminal.close() == 0
