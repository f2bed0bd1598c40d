"""The server at its limits: full queues, small KV caches, disconnecting clients, timeouts, and shutdown."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from recursify.serving import EngineStopped
from recursify.serving import running as serving_running
from tests.support.served import PROMPTS, Running, running, soon, text_of
from tests.support.tiny import sentences


@pytest.fixture
def held(model: Any, tokenizer: Any) -> Iterator[Running]:
    """A server that admits one request, queues two, and generates nothing until the test calls `go`."""
    with running(model, tokenizer, max_running=1, max_queue=2) as server, contextlib.ExitStack() as pause:
        pause.enter_context(server.batcher.manager.pause())
        server.go = pause.close  # type: ignore[attr-defined]
        yield server


def test_requests_queue_when_cache_is_full_and_get_429_when_queue_is_full(held: Any, model: Any, tokenizer: Any) -> None:
    with ThreadPoolExecutor(3) as pool:
        asked = [pool.submit(held.write, prompt) for prompt in PROMPTS[:3]]
        assert soon(lambda: len(held.batcher.waiting) == 2)
        full = held.post(prompt="a")
        held.go()
        assert [one.result() for one in asked] == [text_of(model, tokenizer, prompt) for prompt in PROMPTS[:3]]
    assert (full.status_code, full.json()["error"]["type"], full.headers["retry-after"]) == (429, "rate_limit_error", "1")
    assert held.post(prompt="a", n=4).status_code == 429  # one runs and three would wait
    assert held.post(prompt="a", n=3, max_tokens=2).status_code == 200
    assert soon(lambda: held.idle)


def test_disconnected_client_leaves_the_queue(held: Any, model: Any, tokenizer: Any) -> None:
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(held.write, PROMPTS[0])
        assert soon(lambda: bool(held.batcher.running))
        for stream in (False, True):
            gone = caller(held, {"prompt": "a", "stream": stream})
            assert soon(lambda: bool(held.batcher.waiting))
            gone.close()
            assert soon(lambda: not held.batcher.waiting)
        held.go()
        assert first.result() == text_of(model, tokenizer, PROMPTS[0])
    assert soon(lambda: 'recursify_requests_total{route="/v1/completions",status="499"} 2' in held.http.get("/metrics").text)


def test_small_cache_serves_requests_in_turn(model: Any, tokenizer: Any) -> None:
    """Room for two of five at a time, and prompts that are read in several passes."""
    with running(model, tokenizer, cache_tokens=256, batch_tokens=33) as server:
        assert server.service.longest == 256
        prompts = [" ".join(sentences(i, 3)) for i in range(5)]
        with ThreadPoolExecutor(5) as pool:
            texts = list(pool.map(server.write, prompts))
        assert texts == [text_of(model, tokenizer, prompt) for prompt in prompts]
        full = server.post(prompt=tokenizer(prompts[0]).input_ids, max_tokens=250, temperature=0).json()
        assert full["usage"]["total_tokens"] == 256 and full["choices"][0]["finish_reason"] == "length"
        assert soon(lambda: server.idle)


def connected(server: Running) -> socket.socket:
    return socket.create_connection(("127.0.0.1", int(server.url.rsplit(":", 1)[1])))


def caller(server: Running, body: dict[str, Any]) -> socket.socket:
    """A completion request whose response is not read."""
    raw = connected(server)
    content = json.dumps(body).encode()
    raw.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s" % (len(content), content))
    return raw


@pytest.mark.parametrize("stream", [True, False])
def test_disconnected_client_frees_its_blocks(stream: bool, model: Any, tokenizer: Any) -> None:
    with running(model, tokenizer) as server:
        gone = caller(server, {"prompt": "a b c", "max_tokens": 450, "stream": stream, "n": 4, "temperature": 0, "stop": ["never met"]})
        assert soon(lambda: server.batcher.free_blocks < server.batcher.blocks)
        if stream:
            assert gone.recv(100).startswith(b"HTTP/1.1 200")
        gone.close()
        assert soon(lambda: server.idle)
        assert 'recursify_texts_total{H_cycles="3",end="cancelled"} 4' in server.http.get("/metrics").text
        assert server.batcher.manager.current_batch < 400  # passes; the texts would have taken 450
        assert server.batcher.router.output_queue.empty() and not server.batcher.router.result_handlers


def test_request_timeout(model: Any, tokenizer: Any) -> None:
    with running(model, tokenizer, request_timeout=0.3) as server:
        slow = {"prompt": "a", "max_tokens": 450, "n": 8}
        answer = server.post(**slow)
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "timeout")
        with pytest.raises(openai.APIError, match="no answer within 0.3 seconds"):
            list(server.openai.completions.create(model="tiny", stream=True, **slow))
        assert soon(lambda: server.idle)


def test_slow_body_times_out(model: Any, tokenizer: Any) -> None:
    with running(model, tokenizer, request_timeout=0.3) as server, connected(server) as raw:
        raw.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        assert raw.recv(100).startswith(b"HTTP/1.1 504")


# --- the end


def test_graceful_shutdown_finishes_running_requests(model: Any, tokenizer: Any) -> None:
    before = threading.active_count()
    with running(model, tokenizer) as server, ThreadPoolExecutor(1) as pool:
        running_one = pool.submit(server.write, PROMPTS[0], max_tokens=60)
        assert soon(lambda: not server.service.engine.idle)
        server.stop.ask()
        assert soon(lambda: server.service.engine.stopping)
        health, new = server.http.get("/health"), server.post(prompt="a")
        assert running_one.result() == text_of(model, tokenizer, PROMPTS[0], 3, 60)
        assert (health.status_code, new.status_code, new.json()["error"]["type"]) == (503, 503, "server_error")
        server.thread.join(20)
        assert not server.thread.is_alive()
    assert soon(lambda: threading.active_count() <= before)


def test_shutdown_timeout_fails_running_requests(model: Any, tokenizer: Any) -> None:
    with running(model, tokenizer, shutdown_timeout=0) as server, ThreadPoolExecutor(2) as pool:
        whole = pool.submit(server.post, prompt="a", max_tokens=450, n=3)
        streamed = pool.submit(server.post, prompt="a", max_tokens=450, n=3, stream=True)
        assert soon(lambda: len(server.batcher.running) == 6)
        server.stop.ask()
        assert whole.result().status_code == 503
        assert "the server is stopping" in streamed.result().text and "[DONE]" not in streamed.result().text


def test_the_end_is_quiet_where_a_client_has_stopped_in_its_head_or_body(
    model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither holds up the end, nor is either an error of the server."""
    monkeypatch.setattr(serving_running, "_GOODBYE", 0.5)
    with running(model, tokenizer) as server, connected(server) as half, connected(server) as silent:
        half.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        silent.sendall(b"GET /hea")
        assert server.http.get("/health").status_code == 200
        server.stop.ask()
        server.thread.join(10)
        assert not server.thread.is_alive()
    assert not capsys.readouterr().err


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), SystemExit()])
def test_dead_manager_fails_requests_then_health_then_the_server(
    error: BaseException, model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also requests that wait, and those of a depth whose manager lives: a manager fails only its own, and only at an `Exception`."""

    def fail(model: Any) -> None:
        raise error

    with running(model, tokenizer, max_running=1, depths=(1, 3)) as server, ThreadPoolExecutor(4) as pool:
        batchers = server.service.engine.batchers
        with server.batcher.manager.pause():
            kinds = [{"H_cycles": depth, "stream": stream} for depth in (1, 3) for stream in (False, True)]
            asked = [pool.submit(server.post, prompt="a", max_tokens=450, temperature=0, **kind) for kind in kinds]
            assert soon(lambda: all(len(each.running) == len(each.waiting) == 1 for each in batchers.values()))
            monkeypatch.setattr(server.batcher.manager.batch_processor, "_generation_step", fail)
        for answer, kind in zip([one.result() for one in asked], kinds, strict=True):
            assert answer.status_code == (200 if kind["stream"] else 503)
            assert '"code": "unavailable"' in answer.text.replace('":"', '": "') and "[DONE]" not in answer.text
        health, more = server.http.get("/health"), server.post(prompt="a")
        assert (health.status_code, health.json()) == (503, {"status": "the engine has stopped"})
        assert (more.status_code, more.json()["error"]["message"]) == (503, "the engine has stopped")
        server.thread.join(20)
        assert not server.thread.is_alive()
    cause = str(error) and f" ({error})"
    assert isinstance(server.failure, EngineStopped) and f"the engine has stopped{cause}" in str(server.failure)


DYING = """
import sys
from recursify.cli.main import main
from recursify.serving.engine import Batcher

def fail(model):
    raise RuntimeError("out of memory")

start = Batcher.start
def start_dying(self):
    self.manager.batch_processor._generation_step = fail
    start(self)
Batcher.start = start_dying
main(sys.argv[1:])
"""


def test_the_process_of_a_dead_engine_ends_by_itself(donor_folder: Path) -> None:
    words = ["serve", "--checkpoint", str(donor_folder), "--port", "0", "--device", "cpu"]
    process = subprocess.Popen([sys.executable, "-c", DYING, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        url = next(line.split()[2].rstrip(";") for line in process.stdout if line.startswith("listening on"))
        assert httpx.get(f"{url}/health").status_code == 200
        assert httpx.post(f"{url}/v1/completions", json={"prompt": "a"}).status_code == 503
        assert httpx.get(f"{url}/health").status_code == 503
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 1
        assert errors.splitlines()[-1].startswith("error: the engine has stopped (out of memory)")
    finally:
        process.kill()
