"""The result of a probe: what looping costs before training, by block, and the conversions that loop the best blocks."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ..utils.tables import table

AUTO_GAIN = 0.5  # at which `--layer_selection auto` runs a block twice
CHOSEN = {"cheapest": "the cheapest", "auto": "the choice of auto"}


@dataclass(frozen=True)
class ProbedBlock:
    """A block of the donor's layers.

    Args:
        first, last: Its layers, from 0, both included.
        increase: Gain -> loss with the block looped, less the donor's, in nats per token.
        divergence: KL divergence of the next token from the donor's with the block run twice at gain 0.5, in nats: what
            `--layer_selection auto` goes by.
    """

    first: int
    last: int
    increase: dict[float, float]
    divergence: float

    @property
    def length(self) -> int:
        return self.last - self.first + 1

    @property
    def mean(self) -> float:
        """Over the gains."""
        return sum(self.increase.values()) / len(self.increase)


@dataclass(frozen=True)
class ProbeReport:
    """What looping costs before training, by block.

    Args:
        source: The flags of `recursify convert` that name the donor.
        layers: Of the donor.
        loss: Of the donor, in nats per token.
        tokens: That the losses are means over.
        H_cycles, L_cycles: Of the loops.
    """

    donor: str
    source: str
    layers: int
    loss: float
    tokens: int
    H_cycles: int
    L_cycles: int
    gains: tuple[float, ...]
    blocks: tuple[ProbedBlock, ...]

    @property
    def lengths(self) -> list[int]:
        return sorted({block.length for block in self.blocks})

    @property
    def applications(self) -> int:
        """How often a block is run."""
        return self.H_cycles * (self.L_cycles + 1)

    def cheapest(self, length: int) -> ProbedBlock:
        """The block of that length with the lowest loss, as a mean over the gains."""
        return min((block for block in self.blocks if block.length == length), key=lambda block: block.mean)

    def auto(self, length: int) -> ProbedBlock:
        """The block that `--layer_selection auto` chooses on this text."""
        return min((block for block in self.blocks if block.length == length), key=lambda block: block.divergence)

    @property
    def choices(self) -> list[ProbedBlock]:
        """Of each length the cheapest block, and the one that auto chooses if it is another."""
        pairs = [(self.cheapest(length), self.auto(length)) for length in self.lengths]
        return [block for cheapest, auto in pairs for block in ([cheapest] if cheapest is auto else [cheapest, auto])]

    def marks(self, block: ProbedBlock) -> list[str]:
        """Who chooses a block: cheapest, auto, both or neither."""
        chosen = {"cheapest": self.cheapest(block.length), "auto": self.auto(block.length)}
        return [word for word, other in chosen.items() if other is block]

    def command(self, block: ProbedBlock) -> str:
        """The conversion that loops a block, with the cycles that were measured."""
        place = f" --prelude_layers {block.first}" if block.first else f" --coda_layers {self.layers - block.length}"
        place = place if block.length < self.layers else ""
        loop = f"--L_layers {block.length} --H_cycles {self.H_cycles} --L_cycles {self.L_cycles}"
        return f"recursify convert {self.source} --keep_donor{place} {loop}"

    def to_dict(self) -> dict[str, Any]:
        """JSON types."""
        blocks = [asdict(block) | {"increase": {f"{gain:g}": value for gain, value in block.increase.items()}} for block in self.blocks]
        best = [
            {"length": n, "cheapest": self._choice(self.cheapest(n)), "auto": self._choice(self.auto(n))} for n in self.lengths
        ]  # fmt: skip
        return {
            "donor": self.donor, "layers": self.layers, "loss": self.loss, "tokens": self.tokens, "H_cycles": self.H_cycles,
            "L_cycles": self.L_cycles, "gains": list(self.gains), "blocks": blocks, "best": best,
        }  # fmt: skip

    def _choice(self, block: ProbedBlock) -> dict[str, Any]:
        return {"first": block.first, "last": block.last, "mean_increase": block.mean, "command": self.command(block)}

    def render(self) -> str:
        """The same as text."""
        lines = [
            f"{self.donor}: {self.loss:.4f} nats per token on {self.tokens:,} tokens",
            f"Nats more with a block looped, by gain (H_cycles {self.H_cycles}, L_cycles {self.L_cycles}: it is run {self.applications} "
            "times); nothing is trained",
        ]
        for length in self.lengths:
            lines += ["", _layers(length), *self._table(length)]
        lines += ["", "Where to loop: the cheapest block of each length, as a mean over the gains, and the one that auto chooses"]
        for block in self.choices:
            marks = " and ".join(CHOSEN[mark] for mark in self.marks(block))
            lines += ["", f"{_layers(block.length)}, {block.first}..{block.last}, {block.mean:+.4f}, {marks}:", f"  {self.command(block)}"]
        return "\n".join(lines)

    def _table(self, length: int) -> list[str]:
        rows = [
            (
                f"{block.first}..{block.last}", *(f"{block.increase[gain]:+.4f}" for gain in self.gains), f"{block.divergence:.4f}",
                ", ".join(self.marks(block)),
            )
            for block in self.blocks
            if block.length == length
        ]  # fmt: skip
        return table(("layers", *(f"gain {gain:g}" for gain in self.gains), "KL of auto", ""), rows)


def _layers(length: int) -> str:
    return f"{length} {'layer' if length == 1 else 'layers'}"
