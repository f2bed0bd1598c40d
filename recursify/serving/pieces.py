"""What an answer is made of: pieces of text, with the log-probabilities of their tokens and the calls of tools in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Spelled:
    """A token by itself.

    Args:
        text: Its text; of a token that is part of a character, `bytes:` and its bytes, such as `bytes:\\xf0`, as in OpenAI's API; of an
            id that the tokenizer has no token for, `token_id:` and the id.
        utf8: The bytes that it adds to the text; None where they are unknown.
    """

    text: str
    utf8: tuple[int, ...] | None


@dataclass(frozen=True)
class TokenLog:
    """A generated token with its log-probability.

    Args:
        logprob: Natural logarithm of the model's probability for it.
        top: The most likely tokens in its place, the most likely first.
        offset: Characters of the text before the first one that the token is part of.
    """

    token: Spelled
    logprob: float
    top: tuple[tuple[Spelled, float], ...]
    offset: int


@dataclass(frozen=True)
class ToolCall:
    """A call of a tool by the model.

    Args:
        number: Position among the calls of its choice, from 0.
        arguments: JSON, as the model wrote it, which may be anything.
    """

    number: int
    id: str
    name: str
    arguments: str


@dataclass(frozen=True)
class Piece:
    """A piece of final text of choice `index`; the last one has the finish reason.

    `tokens` is None where no log-probabilities are wanted.
    """

    index: int
    text: str
    reason: str | None = None
    tokens: tuple[TokenLog, ...] | None = None
    calls: tuple[ToolCall, ...] = ()


def joined(pieces: Sequence[Piece]) -> Piece:
    """All pieces of one choice, at least one, as one."""
    logs = [piece.tokens for piece in pieces if piece.tokens is not None]
    return Piece(
        pieces[-1].index,
        "".join(piece.text for piece in pieces),
        pieces[-1].reason,
        tuple(log for some in logs for log in some) if logs else None,
        tuple(call for piece in pieces for call in piece.calls),
    )
