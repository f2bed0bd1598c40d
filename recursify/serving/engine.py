"""Scheduling: a queue, and one of transformers' batch managers per depth, all over the same weights.

A request is admitted when the KV cache has room for its prompt and its maximum number of new tokens; until then it waits in a FIFO queue.
So there is no preemption, and no manager runs out of cache.

Everything here runs in the event loop's thread, except the managers themselves, each of which has a thread of its own.
"""

from __future__ import annotations

import asyncio
import copy
import itertools
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching.continuous_api import OutputRouter

from ..errors import UserError
from .sampling import Choice, Logged, PerRequestSampling

Depth = int | None  # None: a plain donor
_PAGE = 32  # tokens per cache block


class Unavailable(Exception):
    """The engine is stopping, or a manager has died."""


class QueueFull(Exception):
    """The queue is full."""


@dataclass(frozen=True)
class Job:
    """One sequence to generate.

    Args:
        prompt: Token ids, at least one.
        max_new_tokens: At least 1.
    """

    prompt: list[int]
    max_new_tokens: int
    choice: Choice


@dataclass(frozen=True)
class Token:
    """A generated token; `logged` is None where no log-probabilities are wanted."""

    id: int
    logged: Logged | None = None


# What is passed to `notify`: new tokens, the end (None), or an error.
Event = list[Token] | None | Exception


class Request:
    """A queued or running sequence. `notify` is called in the event loop's thread, last with the end or an exception."""

    _numbers = itertools.count()

    def __init__(self, job: Job, sectors: int, notify: Callable[[Event], None]):
        self.id = f"text-{next(self._numbers)}"
        self.job, self.sectors, self.notify = job, sectors, notify
        self.seen = 0


class Batcher:
    """One depth: its batch manager, KV cache and queue.

    Args:
        model: Any transformers model with continuous batching; its configuration gives the number of cache slots.
        ends: End tokens.
        cache_tokens, batch_tokens, max_running: As in `ServeSettings`.
    """

    def __init__(self, model: Any, ends: Sequence[int], *, cache_tokens: int, batch_tokens: int, max_running: int):
        self.ends, self.max_running = list(ends) or [-1], max_running
        self.waiting: deque[Request] = deque()
        self.running: dict[str, Request] = {}
        self.held = 0  # sectors reserved by running requests
        self.manager = model.init_continuous_batching(
            GenerationConfig(do_sample=False, eos_token_id=self.ends),
            ContinuousBatchingConfig(
                page_size=_PAGE,
                num_blocks=-(-cache_tokens // _PAGE),
                max_batch_tokens=batch_tokens,
                max_requests_per_batch=max_running,
                safety_margin=0.0,  # requests are admitted by their reserved room
                allow_block_sharing=False,  # blocks are matched by a 64-bit hash, for which a collision could be constructed
                use_cuda_graph=False,  # tokens are sampled in Python
                use_async_batching=False,
                auto_switch_to_flash=False,
            ),
        )
        self.manager.logit_processor = sampling = PerRequestSampling()
        self.manager.output_router = self.router = _Router(self._take, sampling)
        self.manager.warmup()  # allocates the cache now, where an error can be reported
        self.cache = self.manager.batch_processor.cache

    @property
    def alive(self) -> bool:
        return self.manager.is_running() and self.manager.background_thread_status.can_accept_new_requests() is None

    @property
    def fault(self) -> Exception | None:
        """What ended the manager's thread."""
        return self.manager.background_thread_status.fatal_error

    @property
    def page(self) -> int:
        """Tokens per block."""
        return _PAGE

    @property
    def blocks(self) -> int:
        return int(self.cache.num_blocks)

    @property
    def free_blocks(self) -> int:
        """Free blocks, according to the manager."""
        return round(self.cache.compute_free_capacity() * self.blocks)

    @property
    def longest(self) -> int:
        """The longest sequence, prompt included, that fits the empty cache."""
        low, high = 0, self.cache.max_tokens_read
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self._sectors(middle) <= self.cache.num_sectors else (low, middle - 1)
        return low

    @property
    def memory(self) -> int:
        """Bytes of the cache and its attention masks."""
        masks = self.manager.batch_processor.inputs_and_outputs.attention_mask or {}
        return sum(tensor.numel() * tensor.element_size() for tensor in (self.cache.cache_tensor, *masks.values()))

    def start(self) -> None:
        """Start the manager; call it in the event loop that is to receive the events."""
        self.router.loop = asyncio.get_running_loop()
        self.manager.start()

    def would_wait(self, jobs: Sequence[Job]) -> int:
        """How many of these jobs would be queued if submitted now."""
        held, running = self.held, len(self.running)
        for at, job in enumerate(jobs):
            held, running = held + self._needs(job), running + 1
            if self.waiting or held > self.cache.num_sectors or running > self.max_running:
                return len(jobs) - at
        return 0

    def submit(self, job: Job, notify: Callable[[Event], None]) -> Request:
        request = Request(job, self._needs(job), notify)
        self.waiting.append(request)
        self._admit()
        return request

    def cancel(self, request: Request) -> None:
        """Cancel a request, whether queued, running or finished."""
        if self.running.pop(request.id, None) is not None:
            self.held -= request.sectors
            # Before admitting others: the manager then frees the blocks first.
            self.manager.cancel_request(request.id)
        elif request in self.waiting:
            self.waiting.remove(request)
        self._admit()

    def abandon(self, error: Exception) -> None:
        """Fail all requests."""
        left = [*self.running.values(), *self.waiting]
        self.running.clear()
        self.waiting.clear()
        self.held = 0
        for request in left:
            request.notify(error)

    def stop(self) -> None:
        """Stop the manager's thread. Thread-safe."""
        if self.manager.is_running():
            self.manager.stop(block=True, hard_stop=True)
        self.manager.destroy()

    def _needs(self, job: Job) -> int:
        return self._sectors(len(job.prompt) + job.max_new_tokens)

    def _sectors(self, tokens: int) -> int:
        """Upper bound on the cache sectors of a sequence of this length."""
        return sum(-(-kind.needs_new_blocks("", 0, tokens) // kind.blocks_per_sector) for kind in self.cache.cache_allocators.values())

    def _admit(self) -> None:
        while self.waiting and len(self.running) < self.max_running and self.held + self.waiting[0].sectors <= self.cache.num_sectors:
            request = self.waiting.popleft()
            job = request.job
            accepted = self.manager.add_request(
                job.prompt, request.id, job.max_new_tokens, streaming=True, eos_token_id=self.ends, choice=job.choice
            )
            if accepted is None:
                request.notify(Unavailable("the engine has stopped"))
                continue
            self.running[request.id] = request
            self.held += request.sectors

    def _take(self, outputs: Sequence[tuple[Any, Logged | None]]) -> None:
        """Handle the outputs of a step, with the log-probabilities of their last token; some may belong to cancelled requests."""
        for output, logged in outputs:
            request = self.running.get(output.request_id)
            if request is None:
                continue
            # one at most: a streaming request has an output for every step
            new = [Token(token, logged) for token in output.generated_tokens[request.seen :]]
            request.seen += len(new)
            if new:
                request.notify(new)
            if output.is_finished():
                del self.running[request.id]
                self.held -= request.sectors
                request.notify(None if output.error is None else Unavailable(output.error))
        self._admit()


class _Router(OutputRouter):
    """Passes a manager's outputs to the event loop, one call per step, instead of storing them for a consumer that does not exist."""

    def __init__(self, take: Callable[[Sequence[tuple[Any, Logged | None]]], None], sampling: PerRequestSampling):
        super().__init__()
        self.take, self.sampling = take, sampling
        self.loop: asyncio.AbstractEventLoop | None = None

    def deliver(self, output: Any) -> None:
        self.deliver_batch([output])

    def deliver_batch(self, outputs: list[Any]) -> None:
        if self.loop is not None and not self.loop.is_closed():
            # in the manager's thread, before its next step replaces the log-probabilities
            self.loop.call_soon_threadsafe(self.take, [(output, self._logged(output)) for output in outputs])

    def _logged(self, output: Any) -> Logged | None:
        tokens = output.generated_tokens
        return self.sampling.logged(output.request_id, tokens[-1]) if tokens else None


class Engine:
    """The batchers of all depths and their common limits.

    Args:
        model: The model, on its device and in its dtype.
        depths: Depths of a recursive model, in display order; empty for a plain one.
        sizes: As for `Batcher`.

    Raises:
        UserError: The caches do not fit into memory.
    """

    def __init__(self, model: Any, ends: Sequence[int], depths: Sequence[int], *, max_queue: int, **sizes: int):
        model.set_attn_implementation("sdpa")  # the layers, shared by all depths, read it from their own configuration
        self.max_queue, self.stopping = max_queue, False
        self.batchers: dict[Depth, Batcher] = {}
        for depth in depths or (None,):
            try:
                self.batchers[depth] = Batcher(model if depth is None else at_depth(model, depth), ends, **sizes)
            except (MemoryError, RuntimeError) as error:  # torch's own is a RuntimeError
                where, reason = "" if depth is None else f" at {depth} cycles", str(error).splitlines()[0]
                raise UserError(
                    f"--cache_tokens: {sizes['cache_tokens']} tokens{where} do not fit into memory: take fewer, or fewer --depths; {reason}"
                ) from error
        own = model.config.H_cycles if depths else None
        self.default: Depth = own if own in self.batchers else max(depths, default=None)

    @property
    def obstacle(self) -> str | None:
        """Why nothing can be generated; None if healthy."""
        if self.stopping:
            return "the server is stopping"
        return None if self.alive else "the engine has stopped"

    @property
    def alive(self) -> bool:
        """Whether all managers are. A dead one cannot be started again."""
        return all(batcher.alive for batcher in self.batchers.values())

    @property
    def fault(self) -> Exception | None:
        """What a manager has died of, if it was an exception."""
        return next((batcher.fault for batcher in self.batchers.values() if batcher.fault is not None), None)

    @property
    def idle(self) -> bool:
        return not any(batcher.running or batcher.waiting for batcher in self.batchers.values())

    @property
    def longest(self) -> int:
        return min(batcher.longest for batcher in self.batchers.values())

    def start(self) -> None:
        for batcher in self.batchers.values():
            batcher.start()

    def submit(self, depth: Depth, jobs: Sequence[Job], notify: Callable[[int, Event], None]) -> list[Request]:
        """Submit all jobs of a request, or none; `notify` gets the index of the job with each event.

        Raises:
            QueueFull, Unavailable: No job was submitted.
        """
        if self.obstacle is not None:
            raise Unavailable(self.obstacle)
        batcher = self.batchers[depth]
        more = batcher.would_wait(jobs)
        if more and sum(len(other.waiting) for other in self.batchers.values()) + more > self.max_queue:
            raise QueueFull
        return [batcher.submit(job, lambda event, number=number: notify(number, event)) for number, job in enumerate(jobs)]  # type: ignore[misc]

    def cancel(self, depth: Depth, request: Request) -> None:
        self.batchers[depth].cancel(request)

    def abandon(self) -> None:
        """Take no more, and fail everything queued and running."""
        self.stopping = True
        self.fail("the server is stopping")

    def fail(self, reason: str) -> None:
        """Fail everything queued and running."""
        for batcher in self.batchers.values():
            batcher.abandon(Unavailable(reason))

    def stop(self) -> None:
        """Stop all threads. Thread-safe."""
        for batcher in self.batchers.values():
            batcher.stop()


def at_depth(model: Any, H_cycles: int) -> Any:
    """A view of a recursive model at another depth: shares all parameters; only the two outermost objects are copied."""
    view, base = copy.copy(model), copy.copy(model.model)
    view.config = base.config = model.config.at_depth(H_cycles)
    view._modules = {**model._modules, "model": base}
    view.requires_grad_(False)
    return view
