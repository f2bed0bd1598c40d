"""The words of a command line as values of settings. What is wrong with them is said in one line.

--flag VALUE, --flag=VALUE    dashes may stand for underscores
--flag 1 3 5, --flag 1,3,5    several values; numbers and names also with commas between them, and none is none of them
--switch, --no_switch         or with a value, as transformers' users write it: --switch=False, and --switch False where every word
                              belongs to a flag
-- WORD                       what follows is no flag

A word that looks like a flag is no value, or a mistyped flag would be one: --prompt=--foo is how to write it.
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import re
from collections import deque
from collections.abc import Container, Mapping, Sequence
from typing import Any, get_args, get_origin, get_type_hints

from ..errors import UserError
from ..utils.typed import SWITCHES, expectation, spelt, without_none
from .flags import is_positional
from .habits import INSTEAD
from .names import fields_by_name, model_field

WITHOUT_COMMAS = ("report_to", "tasks")  # fields of several texts none of which has a comma in it, as paths and stop strings may


def asks_for_help(words: Sequence[str]) -> bool:
    """Whether -h or --help is among the words."""
    return any(word in ("-h", "--help") for word in itertools.takewhile(lambda word: word != "--", words))


def read(
    settings_class: type[Any], words: Sequence[str], job: str, prog: str, known: Container[str], extra: Mapping[str, Any]
) -> dict[str, Any]:
    """Field -> value, of the fields that words of a command line give a value. The last one counts.

    Args:
        job: The name of the command, as `INSTEAD` has it.
        prog: How the command is called.
        known: Fields that have a value from elsewhere, and need not be given.
        extra: Flag -> type, of flags that whoever calls has read already; their values are only checked.

    Raises:
        UserError: Words that are no flags of this class, a value that is missing or of another type, or a field without one.
    """
    return _Reader(settings_class, words, job, prog, known, extra).read()


class _Reader:
    def __init__(
        self, settings_class: type[Any], words: Sequence[str], job: str, prog: str, known: Container[str], extra: Mapping[str, Any]
    ):
        self.settings_class, self.job, self.prog, self.extra = settings_class, job, prog, extra
        fields = dataclasses.fields(settings_class)
        hints, marked = get_type_hints(settings_class), get_type_hints(settings_class, include_extras=True)
        self.hints: dict[str, Any] = {field.name: hints[field.name] for field in fields} | dict(extra)
        self.names = {name: name for name in self.hints} | fields_by_name(settings_class)  # as they may be given -> field
        self.negations = {f"no_{name}": field for name, field in self.names.items() if self.is_switch(field)}
        self.places = [field.name for field in fields if is_positional(marked[field.name])]
        self.required = [
            field.name
            for field in fields
            if field.default is field.default_factory is dataclasses.MISSING and field.name not in known and not self.is_list(field.name)
        ]
        self.rest = deque(words)
        self.loose: list[str] = []  # words of no flag
        self.found: dict[str, Any] = {}
        self.previous = ("", "")  # the last flag with a single value, and the value

    def is_list(self, name: str) -> bool:
        return get_origin(self.hints[name]) is tuple

    def read(self) -> dict[str, Any]:
        while self.rest:
            word = self.rest.popleft()
            if word == "--":
                self.loose += self.rest
                break
            if _looks_like_a_flag(word):
                self.read_flag(word)
            else:
                self.loose.append(word)
                if not self.places:
                    break
        self.place_loose()
        if missing := [name for name in self.required if name not in self.found]:
            wanted = " and ".join(name.upper() if name in self.places else f"--{name}" for name in missing)
            raise UserError(f"{self.prog}: expected {wanted}, got none; {self.prog} --help says what to give")
        return {name: value for name, value in self.found.items() if name not in self.extra}

    # Flags

    def read_flag(self, word: str) -> None:
        flag, joined, value = word.partition("=")
        name = flag.lstrip("-").replace("-", "_")
        given = [value] if joined else []
        if not flag.startswith("--") or name not in self.names | self.negations:
            raise self.unknown(flag, name)
        if name in self.names:
            self.found[self.names[name]] = self.value_of(flag, self.names[name], given)
        else:
            self.found[self.negations[name]] = not self.switched(flag, self.negations[name], given)

    def value_of(self, flag: str, field: str, given: list[str]) -> Any:
        if self.is_switch(field):
            return self.switched(flag, field, given)
        if self.is_list(field):
            return self.several(flag, field, given)
        if not given and self.follows():
            given = [self.rest.popleft()]
        if not given:
            raise self.missing(flag, self.hints[field])
        self.previous = flag, given[0]
        return self.spelt(flag, given[0], self.hints[field])

    def is_switch(self, field: str) -> bool:
        return without_none(self.hints[field]) is bool

    def switched(self, flag: str, field: str, given: list[str]) -> Any:
        if not given and not self.places and self.follows():
            given = [self.rest.popleft()]
        if not given:
            return True
        if self.hints[field] is bool and given[0].lower() not in SWITCHES:
            more = "; it continues the newest checkpoint in --output_dir" if field == "resume" else ""
            raise UserError(f"{flag}: takes no value, got {given[0]!r}{more}")
        return self.spelt(flag, given[0], self.hints[field])

    def several(self, flag: str, field: str, given: list[str]) -> tuple[Any, ...]:
        kind = get_args(self.hints[field])[0]
        unfilled = [name for name in self.places if not self.is_list(name) and name not in self.found]
        while self.follows() and (len(self.rest) > len(unfilled) - len(self.loose) or self.is_a_value(self.rest[0], kind, unfilled)):
            given.append(self.rest.popleft())
        if not given:
            raise self.missing(flag, kind)
        if kind is not str or field in WITHOUT_COMMAS:
            given = [part for word in given for part in re.findall(r"[^,\s]+", word) or [word]]
            given = [] if [word.lower() for word in given] == ["none"] else given
        return tuple(self.spelt(flag, word, kind) for word in given)

    def is_a_value(self, word: str, kind: Any, unfilled: list[str]) -> bool:
        """Whether a word at the end of the line, which might be for a place, is a value: a number is, where no place has to be filled."""
        if kind is str or any(name in self.required for name in unfilled):
            return False
        try:
            for part in word.split(","):
                spelt(part, kind)
        except TypeError:
            return False
        return True

    def follows(self) -> bool:
        """Whether a value comes next."""
        return bool(self.rest) and not _looks_like_a_flag(self.rest[0])

    def missing(self, flag: str, hint: Any) -> UserError:
        if not self.rest or self.follows():
            return UserError(f"{flag}: expected {expectation(hint)}, got nothing")
        got = self.rest[0]
        return UserError(f"{flag}: expected {expectation(hint)}, got the flag {got}; a value with a dash in front is written {flag}={got}")

    def spelt(self, flag: str, word: str, hint: Any) -> Any:
        try:
            return spelt(word, hint)
        except TypeError as error:
            raise UserError(f"{flag}: expected {error}, got {word!r}") from None

    def unknown(self, flag: str, name: str) -> UserError:
        if name in (instead := INSTEAD.get("train" if self.job.startswith("train") else self.job, {})):
            return UserError(f"{flag}: not a flag of {self.job}; instead: {instead[name]}")
        near = difflib.get_close_matches(name, self.names, n=1)
        hint = f"did you mean --{near[0]}?" if near else f"{self.prog} --help lists its flags"
        return UserError(f"{flag}: not a flag of {self.job}; {hint}")

    # Words of no flag

    def place_loose(self) -> None:
        for name in self.places:
            if self.loose and name not in self.found:
                count = len(self.loose) if self.is_list(name) else 1
                taken, self.loose = self.loose[:count], self.loose[count:]
                self.found[name] = tuple(taken) if self.is_list(name) else taken[0]
        if self.loose:
            raise self.stray(self.loose[0])

    def stray(self, word: str) -> UserError:
        flag, value = self.previous
        model = model_field(self.settings_class)
        if self.places:
            wanted, mend = " and ".join(map(str.upper, self.places)) + " alone without a flag", f"{self.prog} --help lists the flags"
        elif flag:
            wanted, mend = f"a flag after {flag} {value}", f"{flag} takes one value: put text of several words in quotes"
        elif model is not None and model not in self.found:
            wanted, mend = "a flag", f"did you mean --{model} {word}?"
        else:
            wanted, mend = "a flag", f"{self.prog} --help lists them"
        return UserError(f"{self.prog}: expected {wanted}, got {word!r}; {mend}")


def _looks_like_a_flag(word: str) -> bool:
    """A dash or two and a letter, or --; -5, -.5, -inf and "- a list" are values."""
    return word == "--" or bool(re.match(r"--?[^\W\d_]", word) and word.lower() not in ("-inf", "-infinity", "-nan"))
