"""Which depth a step trains at: a fixed function of seed and step, whose shares are those asked for."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from recursify.training.depth import DepthSchedule


def test_shares_are_the_weights() -> None:
    schedule = DepthSchedule((1, 2, 4), (1.0, 1.0, 2.0), seed=3)
    found = Counter(schedule.at(step) for step in range(8000))
    assert set(found) == {1, 2, 4}
    assert abs(found[4] / 8000 - 0.5) < 0.03 and abs(found[1] / 8000 - 0.25) < 0.03


def test_the_same_step_has_the_same_depth_everywhere() -> None:
    first, again, other = (DepthSchedule((1, 2, 3), (1, 1, 1), seed=seed) for seed in (1, 1, 2))
    assert [first.at(step) for step in range(50)] == [again.at(step) for step in reversed(range(50))][::-1]
    assert [first.at(step) for step in range(50)] != [other.at(step) for step in range(50)]


def test_the_curriculum_opens_one_after_another() -> None:
    schedule = DepthSchedule((1, 2, 4), (1, 1, 1), opening=8)
    assert [schedule.open_at(step) for step in range(10)] == [1, 1, 1, 2, 2, 2, 3, 3, 3, 3]
    assert all(schedule.at(step) == 1 for step in range(3)) and all(schedule.at(step) < 4 for step in range(6))
    assert schedule.deepest == 4


@given(count=st.integers(1, 6), opening=st.integers(0, 50), step=st.integers(0, 100))
def test_the_curriculum_never_closes(count: int, opening: int, step: int) -> None:
    schedule = DepthSchedule(tuple(range(1, count + 1)), (1.0,) * count, opening)
    assert 1 <= schedule.open_at(step) <= schedule.open_at(step + 1) <= count
    assert schedule.open_at(opening) == count
    assert schedule.at(step) <= schedule.open_at(step)
