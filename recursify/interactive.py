"""Prompt after prompt at the keyboard: a line is a text to continue, a line that begins with a slash is a command.

Prompts, answers and replies to commands go to stdout, everything else to stderr. Floor 3.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any, TextIO

import torch
from transformers import PreTrainedTokenizerBase

from .errors import UserError
from .generation import GenerateSettings, forgiving, is_recursive, load, write_once

# command -> (setting, type, what /help says)
_VALUES: dict[str, tuple[str, type, str]] = {
    "/temp": ("temperature", float, "randomness; 0 always takes the likeliest token"),
    "/max": ("max_new_tokens", int, "write at most so many tokens"),
    "/cycles": ("H_cycles", int, "cycles per token; 0 is one plain pass"),
}


def run(settings: GenerateSettings) -> None:
    """Ask for prompts at the terminal and continue them, until the user has enough.

    Raises:
        UserError: A setting out of range; a checkpoint or tokenizer that cannot be read.
    """
    model, tokenizer = load(settings)
    forgiving(sys.stdout)
    with suppress(ImportError):
        importlib.import_module("readline")  # importing it gives `input` its history and line editing
    Conversation(model, tokenizer, settings).run()


class Conversation:
    """Prompts and commands, until `/quit` or the end of the input.

    Args:
        ask: Shows its argument and returns one line; EOFError ends the conversation, KeyboardInterrupt drops the line.
        out, err: Where answers and errors go; None is stdout and stderr.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        settings: GenerateSettings,
        ask: Callable[[str], str] = input,
        out: TextIO | None = None,
        err: TextIO | None = None,
    ):
        self.model, self.tokenizer, self.settings = model, tokenizer, settings
        self.ask, self.out, self.err = ask, out or sys.stdout, err or sys.stderr

    def run(self) -> None:
        """The loop. The seed counts for the conversation as a whole."""
        if self.settings.seed is not None:
            torch.manual_seed(self.settings.seed)
        self._say("Type a prompt to continue. /help lists the commands.\n", self.err)
        while True:
            try:
                line = self.ask("Prompt: ")
            except EOFError:
                self._say("")
                break
            except KeyboardInterrupt:
                self._say("\n(/quit or Ctrl-D ends)", self.err)
                continue
            if line.strip() == "/quit":
                break
            self.handle(line)
        self._say("Goodbye!")

    def handle(self, line: str) -> None:
        """Obey a command, or answer a prompt. No error of one line ends the conversation."""
        try:
            if line.startswith("/") and not line.startswith("//"):
                self._say(self._command(line))
            elif line.strip():
                self._answer(line[1:] if line.startswith("//") else line)
                self._say("")
        except KeyboardInterrupt:
            self._say("(stopped)\n", self.err)
        except BrokenPipeError:  # nobody reads any more
            raise
        except UserError as error:
            self._say(f"error: {error}", self.err)
        except Exception as error:  # out of memory, say: shown in full, and the next prompt may fare better
            if os.environ.get("RECURSIFY_DEBUG") == "1":
                traceback.print_exc(file=self.err)
            self._say(f"error: {type(error).__name__}: {error}", self.err)

    def _answer(self, prompt: str) -> None:
        self._say("Generating...")
        with _ctrl_c() as pressed:
            generated = write_once(self.model, self.tokenizer, prompt, self.settings, self.out, should_stop=pressed.is_set)
        if generated.finish_reason == "interrupted":
            self._say("(stopped)", self.err)

    def _command(self, line: str) -> str:
        """Obey, and return what to say."""
        name, _, value = line.strip().partition(" ")
        if name == "/help":
            return self._help()
        if name not in _VALUES:
            raise UserError(f"unknown command {name}; /help lists the commands, and /{line.strip()} sends {line.strip()!r} as a prompt")
        field, kind, _ = _VALUES[name]
        if value.strip():
            self.settings = self._changed(name, field, kind, value.strip())
        return f"{field} {self._now(field)}"

    def _changed(self, name: str, field: str, kind: type, value: str) -> GenerateSettings:
        try:
            number = kind(value)
        except ValueError:
            expected = "a whole number" if kind is int else "a number"
            raise UserError(f"{name}: expected {expected}, got {value!r}") from None
        if field == "H_cycles" and not is_recursive(self.model):
            raise UserError(f"{name}: expected a recursive model, got a {type(self.model).__name__}, which has no cycles")
        changed = replace(self.settings, **{field: number})
        try:
            changed.sampling.check()
        except UserError as error:
            raise UserError(str(error).replace(f"--{field}", name)) from None
        return changed

    def _now(self, field: str) -> Any:
        value = getattr(self.settings, field)
        return getattr(self.model.config, field, None) if value is None else value

    def _help(self) -> str:
        rows = [
            *((f"{name} {'X' if kind is float else 'N'}", f"{text} (now {self._now(key)})") for name, (key, kind, text) in _VALUES.items()),
            ("/help", "this list"),
            ("/quit", "end; so does Ctrl-D"),
            ("//text", "send a prompt that begins with a slash: /text"),
            ("Ctrl-C", "stop the answer"),
        ]
        return "\n".join(f"{command:<10}{text}" for command, text in rows)

    def _say(self, text: str, where: TextIO | None = None) -> None:
        print(text, file=where or self.out, flush=True)


@contextmanager
def _ctrl_c() -> Iterator[threading.Event]:
    """Ctrl-C sets the event, which ends the text after the token at hand; a second one interrupts at once."""
    pressed = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # only there can a signal be caught
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
