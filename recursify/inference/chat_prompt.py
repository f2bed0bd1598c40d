"""Conversations as prompts, by the tokenizer's chat template, or as plain lines without one."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..data.chat_template import ends_of_turn, render, template_of
from ..errors import UserError
from .prompt import prompt_ids


class Dialogue:
    """Prompts for one tokenizer, from messages.

    Args:
        ends: End tokens beside those of model and tokenizer: what the chat template puts behind an answer.
        stop: Stop strings, for the plain format without a chat template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self.template = template_of(tokenizer)
        self.has_template = self.template is not None
        self.ends = ends_of_turn(tokenizer, self.template) if self.template is not None else ()
        self.stop: tuple[str, ...] = () if self.has_template else ("\nUser:",)

    @property
    def takes_tools(self) -> bool:
        """Whether the chat template has a place for tools."""
        return self.template is not None and re.search(r"\btools\b", self.template) is not None

    def prompt(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()) -> list[int]:
        """Token ids up to where the answer to the last message begins.

        Args:
            messages: Each with `role` and `content`, and what else the chat template reads.
            tools: Descriptions of functions that the model may call, as in OpenAI's API; only where `takes_tools`.

        Raises:
            UserError: Text that is not UTF-8, or a conversation that the template refuses or makes nothing of.
        """
        for message in messages:
            try:
                message["content"].encode("utf-8")
            except UnicodeEncodeError as error:
                raise UserError(f"expected UTF-8 text, got {message['content']!r}, which has a stray byte at {error.start}") from error
        if self.template is None:
            return prompt_ids(self.tokenizer, _plain(messages))
        offered = {"tools": list(tools)} if tools else {}
        options = {"tokenize": True, "return_dict": True, "add_generation_prompt": True, **offered}
        encoded = render(self.tokenizer, self.template, messages, **options)
        if not encoded["input_ids"]:
            raise UserError("the tokenizer's chat template makes nothing of this conversation")
        return list(encoded["input_ids"])

    def answer_text(self, answer: str) -> str:
        """The content of an answer as it goes into the conversation: stripped in the plain format."""
        return answer if self.has_template else answer.strip()


def _plain(messages: Sequence[Mapping[str, Any]]) -> str:
    names = {"user": "User: ", "assistant": "Assistant: ", "system": ""}
    parts = [f"{names[message['role']]}{message['content']}\n" + "\n" * (message["role"] == "system") for message in messages]
    return "".join(parts) + "Assistant:"
