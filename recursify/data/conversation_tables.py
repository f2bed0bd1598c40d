"""Conversations as tables, from local files or from the rows of a dataset: the row as JSON, and its place for messages."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Value

from ..errors import UserError
from .cached_dataset import make_table
from .conversations import COLUMN, FURTHER, form_of, row_json, without_nulls
from .records import RECORDS, file_errors

logger = logging.getLogger(__name__)

FEATURES = Features({COLUMN: Value("large_string"), "place": Value("string")})

ROWS_AT_ONCE = 1000  # written at once


def conversation_files(files: list[Path], form: tuple[str, ...], state: Any) -> Dataset:
    """The conversations of local files, in order; those without an answer are left out, which is logged.

    Args:
        state: What the cache is keyed by: changes whenever a file does.

    Raises:
        UserError: A file that cannot be read, or a row that is not of this form.
    """
    return make_table(read_conversations, {"files": files, "form": form}, FEATURES, [state, form], ROWS_AT_ONCE)


def as_conversations(rows: Dataset, form: tuple[str, ...], name: str) -> Dataset:
    """The conversations of a dataset, as `conversation_files`; ``name`` is for messages.

    Raises:
        UserError: A row that is not of this form.
    """
    if missing := [column for column in form if column not in rows.column_names]:
        raise UserError(f"{name}: expected rows of {' and '.join(form)} in every split, one has no {missing[0]!r}")
    rows = rows.select_columns([column for column in rows.column_names if column in (*form, *FURTHER)])
    gen_kwargs = {"rows": rows, "form": form, "name": name}
    return make_table(read_rows, gen_kwargs, FEATURES, [rows._fingerprint, form, name], ROWS_AT_ONCE)


def form_of_file(path: Path) -> tuple[str, ...] | None:
    """The form of conversations that the first record of a file has; None if it has none."""
    if path.suffix.lower() not in RECORDS:
        return None
    with file_errors(path):
        _, first = next(RECORDS[path.suffix.lower()](path, ()), ("", None))
    return form_of(first) if isinstance(first, dict) else None


def not_streamed(name: str, form: tuple[str, ...]) -> UserError:
    return UserError(
        f"--streaming: {name} has rows of {' and '.join(form)}, which are packed before training, so that it can be told what is cut; "
        "leave --streaming out, or name a column of text with --text_column"
    )


def read_conversations(files: list[Path], form: tuple[str, ...]) -> Iterator[dict[str, str]]:
    """The rows of `conversation_files`, one at a time."""
    for path in files:
        if path.suffix.lower() not in RECORDS:
            raise UserError(f"{path}: expected rows of {' and '.join(form)}, as in other files of the folder, got text; add it with --mix")
        with file_errors(path):
            records = RECORDS[path.suffix.lower()](path, (*form, *FURTHER))
            if path.suffix.lower() == ".parquet":
                records = ((place, without_nulls(record)) for place, record in records)
            yield from _written(records, form, str(path))


def read_rows(rows: Dataset, form: tuple[str, ...], name: str) -> Iterator[dict[str, str]]:
    """The rows of `as_conversations`, one at a time."""
    yield from _written(((f"{name}, row {number}", without_nulls(row)) for number, row in enumerate(rows)), form, name)


def _written(records: Iterable[tuple[str, Any]], form: tuple[str, ...], name: str) -> Iterator[dict[str, str]]:
    count, without = 0, 0
    for place, record in records:
        row = row_json(record, form, place)
        count, without = count + 1, without + (row is None)
        if row is not None:
            yield {COLUMN: row, "place": place}
    if without:
        logger.warning("%s: %d of %d rows have no %s and are left out", name, without, count, repr(form[-1]))
