"""How many bytes of text each token stands for."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from ..data.blocks import encode_each

if TYPE_CHECKING:
    from datasets import Dataset


_BYTE = re.compile("<0x[0-9A-Fa-f]{2}>")  # byte fallback in SentencePiece vocabularies
_SPACE = "▁"  # SentencePiece's space


def stream_bytes(documents: Dataset, tokenizer: PreTrainedTokenizerBase, tokens: int) -> np.ndarray:
    """UTF-8 bytes of the text of each of the first `tokens` tokens of the documents as packed by `loading.tokenize`.

    A token that is part of a character counts its own bytes. Special tokens count none, nor does a space that the tokenizer prepends to a
    text. The tokens of a document add up to the bytes of its text: if the tokenizer normalises the text or has an unknown token, the
    counts of that document are scaled.

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
    sizes, size = table[ids], len(text.encode("utf-8"))
    written = np.flatnonzero(sizes)
    if len(written) and sizes.sum() == size + 1 and spaced[ids[written[0]]]:
        sizes[written[0]] -= 1
    return sizes * (size / sizes.sum()) if sizes.any() else sizes


def token_bytes(tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """`[vocabulary]`: bytes of the text of each token; 0 for special ones."""
    names, added = _names(tokenizer), tokenizer.added_tokens_decoder
    of_bytes = _is_of_bytes(tokenizer)
    sizes = np.array([len(name) if of_bytes else _size(name) for name in names], np.float64)
    for number, token in added.items():
        sizes[number] = len(token.content.encode("utf-8"))
    sizes[[*tokenizer.all_special_ids, *(number for number, token in added.items() if token.special)]] = 0
    return sizes


def _names(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Token strings by id; empty for an unused id."""
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
    """Whether the vocabulary is byte-level (256 characters that stand for a byte each), as in GPT-2, Llama 3 and Qwen."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return backend is not None and "ByteLevel" in json.dumps(json.loads(backend.to_str())["decoder"])
