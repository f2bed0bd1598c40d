"""Small named checks: each passes, fails or is skipped by itself, with a message, and a failure or a hang of one leaves the others.

def it_adds(on: Bench) -> str:
    assert 1 + 1 == 2
    return "what was seen"

yield from outcomes("Arithmetic", {"it adds": it_adds}, bench)
"""

from __future__ import annotations

import gc
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from .case import Bench, Check, Table
from .measure import say

LIMIT = 90  # seconds of a check, which may have to compile

Named = Mapping[str, Callable[[Bench], str]]


class Skip(Exception):
    """Why a check cannot be made here."""


def outcomes(title: str, checks: Named, bench: Bench) -> Iterator[Table | Check]:
    """A table with the result of every check, and a bound on the number of those that fail."""
    rows = []
    for name, check in checks.items():
        say(f"{title}: {name}")
        rows.append(outcome(name, check, bench))
        say(f"  {rows[-1]['result']}: {rows[-1]['message']}")
    yield Table(title, rows)
    yield Check(f"{title}: checks that fail", len(failed(rows)), most=0)


def failed(rows: list[dict[str, Any]]) -> list[str]:
    """Names of the checks that failed, of the rows of any table."""
    return [row["check"] for row in rows if row.get("result") == "failed"]


def outcome(name: str, check: Callable[[Bench], str], bench: Bench) -> dict[str, Any]:
    """A row: ok, failed or skipped; how long it took; what was seen, or why not."""
    start = time.perf_counter()
    try:
        with at_most(LIMIT):
            result, message = "ok", check(bench)
    except Skip as reason:
        result, message = "skipped", str(reason)
    except Exception as error:
        result, message = "failed", f"{type(error).__name__}: {error}"
        traceback.print_exc(file=sys.stderr)
    torch._dynamo.reset()
    gc.collect()
    if bench.on_gpu:
        torch.cuda.empty_cache()
    return {"check": name, "result": result, "seconds": time.perf_counter() - start, "message": in_a_cell(message)}


def in_a_cell(text: str) -> str:
    """On one line, short, without what ends a cell of a table."""
    return " ".join(text.split()).replace("|", "/")[:300]


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raises a TimeoutError in a main thread that is still inside then; a kernel that never ends is not left by it.

    Raises:
        TimeoutError: It took longer.
    """

    def stop(*_: Any) -> None:
        raise TimeoutError(f"not done after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
