"""Share jobs between processes: each does every N-th job, and all get all results, in the order of the jobs.

If a job gives the same result in every process, the results do not depend on the number of processes. Work for a single process, such as
filling a shared cache, is done while the others wait.
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
    """Whether this is the only process, or rank 0, which prints."""
    return not _several() or distributed.get_rank() == 0


def map_jobs(jobs: Sequence[Job], do: Callable[[Job], Result]) -> list[Result]:
    """The result of every job. With several processes, all must call this with the same jobs."""
    rank, count = (distributed.get_rank(), distributed.get_world_size()) if _several() else (0, 1)
    mine = [do(job) for job in jobs[rank::count]]
    parts: list[list[Result]] = [mine]
    if _several():
        parts = [[] for _ in range(count)]
        distributed.all_gather_object(parts, mine)
    return [parts[number % count][number // count] for number in range(len(jobs))]


@contextmanager
def one_process_first() -> Iterator[None]:
    """Run the body in three waves: rank 0, then local rank 0 of every other node, then all other processes.

    So a cache that all nodes share is filled once, and a cache per node once per node. (accelerate's ``PartialState`` has a similar context
    manager, which by default treats several CPU processes as one.)
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
    finally:  # also after an error: otherwise the other processes would wait until the timeout
        for _ in range(2 - wave):
            distributed.barrier()


def _several() -> bool:
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
