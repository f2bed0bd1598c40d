"""Which donor layers a network is made of, as a value: printed, compared, and stored beside the weights."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class ConversionPlan:
    """The fate of every layer of a donor.

    Args:
        donor: Hub id or folder of the donor, for the record.
        donor_layers: N, how many layers the donor has.
        prelude, loop, coda: Donor layer indices, in the order in which they run.
        layer_selection: The strategy that chose the loop; `counts` where prelude and coda counts placed it.
    """

    donor: str
    donor_layers: int
    prelude: tuple[int, ...]
    loop: tuple[int, ...]
    coda: tuple[int, ...]
    layer_selection: str

    @property
    def indices(self) -> list[int]:
        """The donor layer behind each of our layers."""
        return [*self.prelude, *self.loop, *self.coda]

    @property
    def dropped(self) -> list[int]:
        """Donor layers that go nowhere."""
        kept = set(self.indices)
        return [i for i in range(self.donor_layers) if i not in kept]

    @property
    def keeps_donor(self) -> bool:
        """Whether one plain pass runs exactly the donor's layers."""
        return self.indices == list(range(self.donor_layers))

    def fate(self, layer: int) -> str:
        """Where a donor layer goes: `prelude 0`, `L_level 2`, `coda 1` or `dropped`."""
        for part, indices in (("prelude", self.prelude), ("L_level", self.loop), ("coda", self.coda)):
            if layer in indices:
                return f"{part} {indices.index(layer)}"
        return "dropped"

    def to_dict(self) -> dict[str, Any]:
        """JSON types; `from_dict` is the inverse."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ConversionPlan:
        fields: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in data.items()}
        return cls(**fields)
