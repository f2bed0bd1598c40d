"""Text for training and evaluation: find it, split it into documents, cut it into blocks of token ids.

    documents = load_documents(DataSettings(dataset_name="wikitext"))
    blocks = tokenize(documents.train, tokenizer, seq_len=128)      # column input_ids, 128 ids in every row

Two steps and two plain tables: ``load_documents`` gives one document per row in a column ``text``, whatever the source;
``tokenize`` gives rows of exactly ``seq_len`` ids. The work between them is done by generators (``read_files``,
``join_articles``, ``cut_blocks``) that see one document or one block at a time, so they serve a stream as well as a file.
Tables lie on disk in the cache of ``datasets``, keyed by the contents they were made from.

Units: lengths are token ids, except where characters are named.

Floor 1. Uses errors.py.
"""

from __future__ import annotations

import csv
import json
import logging
import random
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, DatasetDict, Features, List, Value
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError, DatasetsError
from datasets.fingerprint import Hasher
from huggingface_hub.utils import httpx
from transformers import PreTrainedTokenizerBase

from recursify.errors import UserError

logger = logging.getLogger(__name__)

WIKITEXT = "Salesforce/wikitext"
WIKITEXT_CONFIG = "wikitext-2-raw-v1"
DOCUMENT_SEPARATOR = "<|endoftext|>"
HELD_OUT_SHARE = 0.05
HELD_OUT_SEED = 0

VALIDATION_NAMES = ("validation", "valid", "val", "dev")
SPLIT_WORDS = {"train": "train", "training": "train", "test": "test", **dict.fromkeys(VALIDATION_NAMES, "validation")}

# Rows written at once. Documents are fewer than datasets' own 1000, so that a book each still fits in memory.
DOCUMENTS_AT_ONCE = 64
BLOCKS_AT_ONCE = 1000
TEXT_AT_ONCE = 8 << 20  # bytes of text tokenized at once

# 64-bit offsets: a batch of books may pass the 2 GiB that plain strings can hold.
DOCUMENT_FEATURES = Features({"text": Value("large_string")})


@dataclass(kw_only=True)
class DataSettings:
    """Where the text comes from."""

    dataset_name: str = "wikitext"
    """Hub data set (wikitext means Salesforce/wikitext), or a local .txt, .jsonl, .json, .csv or .parquet file, or a folder of them."""

    dataset_config_name: str | None = None
    """Configuration of the hub data set; wikitext-2-raw-v1 for wikitext when none is named."""

    text_column: str = "text"
    """Column that holds the text (plain .txt files have none)."""


@dataclass(frozen=True)
class Documents:
    """Text to train on and text to measure on: each a table with one document per row in the column ``text``."""

    train: Dataset
    validation: Dataset


def load_documents(settings: DataSettings) -> Documents:
    """Find the data set that the settings name and give it as documents.

    The validation documents are the data set's own (``validation``, ``valid``, ``val`` or ``dev``; in a folder, the files with such
    a word in their name). Where it has none, 5 % of the documents, at least one, are set aside by a fixed seed. A
    data set that is one single document loses its last 5 % of characters, cut at a paragraph, line or word, and a warning says so.
    A test split is never used.

    A local ``.txt`` file is one document, or several that lines ``<|endoftext|>`` divide. In the other formats a row is a
    document; blank ones are dropped. Only WikiText's rows, which are single lines, are joined: one document per
    article, from one level-1 heading to the next.

    Raises:
        UserError: If the data set is missing, unreadable, empty, or has no such text column.
    """
    with _bars_on_terminals_only():
        train, validation = _load_local(settings) if _is_local(settings.dataset_name) else _load_hub(settings)
        return Documents(train, validation) if validation is not None else hold_out(train, settings.dataset_name)


def tokenize(documents: Dataset, tokenizer: PreTrainedTokenizerBase, seq_len: int) -> Dataset:
    """Write the documents one after another, an end-of-text token after each, and cut that into blocks.

    Blocks run across documents and are not shuffled; the tail that fills no block is dropped. Equal input gives equal blocks.

    Args:
        documents: Table with a column ``text``; others are ignored.
        tokenizer: Any; must have an ``eos_token``. What it puts before a text by itself (a BOS) stays.
        seq_len: Ids per block.

    Returns:
        A table with one column, ``input_ids``: ``seq_len`` int32 ids per row.

    Raises:
        UserError: If the tokenizer has no end-of-text token, ``seq_len`` is not positive, or the text is shorter than one block.
    """
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"tokenizer {tokenizer.name_or_path or type(tokenizer).__name__!r} has no eos_token, and documents must end in one: "
            'name it in tokenizer_config.json ("eos_token"), or use the tokenizer of the donor'
        )
    if seq_len < 1:
        raise UserError(f"--seq_len is the number of tokens in a block and must be at least 1, not {seq_len}")
    with _bars_on_terminals_only():
        encoded = documents.map(
            encode, batched=True, batch_size=_batch_size(documents), remove_columns=documents.column_names, desc="Tokenizing",
            fn_kwargs={"tokenizer": tokenizer}, features=Features({"input_ids": List(Value("int32"))}),
            new_fingerprint=Hasher.hash([encode.__name__, documents._fingerprint, _identity(tokenizer)]),
        )  # fmt: skip
        features = Features({"input_ids": List(Value("int32"), length=seq_len)})
        blocks = _table(cut_blocks, {"encoded": encoded, "seq_len": seq_len}, features, [encoded._fingerprint, seq_len], BLOCKS_AT_ONCE)
    if len(blocks) == 0:
        tokens = sum(len(ids) for ids in encoded["input_ids"])
        raise UserError(
            f"the text is too short: {tokens} tokens in {len(documents)} document(s) do not fill one block of --seq_len {seq_len}; "
            "give more text or a smaller --seq_len (the part set aside for validation is short, too)"
        )
    return blocks


def _batch_size(documents: Dataset) -> int:
    """Documents to tokenize at once: a tokenizer needs some hundred bytes per token until it is done, and a document may be a book."""
    average = documents.data.nbytes / max(1, documents.data.num_rows)
    return max(1, min(BLOCKS_AT_ONCE, int(TEXT_AT_ONCE / max(1.0, average))))


def _identity(tokenizer: PreTrainedTokenizerBase) -> Any:
    """What the ids depend on. A fast tokenizer's pickle changes with its first use, which would make every cached table useless."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return tokenizer if backend is None else [backend.to_str(), tokenizer.eos_token_id]


def encode(batch: dict[str, list[str]], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Column ``input_ids``: the ids of each text, ending in exactly one end-of-text token even where the tokenizer writes one itself."""
    eos = tokenizer.eos_token_id
    # verbose=False: documents may well be longer than the model's context, they are cut afterwards
    rows = tokenizer(batch["text"], return_attention_mask=False, return_token_type_ids=False, verbose=False)["input_ids"]
    return {"input_ids": [ids if ids and ids[-1] == eos else [*ids, eos] for ids in rows]}


def cut_blocks(encoded: Dataset, seq_len: int) -> Iterator[dict[str, np.ndarray]]:
    """Blocks of ``seq_len`` ids from the concatenation of all rows, holding one row and one unfinished block at a time."""
    rest = np.empty(0, np.int32)
    row: Any
    for row in encoded.with_format("numpy"):
        ids = np.concatenate([rest, row["input_ids"]])
        whole = len(ids) - len(ids) % seq_len
        for start in range(0, whole, seq_len):
            yield {"input_ids": ids[start : start + seq_len]}
        rest = ids[whole:]


def hold_out(documents: Dataset, name: str) -> Documents:
    """Set documents aside for validation, by a fixed seed; a single document is cut in two. ``name`` is for the messages."""
    count = len(documents)
    if count == 1:
        train, validation = split_text(documents[0]["text"])
        logger.warning(
            "data set %r is one single document and has no validation split: its last %d of %d characters are set aside for validation",
            name, len(validation), len(train) + len(validation),
        )  # fmt: skip
        return Documents(_from_texts([train]), _from_texts([validation]))
    chosen = set(random.Random(HELD_OUT_SEED).sample(range(count), max(1, round(count * HELD_OUT_SHARE))))
    logger.info("data set %r has no validation split: %d of %d documents are set aside", name, len(chosen), count)
    return Documents(documents.select([i for i in range(count) if i not in chosen]), documents.select(sorted(chosen)))


def split_text(text: str) -> tuple[str, str]:
    """Cut a text before its last 5 %, moved back by at most another 5 % to the end of a paragraph, a line or a word."""
    latest = int(len(text) * (1 - HELD_OUT_SHARE))
    earliest = int(len(text) * (1 - 2 * HELD_OUT_SHARE))
    for boundary in ("\n\n", "\n", " "):
        found = text.rfind(boundary, earliest, latest)
        if found >= 0:
            return text[: found + len(boundary)], text[found + len(boundary) :]
    return text[:latest], text[latest:]


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


def read_files(files: list[Path], column: str) -> Iterator[dict[str, str]]:
    """The documents of local files, in order, blank ones dropped. The suffix tells the format."""
    for path in files:
        try:
            yield from _without_blanks(READERS[path.suffix.lower()](path, column))
        except UnicodeDecodeError as error:
            raise UserError(
                f"{path} is not UTF-8 text: it holds the byte {error.object[error.start]:#04x} ({error.reason}); "
                f"convert it, for example: iconv -f latin1 -t utf-8 {path}"
            ) from error
        except (OSError, pa.ArrowException, csv.Error) as error:
            raise UserError(f"{path} cannot be read as {path.suffix}: {error}") from error


def _without_blanks(texts: Iterable[str | None]) -> Iterator[dict[str, str]]:
    for text in texts:
        if text and not text.isspace():
            yield {"text": text.strip("\n")}


def _read_txt(path: Path, column: str) -> Iterator[str]:
    lines: list[str] = []
    with path.open(encoding="utf-8-sig") as file:
        for line in file:
            if line.strip() == DOCUMENT_SEPARATOR:
                yield "".join(lines)
                lines = []
            else:
                lines.append(line)
    yield "".join(lines)


def _read_jsonl(path: Path, column: str) -> Iterator[str | None]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield _field(_parse_json(line, f"{path}, line {number}"), column, f"{path}, line {number}")


def _read_json(path: Path, column: str) -> Iterator[str | None]:
    """A list of objects, or one object per line as in ``.jsonl``."""
    with path.open(encoding="utf-8-sig") as file:
        if not file.read(1024).lstrip().startswith("["):
            yield from _read_jsonl(path, column)
            return
        file.seek(0)
        for number, record in enumerate(_parse_json(file.read(), str(path))):
            yield _field(record, column, f"{path}, element {number}")


def _read_csv(path: Path, column: str) -> Iterator[str | None]:
    csv.field_size_limit(2**31 - 1)  # the default allows no document beyond 128 KiB
    with path.open(encoding="utf-8-sig", newline="") as file:
        for number, record in enumerate(csv.DictReader(file), 1):
            yield _field(record, column, f"{path}, row {number}")


def _read_parquet(path: Path, column: str) -> Iterator[str | None]:
    with pq.ParquetFile(path) as file:
        schema = file.schema_arrow
        _require_column(schema.names, column, str(path))
        _require_text(_is_text(schema.field(column).type), column, schema.field(column).type, str(path))
        for batch in file.iter_batches(batch_size=DOCUMENTS_AT_ONCE, columns=[column]):
            yield from batch.column(0).to_pylist()


READERS: dict[str, Callable[[Path, str], Iterator[str | None]]] = {
    ".txt": _read_txt,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
    ".json": _read_json,
    ".csv": _read_csv,
}
ACCEPTED = f"accepted are {', '.join(READERS)} files and folders of them"


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _parse_json(content: str, place: str) -> Any:
    try:
        return json.loads(content)
    except json.JSONDecodeError as error:
        raise UserError(f"{place} is not valid JSON ({error}); expected an object with the text column") from error


def _field(record: Any, column: str, place: str) -> str | None:
    if not isinstance(record, dict):
        raise UserError(f'{place}: expected an object such as {{"{column}": "..."}}, found {type(record).__name__}')
    _require_column(list(record), column, place)
    value = record[column]
    _require_text(value is None or isinstance(value, str), column, type(value).__name__, place)
    return value


def _require_column(columns: list[str], column: str, place: str) -> None:
    if column not in columns:
        raise UserError(f"{place} has no column {column!r}; it has {', '.join(map(repr, columns)) or 'none'}: name one with --text_column")


def _require_text(is_text: bool, column: str, kind: object, place: str) -> None:
    if not is_text:
        raise UserError(f"{place}: column {column!r} holds {kind}, expected text; name another with --text_column")


def _is_local(name: str) -> bool:
    """Whether the name means a path. ``wikitext`` never does: ``./wikitext`` names a folder of that name."""
    if name in ("wikitext", WIKITEXT):
        return False
    shaped = name.startswith((".", "/", "~")) or name.endswith("/") or "\\" in name or name.count("/") > 1
    return shaped or Path(name).suffix.lower() in READERS or Path(name).exists()


def _load_local(settings: DataSettings) -> tuple[Dataset, Dataset | None]:
    if settings.dataset_config_name:
        raise UserError(
            f"{settings.dataset_name} is local and has no configurations; leave out --dataset_config_name {settings.dataset_config_name}"
        )
    path = Path(settings.dataset_name).expanduser()
    splits = find_files(path)
    if "train" not in splits:
        named = ", ".join(file.name for files in splits.values() for file in files[:3])
        raise UserError(f"{path} has no text to train on: by their names, its files ({named}, ...) are all for validation or test")
    tables = {split: _read_table(files, settings.text_column) for split, files in splits.items() if split != "test"}
    if len(tables["train"]) == 0:
        raise UserError(f"{path} holds no text: every document in {', '.join(f.name for f in splits['train'][:3])} is empty")
    validation = tables.get("validation")
    return tables["train"], validation if validation is not None and len(validation) else None


def find_files(path: Path) -> dict[str, list[Path]]:
    """Files by split, sorted. A single file is for training; in a folder the names tell, the nearest part of the path first."""
    if not path.exists():
        raise UserError(f"no file or folder {path}; {ACCEPTED}, or a data set of the Hugging Face hub by its name")
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


def _read_table(files: list[Path], column: str) -> Dataset:
    state = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    return _table(read_files, {"files": files, "column": column}, DOCUMENT_FEATURES, [state, column], DOCUMENTS_AT_ONCE)


def _load_hub(settings: DataSettings) -> tuple[Dataset, Dataset | None]:
    is_wikitext = settings.dataset_name in ("wikitext", WIKITEXT)
    name = WIKITEXT if is_wikitext else settings.dataset_name
    splits = _fetch(name, settings.dataset_config_name or (WIKITEXT_CONFIG if is_wikitext else None))
    if "train" not in splits:
        raise UserError(f"data set {name} has no split 'train'; it has {', '.join(map(repr, splits))}")
    own = next((splits[key] for key in VALIDATION_NAMES if key in splits), None)
    train = _as_documents(splits["train"], settings.text_column, name, is_wikitext)
    if len(train) == 0:
        raise UserError(f"data set {name} holds no text: every row of its split 'train' is empty")
    validation = _as_documents(own, settings.text_column, name, is_wikitext) if own is not None else None
    return train, validation if validation is not None and len(validation) else None


def _fetch(name: str, config: str | None) -> DatasetDict:
    label = f"{name} ({config})" if config else name
    try:
        return datasets.load_dataset(name, config)
    except DatasetNotFoundError as error:
        raise UserError(
            f"no data set {name} on the Hugging Face hub (or it is private), and no local file or folder of that name; "
            f"check the name, or give a path: {ACCEPTED}"
        ) from error
    except (ConnectionError, httpx.HTTPError) as error:
        raise UserError(
            f"cannot reach the Hugging Face hub for data set {name}: {error}. Check the network; HF_HUB_OFFLINE=1 uses what is already in "
            f"the cache, and a local path needs no hub: {ACCEPTED}"
        ) from error
    except ValueError as error:  # "BuilderConfig not found. Available: ..." and "Config name is missing. Please pick one among ..."
        raise UserError(f"data set {label} cannot be loaded: {error}\nName the configuration with --dataset_config_name") from error
    # a data set that runs its own script is a RuntimeError, one without data files a FileNotFoundError
    except (RuntimeError, OSError, DatasetsError) as error:
        raise UserError(f"data set {label} cannot be loaded: {error.__cause__ or error}; a local path serves, too: {ACCEPTED}") from error


def _as_documents(rows: Dataset, column: str, name: str, is_wikitext: bool) -> Dataset:
    _require_column(rows.column_names, column, f"data set {name}")
    _require_text(_is_text(rows.features.arrow_schema.field(column).type), column, rows.features[column], f"data set {name}")
    gen_kwargs = {"rows": rows.select_columns(column), "is_wikitext": is_wikitext}
    return _table(_read_rows, gen_kwargs, DOCUMENT_FEATURES, [rows._fingerprint, column, is_wikitext], DOCUMENTS_AT_ONCE)


def _read_rows(rows: Dataset, is_wikitext: bool) -> Iterator[dict[str, str]]:
    (column,) = rows.column_names
    batches = cast("Iterator[dict[str, list[str | None]]]", rows.iter(batch_size=DOCUMENTS_AT_ONCE))
    texts = (text for batch in batches for text in batch[column])
    yield from _without_blanks(join_articles(text or "" for text in texts) if is_wikitext else texts)


def _table(generator: Callable[..., Iterator[Any]], gen_kwargs: dict[str, Any], features: Features, key: Any, at_once: int) -> Dataset:
    """What the generator yields, as a table on disk. ``key`` must change whenever the contents would: a known key is not made again."""
    if next(generator(**gen_kwargs), None) is None:  # from_generator cannot make an empty table
        return Dataset.from_dict({name: [] for name in features}, features=features)
    fingerprint = Hasher.hash([generator.__name__, key])
    try:
        return Dataset.from_generator(
            generator, gen_kwargs=gen_kwargs, features=features, fingerprint=fingerprint, writer_batch_size=at_once
        )
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        raise


def _from_texts(texts: list[str]) -> Dataset:
    return Dataset.from_dict({"text": texts}, features=DOCUMENT_FEATURES)


@contextmanager
def _bars_on_terminals_only() -> Iterator[None]:
    """Silence the progress bars of ``datasets`` where stderr is a file or a pipe, and leave the setting as it was."""
    silence = not sys.stderr.isatty() and not datasets.are_progress_bars_disabled()
    if silence:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if silence:
            datasets.enable_progress_bars()
