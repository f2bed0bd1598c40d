"""Streaming of generated text: whole characters, up to a stop string or an end token, per row of a batch.

`generate` of transformers calls a stopping criterion once per new column of tokens; `Rows` is one that does all of it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, Literal

import torch
from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerBase, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

Finish = Literal["stop", "length", "interrupted"]
UNFINISHED = "\ufffd"  # what a decoder puts for bytes that are no whole character


class TextPieces(BaseStreamer):
    """Passes on text while `generate` runs; every piece is final, and joined they are the whole text.

    transformers' own streamer holds back a word until the next space. This one holds back only the bytes of an incomplete character, as
    `DecodeStream` of tokenizers does; a tokenizer of transformers that is not built on that library decodes its text anew for each token.

    Args:
        special: Whether special tokens have text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, on_text: Callable[[str], object], special: bool = False):
        self.tokenizer, self.on_text, self.special = tokenizer, on_text, special
        self.backend = getattr(tokenizer, "_tokenizer", None)
        self.stream: DecodeStream | None = None
        self.waiting: list[int] = []  # tokens whose text is not out yet
        self.ids: list[int] = []
        self.shown = ""  # of `ids`, where the tokenizer is not built on tokenizers
        self.prompt_comes = True

    def put(self, value: torch.Tensor) -> None:
        ids = value.flatten().tolist()
        if self.prompt_comes:  # `generate` puts the prompt first
            self.prompt_comes, self.ids = False, ids
            self.stream = DecodeStream(ids=ids, skip_special_tokens=not self.special)
            self.shown = self._decode(ids) if ids and self.backend is None else ""
            return
        for token in ids:
            self._add(token)

    def end(self) -> None:
        """No more tokens come: what is left of an incomplete character is shown as such."""
        if self.backend is None:
            self._pass_on(self._decode(self.ids)[len(self.shown) :])
        else:
            self._pass_on(self._decode(self.waiting))

    def _add(self, token: int) -> None:
        self.waiting.append(token)
        if self.backend is not None:
            assert self.stream is not None
            self._pass_on(self.stream.step(self.backend, token) or "")
            return
        self.ids.append(token)
        text = self._decode(self.ids)
        if not text.endswith(UNFINISHED):
            self._pass_on(text[len(self.shown) :])
            self.shown = text

    def _pass_on(self, piece: str) -> None:
        if piece:
            self.waiting = []
            self.on_text(piece)

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=not self.special, clean_up_tokenization_spaces=False))


class UntilStop:
    """Hands on text up to the first stop string. What may be the beginning of one is held back until that is known.

    The string that is complete first counts, so it does not matter how the text is cut into pieces.

    Args:
        stop: None of them empty.
    """

    def __init__(self, stop: Sequence[str], on_text: Callable[[str], object]):
        self.stop, self.on_text = tuple(stop), on_text
        self.held = ""
        self.met = False

    def put(self, piece: str) -> None:
        if self.met:
            return
        self.held += piece
        found = [(at + len(stop), at) for stop in self.stop if (at := self.held.find(stop)) >= 0]
        self.met = bool(found)
        self._release(min(found)[1] if found else len(self.held) - self._may_begin())

    def end(self) -> None:
        """No more text comes: what is held back was no stop string."""
        if not self.met:
            self._release(len(self.held))

    def _release(self, count: int) -> None:
        piece, self.held = self.held[:count], self.held[count:]
        if piece:
            self.on_text(piece)

    def _may_begin(self) -> int:
        """Characters at the end that may be the beginning of a stop string."""
        longest = max((len(stop) - 1 for stop in self.stop), default=0)
        lengths = range(min(longest, len(self.held)), 0, -1)
        return next((n for n in lengths if any(stop.startswith(self.held[-n:]) for stop in self.stop)), 0)


class Row:
    """One text of a batch while it is written.

    Args:
        prompt_ids: What was read; decoders look at the token before.
        ends: Tokens that end the text and have none themselves.
        stop: Strings before which the text ends.
        on_text: Gets each piece as soon as it is final.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompt_ids: Sequence[int],
        ends: Collection[int] = (),
        stop: Sequence[str] = (),
        on_text: Callable[[str], object] | None = None,
    ):
        self.prompt_ids, self.ends, self.on_text = list(prompt_ids), ends, on_text
        self.token_ids: list[int] = []
        self.texts: list[str] = []
        self.finish: Finish | None = None  # None while the text goes on
        self._until = UntilStop(stop, self._emit)
        self._pieces = TextPieces(tokenizer, self._until.put)
        self._pieces.put(torch.tensor(self.prompt_ids))

    @property
    def text(self) -> str:
        """What has been handed on so far."""
        return "".join(self.texts)

    def put(self, token: int) -> None:
        """The next token of the text, which has not ended."""
        self.token_ids.append(token)
        if token in self.ends:
            self.close("stop")
            return
        self._pieces.put(torch.tensor([token]))
        if self._until.met:
            self.finish = "stop"

    def close(self, finish: Finish) -> None:
        """The text ends here, unless it has ended; what is still held back comes out."""
        if self.finish is None:
            self._pieces.end()
            self._until.end()
            self.finish = "stop" if self._until.met else finish

    def _emit(self, piece: str) -> None:
        self.texts.append(piece)
        if self.on_text is not None:
            self.on_text(piece)


class Rows(StoppingCriteria):
    """Gives every row its tokens as they come, and says which rows have ended.

    Args:
        rows: One per row of the batch, in its order.
        read: Columns of the batch that are prompt and padding.
        should_stop: Asked after each column; True ends all rows there.
    """

    def __init__(self, rows: Sequence[Row], read: int, should_stop: Callable[[], bool] | None = None):
        self.rows, self.seen, self.should_stop = rows, read, should_stop

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.BoolTensor:
        for column in input_ids[:, self.seen :].T.tolist():
            for row, token in zip(self.rows, column, strict=True):
                if row.finish is None:
                    row.put(token)
            if self.should_stop is not None and self.should_stop():
                self.close("interrupted")
        self.seen = input_ids.shape[1]
        return torch.tensor([row.finish is not None for row in self.rows], device=input_ids.device)  # type: ignore[return-value]

    def close(self, finish: Finish) -> None:
        """No more tokens come."""
        for row in self.rows:
            row.close(finish)
