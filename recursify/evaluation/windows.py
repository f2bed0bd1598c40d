"""A text in windows: what is read, what of it is scored, and how many bytes of text that is.

    windows = Windows(blocks, stride=64)                          # blocks: rows of `seq_len` ids, one stream that was cut
    windows.ids(0, 8), windows.scored(0, 8)                       # [8, seq_len] ids, and of how many last tokens each is the judge
    windows.bytes_scored(stream_bytes(documents, tokenizer, windows.tokens_read))

Window k reads the `seq_len` tokens from token `k * stride` of the stream on. The first one scores all its tokens but the first, which has
no context. Where windows overlap, each later one scores its last `stride` tokens: those that no window before it has reached. So every
token behind the first is scored once, with at least `seq_len - stride` tokens of context. Where they do not (`stride` = `seq_len`) each
window is by itself and scores all its tokens but the first. What is left at the end and fills no window is not scored. The end-of-text
tokens between documents are tokens like others: they are scored, and stand for no text.

Floor 1.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..data.blocks import encode_each

if TYPE_CHECKING:
    from datasets import Dataset

_BYTE = re.compile("<0x[0-9A-Fa-f]{2}>")  # a byte that no token covers, in vocabularies of SentencePiece
_SPACE = "▁"  # how these write a space


class Rows(Protocol):
    """A table of `datasets` or a list, whose rows have `input_ids`."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int, /) -> Any: ...


@dataclass(frozen=True)
class Windows:
    """Windows of `seq_len` tokens over a stream.

    Args:
        blocks: Of one length, `seq_len`, at least 2; end to end they are the stream.
        stride: 1 to `seq_len`; None is `seq_len`.
        most: Take only the first so many.
    """

    blocks: Rows
    stride: int | None = None
    most: int | None = None

    @cached_property
    def seq_len(self) -> int:
        return len(self.blocks[0]["input_ids"])

    @property
    def step(self) -> int:
        return self.stride or self.seq_len

    def __len__(self) -> int:
        there = 1 + (len(self.blocks) - 1) * self.seq_len // self.step
        return there if self.most is None else min(self.most, there)

    @property
    def tokens_read(self) -> int:
        """Of the stream, from its beginning."""
        return (len(self) - 1) * self.step + self.seq_len

    def ids(self, first: int, behind: int) -> Tensor:
        """`[behind - first, seq_len]` ids of the windows from `first` up to `behind`."""
        length, begin = self.seq_len, first * self.step
        end = (behind - 1) * self.step + length
        rows = (self.blocks[n]["input_ids"] for n in range(begin // length, math.ceil(end / length)))
        stream = torch.cat([torch.as_tensor(row, dtype=torch.long) for row in rows])[begin % length :]
        return stream.unfold(0, length, self.step)[: behind - first]

    def scored(self, first: int, behind: int) -> Tensor:
        """`[behind - first]`: how many tokens each window scores, its last ones."""
        counts = torch.full((behind - first,), min(self.step, self.seq_len - 1))
        if first == 0:
            counts[0] = self.seq_len - 1
        return counts

    @property
    def per_piece(self) -> int:
        """Windows that together score about `seq_len` tokens: the pieces that a standard error takes as independent."""
        return math.ceil(self.seq_len / self.step)

    def bytes_scored(self, sizes: np.ndarray) -> float:
        """Bytes of the text of all scored tokens, given those of every token of the stream."""
        starts = np.arange(len(self)) * self.step
        ends = starts + self.seq_len
        sums = np.concatenate([[0.0], np.cumsum(sizes)])
        return float((sums[ends] - sums[ends - self.scored(0, len(self)).numpy()]).sum())


def mean_and_error(sums: Tensor, counts: Tensor, per_piece: int = 1) -> tuple[float, float | None]:
    """The mean over all tokens and its standard error, which takes pieces of neighbouring windows as independent; None for one piece.

    Pieces of unequal length count by their length (a ratio estimate); of equal length, this is the standard error of the mean of means.

    Args:
        sums: `[windows]` sums over the tokens of each window.
        counts: `[windows]` tokens of each.
        per_piece: Windows that are one piece.
    """
    total, tokens = sums.double().sum().item(), counts.double().sum().item()
    mean = total / tokens
    pieces = torch.stack([sums.double(), counts.double()]).split(per_piece, dim=1)
    if len(pieces) == 1:
        return mean, None
    by_piece = torch.stack([piece.sum(dim=1) for piece in pieces], dim=1)
    off = by_piece[0] - mean * by_piece[1]
    return mean, math.sqrt(len(pieces) / (len(pieces) - 1) * off.square().sum().item()) / tokens


def stream_bytes(documents: Dataset, tokenizer: PreTrainedTokenizerBase, tokens: int) -> np.ndarray:
    """Bytes of text, in UTF-8, of each of the first `tokens` tokens of the stream that `data.tokenize` makes of the documents.

    A token that is part of a character has its own bytes of it. Special tokens have none, nor has a space that a tokenizer puts before a
    text by itself. The tokens of a document add up to the bytes of its text: where a tokenizer changes the text before it cuts it, or has
    a token for whatever it does not know, all tokens of that document are scaled to that.

    Args:
        documents: Table with a column `text`.
    """
    table, spaced = token_bytes(tokenizer), _spaced(tokenizer)
    found: list[np.ndarray] = []
    count = 0
    for document, row in zip(documents, encode_each(documents, tokenizer), strict=True):
        found.append(_of_document(document["text"], row["input_ids"], table, spaced))
        count += len(found[-1])
        if count >= tokens:
            break
    return np.concatenate(found)[:tokens]


def _of_document(text: str, ids: np.ndarray, table: np.ndarray, spaced: np.ndarray) -> np.ndarray:
    sizes, size = table[ids], len(text.encode("utf-8", errors="replace"))
    written = np.flatnonzero(sizes)
    if len(written) and sizes.sum() == size + 1 and spaced[ids[written[0]]]:
        sizes[written[0]] -= 1
    return sizes * (size / sizes.sum()) if sizes.any() else sizes


def token_bytes(tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """`[vocabulary]`: bytes of the text that each token stands for; 0 for special ones."""
    names, added = _names(tokenizer), tokenizer.added_tokens_decoder
    of_bytes = _is_of_bytes(tokenizer)
    sizes = np.array([len(name) if of_bytes else _size(name) for name in names], np.float64)
    for number, token in added.items():
        sizes[number] = len(token.content.encode("utf-8"))
    sizes[[*tokenizer.all_special_ids, *(number for number, token in added.items() if token.special)]] = 0
    return sizes


def _names(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """By id; empty where there is a gap."""
    vocabulary = tokenizer.get_vocab()
    names = [""] * (max(vocabulary.values()) + 1)
    for name, number in vocabulary.items():
        names[number] = name
    return names


def _spaced(tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    return np.array([name.startswith(_SPACE) for name in _names(tokenizer)])


def _size(name: str) -> int:
    return 1 if _BYTE.fullmatch(name) else len(name.replace(_SPACE, " ").encode("utf-8", errors="replace"))


def _is_of_bytes(tokenizer: Any) -> bool:
    """Whether tokens are written in the alphabet of 256 characters that stand for a byte each, as GPT-2, Llama 3 and Qwen have it."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return backend is not None and "ByteLevel" in json.dumps(json.loads(backend.to_str())["decoder"])
