"""The soak of the server finds what it looks for, and none of it in a short one."""

from __future__ import annotations

import dataclasses
import random
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from benchmarks.serving import Text, resources
from stress import soak, visitors
from stress.soak import Sample
from stress.visitors import Stops, Visitor
from tests.support.served import chatty_tokenizer, running, speaking_model

TEXT = Text("The old man", 3, None)
FLAT = [Sample(float(at), resident=100, threads=7, files=30, blocks=9, written=20 * at, cpu=0.5 * at) for at in range(101)]
TIMES = [(at + 0.5, 1.0) for at in range(100)]


def test_what_stays_flat_is_no_fault() -> None:
    assert soak.grown(soak.drift(FLAT, TIMES)) == []


@pytest.mark.parametrize(("name", "late"), [("resident", 106), ("threads", 8), ("files", 46), ("blocks", 14)])
def test_growth_is_found(name: str, late: int) -> None:
    grown = [dataclasses.replace(each, **{name: late}) if each.at > 50 else each for each in FLAT]
    assert soak.grown(soak.drift(grown, TIMES)) == [name]


def test_a_server_that_becomes_slow_is_found() -> None:
    assert soak.grown(soak.drift(FLAT, [(at, 1.0 if at < 50 else 2.1) for at, _ in TIMES])) == ["seconds of an answer"]
    assert soak.grown(soak.drift(FLAT, [each for each in TIMES if each[0] < 50])) == ["seconds of an answer"]  # no answers any more
    slow = [dataclasses.replace(each, written=each.written // 2) if each.at > 50 else each for each in FLAT]
    assert soak.grown(soak.drift(slow, TIMES)) == ["CPU seconds of a token"]


def visited(url: str, right: str, kind: str) -> dict[str, Any] | None:
    """The fault of one action."""
    visitor = Visitor(url, {TEXT: right}, threading.Event())
    visitor.kinds = {getattr(visitor, kind): 1}
    return visitor.visit(0, 17, Stops())[1]


def test_a_wrong_text_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(visitors, "TOKENS", 6)
    with running(speaking_model(tmp_path), chatty_tokenizer(), depths=(1, 3)) as server:
        right = server.write(TEXT.prompt, max_tokens=6)
        for kind in ("whole", "streamed", "slow_sender", "slow_reader", "everything"):
            assert visited(server.url, right, kind) is None
            fault = visited(server.url, "another", kind)
            assert fault is not None and (fault["case"], fault["what"], fault["found"]) == (17, kind, ["wrong"])


def test_what_is_not_given_back_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soak, "PATIENCE", 0.0)
    monkeypatch.setattr(soak, "LATE", 0.2)
    told = {"recursify_running": 1.0, "recursify_queued": 2.0, "recursify_cache_blocks": 9.0, "recursify_cache_blocks_free": 8.0}
    monkeypatch.setattr(soak, "gauges", lambda url: told)
    with socket.create_server(("127.0.0.1", 0)) as here, socket.create_connection(here.getsockname()):
        before = {what: count - 1 for what, count in resources(psutil.Process()).items()}
        found = {what.split(",")[0] for what, _, _ in soak.not_idle("", psutil.Process(), before)}
    assert found == {"running", "queued", "free blocks", "connections", "threads", "files"}


@contextmanager
def saying(answer: bytes) -> Iterator[str]:
    """The address of a server that answers everybody so, and closes no connection."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        kept = []

        def answer_all() -> None:
            while True:
                try:
                    kept.append(listening.accept()[0])
                except OSError:
                    return
                if answer:
                    kept[-1].recv(65536)
                    kept[-1].sendall(answer)

        threading.Thread(target=answer_all, daemon=True).start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        listening.shutdown(socket.SHUT_RDWR)
        for each in kept:
            each.close()


HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
EVENT = b'data: {"choices": [{"text": "a"}]}\n\n'


@pytest.mark.parametrize("last", [b"", b'data: {"error": {"code": "unavailable"}}\n\n'])
def test_a_stream_that_ends_before_its_text_is_found(last: bytes) -> None:
    """A clean end that tells nothing at any time; one that tells why, where the server was not being stopped."""
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (EVENT, last) if part) + b"0\r\n\r\n"
    with saying(HEAD + chunks) as url:
        fault = visited(url, "a", "streamed")
    assert fault is not None and fault["found"] == ["told" if last else "a stream that ends without [DONE] and without an error"]


def test_a_connection_that_stays_open_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(visitors, "PATIENCE", 0.2)
    monkeypatch.setattr(visitors, "LATE", -4.5)
    with saying(b"") as url:
        visitor = Visitor(url, {TEXT: "a"}, threading.Event())
        visitor.rng = Patient()
        visitor.silent()
    assert [end for _, end in visitor.tally.counts] == ["open after 0.7 seconds"]


class Patient(random.Random):
    """Chooses to wait for the end."""

    def random(self) -> float:
        return 0.0


def test_only_a_stop_excuses_a_lost_connection() -> None:
    stops = Stops()
    assert not stops.excuse(0, time.monotonic(), "deaf")
    stops.stopped()
    now = time.monotonic()
    assert stops.excuse(now - 5, now + 1, "deaf") and stops.excuse(now - 0.5, now + 1, "whole")
    assert not stops.excuse(now - 5, now + 1, "whole")  # it was being answered
    stops.up()
    assert not stops.excuse(time.monotonic() + 1, time.monotonic() + 2, "deaf")


def test_a_short_soak_with_a_restart_has_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (soak, visitors):
        monkeypatch.setattr(module, "TOKENS", 8)
    monkeypatch.setattr(soak, "PROMPTS", soak.PROMPTS[:2])
    monkeypatch.setattr(soak, "RESTARTS", 1)
    monkeypatch.setattr(soak, "BETWEEN_RESTARTS", 0.1)
    outcome = soak.run(time.monotonic() + 40, seed=3, first=5, most=None)
    assert outcome.faults == [] and outcome.first == 5 and outcome.cases == sum(outcome.counts.values()) > 20
    assert outcome.notes["restarts"] == 1
