"""Standard errors and significance tests.

    mean_and_error   of sums over windows, such as losses, with the standard error
    standard_error   the same of values that count alike
    student_p        of a mean difference and its standard error (paired t-test)
    mcnemar_p        of two counts: the questions that one model alone got right, and those that the other alone did (exact)
    format_p         a p-value for reading
    verdict          whether a difference is significant, and which way it goes

The tests are two-sided, and exact for what they assume: differences of pieces that are independent and, for the first, normal.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

SIGNIFICANT = 0.05  # a difference is called one where p is below


def student_p(difference: float, error: float, pieces: int) -> float:
    """Two-sided p-value of a paired t-test with `pieces - 1` degrees of freedom.

    Args:
        difference: Mean of the paired differences.
        error: Its standard error.
        pieces: Number of pairs, at least 2.
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
    """Two-sided p-value of McNemar's exact test.

    Args:
        ours, theirs: Number of questions that only the one or only the other model answered right; concordant ones do not count.
    """
    count, term, tail = ours + theirs, 1, 0
    for number in range(min(ours, theirs) + 1):
        tail += term  # term is binom(count, number)
        term = term * (count - number) // (number + 1)
    return min(1.0, 2 * tail / 2**count)


def format_p(p: float | None) -> str:
    """Format a p-value; a dash for None."""
    return "-" if p is None else "<0.0001" if p < 0.0001 else f"{p:.4f}"


def verdict(difference: float, p: float | None, *, less_is_better: bool) -> str | None:
    """`better` or `worse`; None where the difference is not significant, or where that is not known (p None)."""
    if p is None or p >= SIGNIFICANT:
        return None
    return "better" if (difference < 0) == less_is_better else "worse"


def mean_and_error(sums: Tensor, counts: Tensor, per_piece: int = 1) -> tuple[float, float | None]:
    """The mean over all tokens and its standard error over independent pieces of adjacent windows; None for one piece.

    Pieces of unequal length are weighted by length (a ratio estimator); for equal lengths it is the standard error of the mean of means.

    Args:
        sums: `[windows]` sums over the tokens of a window.
        counts: `[windows]` numbers of tokens.
        per_piece: Windows per piece.
    """
    total, tokens = sums.double().sum().item(), counts.double().sum().item()
    mean = total / tokens
    pieces = torch.stack([sums.double(), counts.double()]).split(per_piece, dim=1)
    if len(pieces) == 1:
        return mean, None
    by_piece = torch.stack([piece.sum(dim=1) for piece in pieces], dim=1)
    off = by_piece[0] - mean * by_piece[1]
    return mean, math.sqrt(len(pieces) / (len(pieces) - 1) * off.square().sum().item()) / tokens


def standard_error(values: Tensor) -> float | None:
    """Standard error of the mean of `[n]` values; None for a single one."""
    return mean_and_error(values, torch.ones_like(values))[1]
