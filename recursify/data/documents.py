"""Documents from local files or the hub, split into training and validation.

    documents = load_documents(TextSource(dataset_name="wikitext"))     # tables, one document per row in a column `text`
    train, own = open_documents(TextSource(dataset_name="book.txt"))    # the same to be read again and again, and no table

Whatever the source, generators (`read_files`, `join_articles`) see one document at a time, so they serve tables as well as streams.
Rows of conversations (conversations.py) are documents, too: their tables have the column `conversation` in place of `text`, and `place`.
"""

from __future__ import annotations

import logging
import random
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, DatasetDict, Features, IterableDataset, IterableDatasetDict, Value
from datasets.exceptions import DatasetNotFoundError, DatasetsError

from ..errors import UserError, short
from ..utils.encodings import check_characters, open_text, read_text
from ..utils.files import parse_json
from ..utils.http import httpx
from .cached_dataset import bars_on_terminals_only, make_table
from .conversation_tables import as_conversations, conversation_files, form_of_file, not_streamed
from .conversations import COLUMN, form_of
from .question_sets import file_wanted, is_questions
from .records import RECORDS, file_errors
from .settings import HELD_OUT_SEED, HELD_OUT_SHARE, TextSource
from .tasks import FORMATS

logger = logging.getLogger(__name__)

WIKITEXT = "Salesforce/wikitext"
WIKITEXT_CONFIG = "wikitext-2-raw-v1"
DOCUMENT_SEPARATOR = "<|endoftext|>"

VALIDATION_NAMES = ("validation", "valid", "val", "dev")
SPLIT_WORDS = {"train": "train", "training": "train", "test": "test", **dict.fromkeys(VALIDATION_NAMES, "validation")}

# Rows per batch: fewer than datasets' default of 1000, so that a batch of books fits in memory.
DOCUMENTS_AT_ONCE = 64

# 64-bit offsets: a batch of books may pass the 2 GiB that plain strings can hold.
DOCUMENT_FEATURES = Features({"text": Value("large_string")})

TEXT_COLUMN = "text"  # where none is named

# Starts reading documents from the first one.
Reader = Callable[[], Iterator[dict[str, str]]]


@dataclass(frozen=True)
class Documents:
    """Training and validation text: tables with one document per row in the column ``text``, or ``conversation``."""

    train: Dataset
    validation: Dataset


def load_documents(settings: TextSource) -> Documents:
    """Load the dataset ``dataset_name`` as tables of documents.

    The validation documents are the dataset's own (``validation``, ``valid``, ``val`` or ``dev``; in a folder, the files with such
    a word in their name). Where it has none, 5 % of the documents, at least one, are set aside by a fixed seed. A
    dataset that is one single document loses its last 5 % of characters, cut at a paragraph, line or word, and a warning says so.
    A test split is never used.

    A local ``.txt`` file is one document, or several that lines ``<|endoftext|>`` divide. In the other formats a row is a
    document; blank ones are dropped. Rows of conversations are recognised by their columns, unless ``text_column`` names one, and are
    tables with the columns ``conversation`` (the row as JSON) and ``place`` (file and line). Only WikiText's rows, which are single lines,
    are joined: one document per article, from one level-1 heading to the next.

    Raises:
        UserError: If the dataset is missing, unreadable, empty, has no such text column, or is a question set; a malformed conversation.
    """
    if settings.dataset_name in FORMATS and not Path(settings.dataset_name).exists():
        raise UserError(f"--dataset_name: {file_wanted(settings.dataset_name)}")
    if is_questions(settings.dataset_name):
        raise UserError(f"--dataset_name {settings.dataset_name}: expected text, got questions; evaluate and compare ask --questions")
    with bars_on_terminals_only():
        train, validation = _load_local(settings) if _is_local(settings.dataset_name) else _load_hub(settings)
        return Documents(train, validation) if validation is not None else hold_out(train, settings.dataset_name)


def measured_documents(settings: TextSource, split: str | None = None) -> tuple[Dataset, str]:
    """The documents to measure a model on, and in words which they are.

    By default a local file is measured whole, and of a folder the validation files, else the test files, else all; of a hub dataset the
    validation split, as training holds it out.

    Args:
        split: `validation` is what training validates on: the dataset's own split, or what is held out of it. `test` are the test files of
            a folder, `all` is everything in it.

    Raises:
        UserError: As `load_documents`; a split that is not there.
    """
    name = settings.dataset_name
    settings = replace(settings, text_column=settings.text_column or TEXT_COLUMN)  # conversations are not measured
    if split == "validation" or (split is None and not _is_local(name)) or is_questions(name):
        return load_documents(settings).validation, "validation split"
    if not _is_local(name):
        raise UserError(f"--split {split}: expected validation for a hub dataset such as {name}; download its files to measure others")
    splits = _text_splits(settings)
    whole = split == "all" or (split is None and Path(name).expanduser().is_file())
    part = None if whole else split or next((each for each in ("validation", "test") if each in splits), None)
    if part is not None and part not in splits:
        raise UserError(f"--split {split}: {name} has no file with {part} in its name; it has files for {', '.join(splits)}")
    files = splits[part] if part else [file for each in splits.values() for file in each]
    table = _read_table(files, settings.text_column or TEXT_COLUMN, None)
    if len(table) == 0:
        raise UserError(f"{name} holds no text: every document in {', '.join(file.name for file in files[:3])} is empty")
    return table, f"{part} files" if part else "all of it"


def open_documents(settings: TextSource) -> tuple[Reader, Reader | None]:
    """Readers of the training documents and of the dataset's own validation split (None if it has none).

    Raises:
        UserError: As `load_documents`, as far as the first document shows it; what comes later is raised while it is read.
    """
    return _read_local(settings) if _is_local(settings.dataset_name) else _read_hub(settings)


def hold_out(documents: Dataset, name: str) -> Documents:
    """Hold out documents for validation, with a fixed seed; a single document is split in two. ``name`` is for error messages."""
    count = len(documents)
    if count == 1 and COLUMN in documents.column_names:
        raise UserError(f"{name}: expected at least 2 conversations, one of them to validate on, found 1; add more")
    if count == 1:
        train, validation = split_text(documents[0]["text"])
        logger.warning(
            "dataset %r is one single document and has no validation split: its last %d of %d characters are set aside for validation",
            name, len(validation), len(train) + len(validation),
        )  # fmt: skip
        return Documents(_from_text(train), _from_text(validation))
    chosen = set(random.Random(HELD_OUT_SEED).sample(range(count), max(1, round(count * HELD_OUT_SHARE))))
    logger.info("dataset %r has no validation split: %d of %d documents are set aside", name, len(chosen), count)
    return Documents(documents.select([i for i in range(count) if i not in chosen]), documents.select(sorted(chosen)))


def split_text(text: str) -> tuple[str, str]:
    """Split a text before its last 5 %, or up to another 5 % earlier at the end of a paragraph, line or word."""
    latest = int(len(text) * (1 - HELD_OUT_SHARE))
    earliest = int(len(text) * (1 - 2 * HELD_OUT_SHARE))
    for boundary in ("\n\n", "\n", " "):
        found = text.rfind(boundary, earliest, latest)
        if found >= 0:
            return text[: found + len(boundary)], text[found + len(boundary) :]
    return text[:latest], text[latest:]


def _from_text(text: str) -> Dataset:
    """A table on disk: datasets caches only what derives from one."""
    return make_table(_one_document, {"text": text}, DOCUMENT_FEATURES, text, DOCUMENTS_AT_ONCE)


def _one_document(text: str) -> Iterator[dict[str, str]]:
    yield {"text": text}


# Local files


def _is_local(name: str) -> bool:
    """Whether the name is a local path. ``wikitext`` is always the hub's; use ``./wikitext`` for a folder of that name."""
    if name in ("wikitext", WIKITEXT):
        return False
    shaped = name.startswith((".", "/", "~")) or name.endswith("/") or "\\" in name or name.count("/") > 1
    return shaped or Path(name).suffix.lower() in READERS or Path(name).exists()


def _load_local(settings: TextSource) -> tuple[Dataset, Dataset | None]:
    splits = _local_splits(settings)
    form = None if settings.text_column else form_of_file(splits["train"][0])
    column = settings.text_column or TEXT_COLUMN
    tables = {split: _read_table(files, column, form) for split, files in splits.items() if split != "test"}
    if len(tables["train"]) == 0:
        named = ", ".join(file.name for file in splits["train"][:3])
        raise UserError(f"{settings.dataset_name} holds no text: every document in {named} is empty")
    validation = tables.get("validation")
    return tables["train"], validation if validation is not None and len(validation) else None


def _read_local(settings: TextSource) -> tuple[Reader, Reader | None]:
    splits = _local_splits(settings)
    if not settings.text_column and (form := form_of_file(splits["train"][0])):
        raise not_streamed(settings.dataset_name, form)
    column = settings.text_column or TEXT_COLUMN
    train, own = (partial(read_files, splits.get(split, []), column) for split in ("train", "validation"))
    return train, own if "validation" in splits else None


def _local_splits(settings: TextSource) -> dict[str, list[Path]]:
    """Text files by split, some of them to train on."""
    splits = _text_splits(settings)
    if "train" not in splits:
        named = ", ".join(file.name for files in splits.values() for file in files[:3])
        raise UserError(
            f"{settings.dataset_name} has no text to train on: by their names, its files ({named}, ...) are all for validation or test"
        )
    return splits


def _text_splits(settings: TextSource) -> dict[str, list[Path]]:
    if settings.dataset_config_name:
        raise UserError(
            f"{settings.dataset_name} is local and has no configurations; leave out --dataset_config_name {settings.dataset_config_name}"
        )
    path = Path(settings.dataset_name).expanduser()
    splits = find_files(path)
    if sum(map(len, splits.values())) > 1:
        splits = {split: kept for split, files in splits.items() if (kept := _without_metadata(files, settings.text_column or TEXT_COLUMN))}
    return splits


def find_files(path: Path) -> dict[str, list[Path]]:
    """Files by split, sorted. A single file is for training; in a folder the split is taken from the path, innermost part first."""
    if not path.exists():
        raise UserError(f"no file or folder {path}; {ACCEPTED}, or a dataset of the Hugging Face hub by its name")
    if path.is_file():
        if path.suffix.lower() not in READERS:
            raise UserError(f"cannot read {path}: unknown suffix {path.suffix!r}; {ACCEPTED}")
        return {"train": [path]}
    splits: dict[str, list[Path]] = {}
    for file in sorted(path.rglob("*")):
        inside = file.relative_to(path)
        hidden = any(part.startswith(".") for part in inside.parts)
        if file.is_file() and not hidden and file.suffix.lower() in READERS:
            splits.setdefault(split_of(inside), []).append(file)
    if not splits:
        raise UserError(f"folder {path} holds no text files; {ACCEPTED}")
    return splits


def split_of(inside: Path) -> str:
    """``train``, ``validation`` or ``test`` by the whole words in a path: ``book_valid.txt``, ``dev/a.txt``; ``latest.txt`` is no test."""
    for part in (inside.stem, *reversed(inside.parent.parts)):
        for word in re.findall("[a-z]+", part.lower()):
            if word in SPLIT_WORDS:
                return SPLIT_WORDS[word]
    return "train"


def _read_table(files: list[Path], column: str, form: tuple[str, ...] | None) -> Dataset:
    """The documents of files: the texts of a column, or conversations of a form."""
    state = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    if form is not None:
        return conversation_files(files, form, state)
    return make_table(read_files, {"files": files, "column": column}, DOCUMENT_FEATURES, [state, column], DOCUMENTS_AT_ONCE)


def read_files(files: list[Path], column: str) -> Iterator[dict[str, str]]:
    """The documents of local files, in order, blank ones dropped. The suffix tells the format."""
    for path in files:
        with file_errors(path):
            yield from _without_blanks(READERS[path.suffix.lower()](path, column))


def _without_blanks(texts: Iterable[str | None]) -> Iterator[dict[str, str]]:
    for text in texts:
        if text and not text.isspace():
            yield {"text": text.strip("\n")}


def _read_txt(path: Path, column: str) -> Iterator[str]:
    lines: list[str] = []
    with open_text(path) as file:
        for line in file:
            if "\0" in line:
                raise UserError(f"{path}: expected UTF-8 text, got a NUL in {short(line)}; name a text file")
            if line.strip() == DOCUMENT_SEPARATOR:
                yield "".join(lines)
                lines = []
            else:
                lines.append(line)
    yield "".join(lines)


def _read_records(path: Path, column: str) -> Iterator[str | None]:
    yield from _fields(RECORDS[path.suffix.lower()](path, (column,)), column, path)


def _read_parquet(path: Path, column: str) -> Iterator[str | None]:
    with pq.ParquetFile(path) as file:
        schema = file.schema_arrow
        _require_column(schema.names, column, str(path))
        _require_text(_is_text(schema.field(column).type), column, schema.field(column).type, str(path))
        for batch in file.iter_batches(batch_size=DOCUMENTS_AT_ONCE, columns=[column]):
            yield from batch.column(0).to_pylist()


READERS: dict[str, Callable[[Path, str], Iterator[str | None]]] = {
    ".txt": _read_txt,
    ".jsonl": _read_records,
    ".parquet": _read_parquet,
    ".json": _read_records,
    ".csv": _read_records,
}


ACCEPTED = f"accepted are {', '.join(READERS)} files and folders of them"


def _without_metadata(files: list[Path], column: str) -> list[Path]:
    for path in (each for each in files if each.suffix.lower() == ".json" and _is_metadata(each, column)):
        logger.warning("%s: an object without %r beside other files: taken for metadata and left out", path, column)
        files = [file for file in files if file != path]
    return files


def _is_metadata(path: Path, column: str) -> bool:
    """Whether a .json file among other text files describes them rather than being one: a JSON object without the column."""
    try:
        fields = parse_json(read_text(path))
    except (ValueError, OSError):  # one object per line, or nothing that can be read: an error of its own
        return False
    return isinstance(fields, dict) and column not in fields and form_of(fields) is None


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        return _is_text(kind.value_type)
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _fields(records: Iterable[tuple[str, Any]], column: str, path: Path) -> Iterator[str | None]:
    """The column of every record (place, record); None where it is missing or null, which is logged once per file.

    Raises:
        UserError: A record that is not an object, a value that is not text, or a file without any record that has the column.
    """
    first, count, without, found = None, 0, 0, False
    for place, record in records:
        if not isinstance(record, dict):
            raise UserError(f'{place}: expected an object such as {{"{column}": "..."}}, found {type(record).__name__}')
        first = first or (place, list(record))
        value = record.get(column)
        found, count, without = found or column in record, count + 1, without + (value is None)
        _require_text(value is None or isinstance(value, str), column, type(value).__name__, place)
        if value is not None:
            check_characters(value, f"{place}, column {column!r}")
        yield value
    if first is not None and not found:
        _require_column(first[1], column, first[0])
    if without:
        logger.warning("%s: %d of %d rows have no %r and are left out", path, without, count, column)


def _require_column(columns: list[str], column: str, place: str) -> None:
    if column not in columns and (form := form_of(columns)):
        raise UserError(
            f"{place} has no column {column!r}; its rows are conversations ({', '.join(form)}), which are trained on, not measured: "
            "expected text; name a column that holds it with --text_column"
        )
    if column not in columns:
        raise UserError(f"{place} has no column {column!r}; it has {', '.join(map(repr, columns)) or 'none'}: name one with --text_column")


def _require_text(is_text: bool, column: str, kind: object, place: str) -> None:
    if not is_text:
        raise UserError(f"{place}: column {column!r} holds {kind}, expected text; name another with --text_column")


# The hub


def _load_hub(settings: TextSource) -> tuple[Dataset, Dataset | None]:
    name, train_rows, own_rows = _hub_splits(settings, streaming=False)
    form = None if settings.text_column else form_of(train_rows.column_names)
    as_documents = partial(as_conversations, form=form) if form else partial(_as_documents, column=settings.text_column or TEXT_COLUMN)
    train = as_documents(train_rows, name=name)
    if len(train) == 0:
        raise UserError(f"dataset {name} holds no text: every row of its split 'train' is empty")
    validation = as_documents(own_rows, name=name) if own_rows is not None else None
    return train, validation if validation is not None and len(validation) else None


def _read_hub(settings: TextSource) -> tuple[Reader, Reader | None]:
    name, train, own = _hub_splits(settings, streaming=True)
    column = settings.text_column or TEXT_COLUMN
    if not settings.text_column and (form := form_of(_first_row(train, name) or ())):
        raise not_streamed(name, form)
    return _reader(train, column, name), None if own is None else _reader(own, column, name)


def _hub_splits(settings: TextSource, streaming: bool) -> tuple[str, Any, Any]:
    """The dataset's full name, its rows for training, and those for validation or None: tables, or streams."""
    is_wikitext = settings.dataset_name in ("wikitext", WIKITEXT)
    name = WIKITEXT if is_wikitext else settings.dataset_name
    splits = _fetch(name, settings.dataset_config_name or (WIKITEXT_CONFIG if is_wikitext else None), streaming)
    if "train" not in splits:
        raise UserError(f"dataset {name} has no split 'train'; it has {', '.join(map(repr, splits))}")
    return name, splits["train"], next((splits[key] for key in VALIDATION_NAMES if key in splits), None)


def _fetch(name: str, config: str | None, streaming: bool) -> DatasetDict | IterableDatasetDict:
    with _hub_errors(name, config):
        return datasets.load_dataset(name, config, streaming=streaming)


@contextmanager
def _hub_errors(name: str, config: str | None = None) -> Iterator[None]:
    label = f"{name} ({config})" if config else name
    try:
        yield
    except DatasetNotFoundError as error:
        raise UserError(
            f"no dataset {name} on the Hugging Face hub (or it is private), and no local file or folder of that name; "
            f"check the name, or give a path: {ACCEPTED}"
        ) from error
    except (ConnectionError, httpx.HTTPError) as error:
        raise UserError(
            f"cannot reach the Hugging Face hub for dataset {name}: {error}. Check the network; HF_HUB_OFFLINE=1 uses what is already in "
            f"the cache, and a local path needs no hub: {ACCEPTED}"
        ) from error
    except ValueError as error:  # "BuilderConfig not found. Available: ..." and "Config name is missing. Please pick one among ..."
        raise UserError(
            f"dataset {label} cannot be loaded: {error}\n"
            "Name the configuration with --dataset_config_name, which is for --dataset_name alone"
        ) from error
    # a dataset that runs its own script is a RuntimeError, one without data files a FileNotFoundError
    except (RuntimeError, OSError, DatasetsError) as error:
        raise UserError(f"dataset {label} cannot be loaded: {error.__cause__ or error}; a local path serves, too: {ACCEPTED}") from error


def _as_documents(rows: Dataset, column: str, name: str) -> Dataset:
    _require_column(rows.column_names, column, f"dataset {name}")
    _require_text(_is_text(rows.features.arrow_schema.field(column).type), column, rows.features[column], f"dataset {name}")
    gen_kwargs = {"rows": rows.select_columns(column), "column": column, "is_wikitext": name == WIKITEXT}
    return make_table(_read_rows, gen_kwargs, DOCUMENT_FEATURES, [rows._fingerprint, column, name == WIKITEXT], DOCUMENTS_AT_ONCE)


def _first_row(rows: IterableDataset, name: str) -> dict[str, Any] | None:
    with _hub_errors(name):
        return next(iter(rows), None)


def _reader(rows: IterableDataset, column: str, name: str) -> Reader:
    first = _first_row(rows, name)
    if first is not None:  # a stream may not know its columns before it is read
        place = f"dataset {name}"
        _require_column(list(first), column, place)
        _require_text(first[column] is None or isinstance(first[column], str), column, type(first[column]).__name__, place)
    return partial(_read_rows, rows.select_columns(column), column, name == WIKITEXT)


def _read_rows(rows: Dataset | IterableDataset, column: str, is_wikitext: bool) -> Iterator[dict[str, str]]:
    batches = cast("Iterator[dict[str, list[str | None]]]", rows.iter(batch_size=DOCUMENTS_AT_ONCE))
    texts = (text for batch in batches for text in batch[column])
    yield from _without_blanks(join_articles(text or "" for text in texts) if is_wikitext else texts)


def join_articles(rows: Iterable[str]) -> Iterator[str]:
    """WikiText's rows (one line each) as whole articles; an article starts at a heading `` = Title = `` after a blank row."""
    lines: list[str] = []
    after_blank = True
    for row in rows:
        if after_blank and re.fullmatch(r" = [^=\n]+ = \n?", row):
            yield "".join(lines)
            lines = []
        # the hub's blank rows have lost their line end
        lines.append(row if row.endswith("\n") else row + "\n")
        after_blank = not row.strip()
    yield "".join(lines)
