"""Bad bytes: what must not happen is noticed when it does, cases are what their numbers say, and the first of them pass."""

from __future__ import annotations

import json
import random
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save
from torch import zeros

from stress import bad_bytes, breaking, http_requests
from stress.bad_bytes import Case, fault_of, snapshot
from stress.forks import Forks

# A command line that does what its first word says.
STUB = """
import sys, time
from pathlib import Path

def refuse(message="error: a.json: bad"):
    print(message, file=sys.stderr)
    sys.exit(2)

def main(argv):
    how = argv[0]
    if how == "traceback":
        raise KeyError("x")
    if how == "caught":
        refuse("Traceback (most recent call last):\\nerror: a.json: bad")
    if how == "partial":
        Path("out.pt").write_bytes(b"half")
        refuse()
    if how == "silent":
        refuse("")
    if how == "twice":
        refuse("error: one\\nerror: two")
    if how == "runs code":
        Path("marker").touch()
        refuse()
    if how == "edits":
        Path("input.txt").write_text("other")
    if how == "leftover":
        Path(".recursify-abc").mkdir()
    if how == "damaged":
        Path("out.json").write_text("{")
    if how == "grows":
        print(len(b"x" * (200 << 20)))
    if how == "hangs":
        time.sleep(60)
    if how == "dies":
        import os
        os.kill(os.getpid(), 11)
    if how == "exits":
        import os
        os._exit(1)
    if how == "refuses":
        refuse()
    if how == "says":
        print("{}")
"""
FAULTS = {
    "traceback": "status 1 with a traceback", "caught": "status 2 with a traceback", "partial": "refused, and wrote out.pt",
    "silent": "0 messages", "twice": "2 messages", "runs code": "code of a file has run", "edits": "changed its input: input.txt",
    "leftover": "left behind .recursify-abc", "damaged": "out.json is damaged", "grows": "took 200 MiB", "hangs": "still running",
    "dies": "status -11", "exits": "status 1", "refuses": None, "done": None,
}  # fmt: skip


@pytest.fixture(scope="module")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    folder = tmp_path_factory.mktemp("stub")
    (folder / "stub.py").write_text(STUB)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(folder))
        with Forks(folder / "home", "stub:main") as found:
            yield found


@pytest.mark.parametrize("how", FAULTS)
def test_what_a_command_must_not_do_is_a_fault(how: str, forks: Forks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bad_bytes, "MEMORY", 100 << 20)
    (tmp_path / "input.txt").write_text("as given")
    before = snapshot(tmp_path)
    ended = forks.run([how], tmp_path, 2 if how == "hangs" else 30)
    found, expected = fault_of(Case("stub", how, [how]), ended, tmp_path, before), FAULTS[how]
    assert found is None if expected is None else found is not None and expected in found, (found, ended)


def test_a_success_has_what_was_asked_for(forks: Forks, tmp_path: Path) -> None:
    before = snapshot(tmp_path)
    done, said = forks.run(["done"], tmp_path, 30), forks.run(["says"], tmp_path, 30)
    assert "missing or too many: out.pt" in str(fault_of(Case("stub", "", ["generate"], ("out.pt",)), done, tmp_path, before))
    assert fault_of(Case("checkpoint", "", ["convert"]), done, tmp_path, before) == "no output"
    for_json = Case("evaluate", "", ["evaluate"], *bad_bytes._result_of(["evaluate", "--json"]))
    assert "no JSON object" in str(fault_of(for_json, done, tmp_path, before))
    assert "no JSON object" in str(fault_of(for_json, said, tmp_path, before))
    (tmp_path / "prompts.out.jsonl").write_text('{"index": 0, "prompt": "a"}\n')
    assert bad_bytes._all_prompts(tmp_path, b"a\n\n", ".txt") is None
    assert "results of lines [0], of prompts in lines [0, 1]" in str(bad_bytes._all_prompts(tmp_path, b"a\nb", ".txt"))
    assert "another prompt" in str(bad_bytes._all_prompts(tmp_path, b"b", ".txt"))


def test_a_python_of_its_own_ends_as_a_fork_does(forks: Forks, tmp_path: Path) -> None:
    for how, seconds in (("refuses", 30), ("traceback", 30), ("hangs", 1)):
        fork, fresh = forks.run([how], tmp_path, seconds), forks.run_fresh([how], tmp_path, seconds)
        assert (fork.status, fork.stderr.splitlines()[-1:]) == (fresh.status, fresh.stderr.splitlines()[-1:])


ERROR = {"error": {"message": "bad", "type": "invalid_request_error", "param": None, "code": None}}
USAGE = {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}
TEXT = {"choices": [{"text": "x", "finish_reason": "stop"}], "usage": USAGE}


@pytest.mark.parametrize(
    ("status", "body", "fault"),
    [
        (400, ERROR, None),
        (400, {"detail": "bad"}, "no error in OpenAI's form"),
        (500, ERROR, "500"),
        (302, {}, "302"),
        (200, TEXT, None),
        (200, {**TEXT, "usage": {**USAGE, "total_tokens": 4}}, "usage"),
        (200, {**TEXT, "choices": []}, "0 choices"),
        (200, {**TEXT, "choices": [{"text": None, "message": {}, "finish_reason": "stop"}]}, "KeyError"),
        (200, {**TEXT, "choices": [{"text": "x", "finish_reason": None}]}, "a choice"),
        (200, {**TEXT, "extra": float("nan")}, "NaN is no JSON"),
    ],
)
def test_what_a_server_must_not_answer_is_a_fault(status: int, body: Any, fault: str | None) -> None:
    content = json.dumps(body).encode()
    with socket.create_server(("127.0.0.1", 0)) as listening:
        answer = f"HTTP/1.1 {status} X\r\nContent-Length: {len(content)}\r\n\r\n".encode() + content
        thread = threading.Thread(target=_answer_one, args=(listening, answer))
        thread.start()
        got, found = http_requests._answer(http_requests._request(b"{}"), listening.getsockname()[1], 30)
        thread.join()
    assert got == str(status) and (found is None if fault is None else fault in str(found))


def _answer_one(listening: socket.socket, answer: bytes) -> None:
    connection, _ = listening.accept()
    with connection:
        connection.recv(10_000)
        connection.sendall(answer)


def test_no_answer_is_none() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        assert http_requests._answer(b"POST / HTTP/1.1\r\n", listening.getsockname()[1], 0.1) == (None, None)


WEIGHTS = save({"a.weight": zeros(4, 4), "b.weight": zeros(4)})
ROWS: list[Any] = [{"text": "one", "n": 1}, {"text": "two", "n": 2}]
MUTATORS: dict[str, Any] = {
    "data": lambda rng: breaking.data(rng, WEIGHTS), "text": lambda rng: breaking.text(rng, "one\ntwo"),
    "json": lambda rng: breaking.json_text(rng, ROWS[0]), "json lines": lambda rng: breaking.json_lines(rng, ROWS),
    "csv": lambda rng: breaking.csv_text(rng, ROWS), "parquet": lambda rng: breaking.parquet(rng, ROWS),
    "safetensors": lambda rng: breaking.safetensors(rng, WEIGHTS),
    "recipe": lambda rng: breaking.recipe(rng, {"generate": {"prompt": "x", "stop": ["y"]}}),
    "words": lambda rng: breaking.words(rng, ["inspect", "--checkpoint", "x"], ["checkpoint", "json"], frozenset()),
    "request": http_requests._draw,
}  # fmt: skip


@pytest.mark.parametrize("kind", MUTATORS)
def test_a_number_is_always_the_same_case_and_others_are_others(kind: str) -> None:
    drawn = [MUTATORS[kind](random.Random(f"0 {number}")) for number in range(60)]
    assert drawn == [MUTATORS[kind](random.Random(f"0 {number}")) for number in range(60)]
    assert len({str(each) for each in drawn}) > 20


@pytest.mark.slow
def test_the_first_cases_pass() -> None:
    outcome = bad_bytes.run(time.monotonic() + 400, 0, 0, 30)
    assert (outcome.cases, outcome.faults) == (30, [])
    again = bad_bytes.run(time.monotonic() + 400, 0, 7, 1)
    assert again.next == 8 and set(again.counts) <= set(outcome.counts)
