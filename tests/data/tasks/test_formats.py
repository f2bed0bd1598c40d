"""Published reasoning datasets: small files in each format, malformed files, and whole files with the irregularities of the real ones."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recursify.data.tasks import FORMATS, Item, as_text, is_right, read
from recursify.errors import UserError
from tests.support.published import write_babi, write_gsm8k, write_prosqa, write_scan, write_svamp, write_svamp_training

GSM8K = {"question": "Ann has 2 boxes of 1,000 pins, and 80 more. How many?",
         "answer": "In boxes 2*1,000 = <<2*1000=2000>>2,000.\n\nThat is 2,000+80 = $<<2000+80=2080>>2,080.\n#### 2,080"}  # fmt: skip
SVAMP = {"ID": "chal-1", "Body": "Ann had 6 pears. She ate 3 and gave 2 away", "Question": "How many are left?",
         "Equation": "( 6.0 - ( 3.0 + 2.0 ) )", "Answer": 1.0, "Type": "Subtraction"}  # fmt: skip
PROSQA = {"question": "Every zor is a lem. Tom is a zor. Is Tom a lem or a pif?", "answer": "Tom is a lem.",
          "steps": ["Tom is a zor.", "Every zor is a lem."], "edges": [[0, 1]]}  # fmt: skip
CSV = "Question,Numbers,Equation,Answer,Body\n"
BABI = """\
1 Mary moved to the bathroom.
2 John went to the hallway.
3 Where is Mary? \tbathroom\t1
4 Mary took the apple and the milk there.
5 What is Mary carrying?\tapple,milk\t4 1
1 Sandra is a cat.
2 What is Sandra?|cat|1
"""


def file(folder: Path, content: Any, suffix: str = ".txt") -> Path:
    path = folder / f"set{suffix}"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def test_gsm8k(tmp_path: Path) -> None:
    one_step = {"question": "1 + 1?", "answer": "#### -2"}
    first, second = read("gsm8k", file(tmp_path, f"\ufeff{json.dumps(GSM8K)}\n\n{json.dumps(one_step)}\n", ".jsonl"))
    steps = "In boxes 2*1,000 = 2,000.\nThat is 2,000+80 = $2,080."
    assert first == Item(GSM8K["question"], "2,080", 2, "number", steps, reached=("2000", "2,080"))
    assert second == Item("1 + 1?", "-2", 1, "number", reached=("-2",))
    assert as_text(first, with_steps=True).endswith("$2,080.\n#### 2,080")
    assert is_right(first, "2080") and not is_right(first, "2000")


def test_svamp(tmp_path: Path) -> None:
    half = SVAMP | {"Equation": "( 1.0 / 2.0 )", "Answer": 0.5}
    named = SVAMP | {"Equation": "6.0", "Answer": 6}
    items = read("svamp", file(tmp_path, [SVAMP, half, named], ".json"))
    assert items[0] == Item("Ann had 6 pears. She ate 3 and gave 2 away How many are left?", "1", 2, "number")
    assert [(item.answer, item.difficulty) for item in items] == [("1", 2), ("0.5", 1), ("6", 1)]


def test_records_are_equal_in_all_file_formats(tmp_path: Path) -> None:
    asked = [SVAMP | {"Answer": "1.0"}, SVAMP | {"Answer": "0.5"}]
    lists = file(tmp_path, asked, ".json")
    lines = file(tmp_path, "".join(json.dumps(record) + "\n" for record in asked), ".jsonl")
    pq.write_table(pa.Table.from_pylist(asked), tmp_path / "rows.parquet")
    assert read("svamp", lists) == read("svamp", lines) == read("svamp", tmp_path / "rows.parquet")
    assert [item.answer for item in read("svamp", lists)] == ["1", "0.5"]


def test_uppercase_suffixes_and_byte_order_marks(tmp_path: Path) -> None:
    row = CSV + 'number0 and number10 ?,"' + " ".join("12345678901") + '",+ number0 number10,2,x\n'
    for content, suffix in (([SVAMP], ".json"), (json.dumps(SVAMP) + "\n", ".JSONL"), (row, ".CSV")):
        marked = "\ufeff" + (content if isinstance(content, str) else json.dumps(content))
        [item] = read("svamp", file(tmp_path, marked, suffix))
        assert item.question.startswith("1 and 1 ?" if suffix == ".CSV" else "Ann had 6") and item.match == "number"
    pq.write_table(pa.Table.from_pylist([SVAMP]), tmp_path / "rows.PARQUET")
    assert len(read("svamp", tmp_path / "rows.PARQUET")) == 1
    assert read("scan", file(tmp_path, "\ufeffIN: jump OUT: I_JUMP\n"))[0].question == "jump"


def test_home_directory_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    file(tmp_path, "IN: jump OUT: I_JUMP\n")
    assert read("scan", "~/set.txt")[0].answer == "I_JUMP"


def test_gsm8k_answer_is_after_the_last_mark(tmp_path: Path) -> None:
    worked = {"question": "How many?", "answer": "#### is a mark\n#### -$1,000.5"}
    [item] = read("gsm8k", file(tmp_path, worked, ".jsonl"))
    assert (item.answer, item.steps, item.difficulty) == ("-$1,000.5", "#### is a mark", 1)


def test_invalid_tables(tmp_path: Path) -> None:
    (tmp_path / "rows.parquet").write_text("none")
    with pytest.raises(UserError, match=r"rows\.parquet: expected a parquet file, but it cannot be read as one: "):
        read("gsm8k", tmp_path / "rows.parquet")


def test_the_training_files_of_svamp(tmp_path: Path) -> None:
    many = "1 " * 10 + "7.5"
    rows = "ann had number0 pears and ate number1 . left ?,6.0 2.5,- number0 number1,3.5,x\n"
    rows += f'"bob\nhad number10",{many},number10,7.5,x\n'
    first, second = read("svamp", file(tmp_path, CSV + rows, ".csv"))
    assert first == Item("ann had 6 pears and ate 2.5 . left ?", "3.5", 1, "number")
    assert second == Item("bob\nhad 7.5", "7.5", 1, "number")


def test_prosqa(tmp_path: Path) -> None:
    (item,) = read("prosqa", file(tmp_path, [PROSQA], ".json"))
    assert item == Item(
        PROSQA["question"], "Tom is a lem.", 2, steps="Tom is a zor.\nEvery zor is a lem.", reached=("Tom is a zor.", "Tom is a lem.")
    )


def test_babi(tmp_path: Path) -> None:
    where, what, cat = read("babi", file(tmp_path, BABI))
    story = "Mary moved to the bathroom. John went to the hallway."
    assert where == Item(f"{story} Where is Mary?", "bathroom", 1)
    assert what == Item(f"{story} Mary took the apple and the milk there. What is Mary carrying?", "apple,milk", 2)
    assert cat == Item("Sandra is a cat. What is Sandra?", "cat", 1)


def test_scan(tmp_path: Path) -> None:
    first, second = read("scan", file(tmp_path, "IN: jump OUT: I_JUMP\r\nIN: run twice OUT: I_RUN I_RUN \n"))
    assert first == Item("jump", "I_JUMP", 1) and second == Item("run twice", "I_RUN I_RUN", 2)


def without(record: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name != key}


BABI_QUESTION = "a question, its answer and the numbers of its facts, divided by tabs or |"
# set, suffix, content, what the message says behind the name of the file
WRONG: list[tuple[str, str, Any, str]] = [
    ("gsm8k", ".jsonl", "{}", ", line 1: expected a field question, found none"),
    ("gsm8k", ".jsonl", f"{json.dumps(GSM8K)}\n{{oops", ", line 2: expected JSON, found 'oops' (Expecting property name enclosed in"),
    ("gsm8k", ".jsonl", "\n[]", ", line 2: expected an object, found []"),
    ("gsm8k", ".jsonl", without(GSM8K, "answer"), ", line 1: expected a field answer, found question"),
    ("gsm8k", ".jsonl", GSM8K | {"question": 5}, ", line 1: expected text as question, found 5"),
    ("gsm8k", ".jsonl", GSM8K | {"answer": "5"}, ", line 1: expected an answer that ends in '#### NUMBER', found '5'"),
    ("gsm8k", ".jsonl", GSM8K | {"answer": "#### five"}, ", line 1: expected an answer that ends in '#### NUMBER', found '#### five'"),
    ("svamp", ".json", SVAMP, ": expected a list of objects, found {'ID': 'chal-1', "),
    ("gsm8k", ".jsonl", "[" * 200_000, ", line 1: expected JSON, found '[[["),
    ("gsm8k", ".jsonl", "1" * 5000, ", line 1: expected JSON, found '111"),
    ("svamp", ".json", "[\n{]", ", line 2: expected JSON, found ']' ("),
    ("svamp", ".json", [SVAMP, 3], ", element 2: expected an object, found 3"),
    ("svamp", ".json", [without(SVAMP, "Body")], ", element 1: expected a field Body, found ID, Question, Equation, Answer, Type"),
    ("svamp", ".json", [SVAMP | {"Body": " "}], ", element 1: expected text as Body, found ' '"),
    ("svamp", ".json", [SVAMP | {"Answer": "one"}], ", element 1: expected a number as Answer, found 'one'"),
    ("svamp", ".json", [SVAMP | {"Answer": True}], ", element 1: expected a number as Answer, found True"),
    ("svamp", ".json", [SVAMP | {"Answer": float("nan")}], ", element 1: expected a number as Answer, found nan"),
    ("svamp", ".csv", "Question,Answer\nx,1\n", ", line 2: expected a field Numbers, found Question, Answer"),
    ("svamp", ".csv", CSV + "number1,5,- number0 number1,2,x\n", ", line 2: expected at least 2 Numbers for number1, found 1"),
    ("svamp", ".csv", CSV + "number0,five,number0,2,x\n", ", line 2: expected a number as Numbers, found 'five'"),
    ("svamp", ".csv", CSV + "number0,5,number0,,x\n", ", line 2: expected text as Answer, found ''"),
    ("svamp", ".csv", CSV + "number0,5,number0,inf,x\n", ", line 2: expected a number as Answer, found 'inf'"),
    ("svamp", ".csv", CSV + "number0\n", ", line 2: expected text as Numbers, found None"),
    ("prosqa", ".json", [PROSQA | {"steps": []}], ", element 1: expected a list of sentences as steps, found []"),
    ("prosqa", ".json", [PROSQA | {"steps": ["a", 1]}], ", element 1: expected a list of sentences as steps, found ['a', 1]"),
    ("prosqa", ".json", [without(PROSQA, "steps")], ", element 1: expected a field steps, found question, answer, edges"),
    ("prosqa", ".json", [PROSQA | {"answer": "a\nb"}], ", element 1: expected one line as answer, found 'a\\nb'"),
    ("babi", ".txt", "Mary moved.\n", ", line 1: expected a number, a space and a sentence, found 'Mary moved.'"),
    ("babi", ".txt", "1 Mary moved.\n3 Ann moved.\n", ", line 2: expected the line 2 of a story, or the line 1 of the next, found 3"),
    ("babi", ".txt", "2 Mary moved.\n", ", line 1: expected the line 1 of a story, or the line 1 of the next, found 2"),
    ("babi", ".txt", "1 Ann moved.\n2 Where is Ann?\n", f", line 2: expected {BABI_QUESTION}, found '2 Where is Ann?'"),
    ("babi", ".txt", "1 Ann moved.\n2 Where is Ann?\thall\n", f", line 2: expected {BABI_QUESTION}, found 'Where is Ann? | hall'"),
    ("babi", ".txt", "1 Ann moved.\n2 Where?\thall\tone\n", f", line 2: expected {BABI_QUESTION}, found 'Where? | hall | one'"),
    ("babi", ".txt", "1 Ann moved.\n2 Where?\t\t1\n", f", line 2: expected {BABI_QUESTION}, found 'Where? |  | 1'"),
    ("babi", ".txt", BABI + "3 Who?|cat|2\n", ", line 8: expected facts that are sentences of the story so far, found 2"),
    ("scan", ".txt", "IN: jump OUT: I_JUMP\njump -> I_JUMP\n", ", line 2: expected 'IN: command OUT: actions', found 'jump -> I_JUMP'"),
    ("scan", ".txt", "IN: " + "jump " * 40, ", line 1: expected 'IN: command OUT: actions', found 'IN: jump jump "),
    ("scan", ".txt", "IN: jump OUT: \n", ", line 1: expected 'IN: command OUT: actions', found 'IN: jump OUT: '"),
    ("scan", ".txt", b"IN: \xff OUT: I_JUMP", ": expected UTF-8 text, got the byte 0xff"),
    ("scan", ".txt", "\n\n", ": expected items of scan, found none"),
    ("svamp", ".json", [], ": expected items of svamp, found none"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "suffix", "content", "message"), WRONG, ids=[f"{case[0]}{i}" for i, case in enumerate(WRONG)])
def test_errors_in_files_name_the_place(name: str, suffix: str, content: Any, message: str, tmp_path: Path) -> None:
    path = file(tmp_path, content, suffix)
    with pytest.raises(UserError) as caught:
        read(name, path)
    assert str(caught.value).startswith(f"{path}{message}")
    assert len(str(caught.value)) < 2 * len(str(path)) + 200 and "\n" not in str(caught.value)


def test_missing_files(tmp_path: Path) -> None:
    def message(name: str, path: Path) -> str:
        with pytest.raises(UserError) as caught:
            read(name, path)
        return str(caught.value)

    assert message("drop", tmp_path) == "no reasoning set 'drop'; there are gsm8k, svamp, prosqa, babi, scan"
    assert message("scan", tmp_path / "x.txt") == f"no file {tmp_path / 'x.txt'}; expected a file of scan"
    assert message("babi", tmp_path) == f"{tmp_path}: expected a file of babi, found a folder"
    for name in ("c", "a", "d", "b"):
        (tmp_path / name).touch()
    assert message("babi", tmp_path).endswith("found a folder; name one of its files, such as a, b, c")
    row = file(tmp_path, CSV + '"' + "x" * 200_000 + '",1,1,1,x\n', ".csv")
    before = csv.field_size_limit(131_072)  # of the whole process, and some libraries raise it
    try:
        assert message("svamp", row) == f"{row} cannot be read as a file of svamp: field larger than field limit (131072)"
    finally:
        csv.field_size_limit(before)


def wrote(folder: Path) -> list[tuple[str, Path, list[Item]]]:
    """A file in each published form: its set, where it is, and its items."""
    forms: list[tuple[str, str, Callable[[Path], list[Item]]]] = [
        ("gsm8k", "train.jsonl", write_gsm8k),
        ("svamp", "SVAMP.json", write_svamp),
        ("svamp", "mawps-asdiv-a_svamp_train.csv", write_svamp_training),
        ("prosqa", "prosqa_valid.json", write_prosqa),
        ("babi", "qa1_single-supporting-fact_test.txt", lambda path: write_babi(path, "person", "|")),
        ("babi", "qa2_two-supporting-facts_test.txt", lambda path: write_babi(path, "thing")),
        ("babi", "qa7_counting_test.txt", lambda path: write_babi(path, "count")),
        ("babi", "qa19_path-finding_test.txt", lambda path: write_babi(path, "path")),
        ("scan", "length_train.txt", lambda path: write_scan(path, longest=22)),
        ("scan", "length_test.txt", write_scan),
    ]
    return [(name, folder / file, write(folder / file)) for name, file, write in forms]


def test_files_as_they_are_published(tmp_path: Path) -> None:
    for name, path, expected in wrote(tmp_path):
        items = read(name, path)
        assert [replace(item, reached=()) for item in items] == expected and len(items) >= 300
        stepped = [item for item in items if item.reached]
        assert len(stepped) == (len(items) if name in ("gsm8k", "prosqa") else 0)
        assert all(item.reached[-1] == item.answer and len(item.reached) == item.difficulty for item in stepped)
        assert all(is_right(item, f" {item.answer}\n") for item in items)
        assert all(item.question == item.question.strip() and item.answer and "\n" not in item.answer for item in items)
        others = [items[index - 1].answer for index in range(len(items))]
        assert not any(is_right(item, other) for item, other in zip(items, others, strict=True) if not same(item.answer, other))
        assert sum(not same(item.answer, other) for item, other in zip(items, others, strict=True)) > 50
    assert {name for name, _, _ in wrote(tmp_path)} == set(FORMATS)


def same(one: str, other: str) -> bool:
    return one.replace(",", "") == other.replace(",", "")


def test_difficulties_of_published_files(tmp_path: Path) -> None:
    """Those that the writers gave, and that they are not all one."""
    found = {path.name.partition("_")[0] if name == "babi" else path.name: {item.difficulty for item in items}
             for name, path, items in ((name, path, read(name, path)) for name, path, _ in wrote(tmp_path))}  # fmt: skip
    assert found["train.jsonl"] == set(range(1, 10)) and found["SVAMP.json"] == {1, 2} and found["prosqa_valid.json"] == {3, 4, 5, 6}
    assert (found["qa1"], found["qa2"], found["qa19"]) == ({1}, {2}, {2}) and found["qa7"] >= {1, 2, 3}
    assert 12 < max(found["length_train.txt"]) <= 22 < max(found["length_test.txt"]) <= 48
    assert not any("<<" in item.steps for item in read("gsm8k", tmp_path / "train.jsonl"))
    assert "<<" in (tmp_path / "train.jsonl").read_text()


def prefix(equation: str, numbers: list[str]) -> float:
    stack: list[float] = []
    for word in reversed(equation.split()):
        if word in "+-*/":
            one, other = stack.pop(), stack.pop()
            stack.append({"+": one + other, "-": one - other, "*": one * other, "/": one / (other or math.nan)}[word])
        else:
            stack.append(float(numbers[int(word[6:])] if word.startswith("number") else word))
    (value,) = stack
    return value


def test_published_answers_follow_from_their_questions_except_known_errors(tmp_path: Path) -> None:
    """SVAMP's equations in both forms, and ProsQA's chains of facts, worked out."""
    write_svamp(tmp_path / "SVAMP.json")
    records = json.loads((tmp_path / "SVAMP.json").read_text())
    svamp = read("svamp", tmp_path / "SVAMP.json")
    wrong = [record["ID"] for record, item in zip(records, svamp, strict=True) if eval(record["Equation"]) != Fraction(item.answer)]
    assert wrong == ["chal-68"], "the one whose published answer does not follow from its equation"
    write_svamp_training(tmp_path / "train.csv")
    with (tmp_path / "train.csv").open(newline="") as rows:
        worked = [prefix(row["Equation"], row["Numbers"].split()) for row in csv.DictReader(rows)]
    items = read("svamp", tmp_path / "train.csv")
    agree = [math.isclose(value, float(item.answer), abs_tol=0.001) for value, item in zip(worked, items, strict=True)]
    assert [number for number, agrees in enumerate(agree) if not agrees] == [7]
    write_prosqa(tmp_path / "valid.json")
    for item in read("prosqa", tmp_path / "valid.json"):
        facts = {sentence.strip() for sentence in re.findall(r"[^.]+\.", item.question)}
        chain = item.steps.split("\n")
        assert set(chain) <= facts and len(chain) == item.difficulty
        assert item.answer.split()[0] == chain[0].split()[0] and item.answer.split()[-1] == chain[-1].split()[-1]
