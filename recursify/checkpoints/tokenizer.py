"""The tokenizer of a folder or hub repository."""

from __future__ import annotations

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..errors import UserError, first_line
from .repository import check_place, find_file, require_file

# Each of these files holds a vocabulary. Without one, AutoTokenizer may build an empty tokenizer from config.json without a warning.
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json", "tiktoken.model")


def load_tokenizer(name: str, *, revision: str | None = None, token: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or hub repository.

    Args:
        revision, token: Of the hub, as `from_pretrained` takes them.

    Raises:
        UserError: No tokenizer there, or a revision of a folder.
    """
    check_place(name, "a tokenizer", revision)
    hub = {"revision": revision, "token": token}
    try:
        if not any(find_file(name, file, **hub) for file in _TOKENIZERS):
            require_file(name, _TOKENIZERS[0], **hub)
        return AutoTokenizer.from_pretrained(name, **hub)
    except UserError as error:
        raise UserError(f"{error}; or name a folder that has a tokenizer with --tokenizer_path") from error
    except Exception as error:  # tokenizers raises bare exceptions
        reason = first_line(error)
        raise UserError(f"{name}: its tokenizer cannot be loaded ({reason}); name a folder that has one with --tokenizer_path") from error
