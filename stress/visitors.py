"""Who comes to the server of the soak: the clients of the benchmark, and such as stall, dawdle, do not read, or come all at once."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx

from benchmarks.serving import Client, Sizes, Tally, Text
from stress.part import draw

TOKENS = 40
PATIENCE = 45.0  # seconds that the server has for a request, and for a client that says nothing
LATE = 10.0  # seconds, beyond the patience and those for which an idle connection is kept, until a connection must have been closed
FAIR = {"right", "gone", "left", "closed", "200", "400", "404", "413", "429"}


class Stops:
    """When the server was stopped, and when it was up again."""

    def __init__(self) -> None:
        self.spans: list[list[float]] = []
        self.is_up = threading.Event()

    def stopped(self) -> None:
        self.spans.append([time.monotonic(), float("inf")])
        self.is_up.clear()

    def up(self) -> None:
        if self.spans:
            self.spans[-1][1] = time.monotonic()
        self.is_up.set()

    def excuse(self, began: float, ended: float, kind: str) -> bool:
        """Whether a connection may have been lost: a stop fell into the action, but a plain request was not under way for a second."""
        ahead = 1.0 if kind in ("whole", "streamed") else float("inf")
        return any(began > stop - ahead and began < up and ended > stop for stop, up in self.spans)


class Visitor(Client):
    """One of many. Each action is a case: all that it does is drawn by its number.

    Args:
        url: Of the server.
        right: Every text, as the client of a quiet server got it.
        closing: Set when the time is up: nobody waits any longer for what comes of a stalled connection.
    """

    def __init__(self, url: str, right: dict[Text, str], closing: threading.Event):
        super().__init__(0, url, right, Sizes(tokens=TOKENS), Tally())
        self.http = httpx.Client(base_url=url, timeout=60, limits=httpx.Limits(keepalive_expiry=2))  # before the server closes it
        self.url, self.where = f"{url}/v1/completions", (httpx.URL(url).host, httpx.URL(url).port or 80)
        self.crowd = httpx.Client(timeout=60, limits=httpx.Limits(keepalive_expiry=2))  # for all texts at once
        self.closing = closing
        self.times: list[tuple[float, float]] = []  # when a text came, and how long after it was asked for
        self.kinds |= {
            self.healthy: 1, self.vanish_sending: 1, self.silent: 1, self.half_head: 1, self.half_body: 1, self.kept: 1,
            self.slow_sender: 2, self.slow_reader: 2, self.deaf: 2, self.everything: 0.4,
        }  # fmt: skip

    def visit(self, seed: int, case: int, stops: Stops) -> tuple[str, dict[str, Any] | None]:
        """What was done and what came of it; and the fault, if that must not be."""
        self.rng, self.tally = draw(seed, case), Tally()
        (action,) = self.rng.choices(list(self.kinds), list(self.kinds.values()))
        kind, began = action.__name__, time.monotonic()
        try:
            action()
        except (httpx.HTTPError, http.client.HTTPException, OSError) as error:
            lost = stops.excuse(began, time.monotonic(), kind)
            self.tally.add(kind, "gone" if lost else f"{type(error).__name__}: {error}")
            stops.is_up.wait(60)
        ends = [end for _, end in self.tally.counts]
        down = stops.excuse(began, time.monotonic(), "any")
        wrong = [end for end in ends if end not in FAIR and not (down and end in ("unexpected 503", "told"))]
        fault = {"case": case, "what": kind, "expected": "one of " + ", ".join(sorted(FAIR)), "found": wrong} if wrong or not ends else None
        return (kind, fault) if fault else (f"{kind}: {' '.join(sorted(ends))}", None)

    # Plain requests; others are the benchmark's

    def whole(self) -> None:
        self._timed(super().whole)

    def streamed(self) -> None:
        self._timed(lambda: self._streamed("streamed", 0.0))

    def healthy(self) -> None:
        self._seen("healthy", self.http.get(self.rng.choice(["/health", "/v1/models", "/metrics"])).status_code, {200})

    def everything(self) -> None:
        """All texts at once: those that the queue has no room for are turned away."""
        with ThreadPoolExecutor(len(self.texts)) as pool:
            answers = list(pool.map(lambda text: self.crowd.post(self.url, json=text.body(TOKENS)), self.texts))
        for text, answer in zip(self.texts, answers, strict=True):
            if answer.status_code == 200:
                self._judge("everything", answer.json()["choices"][0]["text"], text)
            else:
                self.tally.add("everything", str(answer.status_code) if answer.status_code == 429 else f"unexpected {answer.status_code}")

    # Those who take their time

    def slow_sender(self) -> None:
        """A byte after the other."""
        text = self.rng.choice(self.texts)
        with self._connected() as raw:
            for byte in self._request(text.body(TOKENS)):
                raw.sendall(bytes([byte]))
                time.sleep(0.005)
            status, body = _read(raw)
        if status == 200:
            self._judge("slow_sender", json.loads(body)["choices"][0]["text"], text)
        else:
            self._seen("slow_sender", status)

    def slow_reader(self) -> None:
        self._streamed("slow_reader", self.rng.uniform(0.01, 0.2))

    def deaf(self) -> None:
        """Asks for a lot and reads nothing."""
        with self._connected(room=1024) as raw:
            raw.sendall(self._request({"prompt": "Once", "max_tokens": 100, "n": 2, "stream": True, "logprobs": 5}))
            self.closing.wait(self.rng.uniform(0.5, 8))
        self.tally.add("deaf", "left")

    def vanish_sending(self) -> None:
        with self._connected() as raw:
            request = self._request({"prompt": "Once", "max_tokens": 500})
            raw.sendall(request[: self.rng.randrange(len(request))])
        self.tally.add("vanish_sending", "left")

    # Those who stop saying anything

    def silent(self) -> None:
        self._stall("silent", b"")

    def half_head(self) -> None:
        self._stall("half_head", self._request({})[: self.rng.randint(1, 60)])

    def half_body(self) -> None:
        path = self.rng.choice(["/v1/completions", "/v1/nothing"])
        self._stall("half_body", self._request(self.texts[0].body(TOKENS), path)[: -self.rng.randint(1, 40)])

    def kept(self) -> None:
        self._stall("kept", b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")

    def _stall(self, kind: str, said: bytes) -> None:
        """Say this and no more; one in eight waits until the server closes the connection, which it must."""
        stay = PATIENCE + 5 + LATE if self.rng.random() < 0.125 else self.rng.uniform(0.5, 5)
        with self._connected() as raw:
            raw.sendall(said)
            raw.settimeout(0.5)
            end = time.monotonic() + stay
            while time.monotonic() < end and not self.closing.is_set():
                with contextlib.suppress(TimeoutError):
                    if not _received(raw):
                        self.tally.add(kind, "closed")
                        return
        waited = stay > PATIENCE and not self.closing.is_set()
        self.tally.add(kind, f"open after {stay:g} seconds" if waited else "left")

    # How

    def _timed(self, action: Callable[[], None]) -> None:
        began = time.monotonic()
        action()
        if any(end == "right" for _, end in self.tally.counts):
            self.times.append((time.monotonic(), time.monotonic() - began))

    def _streamed(self, kind: str, pause: float) -> None:
        """A stream that ends without `[DONE]` must tell why."""
        text = self.rng.choice(self.texts)
        with self.http.stream("POST", "/v1/completions", json={**text.body(TOKENS), "stream": True}) as answer:
            if answer.status_code != 200:
                answer.read()
                self._seen(kind, answer.status_code)
                return
            events = []
            for line in answer.iter_lines():
                if line:
                    events.append(line.removeprefix("data: "))
                    time.sleep(pause)
        if events and events[-1] == "[DONE]":
            self._judge(kind, "".join(json.loads(event)["choices"][0]["text"] for event in events[:-1]), text)
        else:
            told = events and "error" in json.loads(events[-1])
            self.tally.add(kind, "told" if told else "a stream that ends without [DONE] and without an error")

    def _connected(self, room: int | None = None) -> socket.socket:
        raw = socket.socket()
        if room is not None:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, room)
        raw.settimeout(60)
        raw.connect(self.where)
        return raw

    def _request(self, body: dict[str, Any], path: str = "/v1/completions") -> bytes:
        content = json.dumps(body).encode()
        return f"POST {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(content)}\r\n\r\n".encode() + content


def _received(raw: socket.socket) -> bytes:
    """What has come; nothing if the other end has closed the connection, in whatever way."""
    try:
        return raw.recv(65536)
    except ConnectionError:
        return b""


def _read(raw: socket.socket) -> tuple[int, bytes]:
    """Status and body of an answer.

    Raises:
        HTTPException, OSError: It is not whole.
    """
    answer = http.client.HTTPResponse(raw)
    answer.begin()
    return answer.status, answer.read()
