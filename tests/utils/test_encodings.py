"""Text in any encoding is read as UTF-8, or named together with a remedy that works."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recursify.errors import UserError
from recursify.utils.encodings import check_characters, encoding_of, open_text, read_text

TEXT = 'The old tower stood still. "Yes", she said,\nand the river went on.\n' * 20
WIDE = ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"]


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        read_text(path)
    return str(caught.value)


@pytest.mark.parametrize("encoding", [*WIDE, "utf-16", "utf-32"])
def test_utf16_and_utf32_are_named_and_the_remedy_works(encoding: str, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(TEXT.encode(encoding))
    message = refusal(path)
    assert f"got {encoding[:6].upper()}" in message and "latin" not in message
    command = re.search(r"iconv -f (\S+) -t UTF-8 (\S+) > NEW_FILE", message)
    assert command is not None
    if shutil.which("iconv"):
        made = subprocess.run(["iconv", "-f", command[1], "-t", "UTF-8", command[2]], capture_output=True, check=True).stdout
        assert made.decode("utf-8-sig") == TEXT


@given(text=st.text(st.characters(min_codepoint=32, max_codepoint=0x24F), min_size=40), encoding=st.sampled_from(WIDE))
@settings(max_examples=60)
def test_wide_encodings_without_a_mark(text: str, encoding: str) -> None:
    found = encoding_of(text.encode(encoding))
    assert found == encoding[:6].upper() + encoding[7:].upper()


@given(text=st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\0")))
@settings(max_examples=80)
def test_utf8_is_never_taken_for_anything_else(text: str) -> None:
    assert encoding_of(text.encode()) is None
    assert encoding_of(text.encode("utf-8-sig")) is None


def test_a_byte_order_mark_is_not_text(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("café\r\n".encode("utf-8-sig"))
    assert read_text(path) == "café\r\n"
    with open_text(path) as file:
        assert file.read() == "café\n"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (("a café " * 9).encode("cp1252"), "got the byte 0xe9 .*iconv -f WINDOWS-1252 -t UTF-8"),
        ("桃花源记，晋太元中，武陵人捕鱼为业。".encode("gbk"), "got the byte .*iconv -f ITS_ENCODING -t UTF-8"),
        (b"PK\x03\x04\x14\x00\x00\x00\x08 binary", "got a NUL at byte 5, as binary files have them; name a text file"),
    ],
)
def test_other_bytes(data: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(data)
    assert re.search(message, refusal(path))


def test_half_characters() -> None:
    check_characters("🦞", "x")
    with pytest.raises(UserError, match=r"line 3: expected text, got '\\ud83d' at character 2, half of a surrogate pair"):
        check_characters("ab\ud83d", "line 3")
