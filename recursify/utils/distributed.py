"""Work that several processes share: each does every N-th job, and all of them get all results, in the order of the jobs.

Where a job does not depend on who does it, neither do the results, to the last digit. What is for one process alone, such as filling a
cache that all of them read, it does while the others wait.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from torch import distributed

Job = TypeVar("Job")
Result = TypeVar("Result")


def is_first() -> bool:
    """Whether this is the only process, or the first of several: the one that speaks."""
    return not _several() or distributed.get_rank() == 0


def map_jobs(jobs: Sequence[Job], do: Callable[[Job], Result]) -> list[Result]:
    """The result of every job; where there are several processes, all of them must call this with the same jobs."""
    rank, count = (distributed.get_rank(), distributed.get_world_size()) if _several() else (0, 1)
    mine = [do(job) for job in jobs[rank::count]]
    parts: list[list[Result]] = [mine]
    if _several():
        parts = [[] for _ in range(count)]
        distributed.all_gather_object(parts, mine)
    return [parts[number % count][number // count] for number in range(len(jobs))]


@contextmanager
def one_process_first() -> Iterator[None]:
    """In three waves: the first process of all, the first of every other node, the rest.

    Where the cache is shared, the first makes all and the others find it; where each node has a cache of its own, each node's first does.
    (accelerate's ``PartialState`` has a context manager of this kind, but takes processes on CPUs for one unless told otherwise.)
    """
    if not _several():
        yield
        return
    rank = distributed.get_rank()
    wave = 0 if rank == 0 else 1 if os.environ.get("LOCAL_RANK", str(rank)) == "0" else 2
    for _ in range(wave):
        distributed.barrier()
    try:
        yield
    finally:  # after an error, too: the others meet the same one, instead of waiting for this process until the timeout
        for _ in range(2 - wave):
            distributed.barrier()


def _several() -> bool:
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
