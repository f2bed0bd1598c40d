"""Blocks of token ids for training and evaluation, from one dataset or a mixture, materialized or streamed.

    blocks = load_blocks(DataSettings(dataset_name="wikitext", mix=("book.txt=0.2",)), tokenizer, seq_len=128, seed=42)
    blocks.train, blocks.validation                                 # column input_ids, 128 ids in every row

    documents = load_documents(DataSettings(dataset_name="wikitext"))
    blocks = tokenize(documents.validation, tokenizer, seq_len=128)  # the same in two steps, for one dataset

Two steps and two plain tables: ``load_documents`` (documents.py) gives one document per row in a column ``text``, whatever the source;
``tokenize`` gives rows of exactly ``seq_len`` ids. A question set (question_sets.py) gives rows, too, which also have labels.
Tables lie on disk in the cache of ``datasets``, keyed by the contents they were made from: what was made once is not made again, and of
several processes one makes it while the others wait. Mixing chooses rows of such tables by index and copies nothing.

With ``streaming`` no table is made: documents are read, tokenised and cut while training asks for them, without end, and what lies in
memory is one shuffle buffer. Every stream begins anew, and the same, each time that it is iterated over; that is how a run resumes.

Units: lengths are token ids, except where characters are named; weights of a mixture count blocks.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import datasets
import numpy as np
import torch
from datasets import Dataset, Features, IterableDataset, List, Value
from datasets.fingerprint import Hasher
from transformers import PreTrainedTokenizerBase

from ..errors import UserError
from ..utils.distributed import one_process_first
from .blocks import TEXT_AT_ONCE, check_blocks, cut_blocks, encode, encode_each, separate, too_short
from .cached_dataset import bars_on_terminals_only, identity_of, make_table
from .conversation_blocks import COLUMNS, block_features, conversation_blocks
from .conversations import COLUMN
from .documents import Reader, load_documents, open_documents
from .question_rows import question_rows
from .question_sets import divide, is_questions
from .settings import DataSettings, parse_mix

__all__ = ["Blocks", "DataSettings", "load_blocks", "load_documents", "tokenize"]

logger = logging.getLogger(__name__)

BLOCKS_AT_ONCE = 1000  # written at once, and documents tokenized at once

# Of a stream: blocks to validate on, and blocks held in memory, from among which the next ones are drawn.
STREAM_VALIDATION_BLOCKS = 256
STREAM_BUFFER_BLOCKS = 2048


@dataclass(frozen=True)
class Blocks:
    """Training and validation blocks: rows with one column ``input_ids``, all of one length.

    Args:
        train: A table, or an endless stream.
        validation: A table.
    """

    train: Dataset | IterableDataset
    validation: Dataset


def load_blocks(settings: DataSettings, tokenizer: PreTrainedTokenizerBase, seq_len: int, seed: int, with_steps: bool = False) -> Blocks:
    """Load the datasets of the settings as blocks, mixed by weight.

    Tables: with n blocks of ``dataset_name``, a dataset of weight w adds exactly round(w n), so that one pass over the mixture is one pass
    over ``dataset_name``. A longer one gives a choice without repetition, a shorter one all its blocks as often as they fit and
    a choice for the rest; ``seed`` decides. The mixture is in the order of the datasets: shuffle it.

    Streams: the next block comes from a dataset with a probability in proportion to its weight, through a shuffle buffer of 2,048 blocks.
    The stream has no end; each dataset begins anew after its last document. It is the same every time that it is iterated over, for one
    seed and one epoch (``set_epoch``). A data loader's second worker would get nothing to do.

    Validation is that of ``dataset_name``, as ``load_documents`` divides it; of a stream, its first 256 blocks, or, where it has no
    validation split, the first 256 blocks of the text, whose documents are not trained on. What would be the validation part of
    a mixed dataset is not trained on, either. (A stream without such a split sets other documents aside than tables of the same text do.)

    With more than one process in `torch.distributed`, all must call this, and the first makes the tables while the others wait. It must be
    done before the process group's timeout.

    Args:
        tokenizer: Any with an ``eos_token``.
        seq_len: Ids per block.
        seed: 0 to 2^32 - 1.
        with_steps: Whether training rows say what is known after how many steps (question_rows.py).

    Raises:
        UserError: A bad entry of ``mix``, text where steps are wanted, and all that ``load_documents`` and ``tokenize`` raise.
    """
    mixed = parse_mix(settings.mix)
    check_blocks(tokenizer, seq_len)
    for name in (settings.dataset_name, *(name for name, _ in mixed)) if with_steps else ():
        if not is_questions(name):
            raise UserError(
                f"--cycle_targets steps: expected question sets, whose steps are known, such as permutations:difficulty=16, got {name}, "
                "which is text; leave it out, or give --cycle_targets answer"
            )
    others = [(replace(settings, dataset_name=name, dataset_config_name=None), weight) for name, weight in mixed]
    with bars_on_terminals_only():
        if settings.streaming:
            return _make_streams(settings, others, tokenizer, seq_len, seed)
        return _make_tables(settings, others, tokenizer, seq_len, seed, with_steps)


# Tables


def tokenize(documents: Dataset, tokenizer: PreTrainedTokenizerBase, seq_len: int) -> Dataset:
    """Tokenize and pack documents: concatenate them, an end-of-text token after each, and split into blocks.

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
    with bars_on_terminals_only():
        encoded = documents.map(
            encode, batched=True, batch_size=_batch_size(documents), remove_columns=documents.column_names, desc="Tokenizing",
            fn_kwargs={"tokenizer": tokenizer}, features=Features({"input_ids": List(Value("int32"))}),
            new_fingerprint=Hasher.hash([encode.__name__, documents._fingerprint, identity_of(tokenizer)]),
        )  # fmt: skip
        features = block_features(seq_len, ["input_ids"])
        rows = encoded.with_format("numpy")
        blocks = make_table(cut_blocks, {"encoded": rows, "seq_len": seq_len}, features, [encoded._fingerprint, seq_len], BLOCKS_AT_ONCE)
    if len(blocks) == 0:
        raise too_short(sum(len(ids) for ids in encoded["input_ids"]), len(documents), seq_len)
    return blocks


def _batch_size(documents: Dataset) -> int:
    """Documents to tokenize at once: a tokenizer needs some hundred bytes per token, and a document may be a book."""
    average = documents.data.nbytes / max(1, documents.data.num_rows)
    return max(1, min(BLOCKS_AT_ONCE, int(TEXT_AT_ONCE / max(1.0, average))))


def _make_tables(
    own: DataSettings, mixed: list[tuple[DataSettings, float]], tokenizer: Any, seq_len: int, seed: int, with_steps: bool
) -> Blocks:
    with one_process_first():
        train, validation = _tables_of(own, tokenizer, seq_len, with_steps)
        parts = [train]
        for number, (settings, weight) in enumerate(mixed):
            wanted = round(weight * len(train))
            if wanted == 0:
                raise UserError(
                    f"--mix {settings.dataset_name}={weight:g} adds nothing: {weight:g} times the {len(train)} blocks of "
                    f"{own.dataset_name} is less than half a block; give a larger weight"
                )
            blocks = _tables_of(settings, tokenizer, seq_len, with_steps)[0]
            parts += choose_blocks(blocks, wanted, np.random.default_rng([seed, number]))
        columns = [name for name in COLUMNS if any(name in part.column_names for part in parts)]
        parts = [_completed(part, columns, tokenizer.eos_token_id, seq_len) for part in parts]
    return Blocks(datasets.concatenate_datasets(parts), _completed(validation, columns, tokenizer.eos_token_id, seq_len))


def _tables_of(
    settings: DataSettings, tokenizer: PreTrainedTokenizerBase, seq_len: int, with_steps: bool = False
) -> tuple[Dataset, Dataset]:
    """Training and validation rows of one dataset: blocks of text or of conversations, or questions."""
    if is_questions(settings.dataset_name):
        train, held_out = divide(settings.dataset_name)
        return question_rows(train, tokenizer, seq_len, with_steps), question_rows(held_out, tokenizer, seq_len)
    documents = load_documents(settings)
    if COLUMN in documents.train.column_names:
        name, train_on = settings.dataset_name, settings.train_on
        train = conversation_blocks(documents.train, tokenizer, seq_len, train_on, name)
        return train, conversation_blocks(documents.validation, tokenizer, seq_len, train_on, f"{name}, validation")
    return tokenize(documents.train, tokenizer, seq_len), tokenize(documents.validation, tokenizer, seq_len)


def _completed(blocks: Dataset, columns: Sequence[str], eos_token_id: int, seq_len: int) -> Dataset:
    """Blocks with the columns of those that they are mixed with: of text every token is scored, and a document ends in its token."""
    if set(columns) <= set(blocks.column_names):
        return blocks

    def added(rows: dict[str, list[list[int]]]) -> dict[str, Any]:
        positions = separate(torch.tensor(rows["input_ids"]), eos_token_id)[0]
        every = {"input_ids": rows["input_ids"], "labels": rows.get("labels", rows["input_ids"]), "position_ids": positions.numpy()}
        return {name: every[name] for name in columns}

    return blocks.map(added, batched=True, features=block_features(seq_len, columns))


def choose_blocks(blocks: Dataset, wanted: int, rng: np.random.Generator) -> list[Dataset]:
    """Tables that together have ``wanted`` rows: all blocks as often as they fit, then a random subset, in order."""
    times, rest = divmod(wanted, len(blocks))
    chosen = np.sort(rng.choice(len(blocks), rest, replace=False))
    return [blocks] * times + ([blocks.select(chosen)] if rest else [])


# Streams


def _make_streams(own: DataSettings, mixed: list[tuple[DataSettings, float]], tokenizer: Any, seq_len: int, seed: int) -> Blocks:
    opened = [_open_stream(settings, tokenizer, seq_len) for settings in (own, *(settings for settings, _ in mixed))]
    streams = [
        IterableDataset.from_generator(
            stream_blocks, block_features(seq_len, ["input_ids"]), {"stream": stream, "tokenizer": tokenizer, "seq_len": seq_len}
        )
        for stream, _ in opened
    ]  # fmt: skip
    weights = np.array([1.0, *(weight for _, weight in mixed)])
    # one shuffle, after mixing: set_epoch then changes the draw of the datasets, too
    train = datasets.interleave_datasets(streams, probabilities=list(weights / weights.sum()), seed=seed) if mixed else streams[0]
    validation = Dataset.from_dict({"input_ids": opened[0][1]}, features=block_features(seq_len, ["input_ids"]))
    return Blocks(train.shuffle(seed=seed, buffer_size=STREAM_BUFFER_BLOCKS), validation)


@dataclass(frozen=True)
class TextStream:
    """The training documents of one dataset, read again for every epoch.

    Args:
        name: For messages.
        skipped: Number of documents at the beginning that are held out for validation.
    """

    name: str
    read: Reader
    skipped: int

    def without_end(self) -> Iterator[dict[str, str]]:
        """The documents, repeated forever. Raises UserError if there are none."""
        while True:
            document = None
            for document in islice(self.read(), self.skipped, None):
                yield document
            if document is None:
                raise UserError(
                    f"dataset {self.name} has nothing left to train on: the first {STREAM_VALIDATION_BLOCKS} blocks of a stream, "
                    "in whole documents, are set aside for validation; leave out --streaming"
                )


def stream_blocks(stream: TextStream, tokenizer: PreTrainedTokenizerBase, seq_len: int) -> Iterator[dict[str, np.ndarray]]:
    """Endless blocks; a block may span the end and the next beginning of the text."""
    for block in cut_blocks(encode_each(stream.without_end(), tokenizer), seq_len):
        yield {"input_ids": block["input_ids"].copy()}  # a slice would keep its whole document in memory while the block is in the buffer


def _open_stream(settings: DataSettings, tokenizer: PreTrainedTokenizerBase, seq_len: int) -> tuple[TextStream, list[np.ndarray]]:
    """The training stream and the validation blocks."""
    name = settings.dataset_name
    train, own = open_documents(settings)
    if own is not None and next(own(), None) is None:
        own = None
    lengths: list[int] = []

    def counted() -> Iterator[dict[str, np.ndarray]]:
        for row in encode_each((own or train)(), tokenizer):
            lengths.append(len(row["input_ids"]))
            yield row

    validation = [block["input_ids"] for block in islice(cut_blocks(counted(), seq_len), STREAM_VALIDATION_BLOCKS)]
    if not lengths:
        raise UserError(f"dataset {name} holds no text: every document is empty")
    if not validation:
        raise too_short(sum(lengths), len(lengths), seq_len)
    stream = TextStream(name, train, 0 if own else len(lengths))
    if own is None:
        logger.info("dataset %r has no validation split: its first %d documents are set aside", name, len(lengths))
    next(stream.without_end())  # raises now rather than after the model is loaded if no document is left
    return stream, validation
