"""Stages of the demo: timed, announced at their start, ended by Ctrl-C."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from ..training.fitting import FitResult


class Clock:
    """Numbers the stages and records their seconds."""

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


def raise_if_interrupted(fitted: FitResult) -> FitResult:
    """The result of a run; KeyboardInterrupt if Ctrl-C stopped it, since a partial run has nothing to report."""
    if fitted.interrupted:
        raise KeyboardInterrupt
    return fitted
