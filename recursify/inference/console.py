"""The interactive console: a line is a prompt, a line that begins with a slash is a command, Ctrl-C stops the answer.

    a line that ends in a backslash     continues on the next line
    three double quotes                 begin and end a multi-line prompt, in which no line is a command

Answers and replies to commands go to stdout, everything else to stderr. Line editing and history: `keyboard.py`.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, TextIO, get_type_hints

import torch
from transformers import PreTrainedTokenizerBase

from ..errors import UserError
from ..utils.models import is_recursive
from ..utils.typed import typed
from . import transcript
from .keyboard import line_reader
from .options import Sampling
from .settings import WriteSettings
from .transcript import Message

_QUOTES = '"""'
# command -> (setting, type, help)
_VALUES: dict[str, tuple[str, type, str]] = {
    "/temp": ("temperature", float, "sampling temperature; 0 is greedy"),
    "/max": ("max_new_tokens", int, "maximum number of new tokens"),
    "/cycles": ("H_cycles", int, "cycles per token; 0 is one plain pass"),
}


@dataclass(frozen=True)
class Command:
    """A slash command.

    Args:
        argument: Placeholder of the argument in /help.
        about: Its line in /help.
        execute: Takes the argument and returns the reply.
    """

    argument: str
    about: str
    execute: Callable[[str], str]


class Console:
    """Reads prompts and commands until `/quit` or the end of the input. Subclasses define the answer and may add commands.

    Args:
        read_line: Prints its argument and returns one line; EOFError ends the session, KeyboardInterrupt drops the line. None reads the
            terminal or stdin.
        out, err: Streams for answers and for errors; None is stdout and stderr.
    """

    input_prompt = "Prompt: "

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        settings: Any,
        read_line: Callable[[str], str] | None = None,
        out: TextIO | None = None,
        err: TextIO | None = None,
    ):
        self.model, self.tokenizer = model, tokenizer
        self.settings: WriteSettings = settings
        self.read_line, self.out, self.err = read_line or line_reader(self._completions), out or sys.stdout, err or sys.stderr
        self.messages: list[Message] = []

    def answer(self, text: str, pressed: threading.Event) -> None:
        """Write the answer to `out`; stop soon after Ctrl-C has set the event."""
        raise NotImplementedError

    def greet(self) -> None:
        """Print a short introduction to `err`."""
        raise NotImplementedError

    def say_goodbye(self) -> None:
        """Print a closing line."""
        self.say("Goodbye!")

    def commands(self) -> dict[str, Command]:
        """Name -> command, in the order of /help."""
        values = {
            name: Command("X" if kind is float else "N", f"{about} (now {self._now(field)})", partial(self._set, name))
            for name, (field, kind, about) in _VALUES.items()
        }
        shown = f"table of cycles after each answer (now {_switch(self.settings.show_recursive_steps)})"
        return values | {
            "/show": Command("on|off", shown, self._show),
            "/save": Command("FILE", "save the conversation", self._save),
            "/load": Command("FILE", "continue a saved conversation", self._load),
            "/help": Command("", "this list", lambda _: self._help()),
        }

    def _completions(self) -> list[str]:
        return [*self.commands(), "/quit"]

    def run(self) -> None:
        """The read loop. The seed applies once, to the session as a whole."""
        if self.settings.seed is not None:
            torch.manual_seed(self.settings.seed)
        self.greet()
        while True:
            try:
                text, literal = read_text(self.read_line, self.input_prompt)
                if text.strip() == "/quit" and not literal:
                    break
                self.handle(text, literal)
            except EOFError:
                self.say("", self.out if self.input_prompt else self.err)
                break
            except KeyboardInterrupt:
                self.say("\n(/quit or Ctrl-D ends)", self.err)
        self.say_goodbye()

    def handle(self, text: str, literal: bool = False) -> None:
        """Execute a command, or answer a prompt. An error in one line does not end the session.

        Args:
            literal: Never treat the text as a command.
        """
        try:
            if text.startswith("/") and not text.startswith("//") and not literal:
                self.say(self._command(text))
            elif text.strip():
                with ctrl_c() as pressed:
                    self.answer(text[1:] if text.startswith("//") and not literal else text, pressed)
                if pressed.is_set():
                    self.say("(stopped)", self.err)
                self.say("")
        except KeyboardInterrupt:
            self.say("(stopped)\n", self.err)
        except BrokenPipeError:  # stdout was closed
            raise
        except UserError as error:
            self.say(f"error: {error}", self.err)
        except Exception as error:  # such as out of memory: the next prompt may succeed
            if os.environ.get("RECURSIFY_DEBUG") == "1":
                traceback.print_exc(file=self.err)
            self.say(f"error: {type(error).__name__}: {error}", self.err)

    def say(self, text: str, where: TextIO | None = None) -> None:
        print(text, file=where or self.out, flush=True)

    def change(self, **values: Any) -> None:
        """Change settings, all of them or none.

        Raises:
            UserError: A value out of range, or one that the model does not support.
        """
        changed = replace(self.settings, **values)
        changed.sampling.validate()
        changed.sampling.generate_kwargs(self.model)
        self.settings = changed

    def _command(self, line: str) -> str:
        """Execute a command line and return the reply."""
        name, _, rest = line.strip().partition(" ")
        commands = self.commands()
        if name not in commands:
            raise UserError(f"unknown command {name}; /help lists the commands, and /{line.strip()} sends {line.strip()!r} as a prompt")
        return commands[name].execute(rest.strip())

    def _set(self, name: str, value: str) -> str:
        field, kind, _ = _VALUES[name]
        if value:
            try:
                number = kind(value)
            except ValueError:
                expected = "a whole number" if kind is int else "a number"
                raise UserError(f"{name}: expected {expected}, got {value!r}") from None
            if field == "H_cycles" and not is_recursive(self.model):
                raise UserError(f"{name}: expected a recursive model, got a {type(self.model).__name__}, which has no cycles")
            try:
                self.change(**{field: number})
            except UserError as error:
                raise UserError(str(error).replace(f"--{field}", name)) from None
        return f"{field} {self._now(field)}"

    def _show(self, value: str) -> str:
        if value not in ("", "on", "off"):
            raise UserError(f"/show: expected on or off, got {value!r}")
        if value == "on" and not is_recursive(self.model):
            raise UserError(f"/show: expected a recursive model, got a {type(self.model).__name__}, which has no cycles")
        if value:
            self.change(show_recursive_steps=value == "on")
        return f"show_recursive_steps {_switch(self.settings.show_recursive_steps)}"

    def _save(self, file: str) -> str:
        if not file:
            raise UserError("/save: expected a file name, got none")
        kept = {field.name: getattr(self.settings, field.name) for field in fields(Sampling)}
        place = transcript.save(file, self.messages, kept | {"show_recursive_steps": self.settings.show_recursive_steps})
        return f"saved {_count(self.messages)} to {place}"

    def _load(self, file: str) -> str:
        if not file:
            raise UserError("/load: expected the name of a file written by /save, got none")
        messages, values = transcript.load(file)
        self.change(**_settings_of(file, values))
        self.messages = messages
        return f"loaded {_count(messages)} from {file}"

    def _now(self, field: str) -> Any:
        value = getattr(self.settings, field)
        return getattr(self.model.config, field, None) if value is None else value

    def _help(self) -> str:
        rows = [(f"{name} {command.argument}", command.about) for name, command in self.commands().items()]
        rows += [
            ("/quit", "end; so does Ctrl-D"),
            ("//text", "send a prompt that begins with a slash: /text"),
            (_QUOTES, "begins and ends a multi-line prompt; so does \\ at the end of a line"),
            ("Ctrl-C", "stop the answer"),
        ]
        return "\n".join(f"{command:<14}{about}" for command, about in rows)


def read_text(read_line: Callable[[str], str], input_prompt: str) -> tuple[str, bool]:
    """The next prompt, of one or several lines, and whether it was quoted and so cannot be a command.

    The end of the input ends an unfinished prompt; before its first line it raises EOFError.
    """
    line = read_line(input_prompt)
    more = "... " if input_prompt else ""
    opened = line.lstrip().startswith(_QUOTES)
    lines = [line.lstrip().removeprefix(_QUOTES)] if opened else [line]
    try:
        if opened:
            while not lines[-1].rstrip().endswith(_QUOTES):
                lines.append(read_line(more))
            lines[-1] = lines[-1].rstrip().removesuffix(_QUOTES)
        else:
            while lines[-1].endswith("\\"):
                lines[-1] = lines[-1][:-1]
                lines.append(read_line(more))
    except EOFError:
        pass
    if opened:  # quotes on lines of their own add no empty lines
        lines = lines[1:] if not lines[0].strip() else lines
        lines = lines[:-1] if lines and not lines[-1].strip() else lines
    return "\n".join(lines), opened


@contextmanager
def ctrl_c() -> Iterator[threading.Event]:
    """The first Ctrl-C sets the event, which stops generation after the current token; a second one raises KeyboardInterrupt."""
    pressed = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # signal handlers need the main thread
        yield pressed
        return
    before = signal.getsignal(signal.SIGINT) or signal.default_int_handler

    def first(*_: Any) -> None:
        pressed.set()
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, first)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)


def _settings_of(file: str, values: dict[str, Any]) -> dict[str, Any]:
    """The settings of a saved conversation, checked and converted to their types."""
    hints = {name: hint for name, hint in get_type_hints(WriteSettings).items() if name in {field.name for field in fields(Sampling)}}
    hints["show_recursive_steps"] = bool
    for name, value in values.items():
        if name not in hints:
            raise UserError(f"{file}: settings: {name} is none that a conversation has; they are {', '.join(hints)}")
        try:
            values[name] = typed(value, hints[name])
        except TypeError as error:
            raise UserError(f"{file}: settings: {name}: expected {error}, got {value!r}") from None
    return values


def _count(messages: list[Message]) -> str:
    return "1 message" if len(messages) == 1 else f"{len(messages)} messages"


def _switch(value: bool) -> str:
    return "on" if value else "off"
