"""A piece of text, token by token, against plain runs at each depth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from recursify import RecursiveLLM, convert
from recursify.evaluation.token_view import read_passage, text_pieces
from tests.support.tiny import make_tiny_tokenizer, sentences, tiny_model


@pytest.fixture(scope="module")
def model(donor_folder: Path) -> RecursiveLLM:
    torch.manual_seed(1)
    model = convert(str(donor_folder), L_layers=2, keep_donor=True, H_cycles=2, L_cycles=1)
    with torch.no_grad():
        for parameter in model.model.recursion.parameters():
            parameter.normal_()
    return model


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.tensor(make_tiny_tokenizer()(sentences(5, 2)[0] + " 北方的船")["input_ids"])


def by_hand(model: Any, ids: torch.Tensor, **depth: int) -> list[float]:
    with torch.no_grad():
        logits = model(ids[None], **depth).logits[0, :-1]
    return list(F.cross_entropy(logits, ids[1:], reduction="none").tolist())


def test_each_cycle_equals_a_run_of_that_depth(model: RecursiveLLM, ids: torch.Tensor) -> None:
    passage = read_passage(model, make_tiny_tokenizer(), ids, 3)
    assert "".join(passage.tokens) == make_tiny_tokenizer().decode(ids)
    assert len(passage.tokens) == len(ids)
    for H, row in enumerate(passage.nats, start=1):
        assert row == pytest.approx(by_hand(model, ids, H_cycles=H), abs=1e-4)
    assert len(passage.nats) == 3 and passage.nats[0] != passage.nats[1]


def test_without_cycles_and_without_a_loop_there_is_one_row(model: RecursiveLLM, ids: torch.Tensor) -> None:
    plain = tiny_model("llama")
    for read, losses in ((model, by_hand(model, ids, H_cycles=0)), (plain, by_hand(plain, ids))):
        [row] = read_passage(read, make_tiny_tokenizer(), ids, 0).nats
        assert row == pytest.approx(losses, abs=1e-4)


def test_to_dict(model: RecursiveLLM, ids: torch.Tensor) -> None:
    passage = read_passage(model, make_tiny_tokenizer(), ids[:4], 2)
    assert passage.to_dict() == {"tokens": passage.tokens, "nats": passage.nats, "exits": None}


def test_training_mode_is_restored(model: RecursiveLLM, ids: torch.Tensor) -> None:
    model.train()
    read_passage(model, make_tiny_tokenizer(), ids, 1)
    assert model.training
    model.eval()


def test_dropout_is_off_for_passages(ids: torch.Tensor) -> None:
    donor = tiny_model("llama", num_hidden_layers=2, attention_dropout=0.5)
    before = read_passage(donor, make_tiny_tokenizer(), ids, 0)
    donor.train()
    assert read_passage(donor, make_tiny_tokenizer(), ids, 0) == before and donor.training


def test_spaces_before_punctuation_are_kept() -> None:
    tokenizer, text = make_tiny_tokenizer(), " one , two . do n't !"
    assert "".join(text_pieces(tokenizer, tokenizer(text)["input_ids"])) == text


@settings(max_examples=50)
@given(st.text(min_size=1, max_size=30), st.integers(0, 5))
def test_token_texts_join_to_the_text(text: str, cut: int) -> None:
    """Whole documents; and cut ones up to the character that the cut goes through."""
    tokenizer = make_tiny_tokenizer()
    ids = tokenizer(text)["input_ids"]
    kept = ids[: max(1, len(ids) - cut)]
    pieces = text_pieces(tokenizer, kept)
    assert len(pieces) == len(kept) and "".join(pieces) == tokenizer.decode(kept)


def test_multi_token_character_belongs_to_its_last_token() -> None:
    tokenizer = make_tiny_tokenizer()
    pieces = text_pieces(tokenizer, tokenizer("x🦞y")["input_ids"])
    assert pieces[0] == "x" and pieces[-2:] == ["🦞", "y"] and set(pieces[1:-2]) == {""}


def test_end_token_is_shown() -> None:
    tokenizer = make_tiny_tokenizer()
    assert text_pieces(tokenizer, [*tokenizer("x")["input_ids"], tokenizer.eos_token_id]) == ["x", "<|endoftext|>"]


class TakesBack:
    """A decoder that turns a whole run of bytes into unknown characters where its end is cut, as that of SentencePiece does."""

    def decode(self, ids: list[int], **_: Any) -> str:
        return {1: "北", 2: "\ufffd\ufffd", 3: "北方"}[len(ids)]


def test_decoder_cleanup_does_not_move_characters() -> None:
    assert text_pieces(TakesBack(), [7, 8, 9]) == ["北", "", "方"]  # type: ignore[arg-type]
