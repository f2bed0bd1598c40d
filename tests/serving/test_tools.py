"""Tools in chats: what reaches the chat template, and the calls that are read from the text."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

import openai
import pytest
import torch

from recursify.serving.sampling import PerRequestSampling
from recursify.serving.tool_calls import CallReader
from tests.support.served import Running, chatty_tokenizer, running, speaking_model, text_of
from tests.support.tiny import make_tiny_tokenizer

# Of the kind that Hermes and Qwen have.
TEMPLATE = (
    "{% if tools %}{% for tool in tools %}{{ tool | tojson }}{% endfor %} Write <tool_call>{...}</tool_call>.{% endif %}"
    "{% for m in messages %}{{ '<' + m.role + '>' + m.content }}"
    "{% for call in m.tool_calls or [] %}{{ call.function.name }}{{ call.function.arguments | tojson }}{% endfor %}"
    "{% if m.role == 'tool' %}{{ m.tool_call_id }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
WEATHER = {"type": "function", "function": {"parameters": {"type": "object"}, "name": "weather", "description": "of a place"}}
ASKED: list[Any] = [{"role": "user", "content": "Who"}]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"place": "Köln", "days": 2}}\n</tool_call>'


def with_tools(template: str = TEMPLATE) -> Any:
    tokenizer = make_tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return speaking_model(tmp_path_factory.mktemp("speaking"))


@pytest.fixture(scope="module")
def server(model: Any) -> Iterator[Running]:
    with running(model, with_tools()) as found:
        yield found


@pytest.fixture(scope="module")
def plain_server(model: Any) -> Iterator[Running]:
    """A server whose chat template has no place for tools."""
    with running(model, chatty_tokenizer()) as found:
        yield found


def chat(server: Running, **body: Any) -> Any:
    return server.post("/v1/chat/completions", **{"messages": ASKED, "temperature": 0, "max_tokens": 12, **body})


# --- what the model reads


def test_tools_reach_the_template_as_they_are(server: Running, model: Any) -> None:
    prompt = f"{json.dumps(WEATHER)} Write <tool_call>{{...}}</tool_call>.<user>Who<assistant>"
    for choice in ({}, {"tool_choice": "auto"}, {"parallel_tool_calls": True}):
        found = chat(server, tools=[WEATHER], **choice).json()["choices"][0]["message"]
        assert found["content"] == text_of(model, with_tools(), prompt) and "tool_calls" not in found
    bare = text_of(model, with_tools(), "<user>Who<assistant>")
    for body in ({}, {"tools": []}, {"tools": None}, {"tools": [WEATHER], "tool_choice": "none"}, {"tool_choice": "auto"}):
        assert chat(server, **body).json()["choices"][0]["message"]["content"] == bare
    assert bare != found["content"]


def test_calls_and_results_reach_the_template(server: Running, model: Any) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"place":"Köln"}'}}
    messages = [*ASKED, {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": "rain", "tool_call_id": "c1"}]
    prompt = '<user>Who<assistant>weather{"place": "Köln"}<tool>rainc1<assistant>'
    assert chat(server, messages=messages).json()["choices"][0]["message"]["content"] == text_of(model, with_tools(), prompt)
    call["function"]["arguments"] = ""
    assert chat(server, messages=messages[:2]).status_code == 200


# --- what the model writes


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes the model generate a given text, and then its end token."""

    def write(text: str) -> None:
        ids = [*make_tiny_tokenizer()(text).input_ids, 0]

        def scores_of(self: PerRequestSampling, input_ids: torch.Tensor, scores: torch.Tensor, args: torch.Tensor) -> torch.Tensor:
            for row, (_, state) in enumerate(self.rows):
                scores[row, ids[len(state.generated_tokens)]] = 1e9
            self._log(scores)
            return scores

        monkeypatch.setattr(PerRequestSampling, "__call__", scores_of)

    return write


def test_calls_are_read_whole_and_streamed(server: Running, written: Any) -> None:
    written(f"I look it up.\n{CALL}\n{CALL.replace('Köln', 'Bonn')}\n")
    request_body: dict[str, Any] = {"model": "tiny", "messages": ASKED, "tools": [WEATHER], "max_tokens": 400}
    (choice,) = server.openai.chat.completions.create(**request_body).choices
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", "I look it up.")
    calls = choice.message.tool_calls
    assert [(call.type, call.function.name, json.loads(call.function.arguments)) for call in calls] == [
        ("function", "weather", {"place": place, "days": 2}) for place in ("Köln", "Bonn")
    ]
    assert len({call.id for call in calls}) == 2
    with server.openai.chat.completions.stream(**request_body) as stream:  # the client puts the chunks together
        final = stream.get_final_completion().choices[0]
    assert (final.finish_reason, final.message.content) == ("tool_calls", "I look it up.")
    assert [call.function.arguments for call in final.message.tool_calls] == [call.function.arguments for call in calls]
    # and the answer can be sent back
    results = [{"role": "tool", "tool_call_id": call.id, "content": "rain"} for call in calls]
    again = server.openai.chat.completions.create(**{**request_body, "messages": [*ASKED, choice.message.model_dump(), *results]})
    assert again.usage.prompt_tokens > 0


def test_a_call_alone_has_no_content_and_a_cut_one_is_text(server: Running, written: Any) -> None:
    written(CALL)
    alone = chat(server, tools=[WEATHER], max_tokens=400, logprobs=True).json()["choices"][0]
    assert alone["message"]["content"] is None and len(alone["message"]["tool_calls"]) == 1
    assert (
        "".join(entry["token"] for entry in alone["logprobs"]["content"] if not entry["token"].startswith("bytes:"))[:11] == "<tool_call>"
    )
    cut = chat(server, tools=[WEATHER], max_tokens=20).json()["choices"][0]
    assert cut["finish_reason"] == "length" and cut["message"]["content"] and CALL.startswith(cut["message"]["content"])
    assert "tool_calls" not in cut["message"]


def test_nothing_is_read_as_a_call_without_tools(server: Running, written: Any) -> None:
    written(CALL)
    for body in ({}, {"tools": [WEATHER], "tool_choice": "none"}):
        found = chat(server, max_tokens=400, **body).json()["choices"][0]
        assert (found["finish_reason"], found["message"]["content"]) == ("stop", CALL)


def test_calls_in_another_form_stay_text(model: Any, written: Any) -> None:
    written(CALL)
    with running(model, with_tools(TEMPLATE.replace("<tool_call>", "[CALL]"))) as server:
        found = chat(server, tools=[WEATHER], max_tokens=400).json()["choices"][0]
        assert (found["finish_reason"], found["message"]["content"]) == ("stop", CALL)


TEXTS: list[tuple[str, str, list[tuple[str, str]]]] = [
    ("plain <b> text \n", "plain <b> text \n", []),
    ('a <tool_call>{"name": "f"}</tool_call> b <tool', "a b <tool", [("f", "{}")]),
    ('<tool_call>{"name": "f", "arguments": "x"}</tool_call>\n\n', "", [("f", "x")]),
    ('<tool_call>{"name": "f"}</tool_call>\n <tool_call>{"name": "g"}</tool_call>', "", [("f", "{}"), ("g", "{}")]),
    ('x \n<tool_call>{"name": }</tool_call> y ', 'x \n<tool_call>{"name": }</tool_call> y ', []),
    ('<tool_call>{"name": ""}</tool_call>', '<tool_call>{"name": ""}</tool_call>', []),
    ("<tool_call>[1]</tool_call><tool_call>5</tool_call>", "<tool_call>[1]</tool_call><tool_call>5</tool_call>", []),
    ('<tool_call>{"name": "f", "arguments": NaN}</tool_call>', '<tool_call>{"name": "f", "arguments": NaN}</tool_call>', []),
    ('<tool_call>{"name": "\\ud800"}</tool_call>', '<tool_call>{"name": "\\ud800"}</tool_call>', []),
    ("<tool_call>" + "[" * 5000 + "</tool_call>", "<tool_call>" + "[" * 5000 + "</tool_call>", []),
    ('a\n<tool_call>{"name": "f"', 'a\n<tool_call>{"name": "f"', []),
    ('<tool_call>{"name": "龙", "arguments": {"a": "虾"}}</tool_call>', "", [("龙", '{"a": "虾"}')]),
]


@pytest.mark.parametrize(("text", "content", "calls"), TEXTS, ids=range(len(TEXTS)))
def test_calls_do_not_depend_on_the_pieces(text: str, content: str, calls: list[tuple[str, str]]) -> None:
    for seed in range(20):
        rng, reader, found, plain, at = random.Random(seed), CallReader(), [], "", 0
        while at < len(text):
            size = len(text) if seed == 0 else rng.randint(1, 1 + seed)
            more, new = reader.put(text[at : at + size])
            plain, found, at = plain + more, [*found, *new], at + size
        assert plain + reader.end() == content
        assert [(call.name, call.arguments) for call in found] == calls
        assert [call.number for call in found] == list(range(len(calls)))


# --- what is refused

BAD_CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"id": "c", "type": "function", "function": {"name": "f", "arguments": "[1]"}}],
}
BAD: list[tuple[dict[str, Any], str, str]] = [
    ({"tools": [WEATHER], "tool_choice": "required"}, "tool_choice", '(a call cannot be forced here), got "required"'),
    ({"tool_choice": {"type": "function", "function": {"name": "weather"}}}, "tool_choice", 'expected "auto" or "none"'),
    ({"tools": [{"type": "function"}]}, "tools", 'tools.0: expected {"type": "function", "function": {"name"'),
    ({"tools": [WEATHER, {"type": "custom", "custom": {"name": "x"}}]}, "tools", "tools.1: expected"),
    ({"tools": ["weather"]}, "tools", "tools.0: "),
    ({"tools": [{"type": "function", "function": {"name": "f", "strict": True}}]}, "tools", "tools.0.function.strict: decoding"),
    ({"tools": [WEATHER], "parallel_tool_calls": False}, "parallel_tool_calls", "cannot be held to one call"),
    ({"functions": [{"name": "f"}]}, "functions", "does not support"),
    ({"messages": [{"role": "user", "content": "a", "tool_call_id": "c"}]}, "messages", "only in messages of the role tool, got user"),
    ({"messages": [{**BAD_CALL, "role": "user"}]}, "messages", "messages.0.tool_calls: only in messages of the role assistant, got user"),
    ({"messages": [BAD_CALL]}, "messages", 'messages.0.tool_calls.0.function.arguments: expected a JSON object as text, got "[1]"'),
    ({"messages": [{"role": "assistant", "tool_calls": [{"id": "c"}]}]}, "messages", "function: missing"),
    ({"messages": [{"role": "tool", "tool_call_id": "c"}]}, "messages", "content: missing"),
    ({"response_format": {"type": "json_object"}}, "response_format", 'expected {"type": "text"} (decoding is not constrained here'),
    ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format", 'got {"type": "json_schema"'),
]  # fmt: skip


@pytest.mark.parametrize(("body", "param", "words"), BAD, ids=range(len(BAD)))
def test_what_cannot_be_held_is_refused_by_name(body: dict[str, Any], param: str, words: str, server: Running) -> None:
    answer = chat(server, **body)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, param), error
    assert words in error["message"] and "--" not in error["message"] and len(error["message"]) < 400


@pytest.mark.parametrize("arguments", ['{"a": "\\ud800"}', '{"a": ' + "[" * 3000 + "]" * 3000 + "}", '{"a": NaN}', "{"])
def test_odd_arguments_are_client_errors(arguments: str, server: Running) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": arguments}}
    answer = chat(server, messages=[*ASKED, {"role": "assistant", "tool_calls": [call]}])
    assert answer.status_code == 400 and "arguments: expected a JSON object as text" in answer.json()["error"]["message"]


def test_a_template_without_a_place_for_tools(plain_server: Running) -> None:
    with pytest.raises(openai.BadRequestError, match="tools: the chat template of this model has no place for tools"):
        plain_server.openai.chat.completions.create(model="tiny", messages=ASKED, tools=[WEATHER])  # type: ignore[list-item]
    call = {"id": "c", "function": {"name": "f", "arguments": "{}"}}
    for message in ({"role": "tool", "content": "rain", "tool_call_id": "c"}, {"role": "assistant", "tool_calls": [call]}):
        answer = chat(plain_server, messages=[*ASKED, message])
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "messages")
        assert "has no place for tools" in answer.json()["error"]["message"]
    assert chat(plain_server, tools=[WEATHER], tool_choice="none", response_format={"type": "text"}).status_code == 200
