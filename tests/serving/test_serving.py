"""What the server writes, as the official `openai` client reads it: the texts, where they end, sampling, depths, and what it says of
itself."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch

from recursify.serving import ServeSettings
from recursify.serving.answering import Answer
from recursify.serving.engine import Request
from tests.support.served import PROMPTS, Running, ids_of, running, soon, text_of
from tests.support.tiny import tiny_model

DEPTHS = (1, 3, 0)
DOCS = (Path(__file__).resolve().parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def server(model: Any, tokenizer: Any) -> Iterator[Running]:
    with running(model, tokenizer, depths=DEPTHS) as found:
        yield found


@pytest.fixture
def client(server: Running) -> openai.OpenAI:
    return server.openai


# --- the text


@pytest.mark.parametrize("H_cycles", [None, *DEPTHS])
def test_completion_equals_generate_at_each_depth(H_cycles: Any, client: Any, model: Any, tokenizer: Any) -> None:
    extra = {} if H_cycles is None else {"H_cycles": H_cycles}
    answer = client.completions.create(model="tiny", prompt=PROMPTS[0], temperature=0, max_tokens=40, extra_body=extra)
    assert answer.choices[0].text == text_of(model, tokenizer, PROMPTS[0], 3 if H_cycles is None else H_cycles, 40)
    assert (answer.choices[0].finish_reason, answer.object, answer.model) == ("length", "text_completion", "tiny")
    read = len(tokenizer(PROMPTS[0]).input_ids)
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (read, 40, read + 40)


@pytest.mark.parametrize("wanted", [600, 10**12])
def test_max_tokens_beyond_the_room_is_cut_to_it(server: Running, tokenizer: Any, wanted: int) -> None:
    prompt = tokenizer(PROMPTS[0]).input_ids * 30
    answer = server.post(prompt=prompt, max_tokens=wanted, temperature=0).json()
    assert answer["usage"]["total_tokens"] == server.service.longest == 512 and answer["choices"][0]["finish_reason"] == "length"


def test_top_p_0_is_greedy(server: Running, model: Any, tokenizer: Any) -> None:
    assert server.write(PROMPTS[0], temperature=1.5, top_p=0) == text_of(model, tokenizer, PROMPTS[0], 3, 12)


def test_null_content_is_no_text(server: Running) -> None:
    said = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": None}, {"role": "user", "content": "again"}]
    empty = [{**message, "content": message["content"] or ""} for message in said]
    found = [server.post("/v1/chat/completions", messages=each, temperature=0, max_tokens=9).json() for each in (said, empty)]
    assert found[0]["choices"] == found[1]["choices"] and found[0]["choices"][0]["message"]["content"]
    missing = server.post("/v1/chat/completions", messages=[{"role": "user"}])
    assert missing.status_code == 400 and "content" in missing.json()["error"]["message"]


def test_web_pages_may_call_the_api_only_if_allowed(server: Running, model: Any, tokenizer: Any) -> None:
    asked = {
        "origin": "https://chat.example.org",
        "access-control-request-method": "POST",
        "access-control-request-headers": "content-type",
    }
    assert "access-control-allow-origin" not in server.http.options("/v1/completions", headers=asked).headers
    with running(model, tokenizer, cors_origins=("https://chat.example.org",)) as open_server:
        before = open_server.http.options("/v1/completions", headers=asked)
        assert before.status_code == 200 and before.headers["access-control-allow-origin"] == asked["origin"]
        answer = open_server.http.post("/v1/completions", json={"prompt": "The", "max_tokens": 2}, headers={"origin": asked["origin"]})
        assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == asked["origin"]
        other = open_server.http.options("/v1/completions", headers=asked | {"origin": "https://other.example.org"})
        assert "access-control-allow-origin" not in other.headers


def test_errors_name_request_fields_and_no_flags(server: Running) -> None:
    bodies: list[dict[str, Any]] = [
        {"prompt": "   "},
        {"prompt": "\ud83d"},
        {"prompt": [5] * 600},
        {"prompt": [10**6]},
        {"H_cycles": 99, "prompt": "a"},
    ]
    for body in bodies:
        answer = server.http.post("/v1/completions", content=json.dumps(body))
        assert answer.status_code == 400 and "--" not in answer.json()["error"]["message"], answer.text


def test_depths_give_different_texts(model: Any, tokenizer: Any) -> None:
    assert len({text_of(model, tokenizer, PROMPTS[0], depth, 40) for depth in DEPTHS}) == len(DEPTHS)


def test_streamed_completion_equals_unstreamed(client: Any, model: Any, tokenizer: Any) -> None:
    options = {"stream": True, "stream_options": {"include_usage": True}}
    *chunks, last = client.completions.create(model="tiny", prompt=PROMPTS[1], temperature=0, max_tokens=40, **options)
    assert "".join(chunk.choices[0].text for chunk in chunks) == text_of(model, tokenizer, PROMPTS[1], 3, 40)
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert len(chunks) > 30
    assert last.choices == [] and last.usage.completion_tokens == 40
    assert all(chunk.usage is None and chunk.id == last.id for chunk in chunks)


def test_stream_has_no_usage_by_default_and_ends_with_done(server: Running) -> None:
    answer = server.post(prompt="a b", max_tokens=3, stream=True)
    events = answer.text.split("\n\n")
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all("usage" not in json.loads(event.removeprefix("data: ")) for event in events[:-2])


def test_chat_equals_generate_with_the_template(client: Any, model: Any, tokenizer: Any) -> None:
    messages = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": [{"type": "text", "text": "Who"}]}]
    expected = text_of(model, tokenizer, "<system>Be brief.<user>Who<assistant>", 1)
    options = {"model": "tiny", "messages": messages, "temperature": 0, "max_completion_tokens": 12, "extra_body": {"H_cycles": 1}}
    answer = client.chat.completions.create(**options)
    assert (answer.choices[0].message.role, answer.choices[0].message.content) == ("assistant", expected)
    assert answer.object == "chat.completion" and answer.choices[0].finish_reason == "length"
    first, *chunks = client.chat.completions.create(**options, stream=True)
    assert (first.object, first.choices[0].delta.role, first.choices[0].delta.content) == ("chat.completion.chunk", "assistant", "")
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected
    assert chunks[-1].choices[0].finish_reason == "length"


def test_answer_can_be_sent_back_as_a_message(client: Any) -> None:
    first = client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "a"}], max_tokens=2, seed=0)
    messages = [{"role": "user", "content": "a"}, first.choices[0].message.model_dump(), {"role": "user", "content": "b", "name": "me"}]
    again = client.chat.completions.create(model="tiny", messages=messages, max_tokens=2, temperature=0)
    assert again.choices[0].message.role == "assistant" and again.usage.prompt_tokens > first.usage.prompt_tokens


def test_chat_default_max_tokens_is_the_maximum(model: Any, tokenizer: Any) -> None:
    with running(model, tokenizer, max_completion_tokens=21) as server:
        client = server.client()
        chat = client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "a"}], temperature=0)
        assert chat.usage.completion_tokens == 21
        assert client.completions.create(model="tiny", prompt="a", temperature=0).usage.completion_tokens == 16


def test_prompts_are_text_or_ids_one_or_several(client: Any, model: Any, tokenizer: Any) -> None:
    ids = [tokenizer(prompt).input_ids for prompt in PROMPTS[:2]]
    expected = [text_of(model, tokenizer, prompt) for prompt in PROMPTS[:2]]
    for prompt in (PROMPTS[:2], ids):
        choices = client.completions.create(model="tiny", prompt=prompt, temperature=0, max_tokens=12, n=2).choices
        assert [choice.index for choice in choices] == [0, 1, 2, 3]
        assert [choice.text for choice in choices] == [expected[0], expected[0], expected[1], expected[1]]
    assert client.completions.create(model="tiny", prompt=ids[0], temperature=0, max_tokens=12).choices[0].text == expected[0]


def test_multi_token_character_is_streamed_whole(client: Any, model: Any, tokenizer: Any) -> None:
    hot = {"model": "tiny", "prompt": "龙虾和🦞", "temperature": 2.0, "max_tokens": 80, "seed": 3}
    whole = client.completions.create(**hot).choices[0].text
    pieces = [chunk.choices[0].text for chunk in client.completions.create(**hot, stream=True)]
    assert "".join(pieces) == whole
    assert any(len(tokenizer(char, add_special_tokens=False).input_ids) > 1 for char in whole if ord(char) > 127)


# --- where it ends


@pytest.mark.parametrize("stream", [False, True])
def test_the_text_ends_before_a_stop_string_that_spans_tokens(stream: bool, client: Any, model: Any, tokenizer: Any) -> None:
    ids = ids_of(model, tokenizer(PROMPTS[2]).input_ids, 3, 40)
    text = tokenizer.decode(ids, skip_special_tokens=True)
    before = tokenizer.decode(ids[:19], skip_special_tokens=True)
    stop = text[len(before) - 2 : len(before) + 2]  # the end of one token and the beginning of the next
    options = {"model": "tiny", "prompt": PROMPTS[2], "temperature": 0, "max_tokens": 40, "stop": [stop, "never met"]}
    if stream:
        chunks = list(client.completions.create(**options, stream=True))
        found, reason = "".join(chunk.choices[0].text for chunk in chunks), chunks[-1].choices[0].finish_reason
    else:
        choice = client.completions.create(**options).choices[0]
        found, reason = choice.text, choice.finish_reason
    assert (found, reason) == (text[: text.index(stop)], "stop")


def test_partial_stop_string_is_emitted(server: Running, model: Any, tokenizer: Any) -> None:
    text = text_of(model, tokenizer, PROMPTS[3])
    assert server.write(PROMPTS[3], stop=text[-1] + "and more") == text


def test_the_text_ends_at_any_of_several_end_tokens(model: Any, tokenizer: Any) -> None:
    plain = [ids_of(model, tokenizer(prompt).input_ids, 3, 12) for prompt in PROMPTS[:2]]
    ends, before = [plain[0][5], plain[1][7]], model.generation_config.eos_token_id
    model.generation_config.eos_token_id = ends
    try:
        with running(model, tokenizer) as server:
            for prompt, ids in zip(PROMPTS[:2], plain, strict=True):
                answer = server.openai.completions.create(model="tiny", prompt=prompt, temperature=0, max_tokens=12)
                length = min(ids.index(end) for end in ends if end in ids)
                assert answer.choices[0].text == tokenizer.decode(ids[:length])
                assert (answer.choices[0].finish_reason, answer.usage.completion_tokens) == ("stop", length + 1)
    finally:
        model.generation_config.eos_token_id = before


# --- sampling


@pytest.mark.parametrize("extra", [{}, {"top_k": 8}, {"repetition_penalty": 1.3, "presence_penalty": 0.7, "frequency_penalty": -0.4}])
def test_seeded_text_is_independent_of_concurrent_requests(server: Running, extra: dict[str, Any]) -> None:
    said = {"model": "tiny", "prompt": PROMPTS[0], "temperature": 1.5, "top_p": 0.9, "max_tokens": 15, "n": 3, "extra_body": extra}
    alone = [choice.text for choice in server.openai.completions.create(**said, seed=11).choices]
    assert len(set(alone)) == 3
    with ThreadPoolExecutor(8) as pool:
        others = [{}, {"frequency_penalty": 2.0}, {"repetition_penalty": 3.0, "top_k": 2}] * 2
        crowd = [
            pool.submit(server.write, prompt, temperature=2.0, max_tokens=30, extra_body=other)
            for prompt, other in zip(PROMPTS[:6], others, strict=True)
        ]
        again = [choice.text for choice in server.openai.completions.create(**said, seed=11).choices]
        for other in crowd:
            other.result()
    assert again == alone
    assert [choice.text for choice in server.openai.completions.create(**said, seed=12).choices] != alone


PENALTIES: list[dict[str, float]] = [
    {"presence_penalty": 0.4},
    {"frequency_penalty": 0.3},
    {"repetition_penalty": 1.8},
    {"presence_penalty": 1.0, "frequency_penalty": 0.5, "repetition_penalty": 1.2},
]


def penalised_text(model: Any, tokenizer: Any, prompt: str, count: int, penalties: dict[str, float]) -> str:
    """Greedy text by the definition of the penalties, from a plain forward pass for each token."""
    read = tokenizer(prompt).input_ids
    ids = list(read)
    for _ in range(count):
        logits = logits_of(model, ids)[-1].tolist()
        for token in set(ids):
            factor = penalties.get("repetition_penalty", 1.0)
            logits[token] = logits[token] / factor if logits[token] > 0 else logits[token] * factor
        for token in set(ids[len(read) :]):
            logits[token] -= penalties.get("presence_penalty", 0.0)
            logits[token] -= penalties.get("frequency_penalty", 0.0) * ids[len(read) :].count(token)
        ids.append(max(range(len(logits)), key=logits.__getitem__))
    return tokenizer.decode(ids[len(read) :], skip_special_tokens=True)


def logits_of(model: Any, ids: list[int]) -> torch.Tensor:
    """Logits `[tokens, vocabulary]` of a plain forward pass at the model's own depth."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0].float()


def test_penalties_in_one_batch_equal_those_by_hand(server: Running, model: Any, tokenizer: Any) -> None:
    plain = text_of(model, tokenizer, PROMPTS[0], 3, 25)
    expected = [penalised_text(model, tokenizer, PROMPTS[0], 25, penalties) for penalties in PENALTIES]
    assert len({plain, *expected}) == len(PENALTIES) + 1
    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(server.write, PROMPTS[0], max_tokens=25, extra_body=more) for more in [*PENALTIES, {}]]
        assert [one.result() for one in asked] == [*expected, plain]


def test_penalties_count_with_each_prompt_and_choice_by_itself(server: Running, model: Any, tokenizer: Any) -> None:
    said = {"prompt": PROMPTS[:2], "n": 2, "temperature": 0, "max_tokens": 20, **PENALTIES[3]}
    texts = [choice["text"] for choice in server.post(**said).json()["choices"]]
    expected = [penalised_text(model, tokenizer, prompt, 20, PENALTIES[3]) for prompt in PROMPTS[:2]]
    assert texts == [expected[0], expected[0], expected[1], expected[1]]


def test_top_k_1_is_greedy_and_0_and_minus_1_are_off(server: Running, model: Any, tokenizer: Any) -> None:
    hot = {"temperature": 2.0, "seed": 4, "max_tokens": 20}
    texts = [server.write(PROMPTS[0], **hot, extra_body={} if k is None else {"top_k": k}) for k in (1, None, 0, -1, 10**30, 3)]
    assert texts[0] == text_of(model, tokenizer, PROMPTS[0], 3, 20)
    assert texts[1] == texts[2] == texts[3] == texts[4] and len(set(texts)) == 3


def test_without_a_seed_texts_differ(server: Running) -> None:
    assert len({server.write("a", temperature=2.0, max_tokens=20) for _ in range(3)}) == 3


def test_requests_of_a_batch_keep_their_own_parameters(server: Running, model: Any, tokenizer: Any) -> None:
    greedy = [text_of(model, tokenizer, prompt, 3) for prompt in PROMPTS[:8]]
    parameters = [{}, {"temperature": 2.0}, {"temperature": 2.0, "top_p": 1e-6}, {"temperature": 1e-9}] * 2
    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(server.write, p, **more) for p, more in zip(PROMPTS[:8], parameters, strict=True)]
        texts = [one.result() for one in asked]
    assert [text == right for text, right in zip(texts, greedy, strict=True)] == [True, False, True, True] * 2


# --- a donor


def test_a_plain_donor_is_served_without_depths(tokenizer: Any) -> None:
    donor = tiny_model("qwen2", num_hidden_layers=2)
    with running(donor, tokenizer) as server:
        assert server.write(PROMPTS[0]) == text_of(donor, tokenizer, PROMPTS[0], None)
        assert "H_cycles" not in server.http.get("/v1/models").json()["data"][0]
        answer = server.post(prompt="a", H_cycles=1)
        assert answer.status_code == 400 and "has no cycles" in answer.json()["error"]["message"]


# --- what is told


def test_models_endpoint_lists_depths(client: Any) -> None:
    (found,) = client.models.list().data
    assert (found.id, found.owned_by, found.H_cycles) == ("tiny", "recursify", {"offered": [1, 3, 0], "default": 3})
    assert client.models.retrieve("tiny").id == "tiny"


def test_default_depth_without_the_models_own(model: Any, tokenizer: Any) -> None:
    with running(model, tokenizer, depths=(1, 2, 1)) as server:
        assert server.http.get("/v1/models").json()["data"][0]["H_cycles"] == {"offered": [1, 2], "default": 2}
        assert server.write(PROMPTS[0]) == text_of(model, tokenizer, PROMPTS[0], 2)


def test_metrics_count_requests_and_tokens(model: Any, tokenizer: Any) -> None:
    with running(model, tokenizer, depths=(1, 3)) as server:
        server.write("a b", extra_body={"H_cycles": 1})
        server.post(prompt="", max_tokens=1)
        server.http.get("/nowhere")
        assert soon(lambda: server.idle)
        lines = server.http.get("/metrics").text.splitlines()
        read = len(tokenizer("a b").input_ids)
        for line in (
            'recursify_requests_total{route="/v1/completions",status="200"} 1',
            'recursify_requests_total{route="/v1/completions",status="400"} 1',
            'recursify_requests_total{route="other",status="404"} 1',
            'recursify_texts_total{H_cycles="1",end="length"} 1',
            f'recursify_prompt_tokens_total{{H_cycles="1"}} {read}',
            'recursify_completion_tokens_total{H_cycles="1"} 12',
            'recursify_running{H_cycles="3"} 0',
            'recursify_queued{H_cycles="3"} 0',
            'recursify_cache_blocks{H_cycles="3"} 128',
            'recursify_cache_blocks_free{H_cycles="1"} 128',
            "recursify_up 1",
            "# TYPE recursify_queued gauge",
        ):
            assert line in lines, line


# --- docs/serving.md


def test_the_documented_client_code_runs(server: Running, capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", DOCS, re.DOTALL)
    names: dict[str, Any] = {}
    exec(code.replace("http://127.0.0.1:8000", server.url), names)
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == f"{server.write('The old man', max_tokens=40)} 40"
    assert len(printed) > 1  # drawn without a seed, the second text may be empty
    assert names["answer"].choices[0].finish_reason in ("length", "stop")


def test_the_documented_requests_are_answered(server: Running) -> None:
    bodies = re.findall(r"/v1/completions -d '(.*?)'", DOCS)
    assert len(bodies) == 2
    for body in bodies:
        assert server.http.post("/v1/completions", content=body, timeout=60).status_code == 200


def test_the_documented_metrics_are_those_there_are_and_every_documented_flag_is_one(server: Running) -> None:
    page = server.http.get("/metrics").text
    assert set(re.findall(r"`(recursify_\w+)`", DOCS)) == set(re.findall(r"# TYPE (\w+)", page))
    ours, _, of_vllm = DOCS.partition("\n## vLLM\n")  # whose flags are vLLM's
    assert of_vllm and {*re.findall(r"`--(\w+)", ours)} <= {field.name for field in dataclasses.fields(ServeSettings)}


# --- many


def test_sixteen_clients_among_misbehaving_ones_get_what_one_alone_gets(server: Running, model: Any, tokenizer: Any) -> None:
    expected = {(p, d): text_of(model, tokenizer, p, d, 12) for i, p in enumerate(PROMPTS) for d in (DEPTHS[i % 3],)}
    done = threading.Event()

    def misbehave(kind: int) -> set[int]:
        found = set()
        while not done.is_set():
            with contextlib.suppress(httpx.TimeoutException):
                if kind == 0:
                    server.http.post("/v1/completions", json={"prompt": "x", "max_tokens": 400}, timeout=0.1)
                elif kind == 1:
                    found.add(server.http.post("/v1/completions", content=b'{"prompt": ').status_code)
                else:
                    found.add(server.post(prompt="x", n=10**6, temperature=1e9).status_code)
        return found

    def well(key: tuple[str, int]) -> bool:
        prompt, depth = key
        chunks = server.openai.completions.create(
            model="tiny", prompt=prompt, temperature=0, max_tokens=12, stream=True, extra_body={"H_cycles": depth}
        )
        streamed = "".join(chunk.choices[0].text for chunk in chunks)
        return streamed == server.write(prompt, extra_body={"H_cycles": depth}) == expected[key]

    with ThreadPoolExecutor(19) as pool:
        bad = [pool.submit(misbehave, kind) for kind in range(3)]
        right = list(pool.map(well, expected))
        done.set()
        assert [one.result() for one in bad] == [set(), {400}, {400}]
    assert right == [True] * 16
    assert soon(lambda: server.idle)
    assert soon(lambda: not kept(Request, Answer))


def kept(*kinds: type) -> list[Any]:
    gc.collect()
    return [thing for thing in gc.get_objects() if isinstance(thing, kinds)]
