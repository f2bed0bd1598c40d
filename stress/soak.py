"""A server under clients of every kind, good and bad, for as long as is given: texts stay right, and nothing grows.

`recursify serve` runs in a process of its own with a small model. A quiet one is asked for every text first. Then visitors come
(`visitors.py`), each action a case. In the first fifth of the time the server is stopped under them by SIGTERM and started again on the
same port, up to `RESTARTS` times: whoever was being answered must get all, or be told. The last server lives on for the other four fifths,
of which the first tenth is to warm up: what it needs, and how long it takes, is compared between the tenth that follows and the last one.
At the end, when all visitors have gone, it must be as idle as it was before the first of them.

A case that is done again by its number is what a visitor did, not what happened in the server meanwhile.
"""

from __future__ import annotations

import contextlib
import math
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent import futures
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import psutil

from benchmarks.serving import DEPTHS, GROWTH_BOUND, PROMPTS, WRITTEN, Text, converted, gauges, resources, serving, settled, stop, total
from stress.part import Outcome
from stress.visitors import LATE, PATIENCE, TOKENS, Stops, Visitor

VISITORS = 24
RESTARTS = 3
BETWEEN_RESTARTS = 10.0  # seconds at least
JUDGED = 60.0  # seconds of load at least, for a tenth of them to say something
# Of the figure of the last tenth over that of the first. Times are those of a machine that others use, too; and of the others, what
# visitors do at the moment decides, by chance, on more than a few.
BOUNDS = {
    "resident": 1 + GROWTH_BOUND, "threads": 1.0, "files": 1.5, "blocks": 1.5, "seconds of an answer": 2.0, "CPU seconds of a token": 1.5,
}  # fmt: skip
_MEDIANS = ("resident", "threads", "files", "blocks")


@dataclass(frozen=True)
class Sample:
    """What the server needs at a moment; `blocks` are those of the caches in use, `written` tokens and `cpu` seconds since its start."""

    at: float
    resident: int
    threads: int
    files: int
    blocks: int
    written: int
    cpu: float


def run(until: float, seed: int, first: int, most: int | None) -> Outcome:
    with tempfile.TemporaryDirectory() as folder:
        return Soak(Path(folder), until, Outcome(first)).run(seed, most)


class Soak:
    """The lives of the server, one after the other, on one port."""

    def __init__(self, folder: Path, until: float, outcome: Outcome):
        self.model, self.until, self.outcome = converted(folder), until, outcome
        self.said, self.stops, self.port = folder / "said.txt", Stops(), 0

    def run(self, seed: int, most: int | None) -> Outcome:
        with contextlib.ExitStack() as crowds:
            with self._life() as (url, process):
                right = texts(url)
                settled(url)  # the connections of those texts are closed
                before, now = resources(process), time.monotonic()
                crowd = crowds.enter_context(Crowd(url, right, self.outcome, seed, most, self.stops))
                restarts = 0 if most is not None else max(0, min(RESTARTS, int((self.until - now) / 5 / BETWEEN_RESTARTS)))
                self.outcome.notes["restarts"] = restarts
                if not restarts:
                    self._last(crowd, url, process, before)
                crowd.wait((self.until - now) / 5 / RESTARTS if restarts else 0)
            for life in range(1, restarts + 1):
                with self._life() as (url, process):
                    if life == restarts:
                        self._last(crowd, url, process, before)
                    else:
                        crowd.wait((self.until - now) / 5 / RESTARTS)
        return self.outcome

    @contextmanager
    def _life(self) -> Iterator[tuple[str, psutil.Popen]]:
        """A server from its start to its end by SIGTERM, of which it must say nothing, as of nothing else."""
        with (
            open(self.said, "w", encoding="utf-8") as said,
            serving(self.model, "--request_timeout", str(PATIENCE), port=self.port, stderr=said) as (url, process),
        ):
            self.port, start = int(url.rsplit(":", 1)[1]), self.said.stat().st_size
            self.stops.up()
            yield url, process
            self.stops.stopped()
            try:
                stop(process)
            except (AssertionError, psutil.TimeoutExpired) as error:
                self._fault("SIGTERM", "exit status 0 within a minute", f"{error} ({process.poll()})")
        if words := self.said.read_bytes()[start:].decode():
            self._fault("the life of a server", "nothing on stderr", words[-4000:])

    def _last(self, crowd: Crowd, url: str, process: psutil.Popen, before: dict[str, int]) -> None:
        """The life that is judged, with its end in silence."""
        samples = []
        while time.monotonic() < self.until and not crowd.wait(1.0):
            samples.append(sampled(url, process))
        crowd.leave()
        lasted = samples[-1].at - samples[0].at if samples else 0.0
        self.outcome.notes |= {"minutes of the last life": round(lasted / 60, 1), "answers timed": len(crowd.times)}
        if lasted > JUDGED:
            found = drift(samples, crowd.times)
            bounded = {name: [*ends, BOUNDS[name]] for name, ends in found.items()}
            self.outcome.notes["first and last tenth, and the bound of their ratio"] = bounded
            for name in grown(found):
                self._fault(name, f"at most {BOUNDS[name]} times as much in the last tenth", found[name])
        for fault in not_idle(url, process, before):
            self._fault(*fault)

    def _fault(self, what: str, expected: Any, found: Any) -> None:
        self.outcome.faults.append({"case": self.outcome.next, "what": what, "expected": expected, "found": found})


class Crowd:
    """Visitors in threads of their own, until they leave, or `most` cases are done; at least one case."""

    def __init__(self, url: str, right: dict[Text, str], outcome: Outcome, seed: int, most: int | None, stops: Stops):
        self.outcome, self.seed, self.stops = outcome, seed, stops
        self.lock, self.closing = threading.Lock(), threading.Event()
        self.numbers = iter(range(outcome.first, sys.maxsize if most is None else outcome.first + most))
        self.visitors = [Visitor(url, right, self.closing) for _ in range(min(VISITORS, most or VISITORS))]
        self.pool = ThreadPoolExecutor(len(self.visitors))
        self.coming = [self.pool.submit(self._come, visitor) for visitor in self.visitors]

    def __enter__(self) -> Crowd:
        return self

    def __exit__(self, *error: object) -> None:
        self.leave()

    @property
    def times(self) -> list[tuple[float, float]]:
        return [each for visitor in self.visitors for each in visitor.times]

    def wait(self, seconds: float) -> bool:
        """Whether all have left; waits for it for so long. A visitor who fails is a fault of this program, and ends it."""
        done, coming = futures.wait(self.coming, timeout=seconds, return_when=futures.FIRST_EXCEPTION)
        for each in done:
            each.result()
        return not coming

    def leave(self) -> None:
        self.closing.set()
        self.wait(3 * PATIENCE)
        self.pool.shutdown()

    def _come(self, visitor: Visitor) -> None:
        while (case := self._next()) is not None:
            kind, fault = visitor.visit(self.seed, case, self.stops)
            with self.lock:
                self.outcome.add(kind, fault)
        visitor.http.close()
        visitor.crowd.close()

    def _next(self) -> int | None:
        with self.lock:
            case = next(self.numbers, None)
        return None if self.closing.is_set() and case != self.outcome.first else case


def texts(url: str) -> dict[Text, str]:
    """Every text, as a quiet server writes it."""
    found = {}
    for text in (Text(p, d, seed) for n, p in enumerate(PROMPTS) for d in DEPTHS for seed in (None, n)):
        answer = httpx.post(f"{url}/v1/completions", json=text.body(TOKENS), timeout=60).raise_for_status().json()
        found[text] = answer["choices"][0]["text"]
    return found


def sampled(url: str, process: psutil.Process) -> Sample:
    now, found, cpu = resources(process), gauges(url), process.cpu_times()
    used = total(found, "recursify_cache_blocks") - total(found, "recursify_cache_blocks_free")
    return Sample(time.monotonic(), **now, blocks=used, written=total(found, WRITTEN), cpu=cpu.user + cpu.system)


def drift(samples: list[Sample], times: list[tuple[float, float]]) -> dict[str, tuple[float, float]]:
    """Each figure of `BOUNDS` in the tenth after the first one, which is to warm up, and in the last one."""
    start, tenth = samples[0].at, (samples[-1].at - samples[0].at) / 10
    ends = [(start + tenth, start + 2 * tenth), (start + 9 * tenth, start + 10 * tenth)]
    early, late = ([each for each in samples if low <= each.at <= high] for low, high in ends)
    slow = [median([seconds for at, seconds in times if low <= at <= high] or [math.nan]) for low, high in ends]
    found = {name: tuple(median(getattr(each, name) for each in part) for part in (early, late)) for name in _MEDIANS}
    per_token = tuple((part[-1].cpu - part[0].cpu) / max(part[-1].written - part[0].written, 1) for part in (early, late))
    return {**found, "seconds of an answer": (slow[0], slow[1]), "CPU seconds of a token": per_token}


def grown(found: dict[str, tuple[float, float]]) -> list[str]:
    """The figures whose last tenth is out of bounds."""
    return [name for name, (early, late) in found.items() if not late <= BOUNDS[name] * early]


def not_idle(url: str, process: psutil.Process, before: dict[str, int]) -> list[tuple[str, Any, Any]]:
    """What is not as before the first visitor, though the last one has left: (what, expected, found) of each."""
    end = time.monotonic() + PATIENCE + LATE
    while (wrong := list(_left(url, process, before))) and time.monotonic() < end:
        time.sleep(0.5)
    return wrong


def _left(url: str, process: psutil.Process, before: dict[str, int]) -> Iterator[tuple[str, Any, Any]]:
    found = gauges(url)
    # (expected, found); fewer threads and files than before are none that were left
    seen = {
        "running": (0, total(found, "recursify_running")),
        "queued": (0, total(found, "recursify_queued")),
        "free blocks": (total(found, "recursify_cache_blocks"), total(found, "recursify_cache_blocks_free")),
        "connections": (0, sum(each.status == psutil.CONN_ESTABLISHED for each in process.net_connections("tcp"))),
        **{what: (before[what], max(now, before[what])) for what, now in resources(process).items() if what != "resident"},
    }
    yield from ((f"{what}, when all have left", expected, now) for what, (expected, now) in seen.items() if now != expected)
