"""Conversations on disk: what is saved comes back, and what is no conversation is refused and never overwritten."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from recursify.errors import UserError
from recursify.inference import transcript

TALK = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "龙虾\n🦞"}, {"role": "assistant", "content": ""}]


def test_transcript_round_trip(tmp_path: Path) -> None:
    file = str(tmp_path / "talk.json")
    transcript.save(file, TALK, {"temperature": 0.5})
    transcript.save(file, TALK, {"temperature": 0.7})
    assert transcript.load(file) == (TALK, {"temperature": 0.7})
    assert [path.name for path in tmp_path.iterdir()] == ["talk.json"]


def test_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert transcript.save("~/talk.json", TALK, {}) == tmp_path / "talk.json"
    assert transcript.load("~/talk.json")[0] == TALK


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is not JSON"),
        ("[]", 'expected "format": "recursify-conversation/1"'),
        ({"format": "other"}, 'expected "format"'),
        ({"messages": {}}, 'expected "messages", a list'),
        ({"messages": [], "settings": []}, '"settings", an object'),
        ({"messages": [{"role": "user"}]}, 'message 1: expected "role", one of system, user, assistant, and a text "content", got'),
        ({"messages": [TALK[0], {"role": "robot", "content": "a"}]}, "message 2: "),
        ({"messages": [{"role": "user", "content": 3}]}, "message 1: "),
        ({"messages": ["hello"]}, "message 1: "),
    ],
)
def test_foreign_files_are_refused_and_not_overwritten(tmp_path: Path, content: Any, message: str) -> None:
    file = tmp_path / "x.json"
    text = content if isinstance(content, str) else json.dumps({"format": transcript.FORMAT} | content)
    file.write_text(text)
    with pytest.raises(UserError) as error:
        transcript.load(str(file))
    assert message in str(error.value)
    with pytest.raises(UserError, match="is there and is no saved conversation; name another file"):
        transcript.save(str(file), TALK, {})
    assert file.read_text() == text


def test_unusable_paths(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read .No such file"):
        transcript.load(str(tmp_path / "missing.json"))
    with pytest.raises(UserError, match="cannot be written .No such file"):
        transcript.save(str(tmp_path / "nowhere" / "x.json"), TALK, {})
    with pytest.raises(UserError, match="is no saved conversation"):
        transcript.save(str(tmp_path), TALK, {})
