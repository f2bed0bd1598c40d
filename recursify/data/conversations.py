"""Rows that somebody answers in: their three forms, how they are told by their columns, and what a row of each must hold.

    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]}     OpenAI's
    {"prompt": "The capital of Peru is", "completion": " Lima."}                                      TRL's; or both as messages
    {"instruction": "Translate into French.", "input": "A ship", "output": "Un navire"}               Alpaca's

`conversation_rows.py` makes token ids of them. A row travels as JSON (`row_json`): what is in messages and tools has no fixed columns.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any

from ..errors import UserError, short
from ..utils.encodings import check_characters
from ..utils.files import parse_json

MESSAGES, PROMPT, ALPACA = ("messages",), ("prompt", "completion"), ("instruction", "output")
FORMS = (MESSAGES, PROMPT, ALPACA)
# What is read beside the columns of every form, where it is there, as TRL names it.
FURTHER = ("input", "tools", "chat_template_kwargs")
ROLES = ("system", "developer", "user", "assistant", "tool")

# The column of a table of such rows.
COLUMN = "conversation"


def form_of(columns: Collection[str]) -> tuple[str, ...] | None:
    """The columns that make these rows conversations; None if they do not."""
    return next((form for form in FORMS if set(form) <= set(columns)), None)


def row_json(row: Any, form: tuple[str, ...], place: str) -> str | None:
    """A row as JSON, with the columns that are read; None if it has nothing to be trained on, so that it is left out.

    Args:
        form: Of `FORMS`.
        place: File and line, for messages.

    Raises:
        UserError: A row that is not of this form, or a message without a known role or without content.
    """
    if not isinstance(row, Mapping):
        raise UserError(f"{place}: expected an object with {_listed(form)}, got {type(row).__name__}")
    found = {name: row[name] for name in (*form, *FURTHER) if row.get(name) is not None}
    _check_options(found, place)
    check = _check_alpaca if form == ALPACA else _check_prompt if form == PROMPT else _check_messages
    if not set(form) <= set(found) or not check(found, place):
        return None
    written = json.dumps(found, ensure_ascii=False)
    check_characters(written, place)
    return written


def without_nulls(value: Any) -> Any:
    """The value without null fields: a column of a table has the fields of all its rows, null where a row has none."""
    if isinstance(value, Mapping):
        return {name: without_nulls(part) for name, part in value.items() if part is not None}
    return [without_nulls(part) for part in value] if isinstance(value, list) else value


def _check_options(row: dict[str, Any], place: str) -> None:
    """Check what is for the chat template alone; tools may be given as JSON."""
    if isinstance(row.get("tools"), str):
        try:
            row["tools"] = parse_json(row["tools"])
        except ValueError as error:
            raise UserError(f"{place}: expected 'tools' as a list or its JSON, got {short(row['tools'])} ({error})") from error
    for name, kind in (("tools", list), ("chat_template_kwargs", dict)):
        if not isinstance(row.get(name, kind()), kind):
            raise UserError(f"{place}: expected a {kind.__name__} as {name!r}, got {short(row[name])}; mend or remove the row")


def _check_alpaca(row: dict[str, Any], place: str) -> bool:
    for name in (*ALPACA, "input"):
        if not isinstance(row.get(name, ""), str):
            raise UserError(f"{place}: expected text as {name!r}, got {short(row[name])}; mend or remove the row")
    return bool(row["output"].strip()) and bool(row["instruction"].strip() or row.get("input", "").strip())


def _check_prompt(row: dict[str, Any], place: str) -> bool:
    kinds = {type(row[name]) for name in PROMPT}
    if kinds == {str}:
        return bool(row["completion"].strip())
    if kinds != {list}:
        raise UserError(
            f"{place}: expected 'prompt' and 'completion' both as text or both as lists of messages, got {short(row['prompt'])} and "
            f"{short(row['completion'])}; mend or remove the row"
        )
    for name in PROMPT:
        _check_list(row[name], name, place)
    return True


def _check_messages(row: dict[str, Any], place: str) -> bool:
    _check_list(row["messages"], "messages", place)
    return True


def _check_list(messages: Any, name: str, place: str) -> None:
    if not isinstance(messages, list) or not messages:
        raise UserError(
            f"{place}: expected messages in {name!r}, each with role and content, got {short(messages)}; mend or remove the row"
        )
    for number, message in enumerate(messages):
        if fault := _fault(message):
            raise UserError(f"{place}, {name}[{number}]: {fault}, got {short(message)}; mend or remove the row")


def _fault(message: Any) -> str | None:
    """What is wrong with a message."""
    if not isinstance(message, dict):
        return 'expected a message such as {"role": "user", "content": "..."}'
    if message.get("role") not in ROLES:
        return f"expected as role one of {', '.join(ROLES)}"
    content = message.get("content")
    if content is not None and not isinstance(content, str):
        return "expected text as content"
    if not (content and content.strip()) and not message.get("tool_calls"):
        return "expected some text as content"
    return None


def _listed(names: tuple[str, ...]) -> str:
    return " and ".join(map(repr, names))
