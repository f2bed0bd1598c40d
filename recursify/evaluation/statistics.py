"""Standard errors and significance tests.

    mean_and_error   of sums over windows, such as losses, with the standard error
    standard_error   the same of values that count alike
    student_p        of a mean difference and its standard error (paired t-test)
    mcnemar_p        of two counts: the questions that one model alone got right, and those that the other alone did (exact)
    written          what they say, for reading

The tests are two-sided, and exact for what they assume: differences of pieces that are independent and, for the first, normal.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


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


def format_p(p: float | None) -> str:
    """A p for reading; a dash where it is not known."""
    return "-" if p is None else "<0.0001" if p < 0.0001 else f"{p:.4f}"


def mean_and_error(sums: Tensor, counts: Tensor, per_piece: int = 1) -> tuple[float, float | None]:
    """The mean over all tokens and its standard error, which takes pieces of neighbouring windows as independent; None for one piece.

    Pieces of unequal length count by their length (a ratio estimate); of equal length, this is the standard error of the mean of means.

    Args:
        sums: `[windows]` sums over the tokens of each window.
        counts: `[windows]` tokens of each.
        per_piece: Windows that are one piece.
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
    """Of the mean of `[windows]` values that count alike; None for a single one."""
    return mean_and_error(values, torch.ones_like(values))[1]
