"""Chat in turns; a turn prefills only what is new."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ..errors import UserError
from .chat_prompt import Dialogue
from .console import Command, Console
from .generation import Generated, generate_text
from .prefix_cache import PrefixCache
from .session import calibrated, load, print_stats
from .settings import ChatSettings
from .transcript import Message


def run(settings: ChatSettings) -> None:
    """Chat at the terminal. From a pipe, every line is a turn, and stdout has only the answers.

    Raises:
        UserError: A setting out of range; a checkpoint or tokenizer that cannot be read.
    """
    model, tokenizer = load(settings)
    settings = calibrated(settings, model, tokenizer)
    Chat(model, tokenizer, settings, input_prompt="You: " if sys.stdin.isatty() else "").run()


class Chat(Console):
    """A conversation with a model.

    Args:
        input_prompt: Printed before each turn; "" when reading from a pipe.
        args, kwargs: As `Console`.
    """

    def __init__(self, *args: Any, input_prompt: str = "You: ", **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.input_prompt = input_prompt
        self.dialogue = Dialogue(self.tokenizer)
        self.memory = PrefixCache()
        system = getattr(self.settings, "system", None)
        self.messages: list[Message] = [{"role": "system", "content": system}] if system else []

    def greet(self) -> None:
        self.say("Type a message. /help lists the commands.", self.err)
        if not self.dialogue.has_template:
            self.say("The tokenizer has no chat template, so turns are given to the model as plain lines, User: and Assistant:.", self.err)
        self.say("", self.err)

    def say_goodbye(self) -> None:
        self.say("Goodbye!", self.err)

    def commands(self) -> dict[str, Command]:
        found = super().commands()
        cycles = found["/cycles"]
        found["/cycles"] = replace(cycles, execute=lambda value: self._set_depth(cycles.execute, value))
        found["/system"] = Command("TEXT", "system message", self._system)
        found["/reset"] = Command("", "forget the conversation", lambda _: self._reset())
        return found

    def answer(self, text: str, pressed: threading.Event) -> None:
        """Answer, and append both messages to the conversation, even if a second Ctrl-C interrupted the answer."""
        asked: Message = {"role": "user", "content": text}
        ids, room = self._fitting(asked)
        sampling = self.settings.sampling
        sampling = replace(
            sampling, max_new_tokens=min(sampling.max_new_tokens, room), stop=(*sampling.stop, *self.dialogue.stop)
        )  # fmt: skip
        pieces: list[str] = []
        try:
            generated = generate_text(
                self.model, self.tokenizer, ids, sampling, on_text=self._writer(pieces), should_stop=pressed.is_set,
                memory=self.memory, ends=self.dialogue.ends,
            )  # fmt: skip
        finally:
            if pieces:
                self.say("")
            answer = self.dialogue.answer_text("".join(pieces))
            if answer:
                self.messages += [asked, {"role": "assistant", "content": answer}]
        if not answer:
            self.say("(no answer; your message was dropped)", self.err)
        self._after(generated, cut=room < self.settings.max_new_tokens)

    def _after(self, generated: Generated, cut: bool) -> None:
        print_stats(self.model, self.tokenizer, generated, self.settings, self.out, self.err)
        if cut and generated.finish_reason == "length":
            self.say("(the conversation has filled the model's positions; /reset begins a new one)", self.err)
        elif generated.finish_reason == "length":
            self.say(f"(cut after {self.settings.max_new_tokens} tokens; /max sets another limit)", self.err)

    def _writer(self, pieces: list[str]) -> Callable[[str], None]:
        """A callback that prints each piece, without the leading white space of an answer in the plain format, and collects it."""

        def show(piece: str) -> None:
            begun = self.dialogue.has_template or "".join(pieces).strip()
            pieces.append(piece)
            self.out.write(piece if begun else piece.lstrip())
            self.out.flush()

        return show

    def _fitting(self, asked: Message) -> tuple[list[int], int]:
        """The prompt of the next turn and how many new tokens fit behind it; `forget_oldest` drops turns until they do.

        Raises:
            UserError: The conversation exceeds the model's context.
        """
        positions = getattr(self.model.config, "max_position_embeddings", None)
        ids = self.dialogue.prompt([*self.messages, asked])
        if positions is None:
            return ids, self.settings.max_new_tokens
        if getattr(self.settings, "forget_oldest", False):
            wanted = min(self.settings.max_new_tokens, positions // 2)
            while len(ids) + wanted > positions and self._drop_oldest():
                ids = self.dialogue.prompt([*self.messages, asked])
        if len(ids) >= positions:
            have = f"the conversation has {len(ids)} tokens, and the model has {positions} positions"
            raise UserError(
                f"{have}; /reset begins a new one, or say it in fewer words" if self.messages else f"{have}; say it in fewer words"
            )
        return ids, positions - len(ids)

    def _drop_oldest(self) -> bool:
        """Drop the oldest turn after the system message; False if there is none."""
        first = next((i for i, message in enumerate(self.messages) if message["role"] != "system"), None)
        if first is None:
            return False
        turn = self.messages[first : first + 2]
        paired = [message["role"] for message in turn] == ["user", "assistant"]
        del self.messages[first : first + (2 if paired else 1)]
        return True

    def _set_depth(self, execute: Callable[[str], str], value: str) -> str:
        """`/cycles`, and drop the KV cache if the depth changed."""
        before = self._now("H_cycles")
        reply = execute(value)
        if self._now("H_cycles") == before or not self.memory.ids:
            return reply
        self.memory.forget()
        return f"{reply}; the conversation is read again at this depth"

    def _system(self, text: str) -> str:
        turns = [message for message in self.messages if message["role"] != "system"]
        if text:
            self.messages = [{"role": "system", "content": text}, *turns]
        current = next((message["content"] for message in self.messages if message["role"] == "system"), None)
        return f"system {current!r}" if current else "system: no system message"

    def _reset(self) -> str:
        self.messages = [message for message in self.messages if message["role"] == "system"]
        self.memory.forget()
        return "Conversation cleared."
