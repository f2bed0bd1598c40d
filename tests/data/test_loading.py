"""Blocks of a dataset, or of several mixed, as tables and as streams; several processes; the words of every error."""

from __future__ import annotations

import inspect
import json
import logging
import math
import random
import string
from collections import Counter
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from accelerate import skip_first_batches
from datasets import Dataset, IterableDataset
from torch.utils.data import DataLoader

from recursify.data import documents
from recursify.data import loading as data
from recursify.data.loading import Blocks, DataSettings, load_blocks, tokenize
from tests.support import tiny
from tests.support.corpora import load, says, table, texts, write_jsonl
from tests.support.hub_stand_in import HubStandIn


class TestTokenize:
    rows = tuple(" ".join(tiny.sentences(i, i % 7 + 1)) for i in range(30))

    def stream(self, tokenizer: Any) -> list[int]:
        """The slow truth: all documents in a row, an end-of-text token after each."""
        return [i for row in self.rows for i in [*tokenizer(row)["input_ids"], tokenizer.eos_token_id]]

    @pytest.mark.parametrize("seq_len", [1, 7, 128])
    def test_blocks_concatenate_to_the_stream_without_its_tail(self, seq_len: int) -> None:
        tokenizer = tiny.make_tiny_tokenizer()
        blocks = tokenize(table(*self.rows), tokenizer, seq_len)
        stream = self.stream(tokenizer)
        assert blocks.column_names == ["input_ids"]
        assert {len(ids) for ids in blocks["input_ids"]} == {seq_len}
        assert [i for ids in blocks["input_ids"] for i in ids] == stream[: len(stream) // seq_len * seq_len]

    def test_no_token_is_lost_between_batches(self, monkeypatch: pytest.MonkeyPatch) -> None:
        tokenizer = tiny.make_tiny_tokenizer()
        expected = list(tokenize(table(*self.rows), tokenizer, 10)["input_ids"])
        monkeypatch.setattr(data, "TEXT_AT_ONCE", 1)  # one document per batch
        # another table of the same rows: nothing comes from the cache
        assert list(tokenize(table(*self.rows, "x").select(range(30)), tokenizer, 10)["input_ids"]) == expected

    def test_a_document_longer_than_many_blocks(self) -> None:
        tokenizer = tiny.make_tiny_tokenizer()
        text = " ".join(tiny.sentences(1, 300))
        ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        assert [i for row in tokenize(table(text), tokenizer, 16)["input_ids"] for i in row] == ids[: len(ids) // 16 * 16]

    def test_exactly_one_block(self) -> None:
        tokenizer = tiny.make_tiny_tokenizer()
        ids = [*tokenizer("Exactly one block.")["input_ids"], tokenizer.eos_token_id]
        assert list(tokenize(table("Exactly one block."), tokenizer, len(ids))["input_ids"]) == [ids]

    def test_ids_collate_to_int64(self) -> None:
        blocks = tokenize(table(*self.rows), tiny.make_tiny_tokenizer(), 8).with_format("torch")
        assert str(blocks[:2]["input_ids"].dtype) == "torch.int64"
        assert blocks[:2]["input_ids"].shape == (2, 8)

    def test_long_documents_give_no_warning(self, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]) -> None:
        tokenizer = tiny.make_tiny_tokenizer()
        tokenizer.model_max_length = 16
        transformers_logger = logging.getLogger("transformers")
        transformers_logger.propagate, before = True, transformers_logger.propagate
        try:
            tokenize(table(*self.rows, "a row of its own: nothing from the cache"), tokenizer, 8)
        finally:
            transformers_logger.propagate = before
        assert caplog.records == []
        captured = capfd.readouterr()
        assert (captured.out, captured.err) == ("", "")

    def test_progress_bar_setting_is_restored(self) -> None:
        for disabled in (True, False):
            (datasets.disable_progress_bars if disabled else datasets.enable_progress_bars)()
            tokenize(table("some text here"), tiny.make_tiny_tokenizer(), 2)
            assert datasets.are_progress_bars_disabled() is disabled

    def test_a_second_run_comes_from_the_cache(self, tmp_path: Path) -> None:
        path = tmp_path / "a.txt"
        path.write_text("\n<|endoftext|>\n".join(self.rows), encoding="utf-8")
        first = tokenize(load(path).train, tiny.make_tiny_tokenizer(), 8)
        again = tokenize(load(path).train, tiny.make_tiny_tokenizer(), 8)
        assert first.cache_files and first.cache_files == again.cache_files
        other = tokenize(load(path).train, tiny.make_tiny_tokenizer(), 9)
        assert len(other[0]["input_ids"]) == 9

    def test_cache_depends_on_the_tokenizer(self) -> None:
        first, second = tiny.make_tiny_tokenizer(), tiny.make_tiny_tokenizer()
        second.add_tokens(["lobster"])
        tokenize(table(*self.rows), first, 8)
        assert len(first) in [i for ids in tokenize(table(*self.rows), second, 8)["input_ids"] for i in ids]

    def test_cache_depends_on_the_end_of_text_token(self) -> None:
        first, second = tiny.make_tiny_tokenizer(), tiny.make_tiny_tokenizer()
        second.eos_token = second.convert_ids_to_tokens(300)
        one, other = ([i for ids in tokenize(table(*self.rows), each, 8)["input_ids"] for i in ids] for each in (first, second))
        assert 0 in one and 0 not in other and other == [300 if i == 0 else i for i in one]

    def test_no_end_of_text_token(self) -> None:
        tokenizer = tiny.make_tiny_tokenizer()
        tokenizer.eos_token = None
        with says("no eos_token", "tokenizer_config.json"):
            tokenize(table("x"), tokenizer, 8)

    def test_too_short_for_one_block(self) -> None:
        tokenizer = tiny.make_tiny_tokenizer()
        tokens = len(tokenizer("short")["input_ids"]) + 1
        with says("too short", f"{tokens} tokens", "--seq_len 64"):
            tokenize(table("short"), tokenizer, 64)

    def test_invalid_seq_len(self) -> None:
        with says("--seq_len", "not 0"):
            tokenize(table("x"), tiny.make_tiny_tokenizer(), 0)


SEQ_LEN = 8


def corpus(path: Path, seed: int, documents: int) -> Path:
    """A dataset of documents of ten words. Each seed has three letters of its own, so no block is also in another dataset."""
    rng = random.Random(seed)
    letters = string.ascii_letters[3 * seed : 3 * seed + 3]
    return write_jsonl(path, [{"text": " ".join("".join(rng.choices(letters, k=4)) for _ in range(10))} for _ in range(documents)])


def mixed(name: object, *mix: str, seed: int = 7, **settings: Any) -> Blocks:
    return load_blocks(DataSettings(dataset_name=str(name), mix=mix, **settings), tiny.make_tiny_tokenizer(), SEQ_LEN, seed)


def rows_of(blocks: Iterable[Any], count: int | None = None) -> list[tuple[int, ...]]:
    return [tuple(row["input_ids"]) for row in islice(blocks, count)]


def alone(name: object) -> list[tuple[int, ...]]:
    """The training blocks of a dataset by itself."""
    return rows_of(tokenize(load(name).train, tiny.make_tiny_tokenizer(), SEQ_LEN))


def forbid_encoding(monkeypatch: pytest.MonkeyPatch) -> None:
    def encode(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("tokenised again")

    monkeypatch.setattr(data, "encode", encode)


class TestMix:
    @pytest.fixture
    def names(self, tmp_path: Path) -> tuple[Path, Path, Path]:
        """Datasets of some 40, 12 and 150 documents."""
        return corpus(tmp_path / "own.jsonl", 1, 40), corpus(tmp_path / "short.jsonl", 2, 12), corpus(tmp_path / "long.jsonl", 3, 150)

    def test_nothing_to_mix(self, names: tuple[Path, Path, Path]) -> None:
        blocks = mixed(names[0])
        assert rows_of(blocks.train) == alone(names[0])
        assert rows_of(blocks.validation) == rows_of(tokenize(load(names[0]).validation, tiny.make_tiny_tokenizer(), SEQ_LEN))

    def test_counts_are_exact(self, names: tuple[Path, Path, Path]) -> None:
        own, short, long = names
        one, two, three = alone(own), alone(short), alone(long)
        n = len(one)
        assert 2.5 * n > 3 * len(two) and n < len(three)
        rows = rows_of(mixed(own, f"{short}=2.5", f"{long}=1").train)
        assert len(rows) == n + round(2.5 * n) + n
        assert rows[:n] == one
        # the short one: whole, as often as it fits, then some of it once more
        times = Counter(rows[n : n + round(2.5 * n)])
        there = Counter(two)
        whole = round(2.5 * n) // len(two)
        assert set(times) == set(there)
        assert all(whole * there[row] <= times[row] <= (whole + 1) * there[row] for row in there)
        # whole passes are in order
        extra = rows[n : n + round(2.5 * n)]
        assert extra[: whole * len(two)] == two * whole
        # the long one: some of it, none twice
        chosen = Counter(rows[n + round(2.5 * n) :])
        assert chosen <= Counter(three)

    @pytest.mark.parametrize(("wanted", "lengths"), [(1, [1]), (4, [4]), (5, [5]), (6, [5, 1]), (10, [5, 5]), (14, [5, 5, 4])])
    def test_oversampling(self, wanted: int, lengths: list[int]) -> None:
        blocks = Dataset.from_dict({"input_ids": [[i] for i in range(5)]})
        parts = data.choose_blocks(blocks, wanted, np.random.default_rng(3))
        assert [len(part) for part in parts] == lengths
        chosen = [row["input_ids"][0] for row in parts[-1]]
        assert chosen == sorted(set(chosen))

    def test_a_weight_is_rounded(self, names: tuple[Path, Path, Path]) -> None:
        own, _, long = names
        n = len(alone(own))
        for wanted in (1, 7):
            for weight in ((wanted - 0.4) / n, (wanted + 0.4) / n):
                assert len(mixed(own, f"{long}={weight}").train) == n + wanted

    def test_mixture_depends_on_the_seed(self, names: tuple[Path, Path, Path]) -> None:
        own, _, long = names
        first, again, other = (rows_of(mixed(own, f"{long}=1", seed=seed).train) for seed in (1, 1, 2))
        assert first == again
        assert first != other and sorted(first[: len(alone(own))]) == sorted(other[: len(alone(own))])

    def test_datasets_of_a_mixture_are_sampled_independently(self, names: tuple[Path, Path, Path]) -> None:
        own, _, long = names
        n = len(alone(own))
        rows = rows_of(mixed(own, f"{long}=1", f"{long}=1").train)
        assert rows[n : 2 * n] != rows[2 * n :]

    def test_validation_is_that_of_dataset_name(self, names: tuple[Path, Path, Path]) -> None:
        own, short, _ = names
        assert rows_of(mixed(own, f"{short}=1").validation) == rows_of(mixed(own).validation)

    def test_validation_documents_are_never_trained_on(self, names: tuple[Path, Path, Path]) -> None:
        own = names[0]
        assert set(rows_of(mixed(own, f"{own}=3").train)) == set(alone(own))

    def test_nothing_is_copied(self, names: tuple[Path, Path, Path]) -> None:
        own, short, long = names
        train = mixed(own, f"{short}=1.5", f"{long}=0.5").train
        assert isinstance(train, Dataset)
        tables = [tokenize(load(name).train, tiny.make_tiny_tokenizer(), SEQ_LEN) for name in names]
        files = {file["filename"] for blocks in tables for file in blocks.cache_files}
        assert {file["filename"] for file in train.cache_files} == files

    def test_from_the_hub(self, hub: HubStandIn, tmp_path: Path) -> None:
        own = corpus(tmp_path / "own.jsonl", 1, 40)
        rows = rows_of(mixed(own, "wikitext=0.5").train)
        wikitext = set(alone("wikitext"))
        assert sum(row in wikitext for row in rows) == round(len(alone(own)) * 0.5)

    def test_dataset_config_does_not_apply_to_mixed_datasets(self, hub: HubStandIn, tmp_path: Path) -> None:
        extra = corpus(tmp_path / "extra.jsonl", 1, 40)
        rows = rows_of(mixed("wikitext", f"{extra}=0.25", dataset_config_name="wikitext-103-raw-v1").train)
        assert set(rows[-5:]) <= set(alone(extra))

    def test_a_name_may_hold_an_equals_sign(self, names: tuple[Path, Path, Path], tmp_path: Path) -> None:
        odd = corpus(tmp_path / "a=1.jsonl", 4, 20)
        assert set(rows_of(mixed(names[0], f"{odd}=0.5").train)) <= set(alone(names[0])) | set(alone(odd))

    @pytest.mark.parametrize("entry", ["book.txt", "book.txt=", "=2", "book.txt=0", "book.txt=-1", "book.txt=inf", "book.txt=nan", "a=b"])
    @pytest.mark.parametrize("streaming", [False, True])
    def test_bad_entries(self, entry: str, streaming: bool, hub: HubStandIn) -> None:
        with says("--mix", "NAME=WEIGHT", "above 0", repr(entry)):
            mixed("wikitext", "wikitext=1", entry, streaming=streaming)
        assert hub.requests == []  # it is said before anything is loaded

    def test_a_weight_that_adds_nothing(self, names: tuple[Path, Path, Path]) -> None:
        with says("--mix", "0.0001", "adds nothing", "larger weight"):
            mixed(names[0], f"{names[1]}=0.0001")

    def test_second_load_uses_the_cache(self, names: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        book = tmp_path / "book.txt"  # a single document, cut in two
        book.write_text("\n".join(tiny.sentences(9, 200)), encoding="utf-8")
        sources = (names[0], f"{names[1]}=1.5", f"{names[2]}=0.5", f"{book}=1")
        first = mixed(*sources)
        forbid_encoding(monkeypatch)
        again = mixed(*sources)
        assert rows_of(first.train) == rows_of(again.train) and rows_of(first.validation) == rows_of(again.validation)
        with pytest.raises(AssertionError, match="tokenised again"):
            mixed(corpus(tmp_path / "new.jsonl", 8, 9))


class TestSeveralProcesses:
    """What each process does, seen from one: the barriers that it passes before its turn and after it."""

    @pytest.fixture
    def barriers(self, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        passed: list[str] = []
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 16)
        monkeypatch.setattr(torch.distributed, "barrier", lambda: passed.append("barrier"))
        return passed

    @pytest.mark.parametrize(("rank", "local_rank", "before"), [(0, "0", 0), (8, "0", 1), (1, "1", 2), (9, "1", 2), (3, None, 2)])
    def test_rank_0_then_local_rank_0_build_the_tables(
        self, rank: int, local_rank: str | None, before: int, barriers: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(torch.distributed, "get_rank", lambda: rank)
        if local_rank is None:
            monkeypatch.delenv("LOCAL_RANK", raising=False)
        else:
            monkeypatch.setenv("LOCAL_RANK", local_rank)
        load_documents = data.load_documents

        def loading(settings: DataSettings) -> documents.Documents:
            barriers.append("load")
            return load_documents(settings)

        monkeypatch.setattr(data, "load_documents", loading)
        path = corpus(tmp_path / "a.jsonl", 1, 20)
        mixed(path, f"{path}=1")
        assert barriers == ["barrier"] * before + ["load"] * 2 + ["barrier"] * (2 - before)

    def test_error_on_rank_0_releases_other_ranks(self, barriers: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
        with says("no file or folder"):
            mixed(tmp_path / "none.txt")
        assert barriers == ["barrier"] * 2


def test_the_numbers_in_the_texts() -> None:
    assert f"first {data.STREAM_VALIDATION_BLOCKS} blocks" in inspect.getsource(DataSettings)
    assert f"first {data.STREAM_VALIDATION_BLOCKS} blocks" in str(load_blocks.__doc__)
    assert f"buffer of {data.STREAM_BUFFER_BLOCKS:,} blocks" in str(load_blocks.__doc__)


class TestStream:
    @pytest.fixture(autouse=True)
    def small(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(data, "STREAM_VALIDATION_BLOCKS", 10)
        monkeypatch.setattr(data, "STREAM_BUFFER_BLOCKS", 16)

    def stream(self, name: object, *mix: str, **settings: Any) -> tuple[IterableDataset, Dataset]:
        blocks = mixed(name, *mix, streaming=True, **settings)
        assert isinstance(blocks.train, IterableDataset)
        return blocks.train, blocks.validation

    def blocks_of(self, texts: list[str], tokenizer: Any) -> list[tuple[int, ...]]:
        """The slow truth, without shuffling: the documents, over and over."""
        ids = [i for text in texts for i in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
        ids *= SEQ_LEN  # a whole number of blocks: the stream's period
        return [tuple(ids[i : i + SEQ_LEN]) for i in range(0, len(ids), SEQ_LEN)]

    def documents(self, path: Path) -> list[str]:
        return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]

    def held_out(self, path: Path) -> int:
        """How many documents the first 10 blocks need."""
        tokenizer = tiny.make_tiny_tokenizer()
        lengths = [len(tokenizer(text)["input_ids"]) + 1 for text in self.documents(path)]
        return next(n for n in range(len(lengths)) if sum(lengths[:n]) >= 10 * SEQ_LEN)

    def test_stream_is_endless(self, tmp_path: Path) -> None:
        path = corpus(tmp_path / "a.jsonl", 1, 30)
        expected = self.blocks_of(self.documents(path)[self.held_out(path) :], tiny.make_tiny_tokenizer())
        train, _ = self.stream(path)
        rows = rows_of(train, len(expected) + 100)
        # all that came out went in, and what has not come out by now is in the buffer
        assert not Counter(rows) - Counter(expected + expected)
        assert sum((Counter(expected) - Counter(rows)).values()) <= 16
        assert rows[: len(expected)] != expected

    def test_first_blocks_of_a_stream_are_held_out(self, tmp_path: Path) -> None:
        path = corpus(tmp_path / "a.jsonl", 1, 30)
        texts, held = self.documents(path), self.held_out(path)
        _, validation = self.stream(path)
        assert rows_of(validation) == self.blocks_of(texts[:held], tiny.make_tiny_tokenizer())[:10]

    @pytest.mark.parametrize("documents", [7, 9, 10, 11])
    def test_short_validation_split(self, documents: int, tmp_path: Path) -> None:
        """Seven ids to a document and eight to a block, of which ten are wanted."""
        tokenizer = tiny.make_tiny_tokenizer()
        tokens = tokenizer.tokenize("the old ship")
        text = tokenizer.convert_tokens_to_string((tokens * 7)[:7])
        ids = [*tokenizer(text)["input_ids"], 0] * documents
        corpus(tmp_path / "train.jsonl", 1, 30)
        write_jsonl(tmp_path / "valid.jsonl", [{"text": text}] * documents)
        _, validation = self.stream(tmp_path)
        assert rows_of(validation) == [tuple(ids[i : i + 8]) for i in range(0, len(ids) - 7, 8)][:10]

    def test_held_out_documents_of_a_stream_are_minimal(self, tmp_path: Path) -> None:
        path = corpus(tmp_path / "a.jsonl", 1, 30)
        tokenizer, texts = tiny.make_tiny_tokenizer(), self.documents(path)
        first = next(iter(data.TextStream("x", lambda: iter([{"text": text} for text in texts]), self.held_out(path)).without_end()))
        assert first["text"] == texts[self.held_out(path)]
        settings = DataSettings(dataset_name=str(path), streaming=True)
        stream, validation = data._open_stream(settings, tokenizer, SEQ_LEN)
        assert (stream.skipped, len(validation)) == (self.held_out(path), 10)
        assert next(stream.without_end()) == first
        again = list(islice(stream.without_end(), 2 * (30 - stream.skipped)))
        assert [row["text"] for row in again] == texts[stream.skipped :] * 2

    def test_stream_uses_its_validation_split(self, tmp_path: Path) -> None:
        train_path, valid_path = corpus(tmp_path / "train.jsonl", 1, 30), corpus(tmp_path / "valid.jsonl", 2, 30)
        tokenizer = tiny.make_tiny_tokenizer()
        train, validation = self.stream(tmp_path)
        assert rows_of(validation) == self.blocks_of(self.documents(valid_path), tokenizer)[:10]
        everything = self.blocks_of(self.documents(train_path), tokenizer)
        assert set(everything) == set(rows_of(train, 4 * len(everything)))  # a block may stay in the buffer for long

    def test_blank_validation_split_is_ignored(self, tmp_path: Path) -> None:
        path = corpus(tmp_path / "train.jsonl", 1, 30)
        (tmp_path / "valid.txt").write_text("\n")
        assert rows_of(self.stream(tmp_path)[1]) == rows_of(self.stream(path)[1])

    @pytest.mark.parametrize("mix", [False, True])
    def test_iterating_restarts_the_stream_and_set_epoch_reshuffles(self, tmp_path: Path, mix: bool) -> None:
        path, other = corpus(tmp_path / "a.jsonl", 1, 30), corpus(tmp_path / "b.jsonl", 2, 30)
        entries = (f"{other}=0.5",) if mix else ()
        train, _ = self.stream(path, *entries)
        first = rows_of(train, 200)
        assert rows_of(train, 200) == first
        assert rows_of(self.stream(path, *entries)[0], 200) == first
        assert rows_of(self.stream(path, *entries, seed=8)[0], 200) != first
        train.set_epoch(1)
        assert rows_of(train, 200) != first
        train.set_epoch(0)
        assert rows_of(train, 200) == first

    def test_mixed_by_weights(self, tmp_path: Path) -> None:
        paths = [corpus(tmp_path / f"{n}.jsonl", n, 400) for n in (1, 2, 3)]
        train, validation = self.stream(paths[0], f"{paths[1]}=0.5", f"{paths[2]}=2")
        assert rows_of(validation) == rows_of(self.stream(paths[0])[1])
        kinds = [set(self.blocks_of(self.documents(path)[self.held_out(path) :], tiny.make_tiny_tokenizer())) for path in paths]
        rows = rows_of(train, 2000)
        shares = [sum(row in kind for row in rows) / len(rows) for kind in kinds]
        assert sum(shares) == pytest.approx(1)
        # five standard deviations of a share at 2,000 draws
        assert shares == pytest.approx([2 / 7, 1 / 7, 4 / 7], abs=5 * math.sqrt(0.25 / 2000))

    def test_dataset_order_depends_on_the_seed(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(data, "STREAM_BUFFER_BLOCKS", 1)  # nothing is shuffled
        path, other = corpus(tmp_path / "a.jsonl", 1, 30), corpus(tmp_path / "b.jsonl", 2, 30)
        kind = set(self.blocks_of(self.documents(path)[self.held_out(path) :], tiny.make_tiny_tokenizer()))
        drawn = [[row in kind for row in rows_of(self.stream(path, f"{other}=1", seed=seed)[0], 60)] for seed in (7, 8, 7)]
        assert drawn[0] == drawn[2] != drawn[1] and 0 < sum(drawn[0]) < 60

    def test_skipping_in_a_loader_equals_a_resumed_run(self, tmp_path: Path) -> None:
        path, other = corpus(tmp_path / "a.jsonl", 1, 30), corpus(tmp_path / "b.jsonl", 2, 30)
        train, _ = self.stream(path, f"{other}=1")

        def collate(rows: list[dict[str, Any]]) -> torch.Tensor:
            return torch.tensor([row["input_ids"] for row in rows])

        loader = DataLoader(train, batch_size=4, num_workers=0, collate_fn=collate)
        whole = list(islice(loader, 30))
        assert whole[0].shape == (4, SEQ_LEN)
        resumed = list(islice(skip_first_batches(loader, 11), 19))
        assert torch.equal(torch.stack(whole[11:]), torch.stack(resumed))

    def test_streaming_writes_nothing_and_reads_lazily(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path, read = corpus(tmp_path / "a.jsonl", 1, 2000), 0
        original = documents.READERS[".jsonl"]

        def counting(*args: Any) -> Any:
            nonlocal read
            for text in original(*args):
                read += 1
                yield text

        def forbidden(*args: Any, **kwargs: Any) -> None:
            raise AssertionError("made a table")

        monkeypatch.setitem(documents.READERS, ".jsonl", counting)
        for module in (data, documents):
            monkeypatch.setattr(module, "make_table", forbidden)
        train, _ = self.stream(path)
        rows_of(train, 20)
        assert 0 < read < 500

    @pytest.mark.parametrize("config", [None, "wikitext-103-raw-v1"])
    def test_wikitext_from_the_hub(self, hub: HubStandIn, config: str | None) -> None:
        tokenizer = tiny.make_tiny_tokenizer()
        train, validation = self.stream("wikitext", dataset_config_name=config)
        documents = load("wikitext", dataset_config_name=config)
        assert rows_of(validation) == self.blocks_of(texts(documents.validation), tokenizer)[:10]
        expected = self.blocks_of(texts(documents.train), tokenizer)
        assert set(rows_of(train, len(expected) + 16)) == set(expected)

    @pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
    def test_any_other_data_set_of_the_hub(self, hub: HubStandIn, tmp_path: Path, suffix: str) -> None:
        path = corpus(tmp_path / "plain.jsonl", 5, 30)
        rows = [{"id": i, "body": text} for i, text in enumerate(["", None, *self.documents(path)])]
        (tmp_path / "hub").mkdir()
        if suffix == "jsonl":
            write_jsonl(tmp_path / "hub" / "train.jsonl", rows)
        else:
            pq.write_table(pa.Table.from_pylist(rows), tmp_path / "hub" / "train-00000-of-00001.parquet")
        hub.add_dataset("your/stream", tmp_path / "hub")
        train, validation = self.stream("your/stream", text_column="body")
        local, local_validation = self.stream(path)
        assert rows_of(validation) == rows_of(local_validation)
        assert rows_of(train, 100) == rows_of(local, 100)

    def test_stream_smaller_than_its_validation(self, tmp_path: Path) -> None:
        book = tmp_path / "book.txt"
        book.write_text(" ".join(tiny.sentences(0, 100)), encoding="utf-8")
        with says("book.txt", "nothing left", "first 10 blocks", "leave out --streaming"):
            self.stream(book)
        with says("book.txt", "nothing left"):
            self.stream(corpus(tmp_path / "a.jsonl", 1, 30), f"{book}=1")

    def test_load_documents_ignores_streaming(self, hub: HubStandIn) -> None:
        assert texts(load("wikitext", streaming=True).train) == texts(load("wikitext").train)

    def test_other_errors(self, tmp_path: Path, hub: HubStandIn) -> None:
        (tmp_path / "blank.txt").write_text(" \n")
        with says("blank.txt", "holds no text"):
            self.stream(tmp_path / "blank.txt")
        (tmp_path / "short.txt").write_text("x")
        with says("too short", "1 document", "--seq_len 8"):
            self.stream(tmp_path / "short.txt")
        with says("a.jsonl", "no column 'body'", "--text_column"):
            self.stream(corpus(tmp_path / "a.jsonl", 1, 30), text_column="body")
        with says("Salesforce/wikitext", "no column 'body'", "'text'", "--text_column"):
            self.stream("wikitext", text_column="body")
        with says("no dataset no/such", "hub"):
            self.stream("no/such")
        hub.down = True
        with says("cannot reach", "some/dataset"):
            self.stream("some/dataset")

    def test_a_tokenizer_without_end_of_text(self, tmp_path: Path) -> None:
        tokenizer = tiny.make_tiny_tokenizer()
        tokenizer.eos_token = None
        with says("no eos_token"):
            load_blocks(DataSettings(dataset_name=str(corpus(tmp_path / "a.jsonl", 1, 30)), streaming=True), tokenizer, SEQ_LEN, 0)
