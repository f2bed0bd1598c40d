"""Which text to train on and to measure on, as the settings name it. What is read of it: documents.py."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from ..errors import UserError
from ..utils.options import Options

# What is set aside for validation where a data set has no split for it.
HELD_OUT_SHARE = 0.05
HELD_OUT_SEED = 0


@dataclass(kw_only=True)
class TextSource(Options):
    """Data: a data set of text."""

    dataset_name: str = "wikitext"
    """Hub dataset (wikitext is Salesforce/wikitext), a local .txt, .jsonl, .json, .csv or .parquet file, a folder of them, or a question
    set such as permutations:difficulty=2-8, to train on its answers."""

    dataset_config_name: str | None = None
    """Configuration of the hub data set; wikitext-2-raw-v1 for wikitext when none is named."""

    text_column: str = "text"
    """Column that holds the text (plain .txt files have none)."""


@dataclass(kw_only=True)
class DataSettings(TextSource):
    """Data: a data set, with others mixed in, read from a table on disk or as a stream."""

    mix: tuple[str, ...] = ()
    """More data sets to train on, each as NAME=WEIGHT: WEIGHT times as many blocks as dataset_name gives, repeated where there are
    fewer. NAME is what dataset_name may be; dataset_config_name is not for these. Validation stays dataset_name's own alone."""

    streaming: bool = False
    """Read and tokenise the text while training on it, for data sets that are too large for the disk. Validation is the
    first 256 blocks of the data set's own validation split, or of its text, which training then leaves out."""


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
