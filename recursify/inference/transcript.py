"""Saved conversations: a JSON object of `format`, `messages` and `settings`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..utils.atomic import write_text
from ..utils.files import parse_json

FORMAT = "recursify-conversation/1"
ROLES = ("system", "user", "assistant")
Message = dict[str, str]  # role and content, as in chat templates


def save(path: str, messages: list[Message], settings: dict[str, Any]) -> Path:
    """Write a conversation atomically; returns its path.

    Raises:
        UserError: The file exists and is not a conversation, or cannot be written.
    """
    place = Path(path).expanduser()
    if place.exists():
        try:
            load(path)
        except UserError:
            raise UserError(f"{place} is there and is no saved conversation; name another file") from None
    content = json.dumps({"format": FORMAT, "messages": messages, "settings": settings}, ensure_ascii=False, indent=1) + "\n"
    try:
        write_text(place, content)
    except OSError as error:
        raise UserError(f"{place} cannot be written ({error.strerror}); name a file in a folder that is there and yours") from error
    return place


def load(path: str) -> tuple[list[Message], dict[str, Any]]:
    """Read the messages and settings of a saved conversation.

    Raises:
        UserError: Not readable, or not a file written by `save`.
    """
    place = Path(path).expanduser()
    try:
        found = parse_json(place.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{place} cannot be read ({error.strerror}); name a conversation that /save wrote") from error
    except ValueError as error:
        raise UserError(f"{place} is not JSON ({error}); name a conversation that /save wrote") from error
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise UserError(f'{place}: expected "format": "{FORMAT}", as /save writes it; name a conversation that /save wrote')
    messages, settings = found.get("messages"), found.get("settings", {})
    if not isinstance(messages, list) or not isinstance(settings, dict):
        raise UserError(f'{place}: expected "messages", a list, and "settings", an object')
    for number, message in enumerate(messages, start=1):
        if not (isinstance(message, dict) and message.get("role") in ROLES and isinstance(message.get("content"), str)):
            raise UserError(f'{place}: message {number}: expected "role", one of {", ".join(ROLES)}, and a text "content", got {message!r}')
    return [{"role": message["role"], "content": message["content"]} for message in messages], settings
