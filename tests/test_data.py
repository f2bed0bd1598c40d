"""Documents from every source, their split, their blocks, mixed, streamed and told apart, and the words of every error."""

from __future__ import annotations

import inspect
import json
import logging
import math
import random
import re
import string
from collections import Counter
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
import torch
from accelerate import skip_first_batches
from datasets import Dataset, IterableDataset
from hub_stand_in import HubStandIn
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from recursify import RecursiveLLM, data
from recursify.configuration_recursive_llm import from_donor
from recursify.data import Blocks, DataSettings, load_blocks, load_documents, separate, tokenize
from recursify.errors import UserError


def load(name: object, **settings: Any) -> data.Documents:
    return load_documents(DataSettings(dataset_name=str(name), **settings))


def texts(documents: Dataset) -> list[str]:
    assert documents.column_names == ["text"]
    return list(documents["text"])


def table(*rows: str) -> Dataset:
    return Dataset.from_dict({"text": list(rows)})


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def says(*parts: str) -> Any:
    """A ``UserError`` whose message has all these parts, in order."""
    return pytest.raises(UserError, match="(?s)" + ".*".join(map(re.escape, parts)))


DOCUMENTS = [f"Document {i}.\nSecond line, é." for i in range(40)]


class TestFormats:
    def write(self, folder: Path, suffix: str) -> Path:
        path = folder / f"corpus{suffix}"
        rows = [{"id": i, "text": text} for i, text in enumerate(DOCUMENTS)]
        if suffix == ".txt":
            path.write_text("\n<|endoftext|>\n".join(DOCUMENTS) + "\n<|endoftext|>\n", encoding="utf-8")
        elif suffix == ".jsonl":
            write_jsonl(path, rows)
        elif suffix == ".json":
            path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
        elif suffix == ".csv":
            path.write_text("id,text\n" + "".join(f'{r["id"]},"{r["text"]}"\n' for r in rows), encoding="utf-8")
        else:
            pq.write_table(pa.Table.from_pylist(rows), path)
        return path

    @pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".json", ".csv", ".parquet"])
    def test_every_format_gives_the_same_documents(self, tmp_path: Path, suffix: str) -> None:
        documents = load(self.write(tmp_path, suffix))
        assert sorted(texts(documents.train) + texts(documents.validation)) == sorted(DOCUMENTS)

    def test_json_may_hold_one_object_per_line(self, tmp_path: Path) -> None:
        documents = load(write_jsonl(tmp_path / "a.json", [{"text": "one"}, {"text": "two"}]))
        assert sorted(texts(documents.train) + texts(documents.validation)) == ["one", "two"]

    def test_another_column(self, tmp_path: Path) -> None:
        path = write_jsonl(tmp_path / "a.jsonl", [{"body": "one", "text": 1}, {"body": "two", "text": 2}])
        documents = load(path, text_column="body")
        assert sorted(texts(documents.train) + texts(documents.validation)) == ["one", "two"]

    def test_blank_and_null_documents_are_dropped(self, tmp_path: Path) -> None:
        documents = load(write_jsonl(tmp_path / "a.jsonl", [{"text": t} for t in ("one", "", None, " \n", "two")]))
        assert sorted(texts(documents.train) + texts(documents.validation)) == ["one", "two"]

    def test_only_separator_lines_divide_a_text_file(self, tmp_path: Path) -> None:
        path = tmp_path / "a.txt"
        path.write_text("  one\n\nstill one, <|endoftext|> inside\n<|endoftext|>\r\ntwo\n", encoding="utf-8")
        documents = load(path)
        assert sorted(texts(documents.train) + texts(documents.validation)) == ["  one\n\nstill one, <|endoftext|> inside", "two"]

    def test_a_changed_file_is_read_again(self, tmp_path: Path) -> None:
        path = tmp_path / "a.txt"
        for content in ("one\n<|endoftext|>\ntwo", "three\n<|endoftext|>\nfour"):
            path.write_text(content, encoding="utf-8")
            documents = load(path)
            assert set(texts(documents.train) + texts(documents.validation)) == set(content.split("\n<|endoftext|>\n"))


class TestSplits:
    def test_the_names_in_a_folder_tell_the_split(self, tmp_path: Path) -> None:
        for name in ("b.txt", "a.txt", "heldout_valid.txt", "wiki-TEST.txt", "sub/latest.txt", "dev/c.txt", ".hidden.txt"):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(name, encoding="utf-8")
        (tmp_path / "README.md").write_text("not text to learn")
        documents = load(tmp_path)
        assert texts(documents.train) == ["a.txt", "b.txt", "sub/latest.txt"]
        assert texts(documents.validation) == ["dev/c.txt", "heldout_valid.txt"]

    @pytest.mark.parametrize(
        ("name", "split"),
        [
            ("train-00000-of-00002.parquet", "train"),
            ("validation-00000-of-00001.parquet", "validation"),
            ("my.dev.jsonl", "validation"),
            ("devotion.txt", "train"),
            ("test/part1.txt", "test"),
            ("test/train.txt", "train"),
            ("qa10_indefinite-knowledge_test.txt", "test"),
        ],
    )
    def test_split_of(self, name: str, split: str) -> None:
        assert data.split_of(Path(name)) == split

    def test_mixed_formats_in_a_folder(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_text("one")
        write_jsonl(tmp_path / "b.jsonl", [{"text": "two"}])
        pq.write_table(pa.table({"text": ["three"], "more": [1]}), tmp_path / "valid.parquet")
        documents = load(tmp_path)
        assert texts(documents.train) == ["one", "two"]
        assert texts(documents.validation) == ["three"]

    def test_the_test_split_is_not_even_opened(self, tmp_path: Path) -> None:
        (tmp_path / "train.txt").write_text("one\n<|endoftext|>\ntwo")
        (tmp_path / "test.parquet").write_text("no parquet")
        assert len(load(tmp_path).train) == 1

    def test_whole_documents_are_set_aside_by_a_fixed_seed(self, tmp_path: Path) -> None:
        path = write_jsonl(tmp_path / "a.jsonl", [{"text": f"document {i}"} for i in range(100)])
        first, again = load(path), load(path)
        assert (len(first.train), len(first.validation)) == (95, 5)
        assert not set(texts(first.train)) & set(texts(first.validation))
        assert texts(first.validation) == texts(again.validation)
        assert texts(first.train) == sorted(texts(first.train), key=lambda t: int(t.split()[1]))

    def test_at_least_one_document_is_set_aside(self) -> None:
        documents = data.hold_out(table("one", "two", "three"), "x")
        assert (len(documents.train), len(documents.validation)) == (2, 1)

    def test_a_single_document_is_cut_and_a_warning_says_so(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        path = tmp_path / "book.txt"
        book = "\n\n".join(" ".join(tiny.sentences(i, 5)) for i in range(100))
        path.write_text(book, encoding="utf-8")
        with caplog.at_level(logging.WARNING, "recursify.data"):
            documents = load(path)
        (train,), (validation,) = texts(documents.train), texts(documents.validation)
        assert train + validation == book
        assert train.endswith("\n\n")
        assert 0.05 <= len(validation) / len(book) <= 0.1
        (record,) = caplog.records
        assert "book.txt" in record.getMessage() and "one single document" in record.getMessage()

    @pytest.mark.parametrize("boundary", ["\n\n", "\n", " "])
    def test_split_text_prefers_larger_units(self, boundary: str) -> None:
        text = "x" * 930 + boundary + "y" * (70 - len(boundary))
        assert data.split_text(text) == ("x" * 930 + boundary, "y" * (70 - len(boundary)))

    def test_split_text_without_any_boundary(self) -> None:
        assert data.split_text("x" * 100) == ("x" * 95, "x" * 5)


class TestHub:
    def test_wikitext_means_the_small_raw_one(self, hub: HubStandIn) -> None:
        documents = load("wikitext")
        assert (len(documents.train), len(documents.validation)) == (24, 4)
        # the seeds of tiny.tiny_wikitext: 0 and 1 are train and validation of wikitext-2-raw-v1
        assert texts(documents.train)[0].startswith(" = Article 0 0 = \n\n The ")
        assert texts(documents.validation)[3].startswith(" = Article 1 3 = \n")

    @pytest.mark.parametrize("name", ["wikitext", "Salesforce/wikitext"])
    def test_another_configuration(self, hub: HubStandIn, name: str) -> None:
        assert texts(load(name, dataset_config_name="wikitext-103-raw-v1").train)[0].startswith(" = Article 10 0 = \n")

    def test_articles_keep_every_line(self, hub: HubStandIn) -> None:
        rows = tiny.wikitext_rows(1, 4)
        expected = "".join(row or "\n" for row in rows)
        assert re.sub("\n+", "\n", "\n".join(texts(load("wikitext").validation))) == re.sub("\n+", "\n", expected).strip("\n")

    def test_join_articles(self) -> None:
        rows = ["", " = A = \n", "", " a = b \n", " = no heading = \n", "", " = = Part = = \n", "", " = B ( x ) = \n", "", "end"]
        first, *articles = data.join_articles(rows)
        assert first == "\n"
        assert articles == [" = A = \n\n a = b \n = no heading = \n\n = = Part = = \n\n", " = B ( x ) = \n\nend\n"]

    def test_rows_of_any_other_data_set_are_documents(self, hub: HubStandIn, tmp_path: Path) -> None:
        (tmp_path / "data").mkdir()
        rows = ["", " = A = \n", " b \n", None]
        pq.write_table(pa.table({"body": rows, "n": range(4)}), tmp_path / "data" / "train-00000-of-00001.parquet")
        pq.write_table(pa.table({"body": ["v"], "n": [0]}), tmp_path / "data" / "validation-00000-of-00001.parquet")
        hub.add_dataset("your/dataset", tmp_path)
        documents = load("your/dataset", text_column="body")
        assert texts(documents.train) == [" = A = ", " b "]
        assert texts(documents.validation) == ["v"]

    def test_a_data_set_without_validation_split(self, hub: HubStandIn, tmp_path: Path) -> None:
        write_jsonl(tmp_path / "train.jsonl", [{"text": f"d{i}"} for i in range(20)])
        write_jsonl(tmp_path / "test.jsonl", [{"text": "never"}])
        hub.add_dataset("your/undivided", tmp_path)
        documents = load("your/undivided")
        assert (len(documents.train), len(documents.validation)) == (19, 1)
        assert "never" not in texts(documents.train) + texts(documents.validation)

    def test_a_folder_here_goes_before_the_hub(self, hub: HubStandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        for folder in ("corpus", "wikitext"):
            (tmp_path / folder).mkdir()
            (tmp_path / folder / "a.txt").write_text("here\n<|endoftext|>\nand here")
        assert len(load("corpus").train) == 1
        assert hub.requests == []
        # but wikitext is the hub's, unless written as a path
        assert len(load("wikitext").train) == 24
        assert len(load("./wikitext").train) == 1


class TestErrors:
    @pytest.mark.parametrize("name", ["./corpus.txt", "missing/corpus.jsonl", "/no/such/folder", "a/b/c"])
    def test_missing(self, name: str, hub: HubStandIn) -> None:
        with says(str(Path(name)), ".txt, .jsonl, .parquet", "folders", "hub"):
            load(name)
        assert hub.requests == []

    def test_unknown_suffix(self, tmp_path: Path) -> None:
        (tmp_path / "notes.pdf").write_text("x")
        with says("notes.pdf", "unknown suffix '.pdf'", ".txt, .jsonl, .parquet"):
            load(tmp_path / "notes.pdf")

    def test_folder_without_text(self, tmp_path: Path) -> None:
        (tmp_path / "notes.pdf").write_text("x")
        with says(str(tmp_path), "no text files", ".txt, .jsonl, .parquet"):
            load(tmp_path)

    def test_folder_without_training_text(self, tmp_path: Path) -> None:
        (tmp_path / "valid.txt").write_text("x")
        with says(str(tmp_path), "no text to train on", "valid.txt"):
            load(tmp_path)

    @pytest.mark.parametrize("content", ["", "\n \n<|endoftext|>\n\n"])
    def test_empty_file(self, tmp_path: Path, content: str) -> None:
        (tmp_path / "a.txt").write_text(content)
        with says("a.txt", "holds no text"):
            load(tmp_path / "a.txt")

    def test_missing_column_in_jsonl(self, tmp_path: Path) -> None:
        with says("a.jsonl, line 1", "no column 'text'", "'id', 'body'", "--text_column"):
            load(write_jsonl(tmp_path / "a.jsonl", [{"id": 1, "body": "x"}]))

    def test_missing_column_further_down(self, tmp_path: Path) -> None:
        with says("a.jsonl, line 3", "no column 'text'", "'body'"):
            load(write_jsonl(tmp_path / "a.jsonl", [{"text": "x"}, {"text": "y"}, {"body": "x"}]))

    def test_missing_column_in_parquet(self, tmp_path: Path) -> None:
        pq.write_table(pa.table({"id": [1], "body": ["x"]}), tmp_path / "a.parquet")
        with says("a.parquet", "no column 'text'", "'id', 'body'", "--text_column"):
            load(tmp_path / "a.parquet")

    def test_column_that_is_no_text(self, tmp_path: Path) -> None:
        pq.write_table(pa.table({"text": [1]}), tmp_path / "a.parquet")
        with says("a.parquet", "'text' holds int64", "expected text"):
            load(tmp_path / "a.parquet")
        with says("a.jsonl, line 1", "'text' holds list", "expected text"):
            load(write_jsonl(tmp_path / "a.jsonl", [{"text": ["x"]}]))

    def test_broken_json(self, tmp_path: Path) -> None:
        (tmp_path / "a.jsonl").write_text('{"text": "x"}\n{"text": \n')
        with says("a.jsonl, line 2", "not valid JSON"):
            load(tmp_path / "a.jsonl")
        with says("b.jsonl, line 1", "expected an object", "found str"):
            load(write_jsonl(tmp_path / "b.jsonl", ["x"]))

    def test_broken_parquet(self, tmp_path: Path) -> None:
        (tmp_path / "a.parquet").write_text("no parquet")
        with says("a.parquet", "cannot be read as .parquet"):
            load(tmp_path / "a.parquet")

    def test_text_that_is_not_utf8(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_bytes("café\n".encode("latin1"))
        with says("a.txt", "not UTF-8", "0xe9", "iconv"):
            load(tmp_path / "a.txt")

    def test_configuration_of_a_local_file(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_text("x")
        with says("a.txt", "--dataset_config_name other"):
            load(tmp_path / "a.txt", dataset_config_name="other")

    def test_unknown_on_the_hub(self, hub: HubStandIn) -> None:
        with says("no data set no/such", "hub", "path", ".txt"):
            load("no/such")

    def test_hub_out_of_reach(self, hub: HubStandIn) -> None:
        hub.down = True
        with says("cannot reach", "some/dataset", "HF_HUB_OFFLINE", "local path"):
            load("some/dataset")

    def test_unknown_configuration(self, hub: HubStandIn) -> None:
        with says("Salesforce/wikitext (nope)", "wikitext-103-raw-v1", "wikitext-2-raw-v1", "--dataset_config_name"):
            load("wikitext", dataset_config_name="nope")

    def test_missing_column_on_the_hub(self, hub: HubStandIn) -> None:
        with says("Salesforce/wikitext", "no column 'body'", "'text'", "--text_column"):
            load("wikitext", text_column="body")

    def test_hub_data_set_without_training_split(self, hub: HubStandIn, tmp_path: Path) -> None:
        write_jsonl(tmp_path / "test.jsonl", [{"text": "x"}])
        hub.add_dataset("your/benchmark", tmp_path)
        with says("your/benchmark", "no split 'train'", "'test'"):
            load("your/benchmark")

    def test_hub_data_set_without_data(self, hub: HubStandIn, tmp_path: Path) -> None:
        (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
        hub.add_dataset("your/void", tmp_path)
        with says("your/void", "cannot be loaded", "data files"):
            load("your/void")

    def test_empty_hub_data_set(self, hub: HubStandIn, tmp_path: Path) -> None:
        write_jsonl(tmp_path / "train.jsonl", [{"text": ""}, {"text": "\n"}])
        hub.add_dataset("your/blank", tmp_path)
        with says("your/blank", "holds no text"):
            load("your/blank")

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

    def test_seq_len_that_is_no_length(self) -> None:
        with says("--seq_len", "not 0"):
            tokenize(table("x"), tiny.make_tiny_tokenizer(), 0)


class TestTokenize:
    rows = tuple(" ".join(tiny.sentences(i, i % 7 + 1)) for i in range(30))

    def stream(self, tokenizer: Any) -> list[int]:
        """The slow truth: all documents in a row, an end-of-text token after each."""
        return [i for row in self.rows for i in [*tokenizer(row)["input_ids"], tokenizer.eos_token_id]]

    @pytest.mark.parametrize("seq_len", [1, 7, 128])
    def test_blocks_are_the_stream_without_its_tail(self, seq_len: int) -> None:
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

    def test_a_second_end_of_text_is_not_added(self) -> None:
        tokenizer = tiny.make_tiny_tokenizer()
        assert data.encode({"text": ["x<|endoftext|>", "x", ""]}, tokenizer)["input_ids"] == [
            [*tokenizer("x")["input_ids"], 0],
            [*tokenizer("x")["input_ids"], 0],
            [0],
        ]

    def test_ids_collate_to_int64(self) -> None:
        blocks = tokenize(table(*self.rows), tiny.make_tiny_tokenizer(), 8).with_format("torch")
        assert str(blocks[:2]["input_ids"].dtype) == "torch.int64"
        assert blocks[:2]["input_ids"].shape == (2, 8)

    def test_documents_beyond_the_models_length_pass_without_a_word(
        self, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
    ) -> None:
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

    def test_the_setting_of_progress_bars_is_left_alone(self) -> None:
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

    def test_another_tokenizer_gets_no_table_of_the_first(self) -> None:
        first, second = tiny.make_tiny_tokenizer(), tiny.make_tiny_tokenizer()
        second.add_tokens(["lobster"])
        tokenize(table(*self.rows), first, 8)
        assert len(first) in [i for ids in tokenize(table(*self.rows), second, 8)["input_ids"] for i in ids]


SEQ_LEN = 8


def corpus(path: Path, seed: int, documents: int) -> Path:
    """A data set of documents of ten words. Each seed has three letters of its own, so no block is also in another data set."""
    rng = random.Random(seed)
    letters = string.ascii_letters[3 * seed : 3 * seed + 3]
    return write_jsonl(path, [{"text": " ".join("".join(rng.choices(letters, k=4)) for _ in range(10))} for _ in range(documents)])


def mixed(name: object, *mix: str, seed: int = 7, **settings: Any) -> Blocks:
    return load_blocks(DataSettings(dataset_name=str(name), mix=mix, **settings), tiny.make_tiny_tokenizer(), SEQ_LEN, seed)


def rows_of(blocks: Iterable[Any], count: int | None = None) -> list[tuple[int, ...]]:
    return [tuple(row["input_ids"]) for row in islice(blocks, count)]


def alone(name: object) -> list[tuple[int, ...]]:
    """The training blocks of a data set by itself."""
    return rows_of(tokenize(load(name).train, tiny.make_tiny_tokenizer(), SEQ_LEN))


def forbid_encoding(monkeypatch: pytest.MonkeyPatch) -> None:
    def encode(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("tokenised again")

    monkeypatch.setattr(data, "encode", encode)


class TestMix:
    @pytest.fixture
    def names(self, tmp_path: Path) -> tuple[Path, Path, Path]:
        """Data sets of some 40, 12 and 150 documents."""
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
        # the long one: some of it, none twice
        chosen = Counter(rows[n + round(2.5 * n) :])
        assert chosen <= Counter(three)

    def test_the_seed_decides(self, names: tuple[Path, Path, Path]) -> None:
        own, _, long = names
        first, again, other = (rows_of(mixed(own, f"{long}=1", seed=seed).train) for seed in (1, 1, 2))
        assert first == again
        assert first != other and sorted(first[: len(alone(own))]) == sorted(other[: len(alone(own))])

    def test_two_data_sets_draw_differently(self, names: tuple[Path, Path, Path]) -> None:
        own, _, long = names
        n = len(alone(own))
        rows = rows_of(mixed(own, f"{long}=1", f"{long}=1").train)
        assert rows[n : 2 * n] != rows[2 * n :]

    def test_validation_is_the_first_ones_own(self, names: tuple[Path, Path, Path]) -> None:
        own, short, _ = names
        assert rows_of(mixed(own, f"{short}=1").validation) == rows_of(mixed(own).validation)

    def test_what_validates_is_never_trained_on(self, names: tuple[Path, Path, Path]) -> None:
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

    def test_the_configuration_is_not_for_what_is_mixed_in(self, hub: HubStandIn, tmp_path: Path) -> None:
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

    def test_a_second_load_tokenises_nothing(self, names: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
        monkeypatch.setattr(torch.distributed, "barrier", lambda: passed.append("barrier"))
        return passed

    @pytest.mark.parametrize(("rank", "local_rank", "before"), [(0, "0", 0), (8, "0", 1), (1, "1", 2), (9, "1", 2), (3, None, 2)])
    def test_the_first_of_all_then_the_first_of_each_node(
        self, rank: int, local_rank: str | None, before: int, barriers: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(torch.distributed, "get_rank", lambda: rank)
        if local_rank is None:
            monkeypatch.delenv("LOCAL_RANK", raising=False)
        else:
            monkeypatch.setenv("LOCAL_RANK", local_rank)
        load_documents = data.load_documents

        def loading(settings: DataSettings) -> data.Documents:
            barriers.append("load")
            return load_documents(settings)

        monkeypatch.setattr(data, "load_documents", loading)
        path = corpus(tmp_path / "a.jsonl", 1, 20)
        mixed(path, f"{path}=1")
        assert barriers == ["barrier"] * before + ["load"] * 2 + ["barrier"] * (2 - before)

    def test_an_error_keeps_nobody_waiting(self, barriers: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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

    def test_the_text_without_end(self, tmp_path: Path) -> None:
        path = corpus(tmp_path / "a.jsonl", 1, 30)
        expected = self.blocks_of(self.documents(path)[self.held_out(path) :], tiny.make_tiny_tokenizer())
        train, _ = self.stream(path)
        rows = rows_of(train, len(expected) + 100)
        # all that came out went in, and what has not come out by now is in the buffer
        assert not Counter(rows) - Counter(expected + expected)
        assert sum((Counter(expected) - Counter(rows)).values()) <= 16
        assert rows[: len(expected)] != expected

    def test_the_first_blocks_validate_and_their_documents_are_left_out(self, tmp_path: Path) -> None:
        path = corpus(tmp_path / "a.jsonl", 1, 30)
        texts, held = self.documents(path), self.held_out(path)
        _, validation = self.stream(path)
        assert rows_of(validation) == self.blocks_of(texts[:held], tiny.make_tiny_tokenizer())[:10]

    def test_its_own_validation_split_as_far_as_it_is_needed(self, tmp_path: Path) -> None:
        train_path, valid_path = corpus(tmp_path / "train.jsonl", 1, 30), corpus(tmp_path / "valid.jsonl", 2, 30)
        tokenizer = tiny.make_tiny_tokenizer()
        train, validation = self.stream(tmp_path)
        assert rows_of(validation) == self.blocks_of(self.documents(valid_path), tokenizer)[:10]
        everything = self.blocks_of(self.documents(train_path), tokenizer)
        assert set(everything) == set(rows_of(train, len(everything) + 16))

    def test_a_blank_validation_split_is_none(self, tmp_path: Path) -> None:
        path = corpus(tmp_path / "train.jsonl", 1, 30)
        (tmp_path / "valid.txt").write_text("\n")
        assert rows_of(self.stream(tmp_path)[1]) == rows_of(self.stream(path)[1])

    @pytest.mark.parametrize("mix", [False, True])
    def test_it_begins_anew_and_an_epoch_changes_it(self, tmp_path: Path, mix: bool) -> None:
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

    def test_a_loader_skips_as_a_resumed_run_does(self, tmp_path: Path) -> None:
        path, other = corpus(tmp_path / "a.jsonl", 1, 30), corpus(tmp_path / "b.jsonl", 2, 30)
        train, _ = self.stream(path, f"{other}=1")

        def collate(rows: list[dict[str, Any]]) -> torch.Tensor:
            return torch.tensor([row["input_ids"] for row in rows])

        loader = DataLoader(train, batch_size=4, num_workers=0, collate_fn=collate)
        whole = list(islice(loader, 30))
        assert whole[0].shape == (4, SEQ_LEN)
        resumed = list(islice(skip_first_batches(loader, 11), 19))
        assert torch.equal(torch.stack(whole[11:]), torch.stack(resumed))

    def test_nothing_is_written_and_no_more_is_read_than_asked_for(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path, read = corpus(tmp_path / "a.jsonl", 1, 2000), 0
        original = data._read_jsonl

        def counting(*args: Any) -> Any:
            nonlocal read
            for text in original(*args):
                read += 1
                yield text

        def forbidden(*args: Any, **kwargs: Any) -> None:
            raise AssertionError("made a table")

        monkeypatch.setitem(data.READERS, ".jsonl", counting)
        monkeypatch.setattr(data, "_table", forbidden)
        train, _ = self.stream(path)
        rows_of(train, 20)
        assert 0 < read < 500

    def test_documents_of_every_length_are_encoded_as_in_a_table(self, monkeypatch: pytest.MonkeyPatch) -> None:
        texts = [" ".join(tiny.sentences(i, i % 7 + 1)) for i in range(150)] + ["x"]
        tokenizer = tiny.make_tiny_tokenizer()
        expected = data.encode({"text": texts}, tokenizer)["input_ids"]
        for size in (1, 200, data.TEXT_AT_ONCE):
            monkeypatch.setattr(data, "TEXT_AT_ONCE", size)
            assert [list(row["input_ids"]) for row in data.encode_each(({"text": text} for text in texts), tokenizer)] == expected

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

    def test_a_data_set_that_validation_uses_up(self, tmp_path: Path) -> None:
        book = tmp_path / "book.txt"
        book.write_text(" ".join(tiny.sentences(0, 100)), encoding="utf-8")
        with says("book.txt", "nothing left", "first 10 blocks", "leave out --streaming"):
            self.stream(book)
        with says("book.txt", "nothing left"):
            self.stream(corpus(tmp_path / "a.jsonl", 1, 30), f"{book}=1")

    def test_documents_are_tables_all_the_same(self, hub: HubStandIn) -> None:
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
        with says("no data set no/such", "hub"):
            self.stream("no/such")
        hub.down = True
        with says("cannot reach", "some/dataset"):
            self.stream("some/dataset")

    def test_a_tokenizer_without_end_of_text(self, tmp_path: Path) -> None:
        tokenizer = tiny.make_tiny_tokenizer()
        tokenizer.eos_token = None
        with says("no eos_token"):
            load_blocks(DataSettings(dataset_name=str(corpus(tmp_path / "a.jsonl", 1, 30)), streaming=True), tokenizer, SEQ_LEN, 0)


EOS = 0


def separate_slowly(row: list[int]) -> tuple[list[int], list[bool]]:
    positions, starts = [], []
    position = 0
    for t in range(len(row)):
        after_end = t > 0 and row[t - 1] == EOS
        position = 0 if after_end or t == 0 else position + 1
        positions.append(position)
        starts.append(after_end)
    return positions, starts


class TestSeparate:
    @given(st.integers(1, 12).flatmap(lambda T: st.lists(st.lists(st.integers(0, 3), min_size=T, max_size=T), min_size=1, max_size=4)))
    def test_as_the_obvious_way(self, rows: list[list[int]]) -> None:
        ids = torch.tensor(rows)
        positions, starts = separate(ids, EOS)
        assert ids.tolist() == rows
        assert (positions.dtype, starts.dtype) == (torch.int64, torch.bool)
        assert [tuple(pair) for pair in zip(positions.tolist(), starts.tolist(), strict=True)] == [separate_slowly(row) for row in rows]

    def test_by_hand(self) -> None:
        positions, starts = separate(torch.tensor([[5, 6, 0, 7, 0, 0, 8]]), EOS)
        assert positions.tolist() == [[0, 1, 2, 0, 1, 0, 0]]
        assert starts.tolist() == [[False, False, False, True, False, True, True]]

    @pytest.mark.parametrize("attention", ["eager", "sdpa"])
    def test_packed_documents_are_as_each_alone(self, attention: str) -> None:
        shape = {
            "prelude_layers": 1,
            "L_layers": 1,
            "coda_layers": 1,
            "H_cycles": 2,
            "L_cycles": 1,
            "gain_init": 0.3,
            "state_init_std": 0.5,
        }
        torch.manual_seed(0)
        model = RecursiveLLM(from_donor(tiny.tiny_config("qwen2", num_hidden_layers=3), [0, 1, 2], **shape)).eval()
        model.set_attn_implementation(attention)
        rows = [[torch.tensor([*tiny_ids(seed, n), EOS]) for seed, n in enumerate(lengths)] for lengths in ((5, 9, 3), (2, 2, 13))]
        packed = torch.stack([torch.cat(row) for row in rows])
        positions, _ = separate(packed, EOS)
        with torch.no_grad():
            expected = torch.stack([torch.cat([model(document[None], use_cache=False).logits[0] for document in row]) for row in rows])
            apart = model(packed, position_ids=positions, use_cache=False).logits
            together = model(packed, use_cache=False).logits
        torch.testing.assert_close(apart, expected, atol=1e-5, rtol=0)
        assert (together - expected).abs().max() > 0.01


def tiny_ids(seed: int, count: int) -> list[int]:
    return torch.randint(1, 320, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
