"""The chat template of a tokenizer: which one it is, what it makes of messages, and how it ends an answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from ..errors import UserError

_PROBE = "recursify asks where this ends"
_FAULTS = (TemplateError, TypeError, ValueError, KeyError, AttributeError)  # templates are programs and may raise anything


def template_of(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The chat template of a tokenizer. Of several named ones, `default`, or the first that renders a plain conversation."""
    found = getattr(tokenizer, "chat_template", None) or None
    if not isinstance(found, dict):
        return found
    probe = [{"role": "user", "content": _PROBE}]
    for template in (found[name] for name in sorted(found, key=lambda name: name != "default")):
        try:
            if _PROBE in str(tokenizer.apply_chat_template(probe, chat_template=template, tokenize=False)):
                return str(template)
        except _FAULTS:
            continue
    return None


def render(tokenizer: PreTrainedTokenizerBase, template: str, messages: Sequence[Mapping[str, Any]], **options: Any) -> Any:
    """What `apply_chat_template` makes of messages with this template and these options.

    Raises:
        UserError: A conversation that the template refuses.
    """
    try:
        return tokenizer.apply_chat_template(list(messages), chat_template=template, **options)  # type: ignore[arg-type]
    except _FAULTS as error:
        raise UserError(f"the tokenizer's chat template refuses this conversation: {error}") from error


def ends_of_turn(tokenizer: PreTrainedTokenizerBase, template: str) -> tuple[int, ...]:
    """The special token right behind an answer, such as <|im_end|>; empty if the template puts anything else there."""
    conversation = [{"role": "user", "content": _PROBE}, {"role": "assistant", "content": _PROBE}]
    try:
        text = render(tokenizer, template, conversation, tokenize=False)
    except UserError:
        return ()
    behind = str(text).rpartition(_PROBE)[2].lstrip()
    ids = tokenizer(behind, add_special_tokens=False).input_ids if behind else []
    return (ids[0],) if ids and ids[0] in tokenizer.added_tokens_decoder else ()
