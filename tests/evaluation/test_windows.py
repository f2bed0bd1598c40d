"""Which tokens are scored, from how much context, and their bytes of text, with byte-level BPE and SentencePiece tokenizers."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from recursify.data.loading import tokenize
from recursify.evaluation.statistics import mean_and_error
from recursify.evaluation.token_bytes import stream_bytes, token_bytes
from recursify.evaluation.windows import Windows
from tests.support.tiny import make_tiny_tokenizer

LENGTH, TOKENS = 8, 48
ENGLISH, CHINESE, EMOJI = "the ship  crosses the river.", "北方的船穿过河流。", "naïve 🦞👩‍👩‍👧 – the end"
TEXTS = (ENGLISH, CHINESE, EMOJI, " the = Heading = ", f"the {CHINESE} the {EMOJI}\n\nthe")


def sentencepiece(prepend: bool = True) -> PreTrainedTokenizerFast:
    """As Llama 2's: a space before every text by default, spaces as ▁, bytes where there is no letter, `<s>` before a text."""
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefghijklmnopqrstuvwxyz", "▁t", "he", "▁the"]
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he")]
    bpe = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, merges, unk_token="<unk>", byte_fallback=True))
    steps = [normalizers.Prepend("▁")] * prepend + [normalizers.Replace(" ", "▁")]
    bpe.normalizer = normalizers.Sequence(steps)
    bpe.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    bpe.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def metaspace() -> PreTrainedTokenizerFast:
    """As later ones: a space before a text only where it does not begin with one."""
    tokenizer = sentencepiece(prepend=False)
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence([])
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return tokenizer


TOKENIZERS = {"bytes": make_tiny_tokenizer, "sentencepiece": sentencepiece, "bare": lambda: sentencepiece(False), "metaspace": metaspace}


def stream(length: int = LENGTH) -> Dataset:
    """Tokens 0 to 47, in blocks."""
    return Dataset.from_dict({"input_ids": np.arange(TOKENS, dtype=np.int32).reshape(-1, length)})


def documents(*texts: str) -> Dataset:
    return Dataset.from_dict({"text": list(texts)})


@pytest.mark.parametrize("stride", [1, 3, 4, 7])
def test_every_token_but_the_first_is_scored_once(stride: int) -> None:
    windows = Windows(stream(), stride)
    ids, scored = windows.ids(0, len(windows)), windows.scored(0, len(windows))
    places = [int(i) for row, count in zip(ids, scored, strict=True) for i in row[-count:]]
    assert places == list(range(1, windows.tokens_read)) and windows.tokens_read > TOKENS - stride
    for row, count in zip(ids[1:], scored[1:], strict=True):
        assert LENGTH - int(count) >= LENGTH - stride and row.tolist() == list(range(int(row[0]), int(row[0]) + LENGTH))


def test_without_overlap_windows_are_the_blocks() -> None:
    for windows in (Windows(stream()), Windows(stream(), LENGTH)):
        assert torch.equal(windows.ids(0, len(windows)), torch.arange(TOKENS).view(-1, LENGTH))
        assert windows.scored(0, len(windows)).tolist() == [LENGTH - 1] * 6 and windows.per_piece == 1


def test_batched_windows_equal_all_windows() -> None:
    windows = Windows(stream(), 3, most=9)
    assert len(windows) == 9 and windows.tokens_read == 8 * 3 + LENGTH
    whole, counts = windows.ids(0, 9), windows.scored(0, 9)
    for first, behind in ((0, 4), (4, 8), (8, 9)):
        assert torch.equal(windows.ids(first, behind), whole[first:behind])
        assert torch.equal(windows.scored(first, behind), counts[first:behind])
    assert len(Windows(stream(), 3, most=99)) == len(Windows(stream(), 3)) == 14


def test_standard_error_of_equal_windows() -> None:
    means = torch.tensor([1.0, 2.5, 2.0, 4.0], dtype=torch.float64)
    mean, error = mean_and_error(means * 7, torch.full((4,), 7))
    assert mean == pytest.approx(means.mean().item()) and error == pytest.approx(means.std().item() / 2)
    assert mean_and_error(means[:1], torch.tensor([1])) == (1.0, None)


def test_overlapping_windows_form_one_piece() -> None:
    """A smaller stride does not shrink the error."""
    sums, counts = torch.tensor([3.0, 1.0, 6.0, 2.0, 2.0]), torch.tensor([7, 2, 2, 2, 2])
    mean, error = mean_and_error(sums, counts, 2)
    assert mean == pytest.approx(14 / 15)
    off = [4 - mean * 9, 8 - mean * 4, 2 - mean * 2]
    assert error == pytest.approx(math.sqrt(3 / 2 * sum(x * x for x in off)) / 15)
    assert mean_and_error(sums, counts, 5)[1] is None
    assert Windows(stream(), 1).per_piece == 8 and Windows(stream(), 3).per_piece == 3


@given(
    st.lists(st.tuples(st.floats(0, 90), st.integers(1, 30)), min_size=1, max_size=12),
    st.integers(1, 5),
)
def test_mean_and_error_of_any_windows(windows: list[tuple[float, int]], per_piece: int) -> None:
    """Against the ratio estimate written out in fractions, piece by piece."""
    pieces = [windows[first : first + per_piece] for first in range(0, len(windows), per_piece)]
    total, tokens = (sum(Fraction(window[part]) for window in windows) for part in (0, 1))
    off = [sum(Fraction(nats) - total / tokens * count for nats, count in piece) for piece in pieces]
    mean, error = mean_and_error(
        torch.tensor([w[0] for w in windows], dtype=torch.float64), torch.tensor([w[1] for w in windows]), per_piece
    )
    assert mean == pytest.approx(float(total / tokens))
    if len(pieces) == 1:
        assert error is None
    else:
        wanted = math.sqrt(Fraction(len(pieces), len(pieces) - 1) * sum(x * x for x in off)) / tokens
        assert error == pytest.approx(float(wanted), abs=1e-9)


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("text", TEXTS)
def test_token_bytes_sum_to_the_text(kind: str, text: str) -> None:
    tokenizer = TOKENIZERS[kind]()
    row = tokenizer(text)["input_ids"]
    sizes = stream_bytes(documents(text), tokenizer, len(row) + 1)
    assert sizes.sum() == len(text.encode()) and len(sizes) == len(row) + 1
    assert sizes[-1] == 0 and np.array_equal(sizes, sizes.round())  # nothing scaled


def test_partial_character_counts_its_bytes() -> None:
    for kind, part in (("bytes", 1), ("sentencepiece", 1)):
        tokenizer = TOKENIZERS[kind]()
        lobster = tokenizer("🦞", add_special_tokens=False)["input_ids"][-4:]
        assert token_bytes(tokenizer)[lobster].tolist() == [part] * 4


def test_bytes_are_independent_of_the_tokenizer() -> None:
    """Of a whole text, through windows of which the first begins with a space of the text's own."""
    text = " the river " * 20
    for make in TOKENIZERS.values():
        tokenizer, table = make(), documents(text, text)
        windows = Windows(tokenize(table, tokenizer, 10), 5)
        sizes = stream_bytes(table, tokenizer, windows.tokens_read)
        everything = stream_bytes(table, tokenizer, 10**6)
        assert everything.sum() == 2 * len(text) and np.array_equal(everything[: len(sizes)], sizes)
        assert windows.bytes_scored(sizes) == sizes[1:].sum()


def test_windows_may_end_within_a_character() -> None:
    tokenizer, table = make_tiny_tokenizer(), documents(CHINESE * 10)
    windows = Windows(tokenize(table, tokenizer, 10))
    sizes = stream_bytes(table, tokenizer, windows.tokens_read)
    # every token is one byte: the tokenizer has seen no Chinese
    assert windows.bytes_scored(sizes) == 9 * len(windows) == sizes.sum() - len(windows)


def test_normalised_text_keeps_its_byte_count() -> None:
    """Qwen's composes letters and accents; the bytes are those of the file."""
    tokenizer, text = make_tiny_tokenizer(), "cafe\u0301 " * 7
    row = tokenizer(text)["input_ids"]
    assert token_bytes(tokenizer)[row].sum() < len(text.encode())
    assert stream_bytes(documents(text), tokenizer, 10**6).sum() == pytest.approx(len(text.encode()))


def test_special_tokens_count_no_bytes() -> None:
    tokenizer = sentencepiece()
    tokenizer.add_tokens(["<think>"])
    sizes = token_bytes(tokenizer)
    assert sizes[[tokenizer.bos_token_id, tokenizer.eos_token_id]].tolist() == [0, 0]
    assert sizes[tokenizer.convert_tokens_to_ids("<think>")] == 7
    assert stream_bytes(documents("the <think> of"), tokenizer, 99).sum() == 14


def test_each_token_of_a_text_has_its_own_bytes() -> None:
    """The space that a tokenizer puts before a text is taken off the first token that stands for text, and off no other."""
    for kind, sizes in (("sentencepiece", [0, 3, 1, 1]), ("metaspace", [0, 3, 1, 1]), ("bare", [0, 1, 2, 1, 1])):
        assert stream_bytes(documents("the a"), TOKENIZERS[kind](), 99)[: len(sizes)].tolist() == sizes, kind
    assert stream_bytes(documents(" the a"), TOKENIZERS["bare"](), 99)[:4].tolist() == [0, 4, 1, 1]


def test_bytes_are_scaled_if_the_tokenizer_changes_the_length() -> None:
    """One byte more is the tokenizer's own space only where the first token has one."""
    tokenizer = sentencepiece(prepend=False)
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("q", "qq")
    assert stream_bytes(documents("aq"), tokenizer, 4).tolist() == pytest.approx([0, 2 / 3, 2 / 3, 2 / 3])


def test_sentencepiece_with_a_byte_level_postprocessor_is_not_byte_level() -> None:
    tokenizer, other = sentencepiece(), sentencepiece()
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    assert np.array_equal(token_bytes(tokenizer), token_bytes(other)) and token_bytes(tokenizer).max() == 4


def test_unused_ids_count_no_bytes() -> None:
    words = Tokenizer(models.WordLevel({"a": 0, "bcd": 5, "<unk>": 2}, unk_token="<unk>"))
    assert token_bytes(PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")).tolist() == [1, 0, 0, 0, 0, 3]
