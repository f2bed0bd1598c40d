"""Documents as token ids, packed into blocks, and separated again."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recursify import RecursiveLLM
from recursify.data import blocks
from recursify.data.blocks import encode, encode_each, separate
from recursify.network.configuration_recursive_llm import from_donor
from tests.support import tiny

EOS = 0


def test_end_of_text_is_not_duplicated() -> None:
    tokenizer = tiny.make_tiny_tokenizer()
    assert encode({"text": ["x<|endoftext|>", "x", ""]}, tokenizer)["input_ids"] == [
        [*tokenizer("x")["input_ids"], 0],
        [*tokenizer("x")["input_ids"], 0],
        [0],
    ]


def test_end_of_text_inside_a_document_is_plain_text() -> None:
    tokenizer = tiny.make_tiny_tokenizer()
    (ids,) = encode({"text": ["x<|endoftext|>y"]}, tokenizer)["input_ids"]
    assert ids == [*tokenizer("x")["input_ids"], 0, *tokenizer("y")["input_ids"], 0]


def test_streamed_encoding_equals_table_encoding(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [" ".join(tiny.sentences(i, i % 7 + 1)) for i in range(150)] + ["x"]
    tokenizer = tiny.make_tiny_tokenizer()
    expected = encode({"text": texts}, tokenizer)["input_ids"]
    for size in (1, 200, blocks.TEXT_AT_ONCE):
        monkeypatch.setattr(blocks, "TEXT_AT_ONCE", size)
        assert [list(row["input_ids"]) for row in encode_each(({"text": text} for text in texts), tokenizer)] == expected


def separate_slowly(row: list[int]) -> tuple[list[int], list[bool]]:
    positions, starts = [], []
    position = 0
    for t in range(len(row)):
        after_end = t > 0 and row[t - 1] == EOS
        position = 0 if after_end or t == 0 else position + 1
        positions.append(position)
        starts.append(after_end)
    return positions, starts


class TestSeparate:
    @given(st.integers(1, 12).flatmap(lambda T: st.lists(st.lists(st.integers(0, 3), min_size=T, max_size=T), min_size=1, max_size=4)))
    def test_separate_equals_a_naive_implementation(self, rows: list[list[int]]) -> None:
        ids = torch.tensor(rows)
        positions, starts = separate(ids, EOS)
        assert ids.tolist() == rows
        assert (positions.dtype, starts.dtype) == (torch.int64, torch.bool)
        assert [tuple(pair) for pair in zip(positions.tolist(), starts.tolist(), strict=True)] == [separate_slowly(row) for row in rows]

    def test_by_hand(self) -> None:
        positions, starts = separate(torch.tensor([[5, 6, 0, 7, 0, 0, 8]]), EOS)
        assert positions.tolist() == [[0, 1, 2, 0, 1, 0, 0]]
        assert starts.tolist() == [[False, False, False, True, False, True, True]]

    @pytest.mark.parametrize("attention", ["eager", "sdpa"])
    def test_packed_documents_equal_single_documents(self, attention: str) -> None:
        shape = {
            "prelude_layers": 1,
            "L_layers": 1,
            "coda_layers": 1,
            "H_cycles": 2,
            "L_cycles": 1,
            "gain_init": 0.3,
            "state_init_std": 0.5,
        }
        torch.manual_seed(0)
        model = RecursiveLLM(from_donor(tiny.tiny_config("qwen2", num_hidden_layers=3), [0, 1, 2], **shape)).eval()
        model.set_attn_implementation(attention)
        rows = [[torch.tensor([*tiny_ids(seed, n), EOS]) for seed, n in enumerate(lengths)] for lengths in ((5, 9, 3), (2, 2, 13))]
        packed = torch.stack([torch.cat(row) for row in rows])
        positions, _ = separate(packed, EOS)
        with torch.no_grad():
            expected = torch.stack([torch.cat([model(document[None], use_cache=False).logits[0] for document in row]) for row in rows])
            apart = model(packed, position_ids=positions, use_cache=False).logits
            together = model(packed, use_cache=False).logits
        torch.testing.assert_close(apart, expected, atol=1e-5, rtol=0)
        assert (together - expected).abs().max() > 0.01


def tiny_ids(seed: int, count: int) -> list[int]:
    return torch.randint(1, 320, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
