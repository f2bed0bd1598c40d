"""Packing: tokenized documents concatenated and cut into blocks, and the document boundaries within a block.

    rows = encode_each(documents, tokenizer)         # ids of each document, ending in an end-of-text token
    cut_blocks(rows, seq_len=128)                    # the same ids, 128 in every block
    separate(ids, tokenizer.eos_token_id)            # of a batch of blocks: positions that begin anew, and where

The generators see one document or one block at a time, so they serve a table as well as a stream. Needs no library for datasets.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..errors import UserError

# Tokenized at once: at most this many documents and this much text.
DOCUMENTS_AT_ONCE = 64
TEXT_AT_ONCE = 8 << 20


def encode(batch: dict[str, list[str]], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Column ``input_ids``: the ids of each text, ending in exactly one end-of-text token even if the tokenizer appends one itself."""
    eos = tokenizer.eos_token_id
    # verbose=False: documents may well be longer than the model's context, they are cut afterwards
    rows = tokenizer(batch["text"], return_attention_mask=False, return_token_type_ids=False, verbose=False)["input_ids"]
    return {"input_ids": [ids if ids and ids[-1] == eos else [*ids, eos] for ids in rows]}


def encode_each(documents: Iterable[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> Iterator[dict[str, np.ndarray]]:
    """The rows of ``encode`` for these documents, tokenized in small batches."""
    texts: list[str] = []
    size = 0
    for document in documents:
        texts.append(document["text"])
        size += len(document["text"])
        if len(texts) == DOCUMENTS_AT_ONCE or size >= TEXT_AT_ONCE:
            yield from _encoded_rows(texts, tokenizer)
            texts, size = [], 0
    yield from _encoded_rows(texts, tokenizer)


def _encoded_rows(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[dict[str, np.ndarray]]:
    for ids in encode({"text": texts}, tokenizer)["input_ids"] if texts else []:
        yield {"input_ids": np.asarray(ids, np.int32)}


def cut_blocks(encoded: Iterable[Any], seq_len: int) -> Iterator[dict[str, np.ndarray]]:
    """Blocks of ``seq_len`` ids from the concatenation of all rows (arrays), holding one row and one partial block in memory."""
    rest = np.empty(0, np.int32)
    for row in encoded:
        ids = np.concatenate([rest, row["input_ids"]])
        whole = len(ids) - len(ids) % seq_len
        for start in range(0, whole, seq_len):
            yield {"input_ids": ids[start : start + seq_len]}
        rest = ids[whole:]


def separate(input_ids: Tensor, eos_token_id: int) -> tuple[Tensor, Tensor]:
    """Position ids that give packed documents a block-diagonal attention mask; every document ends in an end-of-text token.

    Without an attention mask and a cache, transformers treats restarting position ids as packed documents, none of which attends to
    another (``transformers.masking_utils``).

    Args:
        input_ids: [B, T] ids.

    Returns:
        position_ids: [B, T], 0 at the start of the row and after every end-of-text token, then counting up.
        starts: [B, T], whether a document begins here, except at the row's first position. Position t is scored against label
            t + 1, so a label there would have a token predicted from another document.
    """
    starts = torch.zeros_like(input_ids, dtype=torch.bool)
    starts[:, 1:] = input_ids[:, :-1] == eos_token_id
    index = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
    begun_at = (index * starts).cummax(dim=1).values
    return index - begun_at, starts


def check_blocks(tokenizer: PreTrainedTokenizerBase, seq_len: int) -> None:
    """Raises UserError for a tokenizer without an end-of-text token, or a ``seq_len`` that is no length."""
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"tokenizer {tokenizer.name_or_path or type(tokenizer).__name__!r} has no eos_token, and documents must end in one: "
            'name it in tokenizer_config.json ("eos_token"), or use the tokenizer of the donor'
        )
    if seq_len < 1:
        raise UserError(f"--seq_len is the number of tokens in a block and must be at least 1, not {seq_len}")


def too_short(tokens: int, documents: int, seq_len: int) -> UserError:
    return UserError(
        f"the text is too short: {tokens} tokens in {documents} document(s) do not fill one block of --seq_len {seq_len}; "
        "give more text or a smaller --seq_len (the part set aside for validation is short, too)"
    )
