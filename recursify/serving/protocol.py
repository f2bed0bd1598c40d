"""Request and response bodies of OpenAI's API. Needs pydantic, which comes with FastAPI."""

from __future__ import annotations

import difflib
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator
from pydantic_core import from_json

from ..errors import short
from .pieces import Piece, Spelled, TokenLog, ToolCall

_STOPS = 16
_SHOWN = 80  # characters of a bad value quoted in an error
_REPETITION = 0.01, 100  # beyond them, products of logits would leave the range of float32

# Fields of OpenAI's API without effect here.
_HARMLESS = frozenset({"user", "metadata", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"})
# Fields that would change the answer, with their neutral values.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "audio": (), "best_of": (1,), "echo": (False,), "function_call": ("none", "auto"), "functions": ([],),
    "logit_bias": ({},), "modalities": (["text"],), "moderation": (), "parallel_tool_calls": (True, False),
    "prediction": (), "reasoning_effort": (), "response_format": ({"type": "text"},), "store": (False,),
    "suffix": ("",), "tool_choice": ("none", "auto"), "tools": ([],), "top_logprobs": (0,), "verbosity": (), "web_search_options": (),
}  # fmt: skip
# What to do instead, for those of them where it is not simply to leave the field out.
_INSTEAD = {"response_format": 'expected {"type": "text"} (decoding is not constrained here; ask for JSON in the prompt)'}
# Replaces pydantic's messages for each branch of a union.
_EXPECTED = {
    "prompt": "some text, a list of texts, a list of token ids, or a list of such lists; none of them empty",
    "stop": f"a text, or a list of up to {_STOPS} texts; none of them empty",
    "content": "a text, or a list of parts of type text",
}
# The same for single values, which are shown.
_EXPECTED_VALUES = {
    "top_k": "a whole number of at least 0 (0 or -1 is off)",
    "presence_penalty": "a number from -2 to 2 (0 is off)",
    "frequency_penalty": "a number from -2 to 2 (0 is off)",
    "repetition_penalty": f"a number from {_REPETITION[0]} to {_REPETITION[1]} (1 is off)",
}


class ApiError(Exception):
    """An error response."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, headers: Mapping[str, str] | None = None
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, headers

    @property
    def body(self) -> dict[str, Any]:
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(self.status)
        kind = kind or ("invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


Text = Annotated[str, StringConstraints(min_length=1)]
Id = Annotated[int, Field(ge=0, lt=2**31)]
Ids = Annotated[list[Id], Field(min_length=1)]


class _Strict(BaseModel):
    """No type coercion; unknown fields are kept for `_refuse_others` to check."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)


class StreamOptions(_Strict):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class BaseRequest(_Strict):
    """Fields common to completions and chat completions. None is the default, as for a missing field.

    `expected` has words for errors in fields that the two have in different forms.
    """

    expected: ClassVar[dict[str, str]] = {}

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, lt=2**63)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(ge=_REPETITION[0], le=_REPETITION[1])] | None = None
    max_tokens: Annotated[int, Field(ge=1, lt=2**63)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**63)] | None = None
    stop: Text | Annotated[list[Text], Field(max_length=_STOPS)] | None = None
    H_cycles: Annotated[int, Field(ge=0, lt=2**63)] | None = None

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def limit(self) -> int | None:
        """The requested maximum of new tokens."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def alternatives(self) -> int | None:
        """How many of the most likely tokens to report beside each token; None if no log-probabilities are wanted."""
        raise NotImplementedError

    @property
    def offered_tools(self) -> list[dict[str, Any]]:
        """Descriptions of the functions that the model may call."""
        return []

    @property
    def wants_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)


class CompletionRequest(BaseRequest):
    expected = {"logprobs": "a whole number from 0 to 5"}

    prompt: Text | Ids | Annotated[list[Text], Field(min_length=1)] | Annotated[list[Ids], Field(min_length=1)]
    logprobs: Annotated[int, Field(ge=0, le=5)] | Literal[False] | None = None

    @property
    def alternatives(self) -> int | None:
        return None if self.logprobs is False else self.logprobs

    @property
    def prompts(self) -> list[str | list[int]]:
        alone = isinstance(self.prompt, str) or isinstance(self.prompt[0], int)
        return [self.prompt] if alone else self.prompt  # type: ignore[list-item, return-value]


class Part(_Strict):
    type: Literal["text"]
    text: str


class CalledFunction(_Strict):
    name: Text
    arguments: str

    def as_template(self) -> dict[str, Any]:
        """As a chat template expects it, with the arguments as an object; an empty text has none.

        Raises:
            ValueError: The arguments are no JSON object.
        """
        arguments = from_json(self.arguments, allow_inf_nan=False) if self.arguments.strip() else {}
        if not isinstance(arguments, dict):
            raise ValueError("no object")
        return {"name": self.name, "arguments": arguments}


class Call(_Strict):
    id: str | None = None
    type: Literal["function"] | None = None
    function: CalledFunction


class Message(_Strict):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Part] | None
    tool_calls: list[Call] | None = None
    tool_call_id: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _calls_need_no_content(cls, message: Any) -> Any:
        return {"content": None, **message} if isinstance(message, dict) and message.get("tool_calls") else message

    def as_template(self) -> dict[str, Any]:
        """As a chat template expects it; `developer` is OpenAI's newer name for `system`, and null is no text."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content or ())
        found: dict[str, Any] = {"role": "system" if self.role == "developer" else self.role, "content": content}
        if self.tool_calls:
            found["tool_calls"] = [{"id": call.id, "type": "function", "function": call.function.as_template()} for call in self.tool_calls]
        if self.role == "tool":
            names = {"tool_call_id": self.tool_call_id, "name": (self.model_extra or {}).get("name")}
            found |= {name: value for name, value in names.items() if value is not None}
        return found


class ChatRequest(BaseRequest):
    expected = {
        "logprobs": "true or false (the number of alternatives goes into top_logprobs)",
        "top_logprobs": "a whole number from 0 to 20",
    }

    messages: Annotated[list[Message], Field(min_length=1)]
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Any = None

    @property
    def alternatives(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def offered_tools(self) -> list[dict[str, Any]]:
        return [] if self.tool_choice == "none" else self.tools or []


def read(kind: type[BaseRequest], body: bytes) -> Any:
    """Parse a request body as `kind`.

    Raises:
        ApiError: 400, naming the invalid field.
    """
    try:
        ask = kind.model_validate_json(body)
    except ValidationError as error:
        raise _explained(error, kind) from None
    _refuse_others(ask, kind)
    if isinstance(ask, ChatRequest):
        _check_messages(ask)
        _check_tools(ask)
    if ask.stream_options is not None and not ask.stream:
        raise ApiError(400, "stream_options: only with stream=true", param="stream_options")
    if getattr(ask, "top_logprobs", None) and ask.alternatives is None:
        raise ApiError(400, "top_logprobs: only with logprobs=true", param="top_logprobs")
    if None not in (ask.max_tokens, ask.max_completion_tokens) and ask.max_tokens != ask.max_completion_tokens:
        raise ApiError(400, "max_tokens and max_completion_tokens differ; give one of them", param="max_tokens")
    return ask


def _check_messages(ask: ChatRequest) -> None:
    """Check what types do not say: fields that a message may not have, and the arguments of calls."""
    for at, message in enumerate(ask.messages):
        # a client that sends an answer back sends its empty fields as well
        for name, value in (message.model_extra or {}).items():
            if name != "name" and value not in (None, [], {}):
                raise ApiError(400, f"messages: a message has {name}, which this server does not read", param="messages")
        for name, role, value in (("tool_calls", "assistant", message.tool_calls), ("tool_call_id", "tool", message.tool_call_id)):
            if value and message.role != role:
                raise ApiError(400, f"messages.{at}.{name}: only in messages of the role {role}, got {message.role}", param="messages")
        for number, call in enumerate(message.tool_calls or ()):
            try:
                call.function.as_template()
            except ValueError:
                where, got = f"messages.{at}.tool_calls.{number}.function.arguments", short(call.function.arguments, _SHOWN)
                raise ApiError(400, f"{where}: expected a JSON object as text, got {got}", param="messages") from None


def _check_tools(ask: ChatRequest) -> None:
    if ask.tool_choice not in (None, "auto", "none"):
        got = short(ask.tool_choice, _SHOWN)
        message = f'tool_choice: expected "auto" or "none" (a call cannot be forced here), got {got}'
        raise ApiError(400, message, param="tool_choice", code="unsupported_parameter")
    for at, tool in enumerate(ask.tools or ()):
        function = tool.get("function")
        if tool.get("type") != "function" or not isinstance(function, dict) or not isinstance(function.get("name"), str):
            form = '{"type": "function", "function": {"name": ..., "description": ..., "parameters": ...}}'
            raise ApiError(400, f"tools.{at}: expected {form}, got {short(tool, _SHOWN)}", param="tools")
        if function.get("strict"):
            message = f"tools.{at}.function.strict: decoding is not constrained here; leave it out"
            raise ApiError(400, message, param="tools", code="unsupported_parameter")
    if ask.offered_tools and (ask.model_extra or {}).get("parallel_tool_calls") is False:
        message = "parallel_tool_calls: the model cannot be held to one call here; leave it out"
        raise ApiError(400, message, param="parallel_tool_calls", code="unsupported_parameter")


def _explained(error: ValidationError, kind: type[BaseRequest]) -> ApiError:
    """The first validation error, in one line."""
    fault = error.errors(include_url=False, include_context=False)[0]
    where = [str(part) for part in fault["loc"]]
    if not where:
        return ApiError(400, f"the body is not a JSON object: {fault['msg']}", code="invalid_json")
    if fault["type"] == "missing":
        return ApiError(400, f"{'.'.join(where)}: missing", param=where[0])
    for at, name in enumerate(where):
        if name in _EXPECTED:
            return ApiError(400, f"{'.'.join(where[: at + 1])}: expected {_EXPECTED[name]}", param=where[0])
    expected = (_EXPECTED_VALUES | kind.expected).get(where[0])
    if expected is not None:
        return ApiError(400, f"{where[0]}: expected {expected}, got {short(fault['input'], _SHOWN)}", param=where[0])
    message = fault["msg"][:1].lower() + fault["msg"][1:]
    return ApiError(400, f"{'.'.join(where)}: {message}; got {short(fault['input'], _SHOWN)}", param=where[0])


def _refuse_others(ask: BaseRequest, kind: type[BaseRequest]) -> None:
    """Refuse unknown fields, and known ones without support here unless they have their neutral value."""
    for name, value in (ask.model_extra or {}).items():
        if name in _HARMLESS or (name in _NEUTRAL and (value is None or value in _NEUTRAL[name])):
            continue
        if name in _INSTEAD:
            message = f"{name}: {_INSTEAD[name]}, got {short(value, _SHOWN)}"
            raise ApiError(400, message, param=name, code="unsupported_parameter")
        if name in _NEUTRAL:
            raise ApiError(400, f"{name}: this server does not support it; leave it out", param=name, code="unsupported_parameter")
        near = difflib.get_close_matches(name, [*kind.model_fields, *_NEUTRAL], 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ApiError(400, f"{name[:_SHOWN]}: no such field{hint}", param=name[:_SHOWN], code="unknown_parameter")


class Shape:
    """Builds the response objects. Subclasses differ in field names for completions and chats."""

    prefix = whole = piece = ""

    def __init__(self, model: str, wants_usage: bool):
        self.head = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        self.wants_usage = wants_usage

    def answer(self, texts: list[Piece], usage: dict[str, int]) -> dict[str, Any]:
        """The full response, from the whole text of each choice."""
        return {**self.head, "object": self.whole, "choices": [self.choice(text) for text in texts], "usage": usage}

    def chunk(self, piece: Piece) -> dict[str, Any]:
        return self._chunk([self.delta(piece)])

    def opening(self, index: int) -> dict[str, Any] | None:
        """The chunk before a choice's first piece."""
        return None

    def usage_chunk(self, usage: dict[str, int]) -> dict[str, Any]:
        return {**self._chunk([]), "usage": usage}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self.head, "object": self.piece, "choices": choices, **({"usage": None} if self.wants_usage else {})}

    def choice(self, piece: Piece) -> dict[str, Any]:
        raise NotImplementedError

    def delta(self, piece: Piece) -> dict[str, Any]:
        raise NotImplementedError


class CompletionShape(Shape):
    prefix, whole, piece = "cmpl", "text_completion", "text_completion"

    def choice(self, piece: Piece) -> dict[str, Any]:
        return {"index": piece.index, "text": piece.text, "logprobs": self._logprobs(piece.tokens), "finish_reason": piece.reason}

    delta = choice

    @staticmethod
    def _logprobs(tokens: Sequence[TokenLog] | None) -> dict[str, Any] | None:
        if tokens is None:
            return None
        return {
            "tokens": [log.token.text for log in tokens],
            "token_logprobs": [log.logprob for log in tokens],
            # the token itself is there even if it is not among the most likely
            "top_logprobs": [{other.text: logprob for other, logprob in (*log.top, (log.token, log.logprob))} for log in tokens],
            "text_offset": [log.offset for log in tokens],
        }


class ChatShape(Shape):
    prefix, whole, piece = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def choice(self, piece: Piece) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": piece.text, "refusal": None}
        if piece.calls:
            message |= {"content": piece.text or None, "tool_calls": [self._call(call) for call in piece.calls]}
        return {"index": piece.index, "message": message, "logprobs": self._logprobs(piece.tokens), "finish_reason": piece.reason}

    def delta(self, piece: Piece) -> dict[str, Any]:
        delta: dict[str, Any] = {"content": piece.text} if piece.text else {}
        if piece.calls:
            delta["tool_calls"] = [{"index": call.number, **self._call(call)} for call in piece.calls]
        return {"index": piece.index, "delta": delta, "logprobs": self._logprobs(piece.tokens), "finish_reason": piece.reason}

    def opening(self, index: int) -> dict[str, Any]:
        delta = {"role": "assistant", "content": ""}
        return self._chunk([{"index": index, "delta": delta, "logprobs": None, "finish_reason": None}])

    @classmethod
    def _logprobs(cls, tokens: Sequence[TokenLog] | None) -> dict[str, Any] | None:
        if tokens is None:
            return None
        alternatives = [[cls._token(*other) for other in log.top] for log in tokens]
        content = [{**cls._token(log.token, log.logprob), "top_logprobs": top} for log, top in zip(tokens, alternatives, strict=True)]
        return {"content": content, "refusal": None}

    @staticmethod
    def _call(call: ToolCall) -> dict[str, Any]:
        return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}

    @staticmethod
    def _token(token: Spelled, logprob: float) -> dict[str, Any]:
        return {"token": token.text, "logprob": logprob, "bytes": None if token.utf8 is None else list(token.utf8)}


def usage(prompt: int, completion: int) -> dict[str, int]:
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
