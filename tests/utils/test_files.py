"""JSON that Python's reader gives up on is a ValueError like any other, and values in messages are short, however large they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from recursify.errors import UserError, short, shown
from recursify.utils.files import parse_json, read_json

DEEP = "[" * 200_000
LONG = "1" * 5000


@pytest.mark.parametrize("text", [DEEP, LONG, "{", '{"a": [' + DEEP], ids=["deep", "long", "open", "deep inside"])
def test_what_cannot_be_read_is_a_value_error(text: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        parse_json(text)
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError, match=r"a.json: is not JSON \(.+\); download or copy it again"):
        read_json(tmp_path / "a.json")


def referring(depth: int) -> list[Any]:
    """Two to the power of `depth` leaves, in memory for `depth` lists."""
    value: list[Any] = ["x"]
    for _ in range(depth):
        value = [value, value]
    return value


def itself() -> list[Any]:
    value: list[Any] = []
    value.append(value)
    return value


LARGE = {
    "references": referring(60),
    "itself": itself(),
    "number": 16**10_000,
    "text": "x" * 10**6,
    "inside": {"a": {1: itself()}},
    "key": {"k" * 999: 1},
}


@pytest.mark.parametrize("value", LARGE.values(), ids=LARGE)
def test_a_value_in_a_message_is_short(value: Any) -> None:
    assert len(short(value)) <= 60 and short(value).endswith("...")
    assert 10 < len(shown(value)) < 500


@pytest.mark.parametrize(("value", "text"), [({"a": [1, None]}, '{"a": [1, null]}'), ("é", '"\\u00e9"'), ([1] * 30, f"[{'1, ' * 18}1,...")])
def test_a_short_value_is_itself(value: Any, text: str) -> None:
    assert short(value) == text


@pytest.mark.parametrize("value", ["yes", True, [1, 2], {"a": (1, None)}, 4.5, None])
def test_a_small_value_is_shown_as_python_writes_it(value: Any) -> None:
    assert shown(value) == repr(value)
