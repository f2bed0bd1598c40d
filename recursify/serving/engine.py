"""Scheduling: a queue, and one of transformers' batch managers per depth, all over the same weights.

A text is let in when the cache has room for its prompt and for as many tokens as it may become; until then it waits, first come, first
served. So a text that has begun is never thrown out again, and no manager meets a cache that is full.

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
from .sampling import Choice, PerRequestSampling

Depth = int | None  # None is a plain donor, which has one depth and no name for it
_PAGE = 32  # tokens in a block of the cache


class Unavailable(Exception):
    """The engine is stopping, or a manager has died: no text can be written."""


class QueueFull(Exception):
    """More texts would wait than may."""


@dataclass(frozen=True)
class Job:
    """One text to be written.

    Args:
        prompt: Token ids, at least one.
        max_new_tokens: At least 1.
    """

    prompt: list[int]
    max_new_tokens: int
    choice: Choice


# What a ticket's owner is told: new tokens, the end (None), or why there will be none.
Event = list[int] | None | Exception


class Ticket:
    """A text on its way. `tell` is called in the event loop's thread, with the end or an exception last."""

    _numbers = itertools.count()

    def __init__(self, job: Job, sectors: int, tell: Callable[[Event], None]):
        self.id = f"text-{next(self._numbers)}"
        self.job, self.sectors, self.tell = job, sectors, tell
        self.seen = 0


class Batcher:
    """One depth: its manager, its cache, its queue.

    Args:
        model: Anything of transformers that batches continuously, whose configuration says how many slots its cache has.
        ends: Tokens that end a text.
        cache_tokens, batch_tokens, max_running: As the settings of these names.
    """

    def __init__(self, model: Any, ends: Sequence[int], *, cache_tokens: int, batch_tokens: int, max_running: int):
        self.ends, self.max_running = list(ends) or [-1], max_running
        self.waiting: deque[Ticket] = deque()
        self.running: dict[str, Ticket] = {}
        self.held = 0  # sectors promised to those who run
        self.manager = model.init_continuous_batching(
            GenerationConfig(do_sample=False, eos_token_id=self.ends),
            ContinuousBatchingConfig(
                page_size=_PAGE,
                num_blocks=-(-cache_tokens // _PAGE),
                max_batch_tokens=batch_tokens,
                max_requests_per_batch=max_running,
                safety_margin=0.0,  # nobody is let in without room
                allow_block_sharing=False,  # blocks are matched by a hash of 64 bits, which somebody could find another prompt for
                use_cuda_graph=False,  # the choice of tokens is made in Python
                use_async_batching=False,
                auto_switch_to_flash=False,
            ),
        )
        self.manager.logit_processor = PerRequestSampling()
        self.manager.output_router = self.router = _Router(self._take)
        self.manager.warmup()  # makes the cache now, where an error can still be told
        self.cache = self.manager.batch_processor.cache

    @property
    def alive(self) -> bool:
        return self.manager.is_running() and self.manager.background_thread_status.can_accept_new_requests() is None

    @property
    def page(self) -> int:
        """Tokens in a block."""
        return _PAGE

    @property
    def blocks(self) -> int:
        return int(self.cache.num_blocks)

    @property
    def free_blocks(self) -> int:
        """Blocks that no text holds, as the manager has it."""
        return round(self.cache.compute_free_capacity() * self.blocks)

    @property
    def longest(self) -> int:
        """Tokens of the longest text, prompt included, that the cache can hold when it is empty."""
        low, high = 0, self.cache.max_tokens_read
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self._sectors(middle) <= self.cache.num_sectors else (low, middle - 1)
        return low

    @property
    def memory(self) -> int:
        """Bytes of the cache, and of the masks that go with it."""
        masks = self.manager.batch_processor.inputs_and_outputs.attention_mask or {}
        return sum(tensor.numel() * tensor.element_size() for tensor in (self.cache.cache_tensor, *masks.values()))

    def start(self) -> None:
        """Begin to work; call it in the event loop that will be told of the texts."""
        self.router.loop = asyncio.get_running_loop()
        self.manager.start()

    def would_wait(self, jobs: Sequence[Job]) -> int:
        """How many of some more jobs would have to wait now."""
        held, running = self.held, len(self.running)
        for at, job in enumerate(jobs):
            held, running = held + self._needs(job), running + 1
            if self.waiting or held > self.cache.num_sectors or running > self.max_running:
                return len(jobs) - at
        return 0

    def submit(self, job: Job, tell: Callable[[Event], None]) -> Ticket:
        ticket = Ticket(job, self._needs(job), tell)
        self.waiting.append(ticket)
        self._admit()
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Forget a text, whether it waits, is being written, or is over."""
        if self.running.pop(ticket.id, None) is not None:
            self.held -= ticket.sectors
            # Before anything that is let in instead: the manager frees the blocks first.
            self.manager.cancel_request(ticket.id)
        elif ticket in self.waiting:
            self.waiting.remove(ticket)
        self._admit()

    def abandon(self, error: Exception) -> None:
        """Tell everybody that nothing more comes."""
        left = [*self.running.values(), *self.waiting]
        self.running.clear()
        self.waiting.clear()
        self.held = 0
        for ticket in left:
            ticket.tell(error)

    def stop(self) -> None:
        """End the manager's thread. Any thread may call it."""
        if self.manager.is_running():
            self.manager.stop(block=True, hard_stop=True)
        self.manager.destroy()

    def _needs(self, job: Job) -> int:
        return self._sectors(len(job.prompt) + job.max_new_tokens)

    def _sectors(self, tokens: int) -> int:
        """What a text of so many tokens takes of the cache, at most."""
        return sum(-(-kind.needs_new_blocks("", 0, tokens) // kind.blocks_per_sector) for kind in self.cache.cache_allocators.values())

    def _admit(self) -> None:
        while self.waiting and len(self.running) < self.max_running and self.held + self.waiting[0].sectors <= self.cache.num_sectors:
            ticket = self.waiting.popleft()
            job = ticket.job
            accepted = self.manager.add_request(
                job.prompt, ticket.id, job.max_new_tokens, streaming=True, eos_token_id=self.ends, choice=job.choice
            )
            if accepted is None:
                ticket.tell(Unavailable("the model has stopped writing"))
                continue
            self.running[ticket.id] = ticket
            self.held += ticket.sectors

    def _take(self, outputs: Sequence[Any]) -> None:
        """What a pass has brought. Outputs of cancelled texts may still be among it."""
        for output in outputs:
            ticket = self.running.get(output.request_id)
            if ticket is None:
                continue
            new = output.generated_tokens[ticket.seen :]
            ticket.seen += len(new)
            if new:
                ticket.tell(new)
            if output.is_finished():
                del self.running[ticket.id]
                self.held -= ticket.sectors
                ticket.tell(None if output.error is None else Unavailable(output.error))
        self._admit()


class _Router(OutputRouter):
    """Hands a manager's outputs to the event loop, all of a pass at once, and keeps none: nobody else would ever fetch them."""

    def __init__(self, take: Callable[[Sequence[Any]], None]):
        super().__init__()
        self.take = take
        self.loop: asyncio.AbstractEventLoop | None = None

    def deliver(self, output: Any) -> None:
        self.deliver_batch([output])

    def deliver_batch(self, outputs: list[Any]) -> None:
        if self.loop is not None and not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self.take, outputs)


class Engine:
    """All depths, and the limits that they share.

    Args:
        model: On its device, in its type.
        depths: For a recursive model, in the order in which they are to be named; empty for any other.
        sizes: As `Batcher` takes them.

    Raises:
        UserError: The caches do not fit into memory.
    """

    def __init__(self, model: Any, ends: Sequence[int], depths: Sequence[int], *, max_queue: int, **sizes: int):
        model.set_attn_implementation("sdpa")  # the layers, which all depths share, read it from their own configuration
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
        """Why no text can be written, in words; None where one can."""
        if self.stopping:
            return "the server is stopping"
        return None if all(batcher.alive for batcher in self.batchers.values()) else "the model has stopped writing"

    @property
    def idle(self) -> bool:
        return not any(batcher.running or batcher.waiting for batcher in self.batchers.values())

    @property
    def longest(self) -> int:
        return min(batcher.longest for batcher in self.batchers.values())

    def start(self) -> None:
        for batcher in self.batchers.values():
            batcher.start()

    def submit(self, depth: Depth, jobs: Sequence[Job], tell: Callable[[int, Event], None]) -> list[Ticket]:
        """Take all jobs of a request, or none; `tell` gets the number of the job with each event.

        Raises:
            QueueFull, Unavailable: None was taken.
        """
        if self.obstacle is not None:
            raise Unavailable(self.obstacle)
        batcher = self.batchers[depth]
        more = batcher.would_wait(jobs)
        if more and sum(len(other.waiting) for other in self.batchers.values()) + more > self.max_queue:
            raise QueueFull
        return [batcher.submit(job, lambda event, number=number: tell(number, event)) for number, job in enumerate(jobs)]  # type: ignore[misc]

    def cancel(self, depth: Depth, ticket: Ticket) -> None:
        self.batchers[depth].cancel(ticket)

    def abandon(self) -> None:
        """What is still on its way fails."""
        self.stopping = True
        for batcher in self.batchers.values():
            batcher.abandon(Unavailable("the server is stopping"))

    def stop(self) -> None:
        """End all threads. Any thread may call it."""
        for batcher in self.batchers.values():
            batcher.stop()


def at_depth(model: Any, H_cycles: int) -> Any:
    """A recursive model as seen at another depth: the same parameters, nothing copied but the two outermost objects."""
    view, base = copy.copy(model), copy.copy(model.model)
    view.config = base.config = model.config.at_depth(H_cycles)
    view._modules = {**model._modules, "model": base}
    view.requires_grad_(False)
    return view
