"""Flags that name the text to train and evaluate on."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from ..errors import UserError
from ..utils.options import Options

# Held out for validation if a dataset has no validation split.
HELD_OUT_SHARE = 0.05
HELD_OUT_SEED = 0


@dataclass(kw_only=True)
class TextSource(Options):
    """Data: a dataset of text."""

    dataset_name: str = "wikitext"
    """Hub dataset (wikitext is Salesforce/wikitext), a local .txt, .jsonl, .json, .csv or .parquet file, a folder of them, or a question
    set such as permutations:difficulty=2-8 or gsm8k:train.jsonl, to train on its answers. A .txt file is one document, unless lines
    <|endoftext|> divide it. Rows with messages, with prompt and completion, or with instruction and output are conversations."""

    dataset_config_name: str | None = None
    """Configuration of the hub dataset. Default: wikitext-2-raw-v1 for wikitext."""

    text_column: str | None = None
    """Column with the text; ignored for .txt files. Default: text, unless the columns are those of conversations."""


@dataclass(kw_only=True)
class DataSettings(TextSource):
    """Data: training datasets, from disk or streamed."""

    mix: tuple[str, ...] = ()
    """Additional training datasets as NAME=WEIGHT: WEIGHT times as many blocks as dataset_name, repeated where there are fewer. An epoch
    is one pass over dataset_name, which alone provides the validation split."""

    train_on: Literal["assistant", "all"] = "assistant"
    """Tokens of conversations that are trained on: the assistant's turns or the completion (assistant), or all. Text is trained on whole,
    questions on their answers."""

    streaming: bool = False
    """Read and tokenize while training, for datasets larger than the disk; needs max_steps or max_tokens. Validation: the first 256 blocks
    of the validation split, or of the data, which are then not trained on."""


def parse_mix(entries: Iterable[str]) -> list[tuple[str, float]]:
    """Names and weights of ``NAME=WEIGHT``; a name may hold a ``=``.

    Raises:
        UserError: An entry without a name or without a weight that is a positive number.
    """
    parsed = []
    for entry in entries:
        name, _, written = entry.rpartition("=")
        try:
            weight = float(written)
        except ValueError:
            weight = math.nan
        if not name or not 0 < weight < math.inf:
            raise UserError(f"--mix: expected NAME=WEIGHT with a weight above 0, such as book.txt=0.5, got {entry!r}")
        parsed.append((name, weight))
    return parsed
