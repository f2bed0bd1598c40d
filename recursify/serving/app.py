"""HTTP: routes, body limits, errors in OpenAI's format. Needs FastAPI."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, MutableMapping
from dataclasses import replace
from typing import Any

from fastapi import FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException

from .answering import Answer, Service
from .pieces import Piece, joined
from .protocol import ApiError, ChatRequest, ChatShape, CompletionRequest, CompletionShape, Shape, read, usage

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

_GONE = 499  # for the metrics only: the client disconnected before its answer
_KINDS: dict[str, tuple[type[Any], type[Shape]]] = {
    "/v1/completions": (CompletionRequest, CompletionShape),
    "/v1/chat/completions": (ChatRequest, ChatShape),
}
_ROUTES = (*_KINDS, "/v1/models", "/health", "/metrics")
_DRAIN_SECONDS = 2.0  # that an oversized body is still read for, so that the client sees the error


class ClientDisconnected(Exception):
    """The client has disconnected."""


def make_app(service: Service) -> Any:
    """The ASGI application of a running service."""
    app = FastAPI(openapi_url=None, redirect_slashes=False)
    for path, (ask_kind, shape_kind) in _KINDS.items():
        app.add_api_route(path, _generating(service, ask_kind, shape_kind), methods=["POST"], response_model=None)

    @app.get("/v1/models")
    async def models(request: Request) -> Response:
        _check_key(service, request)
        return JSONResponse({"object": "list", "data": [_model(service)]})

    @app.get("/v1/models/{name:path}")
    async def model(request: Request, name: str) -> Response:
        _check_key(service, request)
        if name != service.name:
            raise ApiError(404, f"model: there is no {name!r} here, only {service.name!r}", param="model", code="model_not_found")
        return JSONResponse(_model(service))

    @app.api_route("/health", methods=["GET", "HEAD"])
    async def health() -> Response:
        obstacle = service.engine.obstacle
        return JSONResponse({"status": obstacle or "ok"}, 200 if obstacle is None else 503)

    @app.get("/metrics")
    async def metrics(request: Request) -> Response:
        _check_key(service, request)
        page = service.metrics.render(service.gauges())
        return PlainTextResponse(page, media_type="text/plain; version=0.0.4")

    if service.settings.cors_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=list(service.settings.cors_origins), allow_methods=["GET", "POST"], allow_headers=["*"]
        )
    app.add_exception_handler(ApiError, _error_response)
    app.add_exception_handler(HTTPException, _error_response)
    app.add_exception_handler(Exception, _error_response)
    return _Counted(app, service)


def _generating(service: Service, ask_kind: type[Any], shape_kind: type[Shape]) -> Callable[[Request], Coroutine[Any, Any, Response]]:
    async def generate(request: Request) -> Response:
        _check_key(service, request)
        if (obstacle := service.engine.obstacle) is not None:  # before reading the body
            raise ApiError(503, obstacle, code="unavailable")
        deadline = asyncio.get_running_loop().time() + service.settings.request_timeout
        try:
            async with asyncio.timeout_at(deadline):
                ask = read(ask_kind, await _body(request, service.settings.max_body_bytes))
                shape = shape_kind(service.name, ask.wants_usage)
                answer = await service.answer(ask)
                if ask.stream:
                    return EventStream(answer, shape, deadline)
                try:
                    return JSONResponse(await _unless_gone(request.receive, _whole(answer, shape)))
                finally:
                    answer.close()
        except TimeoutError:
            raise _too_slow(service) from None
        except ClientDisconnected:
            return Response(status_code=_GONE)

    return generate


def _too_slow(service: Service) -> ApiError:
    return ApiError(504, f"no answer within {service.settings.request_timeout:g} seconds", code="timeout")


async def _whole(answer: Answer, shape: Shape) -> dict[str, Any]:
    """All choices, and the token usage."""
    pieces: list[list[Piece]] = [[] for _ in answer.rows]
    async for piece in answer.pieces():
        pieces[piece.index].append(piece)
    return shape.answer([joined(each) for each in pieces], usage(answer.prompt_tokens, answer.completion_tokens))


class EventStream(Response):
    """Server-sent events: a chunk per piece, the usage if requested, then `[DONE]`; an error replaces the rest."""

    media_type = "text/event-stream"

    def __init__(self, answer: Answer, shape: Shape, deadline: float):
        self.answer, self.shape, self.deadline = answer, shape, deadline
        self.status_code, self.background = 200, None
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        try:
            await _unless_gone(receive, self._send_all(send))
        except ClientDisconnected:
            scope["recursify.status"] = _GONE
        finally:
            self.answer.close()

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            async with asyncio.timeout_at(self.deadline):
                async for event in self._events():
                    await send({"type": "http.response.body", "body": _data(json.dumps(event, ensure_ascii=False)), "more_body": True})
            last = _data("[DONE]")
        except (ApiError, TimeoutError) as error:
            shown = error if isinstance(error, ApiError) else _too_slow(self.answer.service)
            last = _data(json.dumps(shown.body))
        await send({"type": "http.response.body", "body": last, "more_body": False})

    async def _events(self) -> AsyncIterator[dict[str, Any]]:
        for index in range(len(self.answer.rows)):
            if (opening := self.shape.opening(index)) is not None:
                yield opening
        async for piece in self.answer.pieces():
            if piece.text or piece.tokens or piece.calls:
                yield self.shape.chunk(replace(piece, reason=None))
            if piece.reason:
                yield self.shape.chunk(Piece(piece.index, "", piece.reason))
        if self.shape.wants_usage:
            yield self.shape.usage_chunk(usage(self.answer.prompt_tokens, self.answer.completion_tokens))


def _data(text: str) -> bytes:
    return f"data: {text}\n\n".encode()


async def _unless_gone(receive: Receive, work: Coroutine[Any, Any, Any]) -> Any:
    """The result of `work`, which is cancelled when the client disconnects.

    Raises:
        ClientDisconnected: It did.
    """
    task, watch = asyncio.ensure_future(work), asyncio.ensure_future(_until_gone(receive))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnected
        return task.result()
    finally:
        task.cancel()
        watch.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _body(request: Request, most: int) -> bytes:
    """The request body, at most `most` bytes, whatever Content-Length says.

    Raises:
        ApiError: 413.
        ClientDisconnected: The client disconnected.
    """
    parts: list[bytes] = []
    length, give_up = 0, float("inf")
    loop = asyncio.get_running_loop()
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnected
        part = message.get("body", b"")
        length += len(part)
        if length <= most:
            parts.append(part)
        else:
            parts.clear()
            give_up = min(give_up, loop.time() + _DRAIN_SECONDS)
        over = not message.get("more_body", False)
        if length > most and (over or loop.time() > give_up):
            raise ApiError(413, f"the body is longer than {most} bytes, the most that this server reads", code="body_too_large")
        if over:
            return b"".join(parts)


def _check_key(service: Service, request: Request) -> None:
    key = service.settings.key
    if key is None:
        return
    given = request.headers.get("authorization", "")
    if not secrets.compare_digest(given.encode("latin-1"), f"Bearer {key}".encode()):
        raise ApiError(
            401, "expected this server's API key in the header Authorization: Bearer KEY", code="invalid_api_key",
            headers={"www-authenticate": "Bearer"},
        )  # fmt: skip


def _model(service: Service) -> dict[str, Any]:
    """An entry of the list of models: OpenAI's fields and the depths."""
    depths = {"H_cycles": {"offered": service.depths, "default": service.engine.default}} if service.depths else {}
    return {"id": service.name, "object": "model", "created": service.created, "owned_by": "recursify", **depths}


async def _error_response(request: Request, error: Exception) -> Response:
    """Any error in OpenAI's format; internal errors are not described."""
    if isinstance(error, HTTPException):
        words = {404: f"there is no {request.url.path!r} here", 405: f"{request.url.path} does not take {request.method}"}
        error = ApiError(error.status_code, words.get(error.status_code, str(error.detail)), headers=error.headers)
    if not isinstance(error, ApiError):
        error = ApiError(500, "the server has failed; its log says why", code="internal_error")
    return JSONResponse(error.body, error.status, headers=dict(error.headers or {}))


class _Counted:
    """Middleware: counts responses by route and status."""

    def __init__(self, app: Any, service: Service):
        self.app, self.service = app, service

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        status = _GONE

        async def seen(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, seen)
        finally:
            status = scope.get("recursify.status", status)
            path = scope["path"]
            route = path if path in _ROUTES else "/v1/models" if path.startswith("/v1/models/") else "other"
            self.service.metrics.add("recursify_requests_total", route=route, status=status)
