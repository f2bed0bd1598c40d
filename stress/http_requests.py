"""Requests with something wrong in them, to one server, and what is wrong with its answers.

Half are bodies that are no good, in requests that are; the others are wrong as requests: methods, paths, headers, lengths. After each the
server must live, and answer a good request with the text that `recursify generate` gives.
"""

from __future__ import annotations

import http.client
import json
import random
import re
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from . import breaking

PROMPT = "The old river"
CONTROL = {"model": "model", "prompt": PROMPT, "max_tokens": 8, "temperature": 0}
MEMORY = 2**30  # bytes that the server may grow by
_SECONDS = 30.0  # for an answer to a request that is one
_PATIENCE = 1.0  # for an answer to what may be half of a request
_START = 180.0
_PATHS = ("/v1/completions", "/v1/chat/completions")
_COMPLETION: dict[str, Any] = {
    "model": "model", "prompt": "The old", "max_tokens": 4, "temperature": 0.5, "n": 2, "stop": ["\n"], "logprobs": 2, "seed": 1,
    "top_p": 0.9, "top_k": 5, "presence_penalty": 0.5, "repetition_penalty": 1.1, "H_cycles": 2, "user": "x",
}  # fmt: skip
_CHAT: dict[str, Any] = {
    "model": "model", "max_completion_tokens": 4, "temperature": 0, "logprobs": True, "top_logprobs": 2, "stop": "x",
    "messages": [{"role": "system", "content": "Be of help."}, {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
                 {"role": "assistant", "content": None,
                  "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]},
                 {"role": "tool", "tool_call_id": "1", "content": "5"}, {"role": "user", "content": "And?"}],
    "tools": [{"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {}}}}],
    "tool_choice": "auto", "response_format": {"type": "text"},
}  # fmt: skip
_STREAMED = {"stream": True, "stream_options": {"include_usage": True}}
_METHODS = ("GET", "PUT", "HEAD", "DELETE", "OPTIONS", "PATCH", "TRACE", "CONNECT", "post", "P\xd6ST", "", "PRI", "A" * 3000)
_WRONG_PATHS = (
    "/", "/v1", "/v1/models", "/v1/models/x", "/v1/models/%00", "/v1/models/%ff", "/v1/models/..%2f..", "/v1/completions/",
    "//v1/completions", "*", "/health", "/metrics", "/v1/completions?x=%zz", "/v1/completions#a", "/docs", "/%", "/\xff", "x",
    "http://other/v1/completions", "/" + "a" * 9000, "/v1/models/" + "%E9%BE%99" * 300, "/v1/chat/completions?" + "a=b&" * 500, "",
)  # fmt: skip
_HEADERS = (
    "Content-Length: -1", "Content-Length: x", "Content-Length: 99999999999999999999", "Content-Length: 0",
    "Content-Length: 5\r\nContent-Length: 6", "Content-Length: 3000000", "Transfer-Encoding: chunked", "Transfer-Encoding: gzip",
    "Content-Encoding: gzip", "Content-Type: text/plain", "Content-Type: \xff", "Content-Type: application/json; charset=utf-16",
    "Authorization: Bearer \xff\xfe", "Authorization: ", "Expect: 100-continue", "Expect: x", "Connection: upgrade",
    "Upgrade: websocket\r\nConnection: upgrade", "X: " + "a" * 70_000, "no colon", ": empty", "X : y", "X:\x00", " folded",
    "Host: a\r\nHost: b", "Range: bytes=5-1", "Accept: \xff", "Origin: null", "Cookie: =;=;", "\r\n", "Accept-Encoding: " + "gzip," * 300,
)  # fmt: skip
_TAILS = (
    b"",
    b"",
    b"0\r\n\r\n",
    b"zz\r\n",
    b"5\r\nhello\r\n0\r\n\r\n",
    b"ffffffffffffffffff\r\n",
    b"-1\r\n",
    b"3;x=y\r\n{}\n\r\n0\r\n\r\n",
)


class Server:
    """A server with its model, started at the first request and again whenever it has ended."""

    def __init__(self, checkpoint: Path, env: dict[str, str], log: Path, expected: str):
        """
        Args:
            log: File for what it prints.
            expected: The text of `CONTROL`.
        """
        self.checkpoint, self.env, self.log, self.expected = checkpoint, env, log, expected
        self.growth = 0
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def fault_of(self, rng: random.Random) -> tuple[str, dict[str, Any] | None]:
        """Draw a request, send it and judge the answer: what it was, and its fault if it has one."""
        if self._process is None or self._process.poll() is not None:
            self._start()
        kind, request = _draw(rng)
        seen = self.log.stat().st_size
        try:
            found, fault = _answer(request, self.port, _PATIENCE if kind == "request" else _SECONDS)
            if fault is None and found is None and kind != "request":
                fault = "no answer"
            fault = fault or self._disorder(seen)
        except OSError as error:
            found, fault = None, f"no connection: {error}"
        if fault is None:
            return f"HTTP {kind}: {found or 'no answer'}", None
        log = self.log.read_text(encoding="utf-8", errors="replace")[seen:][-3000:]
        self._end()
        expected = "an answer, or a status of 4xx with an error in OpenAI's form; and the next request as ever"
        return f"HTTP {kind}", {"what": ascii(request[:3000]), "expected": expected, "found": fault, "log": log}

    def _disorder(self, seen: int) -> str | None:
        """What is wrong with the server after a request."""
        assert self._process is not None
        if self._process.poll() is not None:
            return f"the server has ended with {self._process.returncode}"
        body = json.dumps(CONTROL).encode()
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=_SECONDS)
        try:
            connection.request("POST", _PATHS[0], body, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            content = answer.read()
        except (http.client.HTTPException, TimeoutError) as error:
            return f"the next request: {error!r}"
        finally:
            connection.close()
        if answer.status != 200 or json.loads(content)["choices"][0]["text"] != self.expected:
            return f"the next request: {answer.status} {content[:500]!r}, expected the text {self.expected!r}"
        if b"Traceback" in self.log.read_bytes()[seen:]:
            return "a traceback in the log"
        self.growth = max(self.growth, _resident(self._process.pid) - self._before)
        return f"the server has grown by {self.growth >> 20} MiB" if self.growth > MEMORY else None

    def _start(self) -> None:
        """Start the server and wait until it listens."""
        words = [sys.executable, "-m", "recursify", "serve", "--checkpoint", str(self.checkpoint), "--port", "0", "--cache_tokens", "1024",
                 "--max_completion_tokens", "32", "--model_name", "model", "--device", "cpu", "--request_timeout", "20"]  # fmt: skip
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(words, stdout=log, stderr=log, env=self.env, cwd=self.log.parent)
        until = time.monotonic() + _START
        while not (listens := re.search(r"listening on http://127.0.0.1:(\d+)", said := self.log.read_text(encoding="utf-8"))):
            if self._process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"the server does not start: {said}")
            time.sleep(0.05)
        self.port = int(listens[1])
        _answer(_request(json.dumps(CONTROL).encode()), self.port, _SECONDS)
        self._before = _resident(self._process.pid)

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait(30)
            self._process = None


def _draw(rng: random.Random) -> tuple[str, bytes]:
    """(`body` or `request`, what is sent)."""
    path = rng.choice(_PATHS)
    good = _COMPLETION if path == _PATHS[0] else _CHAT
    good = {name: value for name, value in good.items() if name in ("prompt", "messages") or rng.random() < 0.6}
    good |= _STREAMED if rng.random() < 0.2 else {}
    body = breaking.data(rng, json.dumps(good).encode()) if rng.random() < 0.1 else breaking.json_text(rng, good)
    if rng.random() < 0.7:
        return "body", _request(body, path)
    return "request", _broken_request(rng, rng.choice((body, json.dumps(good).encode())), path)


def _request(body: bytes, path: str = _PATHS[0]) -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def _broken_request(rng: random.Random, body: bytes, path: str) -> bytes:
    how = rng.randrange(7)
    if how == 0:
        return breaking.data(rng, _request(body[:2000], path))
    method, version = "POST", "HTTP/1.1"
    headers = ["Host: a", "Content-Type: application/json", f"Content-Length: {len(body)}"]
    if how == 1:
        method = rng.choice(_METHODS)
    elif how == 2:
        path = rng.choice(_WRONG_PATHS)
        method = rng.choice(("POST", "GET"))
    elif how == 3:
        version = rng.choice(("HTTP/1.0", "HTTP/0.9", "HTTP/2.0", "HTTP/9", "", "http/1.1"))
    elif how == 4:
        del headers[rng.randrange(len(headers))]
    if how >= 5 or rng.random() < 0.3:
        headers = [each for each in headers if rng.random() < 0.7] + rng.choices(_HEADERS, k=rng.choice((1, 2)))
    tail = rng.choice(_TAILS) if any("chunked" in each for each in headers) else body
    return "\r\n".join([f"{method} {path} {version}", *headers, "", ""]).encode("latin-1") + tail


def _answer(request: bytes, port: int, seconds: float) -> tuple[str | None, str | None]:
    """(status, what is wrong with the answer); no status where there is no answer."""
    with socket.create_connection(("127.0.0.1", port), timeout=seconds) as connection:
        answer = http.client.HTTPResponse(connection, method=request.split(b" ", 1)[0].decode("latin-1"))
        with suppress(OSError):  # the server has answered before it has read everything, and closed
            connection.sendall(request)
        try:
            answer.begin()
            content = answer.read()
        except (http.client.HTTPException, OSError):
            return None, None
        finally:
            answer.close()
    path = request.split(b"\r\n", 1)[0].split(b" ")[1:2]
    return str(answer.status), _fault(answer, content, path[0].decode("latin-1") if path else "")


def _fault(answer: http.client.HTTPResponse, content: bytes, path: str) -> str | None:
    shown = f"{answer.status} {content[:500]!r}"
    if answer.status == 200:
        try:
            return _fault_of_text(answer, content) if path in _PATHS else None
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            return f"{shown}: {error!r}"
    if not 400 <= answer.status < 500:
        return shown
    if content in (b"", b"Invalid HTTP request received.") or b"Unsupported" in content:  # uvicorn's, of what is no request at all
        return None
    try:
        told = json.loads(content)["error"]
        right = isinstance(told["message"], str) and told["type"].endswith("_error") and {"param", "code"} <= set(told)
    except (ValueError, KeyError, TypeError, AttributeError):
        right = False
    return None if right else f"{shown}: no error in OpenAI's form"


def _fault_of_text(answer: http.client.HTTPResponse, content: bytes) -> str | None:
    """What is wrong with a text, whole or in pieces."""
    if answer.headers.get_content_type() == "text/event-stream":
        events = [each.removeprefix("data: ") for each in content.decode().split("\n\n") if each]
        if events[-1] != "[DONE]":
            error = json.loads(events[-1])["error"]
            return None if error["type"] == "invalid_request_error" else f"ends with {error}"
        choices = [choice for event in events[:-1] for choice in json.loads(event)["choices"]]
        reasons = [choice["finish_reason"] for choice in choices if choice["finish_reason"]]
        return None if reasons and set(reasons) <= _REASONS else f"ends {reasons}"
    found = json.loads(content, parse_constant=_no_number)
    for choice in found["choices"]:
        text = choice["text"] if "text" in choice else choice["message"]["content"]
        if not (isinstance(text, str) or choice["message"]["tool_calls"]) or choice["finish_reason"] not in _REASONS:
            return f"a choice {choice}"
    usage = found["usage"]
    right = usage["prompt_tokens"] > 0 and usage["prompt_tokens"] + usage["completion_tokens"] == usage["total_tokens"]
    return None if right and found["choices"] else f"{len(found['choices'])} choices, usage {usage}"


_REASONS = {"stop", "length", "tool_calls"}


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no JSON")


def _resident(pid: int) -> int:
    """Bytes of memory of a process; 0 elsewhere than on Linux."""
    if sys.platform != "linux":
        return 0
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS")), 0)
