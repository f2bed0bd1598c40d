"""Connections that come to nothing end by themselves: those that say nothing, stop in the middle of what they say, or do not read."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from typing import Any

import psutil
import pytest

from recursify.serving import connections
from tests.support.served import Running, running, soon

PATIENCE = 1.0
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n"
ASKED = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.fixture(scope="module")
def impatient(model: Any, tokenizer: Any) -> Iterator[Running]:
    """A server whose patience is short, since no connection waits longer than a request may take."""
    with running(model, tokenizer, request_timeout=PATIENCE) as server:
        yield server


def connected(server: Running, room: int | None = None) -> socket.socket:
    """A connection; `room` is how many bytes this end takes without reading them."""
    raw = socket.socket()
    if room is not None:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, room)
    raw.connect(("127.0.0.1", int(server.url.rsplit(":", 1)[1])))
    raw.settimeout(10)
    return raw


def ended(raw: socket.socket) -> float:
    """Seconds until the other end closes the connection; what it says until then is dropped."""
    start = time.monotonic()
    try:
        while raw.recv(65536):
            pass
    except ConnectionResetError:
        pass
    return time.monotonic() - start


@pytest.mark.parametrize(
    "said",
    [
        b"",
        b"GET /hea",
        b"GET /health HTTP/1.1\r\nHost: x\r\n",
        ASKED,  # and nothing more: a connection that is kept
        ASKED + b"GET /hea",
        HEAD % 100 + b"{",
        b"POST /nowhere HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n{",
    ],
)
def test_a_connection_that_says_no_whole_request_is_closed(impatient: Running, said: bytes) -> None:
    with connected(impatient) as raw:
        raw.sendall(said)
        assert ended(raw) < 4.5  # uvicorn closes a kept connection after 5 seconds


@pytest.mark.parametrize("said", [b"", HEAD % 100, ASKED, b"POST /nowhere HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n"])
def test_a_byte_now_and_then_does_not_keep_a_connection(impatient: Running, said: bytes) -> None:
    with connected(impatient) as raw:
        raw.sendall(said)
        start = time.monotonic()
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            while time.monotonic() < start + 6 * PATIENCE:
                raw.sendall(b"G")
                time.sleep(0.05)


def test_a_kept_connection_takes_requests_for_longer_than_the_patience(impatient: Running) -> None:
    with connected(impatient) as raw:
        for _ in range(10):
            raw.sendall(ASKED)
            answer = b""
            while b'"ok"}' not in answer:
                answer += (more := raw.recv(1000))
                assert more
            time.sleep(PATIENCE / 4)


def unread(server: Running, **body: Any) -> socket.socket:
    """A request whose answer is larger than what the sockets take unread."""
    raw = connected(server, room=1024)
    content = json.dumps({"prompt": "a b", "n": 16, "temperature": 2, "seed": 1, **body}).encode()
    raw.sendall(HEAD % len(content) + content)
    return raw


def small_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sockets of the server take little of what nobody reads, as over a slow line."""
    accept = socket.socket.accept

    def accepted(self: socket.socket) -> Any:
        found, where = accept(self)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        return found, where

    monkeypatch.setattr(socket.socket, "accept", accepted)


def is_open(server: Running, raw: socket.socket) -> bool:
    """Whether the server still holds its end."""
    ends = (("127.0.0.1", int(server.url.rsplit(":", 1)[1])), raw.getsockname())
    return any((each.laddr, each.raddr) == ends for each in psutil.Process().net_connections("tcp4"))


def over(server: Running) -> int:
    """Completions that have ended, whatever came of them."""
    lines = server.http.get("/metrics").text.splitlines()
    return sum(int(line.rsplit(" ", 1)[1]) for line in lines if line.startswith('recursify_requests_total{route="/v1/completions"'))


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_does_not_read_is_left_and_leaves_nothing(
    stream: bool, model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_buffers(monkeypatch)
    body = {"max_tokens": 40, "stream": stream, "logprobs": 5}
    with running(model, tokenizer, request_timeout=2.0, max_running=16) as server, unread(server, **body) as raw:
        assert soon(lambda: bool(server.batcher.running)) and is_open(server, raw)
        assert soon(lambda: not is_open(server, raw), 12)
        assert soon(lambda: server.idle and over(server) == 1, 1)


def test_a_client_that_reads_slowly_gets_all(model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where this takes longer than the patience, as long as it reads."""
    small_buffers(monkeypatch)
    monkeypatch.setattr(connections, "_PATIENCE", 0.5)
    with running(model, tokenizer, max_running=16) as server, unread(server, max_tokens=20, stream=False, logprobs=5) as raw:
        start, answer = time.monotonic(), raw.recv(1)
        while b"\r\n\r\n" not in answer:
            answer += raw.recv(1)
        length = int(answer.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        body = b""
        while len(body) < length:
            body += (more := raw.recv(length // 20))
            assert more, f"{len(body)} of {length} bytes"
            time.sleep(0.02)
        assert len(json.loads(body)["choices"]) == 16 and time.monotonic() - start > 1
