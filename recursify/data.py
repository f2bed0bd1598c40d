"""Text for training and evaluation: find it, split it into documents, cut it into blocks of token ids, mix and pack those.

    blocks = load_blocks(DataSettings(dataset_name="wikitext", mix=("book.txt=0.2",)), tokenizer, seq_len=128, seed=42)
    blocks.train, blocks.validation                                 # column input_ids, 128 ids in every row

    documents = load_documents(DataSettings(dataset_name="wikitext"))
    blocks = tokenize(documents.validation, tokenizer, seq_len=128)  # the same in two steps, for one data set

Two steps and two plain tables: ``load_documents`` gives one document per row in a column ``text``, whatever the source;
``tokenize`` gives rows of exactly ``seq_len`` ids. The work between them is done by generators (``read_files``,
``join_articles``, ``encode_each``, ``cut_blocks``) that see one document or one block at a time, so they serve a stream as well.
Tables lie on disk in the cache of ``datasets``, keyed by the contents they were made from: what was made once is not made again, and of
several processes one makes it while the others wait. Mixing chooses rows of such tables by index and copies nothing.

With ``streaming`` no table is made: documents are read, tokenised and cut while training asks for them, without end, and what lies in
memory is one shuffle buffer. Every stream begins anew, and the same, each time that it is iterated over; that is how a run resumes.

``separate`` tells the documents in a block apart again: positions that begin anew, and where.

Units: lengths are token ids, except where characters are named; weights of a mixture count blocks.

Floor 1. Uses errors.py and objective.py.
"""

from __future__ import annotations

import csv
import json
import logging
import math
import os
import random
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, cast

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from datasets import Dataset, DatasetDict, Features, IterableDataset, IterableDatasetDict, List, Value
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError, DatasetsError
from datasets.fingerprint import Hasher
from huggingface_hub.utils import httpx
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from recursify.errors import UserError
from recursify.questions import divide, is_questions, question_rows, row_features

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

# Of a stream: blocks to validate on, and blocks held in memory, from among which the next ones are drawn.
STREAM_VALIDATION_BLOCKS = 256
STREAM_BUFFER_BLOCKS = 2048

# 64-bit offsets: a batch of books may pass the 2 GiB that plain strings can hold.
DOCUMENT_FEATURES = Features({"text": Value("large_string")})

# Starts reading the documents of a stream from its beginning.
Reader = Callable[[], Iterator[dict[str, str]]]


@dataclass(kw_only=True)
class DataSettings:
    """Where the text comes from."""

    dataset_name: str = "wikitext"
    """Hub data set (wikitext means Salesforce/wikitext), or a local .txt, .jsonl, .json, .csv or .parquet file, or a folder of them; or a
    question set (questions.py), to train on its answers."""

    dataset_config_name: str | None = None
    """Configuration of the hub data set; wikitext-2-raw-v1 for wikitext when none is named."""

    text_column: str = "text"
    """Column that holds the text (plain .txt files have none)."""

    mix: tuple[str, ...] = ()
    """More data sets to train on, each as NAME=WEIGHT: WEIGHT times as many blocks as dataset_name gives, repeated where there are
    fewer. NAME is what dataset_name may be; dataset_config_name is not for these. Validation stays dataset_name's own alone."""

    streaming: bool = False
    """Read and tokenise the text while training on it, for data sets that are too large for the disk. Validation is the
    first 256 blocks of the data set's own validation split, or of its text, which training then leaves out."""


@dataclass(frozen=True)
class Documents:
    """Text to train on and text to measure on: each a table with one document per row in the column ``text``."""

    train: Dataset
    validation: Dataset


@dataclass(frozen=True)
class Blocks:
    """Blocks to train on and to measure on: rows with one column ``input_ids``, all of one length.

    Args:
        train: A table, or a stream without end.
        validation: A table.
    """

    train: Dataset | IterableDataset
    validation: Dataset


def load_blocks(settings: DataSettings, tokenizer: PreTrainedTokenizerBase, seq_len: int, seed: int) -> Blocks:
    """Find the data sets that the settings name, and give their blocks, mixed.

    Tables: with n blocks of ``dataset_name``, a data set of weight w adds exactly round(w n), so that one pass over the mixture is one pass
    over ``dataset_name``. A longer one gives a choice without repetition, a shorter one all its blocks as often as they fit and
    a choice for the rest; ``seed`` decides. The mixture is in the order of the data sets: shuffle it.

    Streams: the next block comes from a data set with a probability in proportion to its weight, through a shuffle buffer of 2,048 blocks.
    The stream has no end; each data set begins anew after its last document. It is the same every time that it is iterated over, for one
    seed and one epoch (``set_epoch``). A data loader's second worker would get nothing to do.

    Validation is that of ``dataset_name``, as ``load_documents`` divides it; of a stream, its first 256 blocks, or, where it has no
    validation split, the first 256 blocks of the text, whose documents are not trained on. What would be the validation part of
    a mixed data set is not trained on, either. (A stream without such a split sets other documents aside than tables of the same text do.)

    With more than one process in `torch.distributed`, all must call this, and the first makes the tables while the others wait. It must be
    done before the process group's timeout.

    Args:
        tokenizer: Any with an ``eos_token``.
        seq_len: Ids per block.
        seed: 0 to 2^32 - 1.

    Raises:
        UserError: A bad entry of ``mix``, and all that ``load_documents`` and ``tokenize`` raise.
    """
    mixed = parse_mix(settings.mix)
    check_blocks(tokenizer, seq_len)
    others = [(replace(settings, dataset_name=name, dataset_config_name=None), weight) for name, weight in mixed]
    with _bars_on_terminals_only():
        make = _make_streams if settings.streaming else _make_tables
        return make(settings, others, tokenizer, seq_len, seed)


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


def load_documents(settings: DataSettings) -> Documents:
    """Find the data set that ``dataset_name`` names and give it as documents, in tables.

    The validation documents are the data set's own (``validation``, ``valid``, ``val`` or ``dev``; in a folder, the files with such
    a word in their name). Where it has none, 5 % of the documents, at least one, are set aside by a fixed seed. A
    data set that is one single document loses its last 5 % of characters, cut at a paragraph, line or word, and a warning says so.
    A test split is never used.

    A local ``.txt`` file is one document, or several that lines ``<|endoftext|>`` divide. In the other formats a row is a
    document; blank ones are dropped. Only WikiText's rows, which are single lines, are joined: one document per
    article, from one level-1 heading to the next.

    Raises:
        UserError: If the data set is missing, unreadable, empty, has no such text column, or is a question set.
    """
    if is_questions(settings.dataset_name):
        raise UserError(f"--dataset_name {settings.dataset_name}: expected text, got questions; evaluate and compare ask --questions")
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
    check_blocks(tokenizer, seq_len)
    with _bars_on_terminals_only():
        encoded = documents.map(
            encode, batched=True, batch_size=_batch_size(documents), remove_columns=documents.column_names, desc="Tokenizing",
            fn_kwargs={"tokenizer": tokenizer}, features=Features({"input_ids": List(Value("int32"))}),
            new_fingerprint=Hasher.hash([encode.__name__, documents._fingerprint, _identity(tokenizer)]),
        )  # fmt: skip
        features = _block_features(seq_len)
        rows = encoded.with_format("numpy")
        blocks = _table(cut_blocks, {"encoded": rows, "seq_len": seq_len}, features, [encoded._fingerprint, seq_len], BLOCKS_AT_ONCE)
    if len(blocks) == 0:
        raise _too_short(sum(len(ids) for ids in encoded["input_ids"]), len(documents), seq_len)
    return blocks


def check_blocks(tokenizer: PreTrainedTokenizerBase, seq_len: int) -> None:
    """Raises UserError for a tokenizer without an end-of-text token, or a ``seq_len`` that is no length."""
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"tokenizer {tokenizer.name_or_path or type(tokenizer).__name__!r} has no eos_token, and documents must end in one: "
            'name it in tokenizer_config.json ("eos_token"), or use the tokenizer of the donor'
        )
    if seq_len < 1:
        raise UserError(f"--seq_len is the number of tokens in a block and must be at least 1, not {seq_len}")


def _too_short(tokens: int, documents: int, seq_len: int) -> UserError:
    return UserError(
        f"the text is too short: {tokens} tokens in {documents} document(s) do not fill one block of --seq_len {seq_len}; "
        "give more text or a smaller --seq_len (the part set aside for validation is short, too)"
    )


def _block_features(seq_len: int) -> Features:
    return Features({"input_ids": List(Value("int32"), length=seq_len)})


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


def encode_each(documents: Iterable[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> Iterator[dict[str, np.ndarray]]:
    """The rows that ``encode`` would give for a table of these documents, tokenised a small batch at a time."""
    texts: list[str] = []
    size = 0
    for document in documents:
        texts.append(document["text"])
        size += len(document["text"])
        if len(texts) == DOCUMENTS_AT_ONCE or size >= TEXT_AT_ONCE:
            yield from _encoded_rows(texts, tokenizer)
            texts, size = [], 0
    yield from _encoded_rows(texts, tokenizer)


def _encoded_rows(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[dict[str, np.ndarray]]:
    for ids in encode({"text": texts}, tokenizer)["input_ids"] if texts else []:
        yield {"input_ids": np.asarray(ids, np.int32)}


def cut_blocks(encoded: Iterable[Any], seq_len: int) -> Iterator[dict[str, np.ndarray]]:
    """Blocks of ``seq_len`` ids from the concatenation of all rows (arrays), holding one row and one unfinished block at a time."""
    rest = np.empty(0, np.int32)
    for row in encoded:
        ids = np.concatenate([rest, row["input_ids"]])
        whole = len(ids) - len(ids) % seq_len
        for start in range(0, whole, seq_len):
            yield {"input_ids": ids[start : start + seq_len]}
        rest = ids[whole:]


def separate(input_ids: Tensor, eos_token_id: int) -> tuple[Tensor, Tensor]:
    """Keep the documents in each row of a batch apart, where rows are blocks and every document ends in an end-of-text token.

    Given to a model of transformers without an attention mask and without a cache, position ids that begin anew are taken for packed
    documents: none attends to another (``transformers.masking_utils``).

    Args:
        input_ids: [B, T] ids.

    Returns:
        position_ids: [B, T], 0 at the start of the row and after every end-of-text token, then counting on.
        starts: [B, T], whether a document begins here, the row's first one excepted. Position t is scored against label t + 1, so a label
            at such a place would have a token predicted from another document.
    """
    starts = torch.zeros_like(input_ids, dtype=torch.bool)
    starts[:, 1:] = input_ids[:, :-1] == eos_token_id
    index = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
    begun_at = (index * starts).cummax(dim=1).values
    return index - begun_at, starts


def _make_tables(own: DataSettings, mixed: list[tuple[DataSettings, float]], tokenizer: Any, seq_len: int, seed: int) -> Blocks:
    with one_process_first():
        train, validation = _tables_of(own, tokenizer, seq_len)
        parts = [train]
        for number, (settings, weight) in enumerate(mixed):
            wanted = round(weight * len(train))
            if wanted == 0:
                raise UserError(
                    f"--mix {settings.dataset_name}={weight:g} adds nothing: {weight:g} times the {len(train)} blocks of "
                    f"{own.dataset_name} is less than half a block; give a larger weight"
                )
            blocks = _tables_of(settings, tokenizer, seq_len)[0]
            parts += choose_blocks(blocks, wanted, np.random.default_rng([seed, number]))
        if any("labels" in part.column_names for part in parts):
            parts = [_with_labels(part, seq_len) for part in parts]
    return Blocks(datasets.concatenate_datasets(parts), validation)


def _tables_of(settings: DataSettings, tokenizer: PreTrainedTokenizerBase, seq_len: int) -> tuple[Dataset, Dataset]:
    """Rows of one data set to train on and to validate on: blocks of text, or questions."""
    if is_questions(settings.dataset_name):
        train, held_out = divide(settings.dataset_name)
        return question_rows(train, tokenizer, seq_len), question_rows(held_out, tokenizer, seq_len)
    documents = load_documents(settings)
    return tokenize(documents.train, tokenizer, seq_len), tokenize(documents.validation, tokenizer, seq_len)


def _with_labels(blocks: Dataset, seq_len: int) -> Dataset:
    """Text beside questions: its labels are its tokens."""
    if "labels" in blocks.column_names:
        return blocks
    return blocks.map(lambda rows: {"labels": rows["input_ids"]}, batched=True, features=row_features(seq_len))


def choose_blocks(blocks: Dataset, wanted: int, rng: np.random.Generator) -> list[Dataset]:
    """Tables that together have ``wanted`` rows: all blocks as often as they fit, then a random choice without repetition, in order."""
    times, rest = divmod(wanted, len(blocks))
    chosen = np.sort(rng.choice(len(blocks), rest, replace=False))
    return [blocks] * times + ([blocks.select(chosen)] if rest else [])


@contextmanager
def one_process_first() -> Iterator[None]:
    """In three waves: the first process of all, the first of every other node, the rest.

    Where the cache is shared, the first makes all and the others find it; where each node has a cache of its own, each node's first does.
    (accelerate's ``PartialState`` has a context manager of this kind, but takes processes on CPUs for one unless told otherwise.)
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        yield
        return
    rank = torch.distributed.get_rank()
    wave = 0 if rank == 0 else 1 if os.environ.get("LOCAL_RANK", str(rank)) == "0" else 2
    for _ in range(wave):
        torch.distributed.barrier()
    try:
        yield
    finally:  # after an error, too: the others meet the same one, instead of waiting for this process until the timeout
        for _ in range(2 - wave):
            torch.distributed.barrier()


def _make_streams(own: DataSettings, mixed: list[tuple[DataSettings, float]], tokenizer: Any, seq_len: int, seed: int) -> Blocks:
    opened = [_open_stream(settings, tokenizer, seq_len) for settings in (own, *(settings for settings, _ in mixed))]
    streams = [
        IterableDataset.from_generator(
            stream_blocks, _block_features(seq_len), {"stream": stream, "tokenizer": tokenizer, "seq_len": seq_len}
        )
        for stream, _ in opened
    ]  # fmt: skip
    weights = np.array([1.0, *(weight for _, weight in mixed)])
    # one shuffle, after mixing: set_epoch then changes the draw of the data sets, too
    train = datasets.interleave_datasets(streams, probabilities=list(weights / weights.sum()), seed=seed) if mixed else streams[0]
    validation = Dataset.from_dict({"input_ids": opened[0][1]}, features=_block_features(seq_len))
    return Blocks(train.shuffle(seed=seed, buffer_size=STREAM_BUFFER_BLOCKS), validation)


@dataclass(frozen=True)
class TextStream:
    """The documents to train on of one data set, which are read anew for every pass.

    Args:
        name: For messages.
        skipped: How many documents at its beginning are set aside for validation.
    """

    name: str
    read: Reader
    skipped: int

    def without_end(self) -> Iterator[dict[str, str]]:
        """The documents, over and over. Raises UserError if there are none."""
        while True:
            document = None
            for document in islice(self.read(), self.skipped, None):
                yield document
            if document is None:
                raise UserError(
                    f"data set {self.name} has nothing left to train on: the first {STREAM_VALIDATION_BLOCKS} blocks of a stream, "
                    "in whole documents, are set aside for validation; leave out --streaming"
                )


def stream_blocks(stream: TextStream, tokenizer: PreTrainedTokenizerBase, seq_len: int) -> Iterator[dict[str, np.ndarray]]:
    """Blocks without end; where the text begins anew, a block runs on across the seam."""
    for block in cut_blocks(encode_each(stream.without_end(), tokenizer), seq_len):
        yield {"input_ids": block["input_ids"].copy()}  # a slice would keep its whole document in memory while the block is in the buffer


def _open_stream(settings: DataSettings, tokenizer: PreTrainedTokenizerBase, seq_len: int) -> tuple[TextStream, list[np.ndarray]]:
    """The stream to train on, and the validation blocks."""
    name = settings.dataset_name
    train, own = _read_local(settings) if _is_local(name) else _read_hub(settings)
    if own is not None and next(own(), None) is None:
        own = None
    lengths: list[int] = []

    def counted() -> Iterator[dict[str, np.ndarray]]:
        for row in encode_each((own or train)(), tokenizer):
            lengths.append(len(row["input_ids"]))
            yield row

    validation = [block["input_ids"] for block in islice(cut_blocks(counted(), seq_len), STREAM_VALIDATION_BLOCKS)]
    if not lengths:
        raise UserError(f"data set {name} holds no text: every document is empty")
    if not validation:
        raise _too_short(sum(lengths), len(lengths), seq_len)
    stream = TextStream(name, train, 0 if own else len(lengths))
    if own is None:
        logger.info("data set %r has no validation split: its first %d documents are set aside", name, len(lengths))
    next(stream.without_end())  # says now, not when the model is loaded, that nothing is left
    return stream, validation


def hold_out(documents: Dataset, name: str) -> Documents:
    """Set documents aside for validation, by a fixed seed; a single document is cut in two. ``name`` is for the messages."""
    count = len(documents)
    if count == 1:
        train, validation = split_text(documents[0]["text"])
        logger.warning(
            "data set %r is one single document and has no validation split: its last %d of %d characters are set aside for validation",
            name, len(validation), len(train) + len(validation),
        )  # fmt: skip
        return Documents(_from_text(train), _from_text(validation))
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
    splits = _local_splits(settings)
    tables = {split: _read_table(files, settings.text_column) for split, files in splits.items() if split != "test"}
    if len(tables["train"]) == 0:
        named = ", ".join(file.name for file in splits["train"][:3])
        raise UserError(f"{settings.dataset_name} holds no text: every document in {named} is empty")
    validation = tables.get("validation")
    return tables["train"], validation if validation is not None and len(validation) else None


def _read_local(settings: DataSettings) -> tuple[Reader, Reader | None]:
    splits = _local_splits(settings)
    train, own = (partial(read_files, splits.get(split, []), settings.text_column) for split in ("train", "validation"))
    return train, own if "validation" in splits else None


def _local_splits(settings: DataSettings) -> dict[str, list[Path]]:
    if settings.dataset_config_name:
        raise UserError(
            f"{settings.dataset_name} is local and has no configurations; leave out --dataset_config_name {settings.dataset_config_name}"
        )
    path = Path(settings.dataset_name).expanduser()
    splits = find_files(path)
    if "train" not in splits:
        named = ", ".join(file.name for files in splits.values() for file in files[:3])
        raise UserError(f"{path} has no text to train on: by their names, its files ({named}, ...) are all for validation or test")
    return splits


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
    name, train_rows, own_rows = _hub_splits(settings, streaming=False)
    train = _as_documents(train_rows, settings.text_column, name)
    if len(train) == 0:
        raise UserError(f"data set {name} holds no text: every row of its split 'train' is empty")
    validation = _as_documents(own_rows, settings.text_column, name) if own_rows is not None else None
    return train, validation if validation is not None and len(validation) else None


def _read_hub(settings: DataSettings) -> tuple[Reader, Reader | None]:
    name, train, own = _hub_splits(settings, streaming=True)
    return _reader(train, settings.text_column, name), None if own is None else _reader(own, settings.text_column, name)


def _hub_splits(settings: DataSettings, streaming: bool) -> tuple[str, Any, Any]:
    """The data set's full name, its rows for training, and those for validation or None: tables, or streams."""
    is_wikitext = settings.dataset_name in ("wikitext", WIKITEXT)
    name = WIKITEXT if is_wikitext else settings.dataset_name
    splits = _fetch(name, settings.dataset_config_name or (WIKITEXT_CONFIG if is_wikitext else None), streaming)
    if "train" not in splits:
        raise UserError(f"data set {name} has no split 'train'; it has {', '.join(map(repr, splits))}")
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
            f"no data set {name} on the Hugging Face hub (or it is private), and no local file or folder of that name; "
            f"check the name, or give a path: {ACCEPTED}"
        ) from error
    except (ConnectionError, httpx.HTTPError) as error:
        raise UserError(
            f"cannot reach the Hugging Face hub for data set {name}: {error}. Check the network; HF_HUB_OFFLINE=1 uses what is already in "
            f"the cache, and a local path needs no hub: {ACCEPTED}"
        ) from error
    except ValueError as error:  # "BuilderConfig not found. Available: ..." and "Config name is missing. Please pick one among ..."
        raise UserError(
            f"data set {label} cannot be loaded: {error}\n"
            "Name the configuration with --dataset_config_name, which is for --dataset_name alone"
        ) from error
    # a data set that runs its own script is a RuntimeError, one without data files a FileNotFoundError
    except (RuntimeError, OSError, DatasetsError) as error:
        raise UserError(f"data set {label} cannot be loaded: {error.__cause__ or error}; a local path serves, too: {ACCEPTED}") from error


def _as_documents(rows: Dataset, column: str, name: str) -> Dataset:
    _require_column(rows.column_names, column, f"data set {name}")
    _require_text(_is_text(rows.features.arrow_schema.field(column).type), column, rows.features[column], f"data set {name}")
    gen_kwargs = {"rows": rows.select_columns(column), "column": column, "is_wikitext": name == WIKITEXT}
    return _table(_read_rows, gen_kwargs, DOCUMENT_FEATURES, [rows._fingerprint, column, name == WIKITEXT], DOCUMENTS_AT_ONCE)


def _reader(rows: IterableDataset, column: str, name: str) -> Reader:
    with _hub_errors(name):
        first = next(iter(rows), None)
    if first is not None:  # a stream may not know its columns before it is read
        _field(first, column, f"data set {name}")
    return partial(_read_rows, rows.select_columns(column), column, name == WIKITEXT)


def _read_rows(rows: Dataset | IterableDataset, column: str, is_wikitext: bool) -> Iterator[dict[str, str]]:
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


def _from_text(text: str) -> Dataset:
    """A table on disk: only what is made from such a one is found in the cache again."""
    return _table(_one_document, {"text": text}, DOCUMENT_FEATURES, text, DOCUMENTS_AT_ONCE)


def _one_document(text: str) -> Iterator[dict[str, str]]:
    yield {"text": text}


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
