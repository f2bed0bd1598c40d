"""Published reasoning sets, read from files as they are published. Nothing is fetched, and one file is read at a time.

    name    file                                             difficulty
    gsm8k   records: question, answer ending in "#### 72"    lines of the worked answer
    svamp   records: Body, Question, Equation, Answer        operations in the equation
            .csv: Question with number0, ..., Numbers,       the same; the training files that come with SVAMP
            Equation, Answer
    prosqa  records: question, answer, steps                 hops: number of steps
    babi    .txt: numbered lines; a question, its answer     supporting facts
            and its facts divided by tabs, or by |
    scan    .txt: IN: command OUT: actions                   actions

Records are a .json list of objects, a .jsonl with one on each line, or a .parquet table, as datasets of the hub have them.

What a file holds is kept as it is written there, mistakes of the set included; only what the format itself puts around it is taken off,
GSM8K's <<48/2=24>> among it.
"""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ...errors import UserError
from ...utils.encodings import check_characters, not_utf8, open_text, read_text
from ...utils.files import parse_json
from .item import FINAL, Item

_ANNOTATION = re.compile(r"<<[^<>]*>>")
_RESULT = re.compile(r"<<[^<>=]*=([^<>]*)>>")
_WHOLE = re.compile(r"-?\$?[\d,]*\.?\d+", re.ASCII)
_COMMAND = re.compile(r"IN: (\S.*?) OUT: (\S.*)")
_NUMBERED = re.compile(r"(\d+) (.*\S)", re.ASCII)
_PLACEHOLDER = re.compile(r"\bnumber(\d+)\b", re.ASCII)
_QUESTION = "a question, its answer and the numbers of its facts, divided by tabs or |"


def read(name: str, path: str | Path) -> list[Item]:
    """All items of a file, in its order.

    Args:
        name: gsm8k, svamp, prosqa, babi or scan.

    Raises:
        UserError: An unknown name, no such file, or a place in it that is not in that format: the message names the file, the line or
            element, what was expected and what was found.
    """
    if name not in FORMATS:
        raise UserError(f"no reasoning set {name!r}; there are {', '.join(FORMATS)}")
    path = Path(path).expanduser()
    if path.is_dir():
        files = sorted(file.name for file in path.iterdir() if file.is_file())
        raise UserError(f"{path}: expected a file of {name}, found a folder{_one_of(files)}")
    if not path.exists():
        raise UserError(f"no file {path}; expected a file of {name}")
    try:
        items = list(FORMATS[name](path))
    except UnicodeDecodeError as error:
        raise not_utf8(path, error) from error
    except (OSError, csv.Error) as error:
        raise UserError(f"{path} cannot be read as a file of {name}: {error}") from error
    if not items:
        raise UserError(f"{path}: expected items of {name}, found none")
    return items


def _gsm8k(path: Path) -> Iterator[Item]:
    for place, record in _records(path):
        question, worked = _text(record, "question", place), _text(record, "answer", place)
        steps, mark, answer = worked.rpartition(FINAL)
        if not mark or not _WHOLE.fullmatch(answer.strip()):
            raise _fault(place, f"an answer that ends in '{FINAL}NUMBER'", worked[-40:])
        written = [line.strip() for line in _ANNOTATION.sub("", steps).split("\n") if line.strip()]
        results = [found[-1] if (found := _RESULT.findall(line)) else "" for line in steps.split("\n") if line.strip()]
        reached = (*results[:-1], answer.strip())
        yield Item(question, answer.strip(), max(1, len(written)), "number", "\n".join(written), reached=reached)


def _svamp(path: Path) -> Iterator[Item]:
    yield from (_svamp_rows if path.suffix.lower() == ".csv" else _svamp_records)(path)


def _svamp_records(path: Path) -> Iterator[Item]:
    for place, record in _records(path):
        body, question, equation = (_text(record, key, place) for key in ("Body", "Question", "Equation"))
        answer = _field(record, "Answer", place)
        if isinstance(answer, str):  # as copies on the hub have it
            answer = _float(answer, "Answer", place)
        if isinstance(answer, bool) or not isinstance(answer, int | float) or not math.isfinite(answer):
            raise _fault(place, "a number as Answer", answer)
        yield Item(f"{body} {question}", _plain(answer), _operations(equation), "number")


def _svamp_rows(path: Path) -> Iterator[Item]:
    with open_text(path, newline="") as file:
        rows = csv.DictReader(file)
        for row in rows:
            place = f"{path}, line {rows.line_num}"
            question, numbers, equation, answer = (_text(row, key, place) for key in ("Question", "Numbers", "Equation", "Answer"))
            filled = _fill(question, [_plain(_float(number, "Numbers", place)) for number in numbers.split()], place)
            yield Item(filled, _plain(_float(answer, "Answer", place)), _operations(equation), "number")


def _prosqa(path: Path) -> Iterator[Item]:
    for place, record in _records(path):
        steps = _field(record, "steps", place)
        if not isinstance(steps, list) or not steps or not all(isinstance(step, str) and step.strip() for step in steps):
            raise _fault(place, "a list of sentences as steps", steps)
        question, answer = _text(record, "question", place), _text(record, "answer", place)
        if "\n" in answer:
            raise _fault(place, "one line as answer", answer)
        reached = (*(f"{answer.rpartition(' ')[0]} {step.split()[-1]}".strip() for step in steps[:-1]), answer)
        yield Item(question, answer, len(steps), steps="\n".join(step.strip() for step in steps), reached=reached)


def _babi(path: Path) -> Iterator[Item]:
    story: dict[int, str] = {}
    last = 0
    for place, line in _lines(path):
        numbered = _NUMBERED.fullmatch(line.strip())
        if numbered is None:
            raise _fault(place, "a number, a space and a sentence", line)
        number = int(numbered[1])
        if number not in (1, last + 1):
            raise _fault(place, f"the line {last + 1} of a story, or the line 1 of the next", number)
        if number == 1:
            story = {}
        last = number
        if "\t" in line or "|" in line:
            yield _babi_item(re.split(r"[\t|]", numbered[2]), story, place)
        elif numbered[2].endswith("?"):
            raise _fault(place, _QUESTION, line)
        else:
            story[number] = numbered[2]


def _babi_item(fields: list[str], story: dict[int, str], place: str) -> Item:
    fields = [field.strip() for field in fields]
    if len(fields) != 3 or not all(fields) or not re.fullmatch(r"\d+( \d+)*", fields[2], re.ASCII):
        raise _fault(place, _QUESTION, " | ".join(fields))
    facts = {int(number) for number in fields[2].split()}
    if facts - set(story):
        raise _fault(place, "facts that are sentences of the story so far", min(facts - set(story)))
    return Item(" ".join([*story.values(), fields[0]]), fields[1], len(facts))


def _scan(path: Path) -> Iterator[Item]:
    for place, line in _lines(path):
        matched = _COMMAND.fullmatch(line.strip())
        if matched is None:
            raise _fault(place, "'IN: command OUT: actions'", line)
        yield Item(matched[1], matched[2], len(matched[2].split()))


FORMATS: dict[str, Callable[[Path], Iterator[Item]]] = {
    "gsm8k": _gsm8k,
    "svamp": _svamp,
    "prosqa": _prosqa,
    "babi": _babi,
    "scan": _scan,
}


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """Name of the place, and content, of the lines that are not blank."""
    with open_text(path) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield f"{path}, line {number}", line.rstrip("\n")


def _records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name of the place, and content, of the objects of a .jsonl or .parquet file, else of a JSON list."""
    suffix = path.suffix.lower()
    if suffix == ".jsonl":
        yield from ((place, _object(_parsed(line, place), place)) for place, line in _lines(path))
    elif suffix == ".parquet":
        yield from _numbered(path, "row", _table(path))
    else:
        records = _parsed(read_text(path), str(path))
        if not isinstance(records, list):
            raise _fault(str(path), "a list of objects", records)
        yield from _numbered(path, "element", records)


def _numbered(path: Path, kind: str, records: list[Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, record in enumerate(records, 1):
        yield f"{path}, {kind} {number}", _object(record, f"{path}, {kind} {number}")


def _table(path: Path) -> list[Any]:
    import pyarrow as pa  # here: only files of this one kind need it, and training imports this package for the names of question sets
    import pyarrow.parquet as pq

    try:
        return pq.read_table(path).to_pylist()
    except pa.ArrowException as error:
        raise UserError(f"{path}: expected a parquet file, but it cannot be read as one: {error}") from error


def _parsed(content: str, place: str) -> Any:
    try:
        return parse_json(content)
    except json.JSONDecodeError as error:
        where = place if ", line " in place else f"{place}, line {error.lineno}"
        raise UserError(f"{where}: expected JSON, found {_short(error.doc[error.pos :])} ({error.msg})") from error
    except ValueError as error:
        raise UserError(f"{place}: expected JSON, found {_short(content)} ({error})") from error


def _object(record: Any, place: str) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise _fault(place, "an object", record)
    return record


def _field(record: dict[str, Any], key: str, place: str) -> Any:
    if key not in record:
        raise UserError(f"{place}: expected a field {key}, found {', '.join(map(str, record)) or 'none'}")
    return record[key]


def _text(record: dict[str, Any], key: str, place: str) -> str:
    value = _field(record, key, place)
    if not isinstance(value, str) or not value.strip():
        raise _fault(place, f"text as {key}", value)
    check_characters(value, f"{place}, {key}")
    return value.strip()


def _float(written: str, key: str, place: str) -> float:
    try:
        value = float(written)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise _fault(place, f"a number as {key}", written)
    return value


def _fill(question: str, numbers: list[str], place: str) -> str:
    """The question with its numbers in the places of number0, number1, ..."""
    for index in map(int, _PLACEHOLDER.findall(question)):
        if index >= len(numbers):
            raise _fault(place, f"at least {index + 1} Numbers for number{index}", len(numbers))
    return _PLACEHOLDER.sub(lambda found: numbers[int(found[1])], question)


def _operations(equation: str) -> int:
    """At least 1: an equation without an operation names the answer."""
    return max(1, sum(part in "+-*/" for part in equation.split()))


def _plain(number: float) -> str:
    return str(int(number)) if float(number).is_integer() else str(number)


def _fault(place: str, expected: str, found: object) -> UserError:
    return UserError(f"{place}: expected {expected}, found {_short(found)}")


def _short(found: object) -> str:
    written = repr(found)
    return written if len(written) <= 80 else f"{written[:77]}..."


def _one_of(files: list[str]) -> str:
    return f"; name one of its files, such as {', '.join(files[:3])}" if files else ""
