"""The tokenizer of a folder or hub repository."""

from __future__ import annotations

import logging
from importlib.util import find_spec

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..errors import UserError, first_line
from .repository import check_place, find_file, require_file

logger = logging.getLogger(__name__)

# Each of these files holds a vocabulary. Without one, AutoTokenizer may build an empty tokenizer from config.json without a warning.
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json", "tiktoken.model")


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, rows: int, name: str) -> None:
    """Check that the model has a row for every token of its tokenizer.

    Args:
        rows: Number of embeddings of the model.
        name: Of the model, for the error.

    Raises:
        UserError: A token without a row: a tokenizer of another model, or tokens that were added without resizing the model.
    """
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest >= rows:
        raise UserError(
            f"{name}: the tokenizer has tokens up to id {largest}, the model only {rows} rows: they do not belong together; "
            "name the model's own tokenizer with --tokenizer_path, or give an extended one its rows first: "
            "model.resize_token_embeddings(len(tokenizer))"
        )
    if largest < rows // 2:
        logger.warning(
            "%s: the tokenizer has %d tokens, the model %d rows; text of another model's tokenizer makes no sense", name, largest + 1, rows
        )


def load_tokenizer(name: str, *, revision: str | None = None, token: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or hub repository.

    Args:
        revision, token: Of the hub, as `from_pretrained` takes them.

    Raises:
        UserError: No tokenizer there, one that cannot be used, or a revision of a folder.
    """
    check_place(name, "a tokenizer", revision)
    hub = {"revision": revision, "token": token}
    try:
        if not any(find_file(name, file, **hub) for file in _TOKENIZERS):
            require_file(name, _TOKENIZERS[0], **hub)
        found = AutoTokenizer.from_pretrained(name, **hub)
        found.decode(found("a b").input_ids)  # some settings of other types are met by the first text only
        return found
    except UserError as error:
        raise UserError(f"{error}; or name a folder that has a tokenizer with --tokenizer_path") from error
    except Exception as error:  # tokenizers raises bare exceptions
        reason = first_line(error)
        if find_spec("sentencepiece") is None and not find_file(name, _TOKENIZERS[0], **hub) and find_file(name, "tokenizer.model", **hub):
            reason = "it has tokenizer.model alone, which needs a package that is not installed: pip install sentencepiece"
        raise UserError(f"{name}: its tokenizer cannot be loaded ({reason}); name a folder that has one with --tokenizer_path") from error
