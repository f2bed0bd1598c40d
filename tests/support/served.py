"""Shared by the tests of the server: a real uvicorn on a loopback port, in a thread of the test process, so that tests can inspect the
cache; and a model that generates a different text for each prompt."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import torch

from recursify.conversion.convert import convert
from recursify.serving.answering import Service
from recursify.serving.running import EngineStopped, Stop, address, bound, serve
from recursify.serving.settings import ServeSettings
from tests.support.tiny import make_tiny_tokenizer, sentences, tiny_donor

TEMPLATE = "{% for m in messages %}{{ '<' + m.role + '>' + m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
PROMPTS = [text[: 20 + 3 * i] for i, text in enumerate(sentences(7, 16))]
SIZES = {"cache_tokens": 4096, "batch_tokens": 64}


class Running:
    """A server in a thread."""

    def __init__(self, model: Any, tokenizer: Any, **settings: Any):
        self.service = Service(model, tokenizer, "tiny", ServeSettings(checkpoint="tiny", port=0, **{**SIZES, **settings}))
        self.stop, ready = Stop(), threading.Event()
        self._port = bound("127.0.0.1", 0)
        sock = self._port.__enter__()
        self.url = address(sock)
        self.failure: EngineStopped | None = None
        self.thread = threading.Thread(target=lambda: self._serve(sock, ready.set), daemon=True)
        self.thread.start()
        assert ready.wait(30)
        # One of each for all threads: making one takes longer than asking.
        self.http = httpx.Client(base_url=self.url, timeout=60)
        self.openai = self.client()

    def _serve(self, sock: socket.socket, ready: Callable[[], None]) -> None:
        try:
            asyncio.run(serve(self.service, sock, self.stop, ready))
        except EngineStopped as error:
            self.failure = error

    def client(self, **options: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", **{"api_key": "unused", "max_retries": 0, "timeout": 60, **options})

    def post(self, path: str = "/v1/completions", **body: Any) -> httpx.Response:
        return self.http.post(path, json=body)

    def write(self, prompt: Any, **options: Any) -> str:
        """Text of a greedy completion."""
        request_body = {"model": "tiny", "prompt": prompt, "temperature": 0, "max_tokens": 12, **options}
        return self.openai.completions.create(**request_body).choices[0].text

    @property
    def batcher(self) -> Any:
        """The batcher of the default depth."""
        return self.service.engine.batchers[self.service.engine.default]

    @property
    def idle(self) -> bool:
        """No request is running, and every block is free."""
        batchers = self.service.engine.batchers.values()
        return self.service.engine.idle and all(b.free_blocks == b.blocks and b.held == 0 for b in batchers)

    def close(self) -> None:
        self.stop.ask()
        self.http.close()
        self.openai.close()
        self.thread.join(30)
        self._port.__exit__(None, None, None)
        assert not self.thread.is_alive()


def soon(true: Callable[[], bool], seconds: float = 20) -> bool:
    """Wait until a condition is true; only a failure reaches the time limit."""
    end = time.monotonic() + seconds
    while not (found := true()) and time.monotonic() < end:
        time.sleep(0.01)
    return found


@contextlib.contextmanager
def running(*args: Any, **settings: Any) -> Iterator[Running]:
    server = Running(*args, **settings)
    try:
        yield server
    finally:
        server.close()


def chatty_tokenizer() -> Any:
    """The tiny tokenizer with a chat template."""
    found = make_tiny_tokenizer()
    found.chat_template = TEMPLATE
    return found


def speaking_model(folder: Path) -> Any:
    """A recursive model with prelude, loop, coda and gains at which the logits differ between cycles. Greedy output is plain characters,
    different for each of `PROMPTS`; with a temperature, any token occurs, also parts of characters."""
    tiny_donor("qwen2", folder, 2, tie_word_embeddings=False, num_hidden_layers=4)
    tokenizer = make_tiny_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = convert(str(folder), L_layers=2, H_cycles=3, L_cycles=1, prelude_layers=1, coda_layers=1, gain=0.3)
    texts = [tokenizer.decode([token]) for token in range(model.config.vocab_size)]
    with torch.no_grad():
        model.lm_head.weight[[not (text.isascii() and text.isprintable()) or text == "" for text in texts]] *= 0.1
    return model


def ids_of(model: Any, ids: list[int], H_cycles: int | None, count: int) -> list[int]:
    """Greedy output of `generate`."""
    depth = {} if H_cycles is None else {"H_cycles": H_cycles}
    batch = torch.tensor([ids])
    out = model.generate(batch, attention_mask=torch.ones_like(batch), max_new_tokens=count, do_sample=False, **depth)
    return out[0, len(ids) :].tolist()


def text_of(model: Any, tokenizer: Any, prompt: str | list[int], H_cycles: int | None = 3, count: int = 12) -> str:
    ids = tokenizer(prompt).input_ids if isinstance(prompt, str) else prompt
    return tokenizer.decode(ids_of(model, ids, H_cycles, count), skip_special_tokens=True)
