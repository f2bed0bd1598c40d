"""Two paired tests, against tables of textbooks and sums by hand."""

from __future__ import annotations

import math
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recursify.evaluation.statistics import format_p, mcnemar_p, student_p


@pytest.mark.parametrize(
    ("freedom", "t", "p"),
    [(1, 12.706, 0.05), (2, 4.303, 0.05), (3, 3.182, 0.05), (10, 2.228, 0.05), (10, 3.169, 0.01), (29, 2.045, 0.05), (120, 2.617, 0.01)],
)
def test_student_p_equals_published_tables(freedom: int, t: float, p: float) -> None:
    assert student_p(-0.1 * t, 0.1, freedom + 1) == pytest.approx(p, rel=2e-3)


def test_student_p_approaches_the_normal_distribution() -> None:
    assert student_p(1.5, 1.0, 100_000) == pytest.approx(math.erfc(1.5 / math.sqrt(2)), rel=1e-4)


def test_student_p_without_variance() -> None:
    assert student_p(0.0, 0.0, 5) == 1.0 and student_p(0.1, 0.0, 5) == 0.0 and student_p(0.0, 0.1, 5) == 1.0


@given(st.floats(0, 50), st.floats(0, 50), st.integers(2, 400))
def test_student_p_decreases_with_distance(one: float, other: float, pieces: int) -> None:
    near, far = sorted((one, other))
    assert 0 <= student_p(far, 1.0, pieces) <= student_p(near, 1.0, pieces) + 1e-12 <= 1 + 1e-12


@settings(deadline=None)  # the first one imports scipy
@given(st.floats(-30, 30), st.floats(1e-3, 10), st.integers(2, 60))
def test_student_p_equals_scipy(difference: float, error: float, pieces: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    assert student_p(difference, error, pieces) == pytest.approx(2 * stats.t.sf(abs(difference) / error, pieces - 1), abs=1e-9)


@settings(deadline=None)
@given(st.integers(0, 40), st.integers(0, 40))
def test_mcnemar_equals_scipys_binomial_test(ours: int, theirs: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    wanted = stats.binomtest(ours, ours + theirs).pvalue if ours + theirs else 1.0
    assert mcnemar_p(ours, theirs) == pytest.approx(wanted)


@pytest.mark.parametrize(("ours", "theirs"), product(range(5), range(5)))
def test_mcnemar_by_hand(ours: int, theirs: int) -> None:
    """All outcomes of n coin flips, of which those count that are at least as uneven."""
    falls = [sum(coins) for coins in product((0, 1), repeat=ours + theirs)]
    uneven = [heads for heads in falls if abs(2 * heads - len(range(ours + theirs))) >= abs(ours - theirs)]
    assert mcnemar_p(ours, theirs) == pytest.approx(len(uneven) / len(falls))


def test_mcnemar_of_many() -> None:
    """More coins than a float has powers of 2 for; near the normal approximation with its correction."""
    assert mcnemar_p(1000, 1100) == pytest.approx(math.erfc(99 / math.sqrt(2100) / math.sqrt(2)), rel=1e-2)
    assert mcnemar_p(3000, 0) == 0.0


def test_format_p() -> None:
    assert [format_p(p) for p in (None, 0.00001, 0.0123, 1.0)] == ["-", "<0.0001", "0.0123", "1.0000"]
    assert [format_p(p) for p in (0.0001, 0.0005, 0.00009999)] == ["0.0001", "0.0005", "<0.0001"]
