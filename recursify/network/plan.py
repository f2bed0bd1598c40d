"""Which donor layers a recursive model is made of, and the conversion record in its configuration.

config.conversion = {"donor": ..., "revision": ..., "plan": {"donor_layers": ..., "prelude": [...], ...}, further notes}
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

_MOST_LAYERS = 10_000  # of a donor: any more is a damaged number


@dataclass(frozen=True)
class ConversionPlan:
    """Where each layer of a donor goes.

    Args:
        donor: Hub id or folder of the donor.
        donor_layers: N, the number of layers of the donor.
        prelude, loop, coda: Donor layer indices, in the order in which they run.
        layer_selection: How the loop was chosen; `counts` where the numbers of prelude and coda layers place it.
    """

    donor: str
    donor_layers: int
    prelude: tuple[int, ...]
    loop: tuple[int, ...]
    coda: tuple[int, ...]
    layer_selection: str

    @property
    def indices(self) -> list[int]:
        """The donor layer of each layer of the recursive model."""
        return [*self.prelude, *self.loop, *self.coda]

    @property
    def dropped(self) -> list[int]:
        """Donor layers that the recursive model does not have."""
        kept = set(self.indices)
        return [i for i in range(self.donor_layers) if i not in kept]

    @property
    def keeps_donor(self) -> bool:
        """Whether one plain pass runs exactly the donor's layers."""
        return self.indices == list(range(self.donor_layers))

    def place(self, layer: int) -> str:
        """Where a donor layer goes: `prelude 0`, `L_level 2`, `coda 1` or `dropped`."""
        for part, indices in (("prelude", self.prelude), ("L_level", self.loop), ("coda", self.coda)):
            if layer in indices:
                return f"{part} {indices.index(layer)}"
        return "dropped"

    def to_dict(self) -> dict[str, Any]:
        """JSON types. `from_dict` is the inverse."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ConversionPlan:
        fields: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in data.items()}
        plan = cls(**fields)
        plan._check()
        return plan

    def _check(self) -> None:
        """Raise a TypeError for a field of another type or out of range."""
        count = self.donor_layers
        if not _is_count(count, _MOST_LAYERS):
            raise TypeError(f"donor_layers: expected a whole number of 0 to {_MOST_LAYERS:,}, got {count!r}")
        for name in ("prelude", "loop", "coda"):
            indices = getattr(self, name)
            if not isinstance(indices, tuple) or not all(_is_count(index, count - 1) for index in indices):
                raise TypeError(f"{name}: expected layers of the donor, from 0 to {count - 1}, got {indices!r}")
        for name in ("donor", "layer_selection"):
            if not isinstance(getattr(self, name), str):
                raise TypeError(f"{name}: expected text, got {getattr(self, name)!r}")


def _is_count(value: Any, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= most


def conversion_record(plan: ConversionPlan | None, notes: Mapping[str, Any] | None = None) -> dict[str, Any] | None:
    """The value of `config.conversion` for a plan and further notes (JSON types); None for neither."""
    record = dict(notes or {})
    if plan is not None:
        fields = plan.to_dict()
        record |= {"donor": fields.pop("donor"), "plan": fields}
    return record or None


def plan_of(config: Any) -> ConversionPlan | None:
    """The plan in the conversion record of a configuration; None where it has none.

    Raises:
        ValueError: A damaged record.
    """
    record = config.conversion or {}
    if record.get("plan") is None:
        return None
    try:
        return ConversionPlan.from_dict({"donor": record["donor"], **record["plan"]})
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"conversion: expected donor and plan of the conversion ({error}), got {record}; set it to null to load without"
        ) from error


def notes_of(config: Any) -> dict[str, Any]:
    """The conversion record of a configuration without its plan."""
    return {name: value for name, value in (config.conversion or {}).items() if name != "plan"}
