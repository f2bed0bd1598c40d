"""The tokenizer of a folder or hub repository."""

from __future__ import annotations

from transformers import (
    AutoTokenizer,
    PreTrainedTokenizerBase,
)

from ..errors import UserError, first_line
from .repository import check_place, find_file, require_file

# Any of these holds a vocabulary. Without one, AutoTokenizer may make an empty tokenizer from config.json and say nothing.
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json", "tiktoken.model")


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder or on the hub.

    Raises:
        UserError: None there.
    """
    check_place(name, "a tokenizer")
    try:
        if not any(find_file(name, file) for file in _TOKENIZERS):
            require_file(name, _TOKENIZERS[0])
        return AutoTokenizer.from_pretrained(name)
    except UserError as error:
        raise UserError(f"{error}; or name a folder that has a tokenizer with --tokenizer_path") from error
    except Exception as error:  # tokenizers raises bare exceptions
        reason = first_line(error)
        raise UserError(f"{name}: its tokenizer cannot be loaded ({reason}); name a folder that has one with --tokenizer_path") from error
