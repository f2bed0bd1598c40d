"""Streamed text: whole characters, stop strings across chunks, end tokens, each row independently."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from recursify.inference.streaming import Row, Rows, TextPieces, UntilStop
from tests.support.tiny import make_qwen_tokenizer, make_tiny_tokenizer
from tests.support.tokenizers import sentencepiece_like


def test_a_space_that_the_decoder_drops_at_a_start_is_kept() -> None:
    tokenizer = sentencepiece_like()
    vocabulary = tokenizer.get_vocab()
    lobster = [vocabulary[f"<0x{byte:02X}>"] for byte in "🦞".encode()]
    words = [vocabulary[word] for word in ("▁one", "▁two", "▁three")]
    pieces: list[str] = []
    streamer = TextPieces(tokenizer, pieces.append)
    streamer.put(torch.tensor([[1, words[0]]]))
    for token in [words[1], *lobster, words[2], 2]:
        streamer.put(torch.tensor([token]))
    streamer.end()
    assert pieces == [" two", "🦞", " three"]


def cut(text: str, places: list[int]) -> list[str]:
    edges = [0, *sorted(min(place, len(text)) for place in places), len(text)]
    return [text[first:last] for first, last in pairwise(edges)]


def before_stop(text: str, stop: list[str]) -> str:
    """Reference: character by character, until any of the strings is complete."""
    for length in range(len(text) + 1):
        for ending in sorted(stop, key=len, reverse=True):
            if text[:length].endswith(ending):
                return text[: length - len(ending)]
    return text


@example(text="abcd", stop=["abcd", "bc"], places=[])  # the one that is complete first starts later
@example(text="bcabc", stop=["abc", "bc"], places=[2])
@example(text="xaab", stop=["aab"], places=[3])  # both characters may be the start
@example(text="xaab", stop=["b", "aab"], places=[3])
@example(text="xaac", stop=["c", "aab"], places=[3])
@given(text=st.text("ab\n"), stop=st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3), places=st.lists(st.integers(0, 40)))
def test_first_stop_string_is_independent_of_chunking(text: str, stop: list[str], places: list[int]) -> None:
    pieces: list[str] = []
    until = UntilStop(stop, pieces.append)
    for piece in cut(text, places):
        until.put(piece)
    until.end()
    assert "".join(pieces) == before_stop(text, stop)
    assert until.met == any(ending in text for ending in stop)
    assert all(pieces)


def test_only_possible_stop_prefixes_are_held_back() -> None:
    pieces: list[str] = []
    until = UntilStop(["\nUser:"], pieces.append)
    for piece in ("one\n", "Us", "ed two", "\nUser", ": three"):
        until.put(piece)
    assert pieces == ["one", "\nUsed two"] and until.met
    until.put("four")
    until.end()
    assert pieces == ["one", "\nUsed two"]


def test_end_token_finishes_a_row_without_text() -> None:
    tokenizer = make_tiny_tokenizer()
    word, end = tokenizer(" lobster").input_ids, tokenizer(" castle").input_ids[0]
    row = Row(tokenizer, [1], ends=[0, end])
    for token in [*word, end]:
        row.put(token)
    assert (row.text, row.finish, row.token_ids) == (" lobster", "stop", [*word, end])


def test_rows_finish_independently_without_padding() -> None:
    tokenizer = make_tiny_tokenizer()
    texts = ["The old lobster follows the famous painter", " river", "quiet ships"]
    tokens = [tokenizer(text).input_ids for text in texts]
    rows = [Row(tokenizer, [1], ends=[0], stop=["ship"]) for _ in texts]
    width = max(map(len, tokens)) + 1
    batch = torch.tensor([[1, *ids, *[0] * (width - len(ids))] for ids in tokens])
    criterion = Rows(rows, read=1)
    answers = [criterion(batch[:, : 2 + column], None).tolist() for column in range(width)]
    assert [row.text for row in rows] == [texts[0], " river", "quiet "]
    assert [row.token_ids for row in rows[:2]] == [[*ids, 0] for ids in tokens[:2]] and 0 not in rows[2].token_ids
    assert answers[0] == [False, False, False] and answers[-1] == [True, True, True]
    assert answers[len(tokens[1])][:2] == [False, True]


@pytest.mark.parametrize(
    "text",
    [
        "龙虾在月光下跳舞。🦞👩‍👩‍👧‍👦 好的",
        "한국어와 English 🏳️‍🌈",
        "ﷺ \u00e9 \U0001f1e9\U0001f1ea",
        "नमस्ते über Größe 好的🦞",
    ],
)
def test_tokens_of_qwen2s_kind_come_as_whole_characters(text: str) -> None:
    tokenizer = make_qwen_tokenizer()
    assert any("\ufffd" in tokenizer.decode([token]) for token in tokenizer(text).input_ids), "some tokens are parts of characters"
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    pieces: list[str] = []
    row = Row(tokenizer, tokenizer("The").input_ids, ends=[end], on_text=pieces.append)
    for token in [*tokenizer(text).input_ids, end]:
        row.put(token)
    assert "".join(pieces) == row.text == text and row.finish == "stop"
    assert not any("\ufffd" in piece for piece in pieces) and len(pieces) > 3


def test_rows_take_several_columns_at_once() -> None:
    tokenizer = make_tiny_tokenizer()
    ids = tokenizer("The old lobster").input_ids
    row = Row(tokenizer, [1])
    criterion = Rows([row], read=1)
    criterion(torch.tensor([[1, *ids[:1]]]), None)
    criterion(torch.tensor([[1, *ids]]), None)
    assert row.token_ids == ids
    criterion(torch.tensor([[1, *ids, 70]]), None)
    assert row.token_ids == [*ids, 70]


def test_should_stop_finishes_running_rows() -> None:
    tokenizer = make_tiny_tokenizer()
    rows = [Row(tokenizer, [1], ends=[0]) for _ in range(2)]
    asked = iter([False, True])
    criterion = Rows(rows, read=1, should_stop=lambda: next(asked))
    criterion(torch.tensor([[1, 0], [1, 70]]), None)
    assert criterion(torch.tensor([[1, 0, 0], [1, 70, 71]]), None).tolist() == [True, True]
    assert [row.finish for row in rows] == ["stop", "interrupted"]


def test_a_character_that_ends_with_the_text_may_complete_a_stop_string() -> None:
    tokenizer = make_tiny_tokenizer()
    half = tokenizer("a🦞").input_ids[:-1]
    row = Row(tokenizer, [1], stop=["\ufffd"])
    for token in half:
        row.put(token)
    row.close("length")
    assert (row.text, row.finish) == ("a", "stop")


def test_pending_text_is_flushed_in_order() -> None:
    """The incomplete character first, which may start a stop string, then the held-back text."""
    tokenizer = make_tiny_tokenizer()
    half = tokenizer("a🦞").input_ids[:-1]
    row = Row(tokenizer, [1], stop=["\ufffd!"])
    for token in half:
        row.put(token)
    row.close("length")
    assert (row.text, row.finish) == (tokenizer.decode(half), "length")


def test_a_row_goes_on_from_its_prompt() -> None:
    tokenizer = sentencepiece_like()
    one, two = (tokenizer.get_vocab()[word] for word in ("▁one", "▁two"))
    row = Row(tokenizer, [1, one])
    row.put(two)
    assert row.text == " two"


def test_spaces_before_punctuation_are_kept() -> None:
    tokenizer, text = make_tiny_tokenizer(), " one , two . do n't !"
    row = Row(tokenizer, [1])
    for token in tokenizer(text).input_ids:
        row.put(token)
    assert row.text == text


def test_tokens_after_the_end_are_ignored() -> None:
    row = Row(make_tiny_tokenizer(), [1], ends=[0])
    row.put(70)
    row.close("length")
    before = (row.text, row.finish)
    row.close("interrupted")
    assert (row.text, row.finish) == before == (row.text, "length")


def test_should_stop_is_called_per_column() -> None:
    row = Row(make_tiny_tokenizer(), [1])
    asked = iter([False, True, True])
    Rows([row], read=1, should_stop=lambda: next(asked))(torch.tensor([[1, 70, 71, 72]]), None)
    assert (row.token_ids, row.finish) == ([70, 71], "interrupted")
