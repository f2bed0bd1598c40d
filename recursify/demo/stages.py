"""Timed stages of a long job, each announced when it begins."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Clock:
    """Counts the stages and keeps their seconds."""

    def __init__(self) -> None:
        self.stages: list[tuple[str, float]] = []

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        print(f"\n[{len(self.stages) + 1}] {name}", flush=True)
        start = time.monotonic()
        yield
        self.stages.append((name, time.monotonic() - start))

    @property
    def seconds(self) -> float:
        return sum(seconds for _, seconds in self.stages)
