"""Conversations as prompts, by the tokenizer's chat template, or as plain lines without one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from ..errors import UserError
from .prompt import prompt_ids
from .transcript import Message

_PROBE = "recursify asks where this ends"


class Dialogue:
    """Prompts for one tokenizer, from messages.

    Args:
        ends: End tokens beside those of model and tokenizer: what the chat template puts behind an answer.
        stop: Stop strings, for the plain format without a chat template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self.has_template = bool(getattr(tokenizer, "chat_template", None))
        self.ends = self._template_ends() if self.has_template else ()
        self.stop: tuple[str, ...] = () if self.has_template else ("\nUser:",)

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Token ids up to where the answer to the last message begins.

        Raises:
            UserError: Text that is not UTF-8, or a conversation that the template refuses.
        """
        for message in messages:
            try:
                message["content"].encode("utf-8")
            except UnicodeEncodeError as error:
                raise UserError(f"expected UTF-8 text, got {message['content']!r}, which has a stray byte at {error.start}") from error
        if not self.has_template:
            return prompt_ids(self.tokenizer, _plain(messages))
        try:
            return list(self._ids(list(messages), add_generation_prompt=True))
        except TemplateError as error:
            raise UserError(f"the tokenizer's chat template refuses this conversation: {error}") from error

    def said(self, answer: str) -> str:
        """The content of an answer as it goes into the conversation: stripped in the plain format."""
        return answer if self.has_template else answer.strip()

    def _template_ends(self) -> tuple[int, ...]:
        """The special token right behind an answer, such as <|im_end|>; empty if the template puts anything else there."""
        conversation = [{"role": "user", "content": _PROBE}, {"role": "assistant", "content": _PROBE}]
        try:
            text = self.tokenizer.apply_chat_template(conversation, tokenize=False)
        except TemplateError:
            return ()
        behind = str(text).rpartition(_PROBE)[2].lstrip()
        ids = self.tokenizer(behind, add_special_tokens=False).input_ids if behind else []
        return (ids[0],) if ids and ids[0] in self.tokenizer.added_tokens_decoder else ()

    def _ids(self, messages: list[Message], **options: Any) -> Any:
        encoded: Any = self.tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **options)
        return encoded["input_ids"]


def _plain(messages: Sequence[Message]) -> str:
    names = {"user": "User: ", "assistant": "Assistant: ", "system": ""}
    parts = [f"{names[message['role']]}{message['content']}\n" + "\n" * (message["role"] == "system") for message in messages]
    return "".join(parts) + "Assistant:"
