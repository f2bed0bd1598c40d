"""The records of local files, one at a time, each with its place for messages: .jsonl, .json, .csv and .parquet."""

from __future__ import annotations

import csv
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import UserError
from ..utils.encodings import not_utf8, open_text, read_text
from ..utils.files import parse_json

# Rows of a .parquet file read at once.
ROWS_AT_ONCE = 64

Records = Iterator[tuple[str, Any]]


def read_jsonl(path: Path, columns: Collection[str]) -> Records:
    with open_text(path) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield f"{path}, line {number}", _parse(line, f"{path}, line {number}")


def read_json(path: Path, columns: Collection[str]) -> Records:
    """A list of objects, or one object per line as in ``.jsonl``."""
    with open_text(path) as file:
        is_list = file.read(1024).lstrip().startswith("[")
    if not is_list:
        yield from read_jsonl(path, columns)
        return
    for number, record in enumerate(_parse(read_text(path), str(path))):
        yield f"{path}, element {number}", record


def read_csv(path: Path, columns: Collection[str]) -> Records:
    csv.field_size_limit(2**31 - 1)  # the default allows no document beyond 128 KiB
    with open_text(path, newline="") as file:
        rows = csv.DictReader(file)
        for column in columns:
            if (count := list(rows.fieldnames or ()).count(column)) > 1:
                raise UserError(f"{path}: expected one column {column!r}, got {count}; rename the others")
        for number, row in enumerate(rows, 1):
            yield f"{path}, row {number}", {name: row[name] for name in row if name}


def read_parquet(path: Path, columns: Collection[str]) -> Records:
    """Only these columns, as far as they are there; without any named, all of them."""
    number = 0
    with pq.ParquetFile(path) as file:
        wanted = [name for name in file.schema_arrow.names if name in columns or not columns]
        for batch in file.iter_batches(batch_size=ROWS_AT_ONCE, columns=wanted):
            for row in batch.to_pylist():
                number += 1
                yield f"{path}, row {number}", row


# Suffix -> reads the records of a file; the columns are those that the caller asks for.
RECORDS: dict[str, Callable[[Path, Collection[str]], Records]] = {
    ".jsonl": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
    ".parquet": read_parquet,
}


def _parse(content: str, place: str) -> Any:
    try:
        return parse_json(content)
    except ValueError as error:
        raise UserError(f"{place} is not valid JSON ({error}); expected an object with the text column") from error


@contextmanager
def file_errors(path: Path) -> Iterator[None]:
    """Raise what goes wrong while a file is read as a UserError that names it."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise not_utf8(path, error) from error
    except (OSError, pa.ArrowException, csv.Error) as error:
        raise UserError(f"{path} cannot be read as {path.suffix}: {error}") from error
