"""One process does all jobs, in order; several are tested in test_evaluation.py."""

from __future__ import annotations

from typing import Any

import pytest
from torch import distributed

from recursify.utils.distributed import is_first, map_jobs


def test_single_process() -> None:
    assert is_first() and map_jobs(range(5), lambda job: job * job) == [0, 1, 4, 9, 16] and map_jobs([], str) == []


@pytest.mark.parametrize("count", [2, 3, 7])
def test_every_process_gets_all_results_in_the_order_of_the_jobs(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[list[int]] = []

    def gather(parts: list[Any], mine: list[int]) -> None:
        """Simulated results of the other processes."""
        done.append(mine)
        parts[:] = [[job * job for job in range(5)[rank::count]] for rank in range(count)]
        assert parts[1] == mine

    for name, value in (("is_initialized", lambda: True), ("get_world_size", lambda: count), ("get_rank", lambda: 1)):
        monkeypatch.setattr(distributed, name, value)
    monkeypatch.setattr(distributed, "all_gather_object", gather)
    assert map_jobs(range(5), lambda job: job * job) == [0, 1, 4, 9, 16]
    assert not is_first() and done == [[job * job for job in range(1, 5, count)]]
