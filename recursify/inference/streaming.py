"""Streaming of generated text: whole characters, up to a stop string or an end token, per row of a batch.

`generate` of transformers calls a stopping criterion once per new column of tokens; `Rows` is one that does all of it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from typing import Any, Literal

import torch
from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerBase, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

Finish = Literal["stop", "length", "interrupted"]
UNFINISHED = "\ufffd"  # replacement for incomplete UTF-8


class TextPieces(BaseStreamer):
    """A streamer for `generate`: every piece of text is final, and joined they are the whole text.

    transformers' TextStreamer holds back a word until the next space. This one holds back only the bytes of an incomplete character, with
    `DecodeStream` of tokenizers; for a tokenizer that is not built on that library, pending tokens are decoded again at each token.

    Args:
        special: Whether to keep special tokens in the text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, on_text: Callable[[str], object], special: bool = False):
        self.tokenizer, self.on_text, self.special = tokenizer, on_text, special
        self.backend = getattr(tokenizer, "_tokenizer", None)
        self.stream: DecodeStream | None = None
        self.waiting: list[int] = []  # tokens whose text is pending
        self.ids: list[int] = []
        self.shown = ""  # of `ids`, where the tokenizer is not built on tokenizers
        self.prompt_comes = True

    def put(self, value: torch.Tensor) -> None:
        ids = value.flatten().tolist()
        if self.prompt_comes:  # the first call has the prompt
            self.prompt_comes, self.ids = False, ids
            self.stream = DecodeStream(ids=ids, skip_special_tokens=not self.special)
            self.shown = self._decode(ids) if ids and self.backend is None else ""
            return
        for token in ids:
            self._add(token)

    def end(self) -> None:
        """End of the tokens: flush, with the replacement character for an incomplete one."""
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
    """Forwards text up to the first stop string, holding back what may be the beginning of one.

    The stop string that completes first wins, so the result does not depend on how the text is split into pieces.

    Args:
        stop: Stop strings, not empty.
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
        """End of the text: flush what is held back."""
        if not self.met:
            self._release(len(self.held))

    def _release(self, count: int) -> None:
        piece, self.held = self.held[:count], self.held[count:]
        if piece:
            self.on_text(piece)

    def _may_begin(self) -> int:
        """Number of trailing characters that may begin a stop string."""
        longest = max((len(stop) - 1 for stop in self.stop), default=0)
        lengths = range(min(longest, len(self.held)), 0, -1)
        return next((n for n in lengths if any(stop.startswith(self.held[-n:]) for stop in self.stop)), 0)


class Row:
    """State of one sequence of a batch during generation.

    Args:
        prompt_ids: The prompt: decoders need the preceding token.
        ends: End tokens, which are not part of the text.
        stop: Stop strings, which are not part of the text.
        on_text: Called with each piece as soon as it is final.
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
        self.finish: Finish | None = None  # None while the sequence is running
        self._until = UntilStop(stop, self._emit)
        self._pieces = TextPieces(tokenizer, self._until.put)
        self._pieces.put(torch.tensor(self.prompt_ids))

    @property
    def text(self) -> str:
        """The text so far."""
        return "".join(self.texts)

    def put(self, token: int) -> None:
        """Add the next token of a running sequence."""
        self.token_ids.append(token)
        if token in self.ends:
            self.close("stop")
            return
        self._pieces.put(torch.tensor([token]))
        if self._until.met:
            self.finish = "stop"

    def close(self, finish: Finish) -> None:
        """Finish the sequence, unless it has finished, and flush."""
        if self.finish is None:
            self._pieces.end()
            self._until.end()
            self.finish = "stop" if self._until.met else finish

    def _emit(self, piece: str) -> None:
        self.texts.append(piece)
        if self.on_text is not None:
            self.on_text(piece)


class Rows(StoppingCriteria):
    """A stopping criterion for `generate` that passes each row its tokens and reports which rows have finished.

    Args:
        rows: One per row of the batch.
        read: Number of columns of prompt and padding.
        should_stop: Called after each column; True finishes all rows.
    """

    def __init__(self, rows: Sequence[Row], read: int, should_stop: Callable[[], bool] | None = None):
        self.rows, self.seen, self.should_stop = rows, read, should_stop
        self.first_at: float | None = None  # `time.perf_counter` at the first token

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.BoolTensor:
        if self.first_at is None:
            self.first_at = time.perf_counter()
        for column in input_ids[:, self.seen :].T.tolist():
            for row, token in zip(self.rows, column, strict=True):
                if row.finish is None:
                    row.put(token)
            if self.should_stop is not None and self.should_stop():
                self.close("interrupted")
        self.seen = input_ids.shape[1]
        return torch.tensor([row.finish is not None for row in self.rows], device=input_ids.device)  # type: ignore[return-value]

    def close(self, finish: Finish) -> None:
        """Finish all rows."""
        for row in self.rows:
            row.close(finish)
