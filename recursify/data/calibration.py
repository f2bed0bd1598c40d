"""Calibration text, for example for an early-exit threshold or the position of the loop."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from ..errors import UserError
from ..utils.encodings import read_text

_CHARACTERS = 16  # characters read per requested token: an upper bound


def calibration_windows(
    file: str, tokenizer: PreTrainedTokenizerBase, size: int, most: int, least: int | None = None, flag: str = "--calibration_file"
) -> torch.Tensor:
    """`[windows, size]` token ids from the beginning of a text file.

    Args:
        size: Tokens per window.
        most: Maximum number of windows.
        least: Minimum tokens of the text; None is `size`. A text with fewer than `size` gives one shorter window.
        flag: That names the file, for messages.

    Raises:
        UserError: Not a UTF-8 text, or too short.
    """
    least = size if least is None else least
    try:
        text = read_text(Path(file)).replace("\r\n", "\n")
    except OSError as error:
        raise UserError(f"{flag}: {file} cannot be read ({error.strerror}); name a UTF-8 text file") from error
    except UserError as error:
        raise UserError(f"{flag}: {error}") from error
    ids = tokenizer(text[: size * most * _CHARACTERS], verbose=False)["input_ids"]
    if len(ids) < least:
        raise UserError(f"{flag}: {file} has {len(ids)} tokens; expected at least {least}")
    size = min(size, len(ids))
    count = min(len(ids) // size, most)
    return torch.tensor(ids[: count * size]).view(count, size)
