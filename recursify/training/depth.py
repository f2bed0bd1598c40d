"""The depth of each optimizer step: sampled from the cycle choices, the same on every rank and in every resumed run.

A few counts, never a long tail: the cost of a step stays known, and both ends of what is trained are met often. The draw depends on the
seed and the number of the step alone, so there is no state to save and nothing to agree on.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class DepthSchedule:
    """The cycle count of every optimizer step.

    Args:
        choices: Cycle counts, ascending.
        weights: Relative probability of each choice.
        opening: Optimizer steps over which the curriculum adds the choices one by one, shallow ones first; 0 allows all from the start.
            (A shallow start saves compute and did no harm in arXiv 2511.07384 and 2511.08653.)
    """

    choices: Sequence[int]
    weights: Sequence[float]
    opening: int = 0
    seed: int = 0

    @property
    def deepest(self) -> int:
        return max(self.choices)

    def open_at(self, step: int) -> int:
        """Number of choices available in an optimizer step (from 0)."""
        if step >= self.opening:
            return len(self.choices)
        return 1 + step * len(self.choices) // (self.opening + 1)

    def at(self, step: int) -> int:
        """The cycle count of an optimizer step (from 0)."""
        count = self.open_at(step)
        draw = random.Random(f"{self.seed} {step}")
        return draw.choices(self.choices[:count], self.weights[:count])[0]
