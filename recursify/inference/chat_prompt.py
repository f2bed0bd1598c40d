"""Conversations as prompts, by the tokenizer's chat template, or as plain lines without one."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from ..errors import UserError
from .prompt import prompt_ids

_PROBE = "recursify asks where this ends"
_TEMPLATE_FAULTS = (TemplateError, TypeError, ValueError, KeyError, AttributeError)  # templates are programs and may raise anything


class Dialogue:
    """Prompts for one tokenizer, from messages.

    Args:
        ends: End tokens beside those of model and tokenizer: what the chat template puts behind an answer.
        stop: Stop strings, for the plain format without a chat template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self.template = _plain_template(tokenizer)
        self.has_template = self.template is not None
        self.ends = self._template_ends() if self.has_template else ()
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
        if not self.has_template:
            return prompt_ids(self.tokenizer, _plain(messages))
        try:
            offered = {"tools": list(tools)} if tools else {}
            encoded: Any = self._render(list(messages), tokenize=True, return_dict=True, add_generation_prompt=True, **offered)
        except _TEMPLATE_FAULTS as error:
            raise UserError(f"the tokenizer's chat template refuses this conversation: {error}") from error
        if not encoded["input_ids"]:
            raise UserError("the tokenizer's chat template makes nothing of this conversation")
        return list(encoded["input_ids"])

    def answer_text(self, answer: str) -> str:
        """The content of an answer as it goes into the conversation: stripped in the plain format."""
        return answer if self.has_template else answer.strip()

    def _template_ends(self) -> tuple[int, ...]:
        """The special token right behind an answer, such as <|im_end|>; empty if the template puts anything else there."""
        conversation = [{"role": "user", "content": _PROBE}, {"role": "assistant", "content": _PROBE}]
        try:
            text = self._render(conversation, tokenize=False)
        except _TEMPLATE_FAULTS:
            return ()
        behind = str(text).rpartition(_PROBE)[2].lstrip()
        ids = self.tokenizer(behind, add_special_tokens=False).input_ids if behind else []
        return (ids[0],) if ids and ids[0] in self.tokenizer.added_tokens_decoder else ()

    def _render(self, messages: Any, **options: Any) -> Any:
        return self.tokenizer.apply_chat_template(messages, chat_template=self.template, **options)


def _plain_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The chat template of a tokenizer. Of several named ones, `default`, or the first that renders a plain conversation."""
    found = getattr(tokenizer, "chat_template", None) or None
    if not isinstance(found, dict):
        return found
    probe = [{"role": "user", "content": _PROBE}]
    for template in (found[name] for name in sorted(found, key=lambda name: name != "default")):
        try:
            if _PROBE in str(tokenizer.apply_chat_template(probe, chat_template=template, tokenize=False)):
                return str(template)
        except _TEMPLATE_FAULTS:
            continue
    return None


def _plain(messages: Sequence[Mapping[str, Any]]) -> str:
    names = {"user": "User: ", "assistant": "Assistant: ", "system": ""}
    parts = [f"{names[message['role']]}{message['content']}\n" + "\n" * (message["role"] == "system") for message in messages]
    return "".join(parts) + "Assistant:"
