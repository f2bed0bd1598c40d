"""Log-probabilities: those of a plain forward pass, with the text they belong to, whole and streamed."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
import torch

from recursify.serving.logprobs import Spelling, TextLog
from recursify.serving.sampling import Logged
from tests.support.served import PROMPTS, Running, ids_of, running
from tests.support.tiny import make_tiny_tokenizer
from tests.support.tokenizers import sentencepiece_like

CLOSE = {"rel": 1e-4, "abs": 1e-4}  # a batch rounds sums differently


@pytest.fixture(scope="module")
def server(model: Any, tokenizer: Any) -> Iterator[Running]:
    with running(model, tokenizer, depths=(1, 3)) as found:
        yield found


def log_probabilities(model: Any, ids: list[int], read: int) -> torch.Tensor:
    """`[generated tokens, vocabulary]`, of a plain forward pass over prompt and text."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0, read - 1 : -1].float().log_softmax(-1)


# --- their values


def test_completion_logprobs_are_those_of_a_forward_pass(server: Running, model: Any, tokenizer: Any) -> None:
    read = tokenizer(PROMPTS[0]).input_ids
    new = ids_of(model, read, 3, 12)
    expected = log_probabilities(model, read + new, len(read))
    choice = server.openai.completions.create(model="tiny", prompt=PROMPTS[0], temperature=0, max_tokens=12, logprobs=4).choices[0]
    found = choice.logprobs
    assert found.tokens == [tokenizer.decode([token]) for token in new] and "".join(found.tokens) == choice.text
    assert found.token_logprobs == pytest.approx([row[token].item() for row, token in zip(expected, new, strict=True)], **CLOSE)
    assert found.text_offset == [len("".join(found.tokens[:n])) for n in range(12)]
    for at, alternatives in enumerate(found.top_logprobs):
        top = expected[at].topk(4)
        spelled = [tokenizer.decode([token]) for token in top.indices.tolist()]
        assert alternatives == pytest.approx(dict(zip(spelled, top.values.tolist(), strict=True)), **CLOSE)


@pytest.mark.parametrize(
    "extra",
    [{}, {"temperature": 0.3, "top_k": 4, "top_p": 0.9}, {"temperature": 0, "repetition_penalty": 2.0, "presence_penalty": 2.0}],
)
def test_sampling_and_penalties_do_not_change_logprobs(extra: dict[str, Any], server: Running, model: Any, tokenizer: Any) -> None:
    """They are those of the sampled tokens, which are not the most likely ones."""
    read = tokenizer(PROMPTS[0]).input_ids
    request_body = {"prompt": read, "temperature": 1.0, "seed": 3, "max_tokens": 15, "logprobs": 0, **extra}
    with ThreadPoolExecutor(4) as pool:
        crowd = [pool.submit(server.write, prompt, temperature=2.0, max_tokens=20) for prompt in PROMPTS[1:4]]
        found = server.post(**request_body).json()["choices"][0]
        for other in crowd:
            other.result()
    spelling = Spelling(tokenizer)
    named = {spelling[token].text: token for token in range(model.config.vocab_size)}
    assert len(named) == model.config.vocab_size
    ids = [named[token] for token in found["logprobs"]["tokens"]]
    expected = log_probabilities(model, read + ids, len(read))
    values = [row[token].item() for row, token in zip(expected, ids, strict=True)]
    assert found["logprobs"]["token_logprobs"] == pytest.approx(values, **CLOSE)
    assert any(row.argmax() != token for row, token in zip(expected, ids, strict=True))
    tops = found["logprobs"]["top_logprobs"]
    assert [list(top) for top in tops] == [[token] for token in found["logprobs"]["tokens"]]


def test_chat_logprobs_are_those_of_the_completion(server: Running, tokenizer: Any) -> None:
    request_body = {"temperature": 1.2, "seed": 8, "max_tokens": 20}
    chat = server.openai.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "Who"}], logprobs=True, top_logprobs=3, **request_body
    ).choices[0]
    plain = server.openai.completions.create(model="tiny", prompt="<user>Who<assistant>", logprobs=3, **request_body).choices[0]
    content = chat.logprobs.content
    assert [entry.token for entry in content] == plain.logprobs.tokens
    assert [entry.logprob for entry in content] == pytest.approx(plain.logprobs.token_logprobs, **CLOSE)
    for entry, top in zip(content, plain.logprobs.top_logprobs, strict=True):
        alternatives = {other.token: other.logprob for other in entry.top_logprobs}
        assert len(alternatives) == 3 and {**alternatives, entry.token: entry.logprob} == pytest.approx(top, **CLOSE)
        assert [other.logprob for other in entry.top_logprobs] == sorted(alternatives.values(), reverse=True)


def test_without_alternatives_and_without_logprobs(server: Running) -> None:
    asked = {"messages": [{"role": "user", "content": "Who"}], "temperature": 0, "max_tokens": 3}
    bare = server.post("/v1/chat/completions", **asked, logprobs=True).json()["choices"][0]["logprobs"]["content"]
    assert [entry["top_logprobs"] for entry in bare] == [[], [], []]
    for none in ({}, {"logprobs": False}, {"logprobs": None, "top_logprobs": 0}):
        assert server.post("/v1/chat/completions", **asked, **none).json()["choices"][0]["logprobs"] is None
    for none in ({}, {"logprobs": None}, {"logprobs": False}):
        assert server.post(prompt="a", max_tokens=2, **none).json()["choices"][0]["logprobs"] is None


# --- the text they belong to


@pytest.mark.parametrize("chat", [False, True])
def test_streamed_logprobs_are_those_of_the_whole_answer(chat: bool, server: Running) -> None:
    request_body: dict[str, Any] = {"temperature": 2.0, "seed": 3, "max_tokens": 60, "n": 2}
    path = "/v1/chat/completions" if chat else "/v1/completions"
    request_body |= (
        {"messages": [{"role": "user", "content": "龙虾"}], "logprobs": True, "top_logprobs": 2}
        if chat
        else {"prompt": "龙虾", "logprobs": 2}
    )
    whole = server.post(path, **request_body).json()["choices"]
    create: Any = server.openai.chat.completions.create if chat else server.openai.completions.create
    texts, logs = ["", ""], [[], []]  # type: ignore[var-annotated]
    for chunk in create(model="tiny", stream=True, **request_body):
        choice = chunk.choices[0]
        text = (choice.delta.content or "") if chat else choice.text
        if choice.logprobs is not None and not chat:
            # a token comes with its first character, or without text
            offsets = choice.logprobs.text_offset
            assert all(len(texts[choice.index]) <= at < len(texts[choice.index]) + max(len(text), 1) for at in offsets)
        texts[choice.index] += text
        if choice.logprobs is not None:
            found = choice.logprobs.model_dump()
            logs[choice.index] += found["content"] if chat else zip(*(found[name] for name in NAMES), strict=True)
    for choice in whole:
        expected = choice["logprobs"]["content"] if chat else list(zip(*(choice["logprobs"][name] for name in NAMES), strict=True))
        assert logs[choice["index"]] == expected and len(expected) > 50
        assert texts[choice["index"]] == (choice["message"]["content"] if chat else choice["text"])


NAMES = ("tokens", "token_logprobs", "top_logprobs", "text_offset")


def test_bytes_of_a_hot_text_are_its_own(server: Running) -> None:
    """At this temperature there are parts of characters among the tokens, and ids without a token."""
    request_body = {"messages": [{"role": "user", "content": "Who"}], "temperature": 2.0, "max_tokens": 200, "seed": 1, "logprobs": True}
    choice = server.post("/v1/chat/completions", **request_body).json()["choices"][0]
    content = choice["logprobs"]["content"]
    kinds = {entry["token"].split(":")[0] for entry in content if entry["token"].startswith(("bytes:\\x", "token_id:"))}
    assert kinds == {"bytes", "token_id"}
    said_bytes = b"".join(bytes(entry["bytes"] or []) for entry in content if entry["token"] != "<|endoftext|>")
    assert said_bytes.decode("utf-8", "replace") == choice["message"]["content"]


def test_tokens_of_a_stop_string_and_end_tokens_are_left_out(server: Running, model: Any, tokenizer: Any) -> None:
    read = tokenizer(PROMPTS[2]).input_ids
    ids = ids_of(model, read, 3, 30)
    text, before = tokenizer.decode(ids), tokenizer.decode(ids[:19])
    stop = text[len(before) : len(before) + 3]
    cut = text.index(stop)
    request_body: dict[str, Any] = {"prompt": PROMPTS[2], "temperature": 0, "max_tokens": 30, "logprobs": 1}
    found = server.post(**request_body, stop=stop).json()["choices"][0]
    assert found["text"] == text[:cut] and max(found["logprobs"]["text_offset"]) < cut <= len("".join(found["logprobs"]["tokens"]))
    before_end, model.generation_config.eos_token_id = model.generation_config.eos_token_id, ids[10]
    try:
        with running(model, tokenizer) as ending:
            found = ending.post(**request_body).json()["choices"][0]
    finally:
        model.generation_config.eos_token_id = before_end
    assert (found["finish_reason"], found["logprobs"]["tokens"]) == ("stop", [tokenizer.decode([i]) for i in ids[: ids.index(ids[10])]])


def test_spelling_of_llamas_kind_of_tokenizer_keeps_spaces_and_bytes() -> None:
    tokenizer = sentencepiece_like()
    spelling = Spelling(tokenizer)
    two, e = tokenizer.convert_tokens_to_ids("▁two"), tokenizer.convert_tokens_to_ids("<0xE9>")
    assert (spelling[two].text, spelling[two].utf8) == (" two", tuple(b" two"))
    assert (spelling[e].text, spelling[e].utf8) == ("bytes:\\xe9", (0xE9,))
    assert (spelling[10**6].text, spelling[10**6].utf8) == ("token_id:1000000", None)


def test_infinite_values_stay_within_json() -> None:
    log = TextLog(Spelling(make_tiny_tokenizer()), [5], [0])
    log.put(6, Logged(float("-inf"), ((7, -0.1), (8, float("nan")))))
    (entry,) = log.take("x", True)
    assert entry.logprob == -9999.0 and [value for _, value in entry.top] == [-0.1, -9999.0]


# --- what is refused


@pytest.mark.parametrize(
    ("chat", "body", "param", "words"),
    [
        (False, {"logprobs": 6}, "logprobs", "expected a whole number from 0 to 5, got 6"),
        (False, {"logprobs": -1}, "logprobs", "got -1"),
        (False, {"logprobs": True}, "logprobs", "expected a whole number from 0 to 5, got true"),
        (False, {"logprobs": 1, "top_logprobs": 2}, "top_logprobs", "does not support"),
        (True, {"logprobs": 3}, "logprobs", "expected true or false (the number of alternatives goes into top_logprobs), got 3"),
        (True, {"logprobs": True, "top_logprobs": 21}, "top_logprobs", "expected a whole number from 0 to 20, got 21"),
        (True, {"top_logprobs": 2}, "top_logprobs", "only with logprobs=true"),
    ],
)
def test_logprobs_out_of_range_are_refused(chat: bool, body: dict[str, Any], param: str, words: str, server: Running) -> None:
    given: dict[str, Any] = {"messages": [{"role": "user", "content": "a"}]} if chat else {"prompt": "a"}
    answer = server.post("/v1/chat/completions" if chat else "/v1/completions", **given, **body)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, param) and words in error["message"]


def test_the_client_reads_the_error(server: Running) -> None:
    with pytest.raises(openai.BadRequestError, match="from 0 to 5"):
        server.openai.completions.create(model="tiny", prompt="a", logprobs=9)
