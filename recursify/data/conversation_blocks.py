"""Conversations packed into blocks: cut where they are too long, whole otherwise, and apart from each other by their positions.

    blocks = conversation_blocks(load_documents(settings).train, tokenizer, seq_len=512, train_on="assistant", name="chats.jsonl")

A block has the columns `input_ids`, `labels` and `position_ids`. Positions begin anew at every conversation, which gives packed ones a
block-diagonal mask. (`blocks.separate` does it for text by its end-of-text tokens, of which one conversation may hold several.)
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset, Features, List, Value
from datasets.fingerprint import Hasher
from transformers import PreTrainedTokenizerBase

from ..errors import UserError
from ..network.losses import IGNORED
from .blocks import check_blocks
from .cached_dataset import bars_on_terminals_only, identity_of, make_table
from .conversation_rows import Encoder, TrainOn
from .conversations import COLUMN

logger = logging.getLogger(__name__)

COLUMNS = ("input_ids", "labels", "position_ids")

ROWS_AT_ONCE = 200  # encoded and written at once
# Blocks that are filled at once: a conversation goes into the fullest one that has room for it.
OPEN_BLOCKS = 32


def conversation_blocks(documents: Dataset, tokenizer: PreTrainedTokenizerBase, seq_len: int, train_on: TrainOn, name: str) -> Dataset:
    """Tokenize and pack conversations. What is longer than a block loses its end; how many do is logged.

    Args:
        documents: Table with the columns `conversation` and `place`.
        tokenizer: As for `Encoder`.
        seq_len: Ids per block.
        train_on: As for `Encoder`.
        name: For messages.

    Returns:
        A table with `input_ids`, `labels` (-100 where nothing is trained) and `position_ids`, `seq_len` each.

    Raises:
        UserError: An unsuitable tokenizer, a conversation that its template refuses, or nothing to train on.
    """
    check_blocks(tokenizer, seq_len)
    encoder = Encoder(tokenizer, train_on)
    if encoder.leaves_out_the_end():
        logger.warning(
            "the {% generation %} markers of the chat template leave out the token that ends a turn: the model will not learn to stop; "
            "mend the template, or give --train_on all"
        )
    with bars_on_terminals_only():
        encoded = documents.map(
            encode, batched=True, batch_size=ROWS_AT_ONCE, remove_columns=documents.column_names, desc="Tokenizing",
            fn_kwargs={"encoder": encoder}, features=_ENCODED,
            new_fingerprint=Hasher.hash([encode.__name__, documents._fingerprint, identity_of(tokenizer), encoder.template, train_on]),
        )  # fmt: skip
        _tell_what_is_cut(encoded, seq_len, name)
        gen_kwargs = {"encoded": encoded.with_format("numpy"), "seq_len": seq_len, "filler": tokenizer.eos_token_id}
        return make_table(pack, gen_kwargs, block_features(seq_len), [encoded._fingerprint, seq_len], ROWS_AT_ONCE)


def block_features(seq_len: int, columns: Iterable[str] = COLUMNS) -> Features:
    """The features of blocks with these columns, of `seq_len` int32 each."""
    return Features({name: List(Value("int32"), length=seq_len) for name in columns})


# `first` is the first position whose label is trained on, or the length of the row where none is. (That of position 0 is not.)
_ENCODED = Features({"input_ids": List(Value("int32")), "labels": List(Value("int32")), "first": Value("int32")})


def encode(batch: dict[str, list[str]], encoder: Encoder) -> dict[str, list[Any]]:
    """The ids and labels of each conversation, uncut."""
    found: dict[str, list[Any]] = {name: [] for name in _ENCODED}
    for row, place in zip(batch[COLUMN], batch["place"], strict=True):
        try:
            ids, labels = encoder(json.loads(row))
        except UserError as error:
            raise UserError(f"{place}: {error}") from error
        found["input_ids"].append(ids)
        found["labels"].append(labels)
        found["first"].append(next((at for at in range(1, len(ids)) if labels[at] != IGNORED), len(ids)))
    return found


def _tell_what_is_cut(encoded: Dataset, seq_len: int, name: str) -> None:
    table = encoded.select_columns(["input_ids", "first"]).with_format("arrow")[:]
    lengths, first = (np.asarray(column) for column in (pc.list_value_length(table["input_ids"]), table["first"]))
    cut, lost = int((lengths > seq_len).sum()), int((first >= np.minimum(lengths, seq_len)).sum())
    if lost == len(lengths):
        raise UserError(
            f"{name}: none of {len(lengths)} conversations has a token to train on among its first {seq_len}; "
            "give a larger --seq_len, or rows with answers"
        )
    if cut:
        logger.warning("%s: %d of %d conversations are longer than --seq_len %d and were cut", name, cut, len(lengths), seq_len)
    if lost:
        logger.warning("%s: %d of %d conversations have no token left to train on and were left out", name, lost, len(lengths))


def pack(encoded: Iterable[Any], seq_len: int, filler: int) -> Iterator[dict[str, np.ndarray]]:
    """Blocks of whole rows, each cut to `seq_len`, padded with a token without a label; rows without a trained label are left out."""
    blocks: list[_Block] = []
    for row in encoded:
        ids, labels = row["input_ids"][:seq_len], row["labels"][:seq_len]
        if row["first"] >= len(ids):
            continue
        fitting = [block for block in blocks if block.size + len(ids) <= seq_len]
        if not fitting and len(blocks) == OPEN_BLOCKS:
            blocks.remove(fullest := max(blocks, key=lambda block: block.size))
            yield fullest.filled(seq_len, filler)
        if not fitting:
            blocks.append(_Block())
        (max(fitting, key=lambda block: block.size) if fitting else blocks[-1]).add(ids, labels)
    yield from (block.filled(seq_len, filler) for block in blocks)


class _Block:
    """Rows of one block, before it is filled up."""

    def __init__(self) -> None:
        self.size = 0
        self.rows: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []

    def add(self, ids: np.ndarray, labels: np.ndarray) -> None:
        self.rows.append((ids, labels, np.arange(len(ids), dtype=np.int32)))
        self.size += len(ids)

    def filled(self, seq_len: int, filler: int) -> dict[str, np.ndarray]:
        rest = seq_len - self.size
        end = (np.full(rest, filler, np.int32), np.full(rest, IGNORED, np.int32), np.arange(rest, dtype=np.int32))
        return {name: np.concatenate(parts) for name, parts in zip(COLUMNS, zip(*self.rows, end, strict=True), strict=True)}
