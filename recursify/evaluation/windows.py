"""Windows over a token stream: what is read, which tokens are scored, and their bytes of text.

    windows = Windows(blocks, stride=64)                          # blocks: rows of `seq_len` ids, one stream that was cut
    windows.ids(0, 8), windows.scored(0, 8)                       # [8, seq_len] ids, and of how many last tokens each is the judge
    windows.bytes_scored(stream_bytes(documents, tokenizer, windows.tokens_read))

Window k reads the `seq_len` tokens from token `k * stride` of the stream on. The first one scores all its tokens but the first, which has
no context. Where windows overlap, each later one scores its last `stride` tokens: those that no window before it has reached. So every
token behind the first is scored once, with at least `seq_len - stride` tokens of context. Where they do not (`stride` = `seq_len`) each
window is by itself and scores all its tokens but the first. What is left at the end and fills no window is not scored. The end-of-text
tokens between documents are tokens like others: they are scored, and stand for no text.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    pass


class Rows(Protocol):
    """A table of `datasets` or a list, whose rows have `input_ids`."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int, /) -> Any: ...


@dataclass(frozen=True)
class Windows:
    """Windows of `seq_len` tokens over a stream.

    Args:
        blocks: Rows of one length `seq_len`, at least 2; concatenated they are the stream.
        stride: 1 to `seq_len`; None is `seq_len`.
        most: Maximum number of windows.
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
        """Tokens of the stream that are read."""
        return (len(self) - 1) * self.step + self.seq_len

    def ids(self, first: int, behind: int) -> Tensor:
        """`[behind - first, seq_len]` ids of the windows from `first` up to but excluding `behind`."""
        length, begin = self.seq_len, first * self.step
        end = (behind - 1) * self.step + length
        rows = (self.blocks[n]["input_ids"] for n in range(begin // length, math.ceil(end / length)))
        stream = torch.cat([torch.as_tensor(row, dtype=torch.long) for row in rows])[begin % length :]
        return stream.unfold(0, length, self.step)[: behind - first]

    def scored(self, first: int, behind: int) -> Tensor:
        """`[behind - first]`: number of scored tokens of each window, its last ones."""
        counts = torch.full((behind - first,), min(self.step, self.seq_len - 1))
        if first == 0:
            counts[0] = self.seq_len - 1
        return counts

    @property
    def per_piece(self) -> int:
        """Number of windows that together score about `seq_len` tokens: one independent piece for standard errors."""
        return math.ceil(self.seq_len / self.step)

    def bytes_scored(self, sizes: np.ndarray) -> float:
        """Bytes of the text of all scored tokens, given the bytes of every token of the stream."""
        starts = np.arange(len(self)) * self.step
        ends = starts + self.seq_len
        sums = np.concatenate([[0.0], np.cumsum(sizes)])
        return float((sums[ends] - sums[ends - self.scored(0, len(self)).numpy()]).sum())
