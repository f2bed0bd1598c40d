"""From the log-probabilities of tokens to those of a text: how each token is spelled, and which piece of the text it belongs to."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Collection, Sequence
from typing import Any

import torch

from ..inference.streaming import UNFINISHED, TextPieces
from .pieces import Spelled, TokenLog
from .sampling import Logged

_LEAST = -9999.0  # OpenAI's value for an improbable token; JSON has no infinity
# Byte-level tokenizers write each byte as a visible character: itself, or one from 256 on.
_VISIBLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_BYTE_OF = {chr(byte): byte for byte in _VISIBLE} | {
    chr(256 + n): byte for n, byte in enumerate(byte for byte in range(256) if byte not in _VISIBLE)
}
_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")  # Llama's kind of tokenizer, for bytes of characters that it has no token for


class Spelling:
    """Text and bytes of single tokens of a tokenizer."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        # Behind another token, since some decoders drop the space of a first word.
        self.before: list[int] = tokenizer("a", add_special_tokens=False).input_ids[-1:]
        self.shown = self._decode(self.before)
        self.known: dict[int, Spelled] = {}

    def __getitem__(self, token: int) -> Spelled:
        if token not in self.known:
            self.known[token] = self._spelled(token)
        return self.known[token]

    def _spelled(self, token: int) -> Spelled:
        raw = self.tokenizer.convert_ids_to_tokens(token)
        if raw is None:
            return Spelled(f"token_id:{token}", None)
        text = self._decode([*self.before, token]).removeprefix(self.shown)
        if UNFINISHED not in text:
            return Spelled(text, tuple(text.encode("utf-8")))
        utf8 = _bytes_of(raw)
        if utf8 is None:
            return Spelled(f"token_id:{token}", None)
        try:
            return Spelled(utf8.decode("utf-8"), tuple(utf8))
        except UnicodeDecodeError:
            return Spelled("bytes:" + "".join(f"\\x{byte:02x}" for byte in utf8), tuple(utf8))

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


class TextLog:
    """The log-probabilities of one text, each released with the first character that its token is part of.

    End tokens and tokens of a stop string, which are not in the text, are left out.

    Args:
        start: The last tokens of the prompt: decoders need the preceding token.
        ends: End tokens.
    """

    def __init__(self, spelling: Spelling, start: Sequence[int], ends: Collection[int]):
        self.spelling, self.ends = spelling, ends
        self.waiting: deque[TokenLog] = deque()
        self.decoded = self.released = 0  # characters, those of a stop string included, and those of the text so far
        self.decoder = TextPieces(spelling.tokenizer, self._count)
        self.decoder.put(torch.tensor(list(start)))

    def put(self, token: int, logged: Logged) -> None:
        """Add the next token."""
        if token in self.ends:
            return
        top = tuple((self.spelling[other], _finite(logprob)) for other, logprob in logged.top)
        self.waiting.append(TokenLog(self.spelling[token], _finite(logged.logprob), top, self.decoded))
        self.decoder.put(torch.tensor([token]))

    def take(self, text: str, finished: bool) -> tuple[TokenLog, ...]:
        """What belongs to the next piece of the text, which may be empty; with the last piece, everything that is left."""
        self.released += len(text)
        if finished:
            self.decoder.end()
        whole = finished and self.decoded <= self.released  # no stop string was cut off
        taken = []
        while self.waiting and (whole or self.waiting[0].offset < self.released):
            taken.append(self.waiting.popleft())
        return tuple(taken)

    def _count(self, text: str) -> None:
        self.decoded += len(text)


def _bytes_of(raw: str) -> bytes | None:
    """The bytes of a token from its name in the vocabulary; None if it is of neither known kind."""
    if (found := _BYTE_TOKEN.fullmatch(raw)) is not None:
        return bytes([int(found[1], 16)])
    return bytes(_BYTE_OF[char] for char in raw) if all(char in _BYTE_OF for char in raw) else None


def _finite(logprob: float) -> float:
    return logprob if logprob > _LEAST else _LEAST  # also for one that is no number
