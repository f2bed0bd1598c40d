"""Which depth a step trains at: a deterministic function of seed and step, with the requested weights."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from recursify.training.depth import DepthSchedule


def test_depths_are_drawn_in_proportion_to_their_weights() -> None:
    schedule = DepthSchedule((1, 2, 4), (1.0, 1.0, 2.0), seed=3)
    found = Counter(schedule.at(step) for step in range(8000))
    assert set(found) == {1, 2, 4}
    assert abs(found[4] / 8000 - 0.5) < 0.03 and abs(found[1] / 8000 - 0.25) < 0.03


def test_depth_of_a_step_is_equal_on_all_ranks() -> None:
    first, again, other = (DepthSchedule((1, 2, 3), (1, 1, 1), seed=seed) for seed in (1, 1, 2))
    assert [first.at(step) for step in range(50)] == [again.at(step) for step in reversed(range(50))][::-1]
    assert [first.at(step) for step in range(50)] != [other.at(step) for step in range(50)]


def test_curriculum_adds_depths_one_by_one() -> None:
    schedule = DepthSchedule((1, 2, 4), (1, 1, 1), curriculum_steps=8)
    assert [schedule.available_at(step) for step in range(10)] == [1, 1, 1, 2, 2, 2, 3, 3, 3, 3]
    assert all(schedule.at(step) == 1 for step in range(3)) and all(schedule.at(step) < 4 for step in range(6))
    assert schedule.deepest == 4


@given(count=st.integers(1, 6), opening=st.integers(0, 50), step=st.integers(0, 100))
def test_curriculum_never_removes_a_depth(count: int, opening: int, step: int) -> None:
    schedule = DepthSchedule(tuple(range(1, count + 1)), (1.0,) * count, opening)
    assert 1 <= schedule.available_at(step) <= schedule.available_at(step + 1) <= count
    assert schedule.available_at(opening) == count
    assert schedule.at(step) <= schedule.available_at(step)


def test_without_a_curriculum_the_first_step_draws_from_all() -> None:
    assert DepthSchedule((1, 2, 4), (1, 1, 1)) == DepthSchedule((1, 2, 4), (1, 1, 1), curriculum_steps=0, seed=0)
    assert {DepthSchedule((1, 2, 4), (1, 1, 1), seed=seed).at(0) for seed in range(50)} == {1, 2, 4}


def test_curriculum_renormalises_the_weights_of_available_depths() -> None:
    """The third opens last: until then the first two are drawn as 1 to 9, however rare or frequent the third is to be."""
    schedule = DepthSchedule((1, 2, 4), (1.0, 9.0, 30.0), curriculum_steps=6000, seed=5)
    middle = [schedule.at(step) for step in range(6001) if schedule.available_at(step) == 2]
    found = Counter(middle)
    assert len(middle) == 2000 and set(found) == {1, 2} and 0.07 < found[1] / len(middle) < 0.13
    after = Counter(schedule.at(step) for step in range(6000, 8000))
    assert 0.7 < after[4] / 2000 < 0.8 and after[2] > 3 * after[1] > 0


def test_curriculum_stages_have_equal_length() -> None:
    assert [DepthSchedule((1, 2), (1, 1), curriculum_steps=4).available_at(step) for step in range(6)] == [1, 1, 1, 2, 2, 2]
    assert [DepthSchedule((1, 2), (1, 1), curriculum_steps=5).available_at(step) for step in range(7)] == [1, 1, 1, 2, 2, 2, 2]
    assert [DepthSchedule((1, 2, 3, 4), (1,) * 4, curriculum_steps=1).available_at(step) for step in range(3)] == [1, 4, 4]


def test_drawn_depths_are_stable_across_versions() -> None:
    """Also from one version to the next, which may go on with a run of the one before it."""
    schedule = DepthSchedule((1, 2, 4), (1, 1, 2), seed=42)
    assert [schedule.at(step) for step in range(12)] == [2, 1, 2, 2, 1, 4, 1, 4, 1, 4, 2, 2]
