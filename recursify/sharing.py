"""Work that several processes share: each does every N-th job, and all of them get all results, in the order of the jobs.

Where a job does not depend on who does it, neither do the results, to the last digit. Floor 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from torch import distributed

Job = TypeVar("Job")
Result = TypeVar("Result")


def is_first() -> bool:
    """Whether this is the only process, or the first of several: the one that speaks."""
    return not _several() or distributed.get_rank() == 0


def in_turns(jobs: Sequence[Job], do: Callable[[Job], Result]) -> list[Result]:
    """The result of every job; where there are several processes, all of them must call this with the same jobs."""
    rank, count = (distributed.get_rank(), distributed.get_world_size()) if _several() else (0, 1)
    mine = [do(job) for job in jobs[rank::count]]
    parts: list[list[Result]] = [mine]
    if _several():
        parts = [[] for _ in range(count)]
        distributed.all_gather_object(parts, mine)
    return [parts[number % count][number // count] for number in range(len(jobs))]


def _several() -> bool:
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
