"""A prompt as token ids, checked against the model's vocabulary and positions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt with its token ids, checked against a model."""

    text: str
    ids: list[int]


def encode_prompt(model: Any, tokenizer: PreTrainedTokenizerBase, prompt: str, max_new_tokens: int = 0) -> EncodedPrompt:
    """Tokenize a prompt and check that the model can continue it.

    Raises:
        UserError: As `prompt_ids` and `check_ids`.
    """
    ids = prompt_ids(tokenizer, prompt)
    check_ids(model, ids, max_new_tokens)
    return EncodedPrompt(prompt, ids)


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str, field: str = "--prompt") -> list[int]:
    """Token ids of a prompt, with the leading special tokens that the tokenizer adds, and without a trailing end token.

    Args:
        field: Where the prompt comes from, for errors: a flag, or a field of a request.

    Raises:
        UserError: An empty prompt, or one that is not valid UTF-8.
    """
    check_prompt(prompt, field)
    ids = list(tokenizer(prompt, verbose=False).input_ids)
    if not tokenizer.num_special_tokens_to_add():
        bare = ids
    else:
        bare = tokenizer(prompt, add_special_tokens=False, verbose=False).input_ids
        while len(ids) > len(bare) and ids[-1] == tokenizer.eos_token_id and ids[-len(bare) :] != bare:
            ids.pop()
    if not bare:
        raise UserError(f"{field}: the tokenizer makes no token of {prompt!r}; expected some text to continue")
    return ids


def check_ids(model: Any, ids: Sequence[int], max_new_tokens: int = 0) -> None:
    """Check that a prompt and its completion fit the model's context and vocabulary.

    Raises:
        UserError: No ids, too many for the model's positions, or ids outside its vocabulary.
    """
    if not ids:
        raise UserError("--prompt: expected some tokens to continue, got none")
    vocabulary = model.get_input_embeddings().num_embeddings
    if max(ids) >= vocabulary:
        raise UserError(
            f"--tokenizer_path: the tokenizer gives token {max(ids)}, the model knows 0 to {vocabulary - 1}: they do not belong together; "
            "name the tokenizer that was saved with the checkpoint"
        )
    _check_length(len(ids), max_new_tokens, getattr(model.config, "max_position_embeddings", None))


def end_tokens(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """All end tokens: those of the model's generation config and the tokenizer's own. Chat models have several."""
    of_model = model.generation_config.eos_token_id
    found = [*(of_model if isinstance(of_model, list) else [of_model]), tokenizer.eos_token_id]
    return [int(token) for token in dict.fromkeys(found) if token is not None]


def check_prompt(prompt: str, field: str = "--prompt") -> None:
    if not prompt.strip():
        cure = "; leave --prompt out for the interactive mode" if field == "--prompt" else ""
        raise UserError(f"{field} is empty: expected some text to continue, got {prompt!r}{cure}")
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"{field}: expected UTF-8 text, got {prompt!r}, which has a stray byte at position {error.start}") from error


def _check_length(prompt: int, new: int, positions: int | None) -> None:
    if positions is None or prompt + new <= positions:
        return
    room = positions - prompt
    cure = f"use --max_new_tokens {room} or less" if room > 0 else f"shorten the prompt to {positions - 1} tokens or less"
    raise UserError(
        f"--max_new_tokens: the prompt has {prompt} tokens and {new} more are asked for, {prompt + new} in all, but the model has "
        f"{positions} positions; {cure}"
    )
