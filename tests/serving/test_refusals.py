"""What the server refuses, and with which message: always OpenAI's error format, never a 500."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from recursify.serving.settings import API_KEY
from tests.support.served import Running, running
from tests.support.tiny import make_tiny_tokenizer

DEPTHS = (1, 3, 0)


@pytest.fixture(scope="module")
def server(model: Any, tokenizer: Any) -> Iterator[Running]:
    with running(model, tokenizer, depths=DEPTHS) as found:
        yield found


@pytest.fixture
def client(server: Running) -> openai.OpenAI:
    return server.openai


# --- what is refused


BAD_BODIES: list[tuple[dict[str, Any], str, str]] = [
    ({"H_cycles": 2}, "H_cycles", "this server offers 1, 3, 0; got 2"),
    ({"H_cycles": -1}, "H_cycles", "greater than or equal to 0"),
    ({"H_cycles": "3"}, "H_cycles", "valid integer"),
    ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1; got 0"),
    ({"max_tokens": -5}, "max_tokens", "got -5"),
    ({"max_tokens": 10**400}, "max_tokens", "less than"),
    ({"max_tokens": 1.5}, "max_tokens", "integer"),
    ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens", "differ"),
    ({"prompt": [5] * 512}, "prompt", "has 512 tokens; prompt and answer together have room for 512"),
    ({"prompt": "word " * 5000}, "prompt", "together have room for 512"),
    ({"temperature": 1e9}, "temperature", "less than or equal to 2"),
    ({"temperature": -0.1}, "temperature", "greater than or equal to 0"),
    ({"temperature": "hot"}, "temperature", 'valid number; got "hot"'),
    ({"top_p": -0.1}, "top_p", "greater than or equal to 0"),
    ({"top_p": 1.1}, "top_p", "less than or equal to 1"),
    ({"top_k": -3}, "top_k", "expected a whole number of at least 0 (0 or -1 is off), got -3"),
    ({"top_k": 2.5}, "top_k", "got 2.5"),
    ({"presence_penalty": -2.1}, "presence_penalty", "expected a number from -2 to 2 (0 is off), got -2.1"),
    ({"frequency_penalty": "much"}, "frequency_penalty", 'expected a number from -2 to 2 (0 is off), got "much"'),
    ({"repetition_penalty": 0}, "repetition_penalty", "expected a number from 0.01 to 100 (1 is off), got 0"),
    ({"repetition_penalty": 1e300}, "repetition_penalty", "got 1e+300"),
    ({"n": 10**6}, "n", "at most 16 for one request"),
    ({"n": 0}, "n", "greater than or equal to 1"),
    ({"n": 9, "prompt": ["a", "b"]}, "n", "18 texts are asked for"),
    ({"seed": "x"}, "seed", "valid integer"),
    ({"seed": 10**30}, "seed", "less than"),
    ({"stop": ""}, "stop", "a list of up to 16"),
    ({"stop": ["a"] * 17}, "stop", "a list of up to 16"),
    ({"stop": 5}, "stop", "a text, or a list"),
    ({"prompt": ""}, "prompt", "expected some text"),
    ({"prompt": []}, "prompt", "expected some text"),
    ({"prompt": [[]]}, "prompt", "expected some text"),
    ({"prompt": ["a", ""]}, "prompt", "expected some text"),
    ({"prompt": [1, "a"]}, "prompt", "expected some text"),
    ({"prompt": {"a": 1}}, "prompt", "expected some text"),
    ({"prompt": None}, "prompt", "expected some text"),
    ({"prompt": [384]}, "prompt", "token ids are 0 to 383"),
    ({"prompt": [-1]}, "prompt", "expected some text"),
    ({"stream": "yes"}, "stream", "valid boolean"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "only with stream"),
    ({"model": "gpt-9"}, "model", "no 'gpt-9' here, only 'tiny'"),
    ({"model": "x" * 10_000}, "model", "only 'tiny'"),
    ({"model": 5}, "model", "valid string"),
    ({"temprature": 1}, "temprature", "did you mean temperature?"),
    ({"x" * 500: 1}, "x" * 80, "no such field"),
    ({"logit_bias": {"5": 3}}, "logit_bias", "does not support"),
    ({"echo": True}, "echo", "does not support"),
    ({"best_of": 2}, "best_of", "does not support"),
    ({"suffix": "end"}, "suffix", "does not support"),
    ({"tools": [{"type": "function"}]}, "tools", "does not support"),
    ({"response_format": {"type": "json_object"}}, "response_format", "decoding is not constrained here"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "param", "words"), BAD_BODIES, ids=[f"{b[1][:20]}-{i}" for i, b in enumerate(BAD_BODIES)])
def test_a_bad_field_is_named(body: dict[str, Any], param: str, words: str, server: Running) -> None:
    answer = server.post(**{"prompt": "a", **body})
    error = answer.json()["error"]
    assert answer.status_code == (404 if param == "model" and isinstance(body["model"], str) else 400), error
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert words in error["message"] and len(error["message"]) < 400


BAD_CHATS: list[tuple[Any, str]] = [
    ([], "at least 1 item"),
    (None, "valid array"),
    ([{"role": "user"}], "content: missing"),
    ([{"role": "robot", "content": "a"}], "messages.0.role"),
    ([{"role": "tool", "content": "a", "tool_call_id": "x"}], "no place for tools"),
    ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}], "parts of type text"),
    ([{"role": "user", "content": 5}], "content: expected a text"),
    ([{"role": "assistant", "content": "a", "tool_calls": [{"id": "x"}]}], "tool_calls.0.function: missing"),
    ([{"role": "assistant", "content": "a", "function_call": {"name": "x"}}], "has function_call"),
]


@pytest.mark.parametrize(("messages", "words"), BAD_CHATS)
def test_bad_messages_are_refused(messages: Any, words: str, server: Running) -> None:
    answer = server.post("/v1/chat/completions", messages=messages)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "messages")
    assert words in answer.json()["error"]["message"]


def test_neutral_values_of_unsupported_fields_are_accepted(server: Running) -> None:
    neutral = {
        "user": "u", "metadata": {"a": "b"}, "logprobs": None, "echo": False, "best_of": 1, "logit_bias": {}, "presence_penalty": 0,
        "frequency_penalty": 0.0, "suffix": None, "stop": None, "seed": None, "n": None, "temperature": None, "H_cycles": None,
        "stream_options": None, "model": "tiny",
    }  # fmt: skip
    assert server.post(prompt="a", **neutral).status_code == 200
    chat = {
        "messages": [{"role": "user", "content": "a"}],
        "max_tokens": 2,
        "tools": [],
        "response_format": {"type": "text"},
        "store": False,
    }
    assert server.post("/v1/chat/completions", **chat).status_code == 200


RAW = [
    b"",
    b"{",
    b"null",
    b"[]",
    b'"a"',
    b"\xff\xfe",
    b'{"prompt": "\\ud800"}',
    b"[" * 100_000,
    b'{"prompt": "a"} x',
    b'{"prompt": "\xff"}',
]


@pytest.mark.parametrize("raw", RAW, ids=range(len(RAW)))
def test_body_must_be_a_json_object(raw: bytes, server: Running) -> None:
    answer = server.http.post("/v1/completions", content=raw)
    assert (answer.status_code, answer.json()["error"]["type"]) == (400, "invalid_request_error")
    assert len(answer.text) < 400


@pytest.mark.parametrize("word", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_non_finite_numbers_are_refused(word: str, server: Running) -> None:
    answer = server.http.post("/v1/completions", content=f'{{"prompt": "a", "temperature": {word}}}')
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "temperature")


def test_unknown_paths_and_methods(server: Running) -> None:
    lost = server.http.post("/v1/embeddings", json={})
    assert (lost.status_code, lost.json()["error"]["message"]) == (404, "there is no '/v1/embeddings' here")
    wrong = server.http.get("/v1/completions")
    assert (wrong.status_code, wrong.headers["allow"]) == (405, "POST")
    assert wrong.json()["error"]["message"] == "/v1/completions does not take GET"


def test_the_client_raises_its_own_errors(client: Any) -> None:
    with pytest.raises(openai.BadRequestError, match="this server offers 1, 3, 0") as error:
        client.completions.create(model="tiny", prompt="a", extra_body={"H_cycles": 9})
    assert (error.value.param, error.value.code) == ("H_cycles", "unknown_depth")
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


@pytest.mark.parametrize("chunked", [False, True])
def test_oversized_body_is_refused(chunked: bool, model: Any, tokenizer: Any) -> None:
    with running(model, tokenizer, max_body_bytes=1000) as server:
        long = json.dumps({"prompt": "a" * 300_000}).encode()
        parts = (long[at : at + 5000] for at in range(0, len(long), 5000))
        answer = server.http.post("/v1/completions", content=parts if chunked else long)
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")
        assert server.post(prompt="a").status_code == 200


def test_internal_errors_reveal_nothing(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(ask: Any) -> None:
        raise RuntimeError("secret")

    monkeypatch.setattr(server.service, "answer", fail)
    answer = server.post(prompt="a")
    assert (answer.status_code, answer.json()["error"]["type"]) == (500, "server_error") and "secret" not in answer.text


def test_chat_without_a_template_suggests_completions(model: Any) -> None:
    with running(model, make_tiny_tokenizer()) as server:
        answer = server.post("/v1/chat/completions", messages=[{"role": "user", "content": "a"}])
        assert answer.status_code == 400 and "use /v1/completions" in answer.json()["error"]["message"]


def test_template_errors_are_client_errors(model: Any) -> None:
    tokenizer = make_tiny_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with running(model, tokenizer) as server:
        answer = server.post("/v1/chat/completions", messages=[{"role": "user", "content": "a"}])
        assert answer.status_code == 400 and "roles must alternate" in answer.json()["error"]["message"]


def test_api_key_is_required_except_for_health(model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(API_KEY, "sésame")
    with running(model, tokenizer) as server:
        assert server.post(prompt="a").status_code == 401
        for path in ("/v1/models", "/v1/models/tiny", "/metrics"):
            assert server.http.get(path).status_code == 401
        assert server.http.get("/health").status_code == 200
        with pytest.raises(openai.AuthenticationError, match="API key"):
            server.client(api_key="wrong").models.list()
        right = {"Authorization": "Bearer sésame".encode()}
        assert server.http.get("/v1/models", headers=right).status_code == 200
