"""Spellings of training flags that users of transformers and trl are used to, rewritten into ours before the flags are parsed.

--gradient_checkpointing True    a switch with a value
--bf16                           a value that may be left out
--optim adamw_torch              a value with another name
--report_to none                 an empty list
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, get_args, get_type_hints

from ..errors import UserError
from ..utils.options import ALIASES, VALUE_ALIASES

_TRUE, _FALSE = ("true", "1", "yes"), ("false", "0", "no")


def as_ours(words: Sequence[str], settings_class: type[Any]) -> list[str]:
    """The words of a training's command line with these spellings replaced. Trainings have no positional arguments: what follows a
    switch can only be its value.

    Raises:
        UserError: A value for a switch that takes none, such as a path for --resume.
    """
    hints, ours = get_type_hints(settings_class), {field.name for field in dataclasses.fields(settings_class)}
    names = {alias: name for name, alias in ALIASES.items()}
    found: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        flag, joined, value = word.partition("=")
        name = names.get(flag.removeprefix("--"), flag.removeprefix("--")) if word.startswith("--") else ""
        if name not in ours or not _has_habits(name, hints[name]):
            found.append(word)
            continue
        if joined:
            rest.insert(0, value)
        following = rest[0] if rest and (joined or not rest[0].startswith("--")) else None
        if hints[name] is bool and following is not None:
            rest.pop(0)
            found += [flag] if _switched_on(flag, name, following) else []
        elif set(get_args(hints[name])) == {bool, type(None)} and following is None:
            found += [flag, "True"]
        elif name == "report_to" and following == "none":
            rest.pop(0)
        elif following is not None and following in VALUE_ALIASES.get(name, {}):
            found += [flag, VALUE_ALIASES[name][rest.pop(0)]]
        else:
            found.append(flag)
            found += [rest.pop(0)] if joined else []
    return found


def _has_habits(name: str, hint: Any) -> bool:
    return bool in (hint, *get_args(hint)) or name == "report_to" or name in VALUE_ALIASES


def _switched_on(word: str, name: str, value: str) -> bool:
    if value.lower() in _TRUE:
        return True
    if value.lower() in _FALSE:
        return False
    more = "; it continues the newest checkpoint in --output_dir" if name == "resume" else ""
    raise UserError(f"{word}: takes no value, got {value!r}{more}")
