"""Is a difference more than chance? Two tests of pairs: the same text, or the same questions, given to two models.

    student_p    of a mean difference and its standard error (paired t-test)
    mcnemar_p    of two counts: the questions that one model alone got right, and those that the other alone did (exact)
    written      what they say, for reading

Both are two-sided, and exact for what they assume: differences of pieces that are independent and, for the first, normal. Floor 0.
"""

from __future__ import annotations

import math


def student_p(difference: float, error: float, pieces: int) -> float:
    """How likely a mean as far from 0 as this one is where there is no difference, by Student's t with `pieces - 1` degrees of freedom.

    Args:
        difference: Mean of the differences of pairs.
        error: Its standard error.
        pieces: At least 2, the number of pairs.
    """
    if error == 0:
        return 1.0 if difference == 0 else 0.0
    freedom = pieces - 1
    angle = math.atan(abs(difference) / error / math.sqrt(freedom))
    # Abramowitz and Stegun 26.7.3 and 26.7.4: a finite sum of powers of cos(angle), for any whole number of degrees of freedom
    odd = freedom % 2
    term, total = (math.cos(angle) if odd else 1.0), 0.0
    for power in range(odd, freedom - 1, 2):
        total += term
        term *= (power + 1) / (power + 2) * math.cos(angle) ** 2
    within = 2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total
    return min(1.0, max(0.0, 1 - within))


def mcnemar_p(ours: int, theirs: int) -> float:
    """How likely a split as uneven as this one is where each question is as likely to fall to the one model as to the other.

    Args:
        ours, theirs: Questions that only the one model, or only the other, got right. Those that both or neither got right say nothing.
    """
    count, term, tail = ours + theirs, 1, 0
    for number in range(min(ours, theirs) + 1):
        tail += term  # term is "count choose number"
        term = term * (count - number) // (number + 1)
    return min(1.0, 2 * tail / 2**count)


def written(p: float | None) -> str:
    """A p for reading; a dash where it is not known."""
    return "-" if p is None else "<0.0001" if p < 0.0001 else f"{p:.4f}"
