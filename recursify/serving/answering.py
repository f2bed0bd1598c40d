"""From a request to its generated sequences and pieces of text.

Service   model, tokenizer and engine, and what they can do for a request
Answer    the texts of one request, on their way
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from ..checkpoints.configs import check_cycles
from ..errors import UserError
from ..inference.chat_prompt import Dialogue
from ..inference.prompt import encode_prompt, end_tokens, prompt_ids
from ..inference.streaming import Row
from ..network.decoding_recursive_llm import rotary_limit
from ..network.modeling_recursive_llm import RecursiveLLM
from .engine import Depth, Engine, Event, Job, QueueFull, Request, Token, Unavailable
from .logprobs import Spelling, TextLog
from .metrics import Labels, Metrics, labelled
from .pieces import Piece
from .protocol import ApiError, BaseRequest, ChatRequest, CompletionRequest
from .sampling import Choice
from .settings import ServeSettings
from .tool_calls import OPEN, CallReader

_COMPLETION_TOKENS = 16  # default of OpenAI's completions API
_RETRY_SECONDS = 1
_CONTEXT = 8  # prompt tokens that a decoder may need before the first generated one


class Service:
    """The served model: tokenizer, engine, metrics.

    Args:
        model, tokenizer: As from `recursify.checkpoints.loading.load_model`; the model on its device.

    Raises:
        UserError: Depths for a plain donor, a tokenizer of another model, caches that do not fit.
    """

    def __init__(self, model: Any, tokenizer: Any, name: str, settings: ServeSettings):
        self.model, self.tokenizer, self.name, self.settings = model, tokenizer, name, settings
        self.dialogue = Dialogue(tokenizer)
        self.ends = [*dict.fromkeys([*end_tokens(model, tokenizer), *self.dialogue.ends])]
        encode_prompt(model, tokenizer, "a")  # checks that they belong together
        depths = _depths(model, settings)
        cache_tokens, batch_tokens = settings.sizes(model.device)
        sizes = {"cache_tokens": cache_tokens, "batch_tokens": batch_tokens, "max_running": settings.max_running}
        self.engine = Engine(model, self.ends, depths, max_queue=settings.max_queue, **sizes)
        positions = getattr(model.config, "max_position_embeddings", None)
        # beyond the rotary limit the angles of a text would change with the longest one of its batch
        limits = (self.engine.longest, positions, rotary_limit(model.config))
        self.longest = min(limit for limit in limits if limit is not None)
        self.vocabulary: int = model.get_input_embeddings().num_embeddings
        self.metrics, self.spelling = Metrics(), Spelling(tokenizer)
        self.created = int(time.time())
        # One thread: a long prompt does not block the event loop, and the tokenizer is not thread-safe.
        self.reader = ThreadPoolExecutor(1, "tokenizer")

    @property
    def depths(self) -> list[int]:
        return [depth for depth in self.engine.batchers if depth is not None]

    async def answer(self, ask: BaseRequest) -> Answer:
        """Start answering a request.

        Raises:
            ApiError: An unknown model or depth, a prompt that is too long, a full queue.
        """
        depth = self._depth(ask.H_cycles)
        if ask.model is not None and ask.model != self.name:
            raise ApiError(404, f"model: there is no {ask.model[:80]!r} here, only {self.name!r}", param="model", code="model_not_found")
        n = ask.n or 1
        count = n * (len(ask.prompts) if isinstance(ask, CompletionRequest) else 1)
        most = self.settings.max_choices
        if count > most:
            raise ApiError(400, f"n: {count} texts are asked for; this server writes at most {most} for one request", param="n")
        prompts = await asyncio.get_running_loop().run_in_executor(self.reader, self._read, ask)
        jobs = self._jobs(ask, prompts, n)
        answer = Answer(self, depth, prompts, n, ask)
        try:
            answer.begin(jobs)
        except QueueFull:
            raise ApiError(
                429, "the queue is full; try again in a moment", code="queue_full", headers={"retry-after": str(_RETRY_SECONDS)}
            ) from None
        except Unavailable as error:
            raise ApiError(503, str(error), code="unavailable") from None
        return answer

    def gauges(self) -> dict[str, dict[Labels, float]]:
        """Current values for `Metrics.render`."""
        by_depth = {labelled(H_cycles=name_of(depth)): batcher for depth, batcher in self.engine.batchers.items()}
        return {
            "recursify_running": {key: len(batcher.running) for key, batcher in by_depth.items()},
            "recursify_queued": {key: len(batcher.waiting) for key, batcher in by_depth.items()},
            "recursify_cache_blocks": {key: batcher.blocks for key, batcher in by_depth.items()},
            "recursify_cache_blocks_free": {key: batcher.free_blocks for key, batcher in by_depth.items()},
            "recursify_up": {labelled(): int(self.engine.obstacle is None)},
        }

    def close(self) -> None:
        """Stop all threads. Thread-safe."""
        self.engine.stop()
        self.reader.shutdown()

    def _depth(self, wanted: int | None) -> Depth:
        if wanted is None:
            return self.engine.default
        if wanted not in self.engine.batchers:
            offered = ", ".join(map(str, self.depths))
            has = f"this server offers {offered}" if offered else "this model has no cycles; leave it out"
            raise ApiError(400, f"H_cycles: {has}; got {wanted}", param="H_cycles", code="unknown_depth")
        return wanted

    def _read(self, ask: BaseRequest) -> list[list[int]]:
        """Token ids of every prompt. Runs in the tokenizer's thread."""
        if isinstance(ask, ChatRequest):
            return [self._read_chat(ask)]
        assert isinstance(ask, CompletionRequest)
        return [self._read_prompt(prompt) for prompt in ask.prompts]

    def _read_prompt(self, prompt: str | list[int]) -> list[int]:
        if isinstance(prompt, list):
            if max(prompt) >= self.vocabulary:
                raise ApiError(400, f"prompt: token ids are 0 to {self.vocabulary - 1} here, got {max(prompt)}", param="prompt")
            return prompt
        try:
            ids = prompt_ids(self.tokenizer, prompt, "prompt")
        except UserError as error:
            raise ApiError(400, str(error), param="prompt") from None
        if max(ids) >= self.vocabulary:
            raise ApiError(400, f"prompt: has token {max(ids)}, and the model knows 0 to {self.vocabulary - 1}", param="prompt")
        return ids

    def _read_chat(self, ask: ChatRequest) -> list[int]:
        if not self.dialogue.has_template:
            raise ApiError(
                400, f"messages: {self.name!r} has no chat template; use /v1/completions", param="messages", code="no_chat_template"
            )
        messages = [message.as_template() for message in ask.messages]
        if not self.dialogue.takes_tools:
            no_place = "the chat template of this model has no place for tools"
            if ask.offered_tools:
                raise ApiError(400, f"tools: {no_place}", param="tools", code="unsupported_parameter")
            if any(message["role"] == "tool" or "tool_calls" in message for message in messages):
                raise ApiError(400, f"messages: have calls of tools or their results, and {no_place}", param="messages")
        try:
            return self.dialogue.prompt(messages, ask.offered_tools)
        except UserError as error:
            raise ApiError(400, f"messages: {error}", param="messages") from None

    def reads_calls(self, ask: BaseRequest) -> bool:
        """Whether the answer is searched for calls of tools: some are offered, and the chat template writes calls in the known form."""
        return bool(ask.offered_tools) and OPEN in (self.dialogue.template or "")

    def _jobs(self, ask: BaseRequest, prompts: list[list[int]], n: int) -> list[Job]:
        """One job per choice, in order."""
        choice = _choice(ask)
        jobs: list[Job] = []
        for prompt in prompts:
            limit = self._limit(ask, len(prompt))
            jobs += [Job(prompt, limit, replace(choice, index=len(jobs) + i)) for i in range(n)]
        return jobs

    def _limit(self, ask: BaseRequest, prompt: int) -> int:
        """Maximum number of new tokens for a prompt of the given length."""
        room, most = self.longest - prompt, self.settings.max_completion_tokens
        param = "messages" if isinstance(ask, ChatRequest) else "prompt"
        if room < 1:
            raise ApiError(
                400, f"{param}: has {prompt} tokens; prompt and answer together have room for {self.longest}", param=param,
                code="context_length_exceeded",
            )  # fmt: skip
        if ask.limit is None:
            return min(room, most if isinstance(ask, ChatRequest) else min(most, _COMPLETION_TOKENS))
        return min(ask.limit, room, most)


class Answer:
    """The choices of one request. The owner must call `close`."""

    def __init__(self, service: Service, depth: Depth, prompts: list[list[int]], n: int, ask: BaseRequest):
        self.service, self.depth, self.label = service, depth, name_of(depth)
        self.prompt_tokens = sum(map(len, prompts))
        self.fresh: list[list[str]] = [[] for _ in range(len(prompts) * n)]  # pending text of each choice
        starts = [prompt[-_CONTEXT:] for prompt in prompts for _ in range(n)]
        self.rows = [
            Row(service.tokenizer, start, service.ends, ask.stops, fresh.append) for start, fresh in zip(starts, self.fresh, strict=True)
        ]
        self.logs = [TextLog(service.spelling, start, service.ends) for start in starts] if ask.alternatives is not None else None
        self.readers = [CallReader() for _ in starts] if service.reads_calls(ask) else None
        self.events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self.open: dict[int, Request] = {}

    @property
    def completion_tokens(self) -> int:
        """Tokens generated so far, end tokens included."""
        return sum(len(row.token_ids) for row in self.rows)

    def begin(self, jobs: list[Job]) -> None:
        """Submit all jobs, or none: raises QueueFull or Unavailable."""
        requests = self.service.engine.submit(self.depth, jobs, lambda number, event: self.events.put_nowait((number, event)))
        self.open = dict(enumerate(requests))
        self.service.metrics.add("recursify_prompt_tokens_total", self.prompt_tokens, H_cycles=self.label)

    async def pieces(self) -> AsyncIterator[Piece]:
        """Text of all choices as it is generated, ending with one piece with a finish reason per choice.

        Raises:
            ApiError: The engine has stopped.
        """
        while self.open:
            index, event = await self.events.get()
            if index not in self.open:
                continue
            if isinstance(event, Exception):
                raise ApiError(503, str(event), code="unavailable")
            piece = self._piece(index, event)
            if piece.text or piece.tokens or piece.calls or piece.reason:
                yield piece

    def close(self) -> None:
        """Cancel what is still running."""
        for index in list(self.open):
            self._over(index, "cancelled")

    def _piece(self, index: int, event: list[Token] | None) -> Piece:
        row, log = self.rows[index], None if self.logs is None else self.logs[index]
        for token in event or ():
            if row.finish is None:  # the manager may be a token past the stop string
                row.put(token.id)
                if log is not None and token.logged is not None:
                    log.put(token.id, token.logged)
        if event is None:
            row.close("length")
        if row.finish is not None:
            self._over(index, row.finish)
        text = "".join(self.fresh[index])
        self.fresh[index].clear()
        logs = None if log is None else log.take(text, row.finish is not None)
        if self.readers is None:
            return Piece(index, text, row.finish, logs)
        reader = self.readers[index]
        content, calls = reader.put(text)
        if row.finish is not None:
            content += reader.end()
        reason = "tool_calls" if row.finish == "stop" and reader.count else row.finish
        return Piece(index, content, reason, logs, calls)

    def _over(self, index: int, reason: str) -> None:
        self.service.engine.cancel(self.depth, self.open.pop(index))
        metrics = self.service.metrics
        metrics.add("recursify_texts_total", H_cycles=self.label, end=reason)
        metrics.add("recursify_completion_tokens_total", len(self.rows[index].token_ids), H_cycles=self.label)


def _choice(ask: BaseRequest) -> Choice:
    """Sampling parameters of a request, with defaults filled in and a seed drawn where none is given."""
    temperature, top_p = 1.0 if ask.temperature is None else ask.temperature, 1.0 if ask.top_p is None else ask.top_p
    if top_p == 0:  # the most likely token alone
        temperature, top_p = 0.0, 1.0
    return Choice(
        temperature=temperature,
        top_p=top_p,
        seed=secrets.randbits(64) if ask.seed is None else ask.seed,
        top_k=max(ask.top_k or 0, 0),
        presence_penalty=ask.presence_penalty or 0.0,
        frequency_penalty=ask.frequency_penalty or 0.0,
        repetition_penalty=1.0 if ask.repetition_penalty is None else ask.repetition_penalty,
        logprobs=ask.alternatives,
    )


def name_of(depth: Depth) -> str:
    """The label of a depth; empty for a plain donor."""
    return "" if depth is None else str(depth)


def _depths(model: Any, settings: ServeSettings) -> tuple[int, ...]:
    wanted = settings.wanted_depths()
    if isinstance(model, RecursiveLLM):
        config: Any = model.config
        for depth in wanted:
            check_cycles(config, depth, "depths")
        return wanted or (config.H_cycles,)
    if wanted:
        raise UserError(f"--depths: {settings.checkpoint} is a plain model without cycles; leave the flag out")
    return ()
