"""The number of cycles of each optimizer step: sampled from the cycle choices, the same on every rank and in a resumed run.

A few counts rather than a long-tailed distribution: the cost of a step stays bounded, and the shallowest and deepest counts are sampled
often. The sample depends only on the seed and the step number, so there is no state to save or to synchronise.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class DepthSchedule:
    """Cycle counts and their sampling weights.

    Args:
        choices: Cycle counts, ascending.
        weights: Relative sampling weights.
        curriculum_steps: Optimizer steps over which the choices become available one after another, shallow ones first; 0 makes all
            available at once. (A shallow start saved compute without loss of quality in arXiv 2511.07384 and 2511.08653.)
    """

    choices: Sequence[int]
    weights: Sequence[float]
    curriculum_steps: int = 0
    seed: int = 0

    @property
    def deepest(self) -> int:
        return max(self.choices)

    def available_at(self, step: int) -> int:
        """Number of choices that can be sampled at an optimizer step, counted from 0."""
        if step >= self.curriculum_steps:
            return len(self.choices)
        return 1 + step * len(self.choices) // (self.curriculum_steps + 1)

    def at(self, step: int) -> int:
        """The cycle count of an optimizer step, counted from 0."""
        count = self.available_at(step)
        generator = random.Random(f"{self.seed} {step}")
        return generator.choices(self.choices[:count], self.weights[:count])[0]
