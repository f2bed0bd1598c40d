"""Interactive mode: one independent prompt after another."""

from __future__ import annotations

import threading

from .console import Console
from .session import calibrated, load, write_once
from .settings import GenerateSettings


def run(settings: GenerateSettings) -> None:
    """Read prompts at the terminal and continue each.

    Raises:
        UserError: A setting out of range; a checkpoint or tokenizer that cannot be read.
    """
    model, tokenizer = load(settings)
    settings = calibrated(settings, model, tokenizer)
    Conversation(model, tokenizer, settings).run()


class Conversation(Console):
    """Independent prompts and their completions; /save stores them as messages of user and assistant."""

    def greet(self) -> None:
        self.say("Type a prompt to continue. /help lists the commands.\n", self.err)

    def answer(self, text: str, pressed: threading.Event) -> None:
        self.say("Generating...")
        generated = write_once(self.model, self.tokenizer, text, self.settings, self.out, self.err, should_stop=pressed.is_set)
        self.messages += [{"role": "user", "content": text}, {"role": "assistant", "content": generated.text}]
