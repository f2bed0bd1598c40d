"""Other anchors for our loop: what is mixed into its input, and how much of it; all else stays ours.

    fixed 0.9     A + B is 0.9 at every channel, as large as ours may become; only how it is divided is learnt
    fixed 1.0     A + B is 1: the prelude's output e is no longer in the mixture
    orthogonal    of e only what is orthogonal to the mean of the states, after xLLM-Loop, part II (arXiv 2610.06833)
    history       z_H of the cycle before in the place of e, after "What makes recurrence effective" (arXiv 2609.36636)

With `fixed 1.0` and `history` the loop reads e at its start alone. The first application is the donor's own with all of them; that the
donor is there at every depth, at gains of 0, holds for ours alone.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from recursify.network.configuration_recursive_llm import GAIN_SUM
from recursify.network.modeling_recursive_llm import AnchoredInjection, Recursion

Gains = tuple[Tensor, Tensor]


class OtherAnchor(Recursion):
    """Our loop; `mix` and `_gains` are what may differ."""

    def __init__(self, config: Any):
        super().__init__(config, ())

    def mix(self, e: Tensor, z_H: Tensor, own: Tensor, other: Tensor, gains: Gains) -> Tensor:
        return AnchoredInjection.mix(e, own, other, gains)

    def _advance_one(self, e: Tensor, z_L: Tensor, z_H: Tensor, block: Any, n: int, L_cycles: int, gains: Any) -> tuple[Tensor, Tensor]:
        of_H = n % (L_cycles + 1) == L_cycles
        own, other = (z_H, z_L) if of_H else (z_L, z_H)
        z = block(self.mix(e, z_H, own, other, gains[of_H]), n)
        return (z_L, z) if of_H else (z, z_H)


class Fixed(OtherAnchor):
    """The gains that are learnt, stretched to a given sum at every channel."""

    total = GAIN_SUM

    def _gains(self, e: Tensor) -> Any:
        pairs = super()._gains(e)
        return [[gain * self.total / sum(each.abs() for each in pair).clamp(min=1e-4) for gain in pair] for pair in pairs]


class FixedAtOne(Fixed):
    total = 1.0


class Orthogonal(OtherAnchor):
    """x = A * own + B * other + (1 - A - B) * (m + what of e is orthogonal to m), where m = (own + other) / 2."""

    def mix(self, e: Tensor, z_H: Tensor, own: Tensor, other: Tensor, gains: Gains) -> Tensor:
        A, B = gains
        mean = (own + other) / 2
        along = (e * mean).sum(-1, keepdim=True) / mean.square().sum(-1, keepdim=True).clamp(min=1e-6)
        return A * own + B * other + (1 - A - B) * (mean + e - along * mean)


class History(OtherAnchor):
    def mix(self, e: Tensor, z_H: Tensor, own: Tensor, other: Tensor, gains: Gains) -> Tensor:
        return AnchoredInjection.mix(z_H, own, other, gains)


ANCHORS: dict[str, type[OtherAnchor]] = {"fixed 0.9": Fixed, "fixed 1.0": FixedAtOne, "orthogonal": Orthogonal, "history": History}
