"""Whether what a model wrote answers an item.

First the place. Where ``####`` stands in the text, what is behind the first one is looked at, else all of it; the text ends at the next
blank line or line that begins with ``Question:``, since a model that knows no end goes on with a question of its own. Then, by ``match``:

    words   The first line that is not blank, or that line up to the end of one of its sentences (".", "!" or "?" before white space),
            must equal the answer, where upper and lower case are one, white space is one space and none around commas, and quotes
            and . , ; : ! ? at the ends are dropped.
    digits  As words, with all white space and commas dropped: "1 3 2", "132" and "1,32" are one; "0132" is another.
    number  The first number behind ``####``; without it, the last number of the text. Commas between groups of three digits and a
            dollar sign are dropped. Numbers are compared by value: 18, $18.00 and 18.0 are one. A hyphen is a minus sign unless a letter,
            a digit or a closing bracket is right before it: 5-3 ends in 3.
"""

from __future__ import annotations

import re
from decimal import Decimal

from .item import FINAL, QUESTION, Item, Match

_FINAL, _NEXT = FINAL.strip(), re.compile(rf"\n\s*(?:\n|{re.escape(QUESTION.strip())})")
_SENTENCE_END = re.compile(r"[.!?](?=\s)")
_EDGES = " \t\"'`.,;:!?"
_DIGITS = r"\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+"
_NUMBER = re.compile(rf"(?P<sign>(?<![\w)\]])-)?(?:\$(?P<inner>-)?)?(?P<digits>{_DIGITS})", re.ASCII)


def is_right(item: Item, text: str) -> bool:
    """Whether ``text``, written after ``prompt(item)``, gives the answer of ``item``."""
    if item.match == "number":
        given = _number(text)
        return given is not None and given == _number(item.answer)
    line = _place(text)[0].split("\n")[0]
    beginnings = [line[: end.start()] for end in _SENTENCE_END.finditer(line)]
    wanted = _normal(item.answer, item.match)
    return any(_normal(words, item.match) == wanted for words in [line, *beginnings])


def _normal(words: str, match: Match) -> str:
    words = re.sub(r"\s*,\s*", ",", " ".join(words.split())).strip(_EDGES).casefold()
    return re.sub(r"[\s,]", "", words) if match == "digits" else words


def _number(text: str) -> Decimal | None:
    place, is_final = _place(text)
    found = list(_NUMBER.finditer(place))
    if not found:
        return None
    chosen = found[0 if is_final else -1]
    value = Decimal(chosen["digits"].replace(",", ""))
    return value.copy_negate() if chosen["sign"] or chosen["inner"] else value


def _place(text: str) -> tuple[str, bool]:
    """The part of the text to look at, from its first character that is not white space, and whether it stood behind ``####``."""
    text = text.replace("\r\n", "\n")
    own = _NEXT.split(text.strip(), maxsplit=1)[0]
    before, mark, behind = own.partition(_FINAL)
    return (behind if mark else before).strip(), bool(mark)
