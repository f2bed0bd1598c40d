"""Documents from every source, their split, and every error message."""

from __future__ import annotations

import json
import logging
import random
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recursify.data.documents import hold_out, join_articles, load_documents, read_files, split_of, split_text
from recursify.data.settings import TextSource
from recursify.errors import UserError
from tests.support import tiny
from tests.support.corpora import load, says, table, texts, write_jsonl
from tests.support.hub_stand_in import HubStandIn

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

    @pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".json", ".csv"])
    def test_byte_order_mark_is_not_text(self, tmp_path: Path, suffix: str) -> None:
        path = self.write(tmp_path, suffix)
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
        documents = load(path)
        assert sorted(texts(documents.train) + texts(documents.validation)) == sorted(DOCUMENTS)

    @pytest.mark.parametrize("suffix", [".TXT", ".JSONL", ".Json", ".CSV", ".Parquet"])
    def test_a_suffix_in_capitals(self, tmp_path: Path, suffix: str) -> None:
        path = self.write(tmp_path, suffix.lower())
        (tmp_path / "folder").mkdir()
        for moved in (path.rename(tmp_path / f"corpus{suffix}"), tmp_path / "folder"):
            documents = load(moved)
            assert sorted(texts(documents.train) + texts(documents.validation)) == sorted(DOCUMENTS)
            if moved.is_file():
                moved.rename(tmp_path / "folder" / moved.name)

    def test_a_long_field_and_line_ends_within_one(self, tmp_path: Path) -> None:
        long = "word " * 40_000 + "end"
        (tmp_path / "a.csv").write_bytes(f'text\n"{long}"\n"one\r\ntwo"\n'.encode())
        documents = load(tmp_path / "a.csv")
        assert sorted(texts(documents.train) + texts(documents.validation)) == sorted([long, "one\r\ntwo"])

    def test_json_after_leading_white_space(self, tmp_path: Path) -> None:
        (tmp_path / "a.json").write_text(" \n" * 100 + json.dumps([{"text": "one"}, {"text": "two"}]))
        documents = load(tmp_path / "a.json")
        assert sorted(texts(documents.train) + texts(documents.validation)) == ["one", "two"]

    def test_only_surrounding_line_ends_are_stripped(self, tmp_path: Path) -> None:
        documents = load(write_jsonl(tmp_path / "a.jsonl", [{"text": t} for t in ("\n\n  one \t\n\n", "two")]))
        assert sorted(texts(documents.train) + texts(documents.validation)) == ["  one \t", "two"]

    def test_two_columns_of_one_file_are_two_tables(self, tmp_path: Path) -> None:
        path = write_jsonl(tmp_path / "a.jsonl", [{"one": f"a{i}", "two": f"b{i}"} for i in range(2)])
        for column, letter in (("one", "a"), ("two", "b"), ("one", "a")):
            documents = load(path, text_column=column)
            assert {text[0] for text in texts(documents.train) + texts(documents.validation)} == {letter}


class TestSplits:
    def test_split_from_file_names(self, tmp_path: Path) -> None:
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
            *[(f"a_{word}.txt", "validation") for word in ("validation", "valid", "val", "dev", "DEV")],
            *[(f"{word}/a.txt", "train") for word in ("train", "training")],
            ("valid/test/a.txt", "test"),
            ("test/valid/a.txt", "validation"),
            ("train_valid.txt", "train"),
            ("test/training.txt", "train"),
            ("test.d/valid1.txt", "validation"),
            ("test/part1.txt", "test"),
            ("test/train.txt", "train"),
            ("qa10_indefinite-knowledge_test.txt", "test"),
        ],
    )
    def test_split_of(self, name: str, split: str) -> None:
        assert split_of(Path(name)) == split

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

    def test_documents_are_held_out_with_a_fixed_seed(self, tmp_path: Path) -> None:
        path = write_jsonl(tmp_path / "a.jsonl", [{"text": f"document {i}"} for i in range(100)])
        first, again = load(path), load(path)
        assert (len(first.train), len(first.validation)) == (95, 5)
        assert not set(texts(first.train)) & set(texts(first.validation))
        assert texts(first.validation) == texts(again.validation)
        assert texts(first.train) == sorted(texts(first.train), key=lambda t: int(t.split()[1]))

    def test_blank_validation_file_is_ignored(self, tmp_path: Path) -> None:
        write_jsonl(tmp_path / "train.jsonl", [{"text": f"d{i}"} for i in range(20)])
        (tmp_path / "valid.txt").write_text(" \n")
        documents = load(tmp_path)
        assert (len(documents.train), len(documents.validation)) == (19, 1)

    def test_hidden_files_and_folders_are_left_out(self, tmp_path: Path) -> None:
        for name in ("a.txt", ".git/b.txt", "sub/.cache/c.txt", "sub/.d.txt", "sub/e.txt"):
            (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
            (tmp_path / name).write_text(name)
        documents = load(tmp_path)
        assert sorted(texts(documents.train) + texts(documents.validation)) == ["a.txt", "sub/e.txt"]

    @pytest.mark.parametrize(("count", "share"), [(2, 1), (20, 1), (29, 1), (31, 2), (49, 2), (51, 3), (110, 6), (400, 20)])
    def test_held_out_documents_are_stable(self, count: int, share: int) -> None:
        rows = [str(i) for i in range(count)]
        documents = hold_out(table(*rows), "x")
        chosen = sorted(random.Random(0).sample(range(count), share))
        assert texts(documents.validation) == [str(i) for i in chosen]
        assert texts(documents.train) == [row for row in rows if int(row) not in chosen]

    def test_at_least_one_document_is_held_out(self) -> None:
        documents = hold_out(table("one", "two", "three"), "x")
        assert (len(documents.train), len(documents.validation)) == (2, 1)

    def test_a_single_document_is_cut_and_a_warning_says_so(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        path = tmp_path / "book.txt"
        book = "\n\n".join(" ".join(tiny.sentences(i, 5)) for i in range(100))
        path.write_text(book, encoding="utf-8")
        with caplog.at_level(logging.WARNING, "recursify.data.documents"):
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
        assert split_text(text) == ("x" * 930 + boundary, "y" * (70 - len(boundary)))

    @pytest.mark.parametrize("boundary", ["\n\n", "\n", " "])
    def test_split_boundary_is_within_5_percent(self, boundary: str) -> None:
        for start in range(880, 1000 - len(boundary)):
            text = "x" * start + boundary + "y" * (1000 - start - len(boundary))
            end = start + len(boundary)
            cut = end if 900 < end <= 950 else 950
            assert split_text(text) == (text[:cut], text[cut:]), start

    def test_last_boundary_of_the_largest_unit_is_used(self) -> None:
        text = "x" * 905 + "\n\n" + "x" * 8 + "\n\n" + "x" * 8 + "\n" + "x" * 4 + " " + "y" * 69
        train, validation = split_text(text)
        assert (train, validation) == (text[:917], text[917:]) and len(text) == 1000

    def test_split_text_without_any_boundary(self) -> None:
        assert split_text("x" * 100) == ("x" * 95, "x" * 5)


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
        first, *articles = join_articles(rows)
        assert first == "\n"
        assert articles == [" = A = \n\n a = b \n = no heading = \n\n = = Part = = \n\n", " = B ( x ) = \n\nend\n"]

    def test_an_article_needs_a_blank_row_before_its_heading(self) -> None:
        rows = [" = A = \n", "", " text \n", " = B = \n", "", " = C = ", " = D = \n", " \n", " = E = \n"]
        assert list(join_articles(rows))[1:] == [" = A = \n\n text \n = B = \n\n", " = C = \n = D = \n \n", " = E = \n"]

    @pytest.mark.parametrize("split", ["validation", "valid", "val", "dev"])
    def test_every_name_of_a_validation_split(self, split: str, hub: HubStandIn, tmp_path: Path) -> None:
        card = ["---", "configs:", "- config_name: default", "  data_files:"]
        for name in ("train", "test", split):
            write_jsonl(tmp_path / f"{name}.jsonl", [{"text": f"{name} {i}"} for i in range(3)])
            card += [f"  - split: {name}", f"    path: {name}.jsonl"]
        (tmp_path / "README.md").write_text("\n".join([*card, "---", ""]))
        hub.add_dataset(f"your/{split}", tmp_path)
        documents = load(f"your/{split}")
        assert texts(documents.validation) == [f"{split} {i}" for i in range(3)]
        assert texts(documents.train) == [f"train {i}" for i in range(3)]

    def test_blank_validation_split_is_ignored(self, hub: HubStandIn, tmp_path: Path) -> None:
        write_jsonl(tmp_path / "train.jsonl", [{"text": f"d{i}"} for i in range(20)])
        write_jsonl(tmp_path / "validation.jsonl", [{"text": " \n"}])
        hub.add_dataset("your/half", tmp_path)
        documents = load("your/half")
        assert (len(documents.train), len(documents.validation)) == (19, 1)

    def test_two_columns_of_one_data_set_are_two_tables(self, hub: HubStandIn, tmp_path: Path) -> None:
        write_jsonl(tmp_path / "train.jsonl", [{"one": f"a{i}", "two": f"b{i}"} for i in range(3)])
        hub.add_dataset("your/columns", tmp_path)
        for column, letter in (("one", "a"), ("two", "b")):
            documents = load("your/columns", text_column=column)
            assert {text[0] for text in texts(documents.train) + texts(documents.validation)} == {letter}

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

    def test_local_folder_takes_precedence_over_the_hub(self, hub: HubStandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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

    @pytest.mark.parametrize("streamed", [False, True])
    @pytest.mark.parametrize("suffix", ["jsonl", "json", "csv"])
    def test_rows_without_text_are_left_out_counted_and_logged_once(
        self, suffix: str, streamed: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        """A missing column and null are one thing."""
        rows: list[dict[str, Any]] = [{"text": "x"}, {"body": "y"}, {"text": None}, {"text": "z", "body": "y"}]
        path = tmp_path / f"a.{suffix}"
        if suffix == "csv":
            path.write_text("body,text\n1,x\n2\n3\n4,z\n")
        else:
            path.write_text(json.dumps(rows) if suffix == "json" else "".join(json.dumps(row) + "\n" for row in rows))
        with caplog.at_level("WARNING"):
            found = [row["text"] for row in read_files([path], "text")] if streamed else load(path).train["text"]
        assert set(found) <= {"x", "z"} and found
        assert [record.message for record in caplog.records if "left out" in record.message] == [
            f"{path}: 2 of 4 rows have no 'text' and are left out"
        ]

    def test_half_a_character_is_named_with_its_place(self, tmp_path: Path) -> None:
        path = tmp_path / "a.jsonl"
        path.write_text('{"text": "fine"}\n{"text": "ab\\ud83d"}\n')
        with says("a.jsonl, line 2, column 'text'", "at character 2, half of a surrogate pair"):
            list(read_files([path], "text"))

    @pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())])
    def test_every_kind_of_text_in_parquet(self, kind: pa.DataType, tmp_path: Path) -> None:
        pq.write_table(pa.table({"text": pa.array(["one", "two", None, "one"], pa.string()).cast(kind)}), tmp_path / "a.parquet")
        assert [row["text"] for row in read_files([tmp_path / "a.parquet"], "text")] == ["one", "two", "one"]

    def test_metadata_beside_texts_is_left_out(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        (tmp_path / "README.md").write_text("# Data")
        (tmp_path / "dataset_info.json").write_text(json.dumps({"features": {"text": {"dtype": "string"}}}, indent=2))
        (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
        with caplog.at_level("WARNING"):
            found = load(tmp_path)
        assert sorted([*found.train["text"], *found.validation["text"]]) == ["one", "two"]
        assert "dataset_info.json" in caplog.text

    def test_csv_with_odd_column_names(self, tmp_path: Path) -> None:
        (tmp_path / "a.csv").write_text("text,,x,x\none,1,2,3\ntwo,4,5,6,7,8\n")
        assert [row["text"] for row in read_files([tmp_path / "a.csv"], "text")] == ["one", "two"]
        (tmp_path / "b.csv").write_text("text,text\none,two\n")
        with says("b.csv", "expected one column 'text', got 2"):
            list(read_files([tmp_path / "b.csv"], "text"))

    def test_missing_column_in_parquet(self, tmp_path: Path) -> None:
        pq.write_table(pa.table({"id": [1], "body": ["x"]}), tmp_path / "a.parquet")
        with says("a.parquet", "no column 'text'", "'id', 'body'", "--text_column"):
            load(tmp_path / "a.parquet")

    def test_column_that_is_not_text(self, tmp_path: Path) -> None:
        pq.write_table(pa.table({"text": [1]}), tmp_path / "a.parquet")
        with says("a.parquet", "'text' holds int64", "expected text"):
            load(tmp_path / "a.parquet")
        with says("a.jsonl, line 1", "'text' holds list", "expected text"):
            load(write_jsonl(tmp_path / "a.jsonl", [{"text": ["x"]}]))

    def test_broken_json(self, tmp_path: Path) -> None:
        (tmp_path / "a.jsonl").write_text('{"text": "x"}\n{"text": \n')
        with says("a.jsonl, line 2", "not valid JSON"):
            load(tmp_path / "a.jsonl")
        for number, value in enumerate(("[" * 200_000, "1" * 5000)):  # deeper, or longer, than Python's reader goes
            for suffix in ("json", "jsonl"):
                (tmp_path / f"{number}.{suffix}").write_text(f'{{"text": "x"}}\n{{"text": "x", "a": {value}}}\n')
                with says(f"{number}.{suffix}, line 2", "not valid JSON"):
                    load(tmp_path / f"{number}.{suffix}")
        with says("b.jsonl, line 1", "expected an object", "found str"):
            load(write_jsonl(tmp_path / "b.jsonl", ["x"]))

    def test_broken_parquet(self, tmp_path: Path) -> None:
        (tmp_path / "a.parquet").write_text("no parquet")
        with says("a.parquet", "cannot be read as .parquet"):
            load(tmp_path / "a.parquet")

    def test_text_that_is_not_utf8(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_bytes("café\n".encode("latin1"))
        with says("a.txt", "expected UTF-8", "0xe9", "iconv -f WINDOWS-1252"):
            load(tmp_path / "a.txt")

    def test_configuration_of_a_local_file(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_text("x")
        with says("a.txt", "--dataset_config_name other"):
            load(tmp_path / "a.txt", dataset_config_name="other")

    def test_unknown_on_the_hub(self, hub: HubStandIn) -> None:
        with says("no dataset no/such", "hub", "path", ".txt"):
            load("no/such")

    def test_hub_unreachable(self, hub: HubStandIn) -> None:
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


@pytest.mark.parametrize("name", ["gsm8k", "babi"])
def test_a_format_of_questions_without_its_file_is_not_asked_of_the_hub(name: str) -> None:
    with pytest.raises(UserError, match=f"--dataset_name: {name} is read from a file: a local one, {name}:FILE, .* {name}:OWNER/NAME/PATH"):
        load_documents(TextSource(dataset_name=name))
