"""The parts of a model and its cost per token, from the configuration alone.

The unit of cost is the layer application: one transformer layer, applied to one token.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..checkpoints import checkpoint
from ..checkpoints.donor import open_donor
from ..checkpoints.loading import is_recursive_checkpoint
from ..network.configuration_recursive_llm import RecursiveLLMConfig
from ..network.plan import ConversionPlan, notes_of, plan_of
from ..network.size import parameters_by_part, slot_bytes
from ..utils.tables import table
from .settings import InspectSettings


@dataclass(frozen=True)
class Inspection:
    """Parts and cost of a recursive model.

    Args:
        config: Without the conversion record, whose parts are `plan` and `notes`.
        parameters: Part -> number of parameters; a tied head counts 0.
        applications: H_cycles -> layer applications per token, at the configuration's L_cycles.
        donor_applications: Layer applications per token of the donor; None without a plan.
        slot_bytes: Bytes of keys and values of one cache slot, per token of context, at two bytes a number.
    """

    config: dict[str, Any]
    plan: ConversionPlan | None
    notes: dict[str, Any]
    parameters: dict[str, int]
    applications: dict[int, int]
    donor_applications: int | None
    slot_bytes: int

    @property
    def total_parameters(self) -> int:
        return sum(self.parameters.values())

    @property
    def cache_slots(self) -> dict[str, dict[int, int]]:
        """Cache policy -> H_cycles -> slots: one per layer application, or one per layer."""
        layers = sum(self.config[f"{part}_layers"] for part in ("prelude", "L", "coda"))
        return {"full": self.applications, "last": dict.fromkeys(self.applications, layers)}

    def to_dict(self) -> dict[str, Any]:
        """JSON types."""
        return {
            "config": self.config,
            "plan": None if self.plan is None else self.plan.to_dict(),
            "notes": self.notes,
            "parameters": {**self.parameters, "total": self.total_parameters},
            "layer_applications_per_token": {str(cycles): cost for cycles, cost in self.applications.items()},
            "donor_layer_applications_per_token": self.donor_applications,
            "cache_bytes_per_token": {
                policy: {str(cycles): slots * self.slot_bytes for cycles, slots in of.items()} for policy, of in self.cache_slots.items()
            },
        }

    def render(self) -> str:
        """The same as text."""
        c = self.config
        lines = [f"{c['model_type']}: hidden_size={c['hidden_size']}, vocab_size={c['vocab_size']}, injection={c['injection']}"]
        lines += [f"  H_cycles={c['H_cycles']}, L_cycles={c['L_cycles']}, L_layers={c['L_layers']}", ""]
        if self.plan is not None:
            revision = f", revision {self.notes['revision']}" if self.notes.get("revision") else ""
            lines += [f"donor {self.plan.donor} ({self.plan.donor_layers} layers{revision}), selection {self.plan.layer_selection}"]
            lines += [f"  layer {i:>3}  ->  {self.plan.place(i)}" for i in range(self.plan.donor_layers)]
            lines += [""]
        lines += [*_parameter_lines(self.parameters), "", "cost per token; the KV cache in kB at two bytes a number, by --cache_policy"]
        rows: list[tuple[object, ...]] = []
        for cycles, cost in self.applications.items():
            ratio = f"{cost / self.donor_applications:.2f}" if self.donor_applications else "-"
            full, last = (self._kilobytes(of[cycles]) for of in self.cache_slots.values())
            rows.append((cycles, cost, ratio, full, last, "<- this checkpoint" if cycles == c["H_cycles"] else ""))
        if self.donor_applications:
            rows.append(("donor", self.donor_applications, "1.00", self._kilobytes(self.donor_applications)))
        head = ("H_cycles", "layer applications", "x donor", "full", "last", "")
        return "\n".join([*lines, *(f"  {line}" for line in table(head, rows))])

    def _kilobytes(self, slots: int) -> str:
        return f"{slots * self.slot_bytes / 1e3:,.1f}"


@dataclass(frozen=True)
class PlainInspection:
    """Parts and cost of a plain model: every layer is applied once and has one cache slot.

    Args:
        config: Of the model.
        parameters: Part -> number of parameters; a tied head counts 0.
        layers: Layer applications per token.
        slot_bytes: As of `Inspection`.
    """

    config: dict[str, Any]
    parameters: dict[str, int]
    layers: int
    slot_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """JSON types."""
        return {
            "config": self.config,
            "plan": None,
            "parameters": {**self.parameters, "total": sum(self.parameters.values())},
            "layer_applications_per_token": self.layers,
            "cache_bytes_per_token": self.layers * self.slot_bytes,
        }

    def render(self) -> str:
        """The same as text."""
        c = self.config
        lines = [f"{c['model_type']}, a plain model: hidden_size={c['hidden_size']}, vocab_size={c['vocab_size']}, no cycles", ""]
        cost = f"{self.layers} layer applications, {self.layers * self.slot_bytes / 1e3:,.1f} kB of KV cache at two bytes a number"
        return "\n".join([*lines, *_parameter_lines(self.parameters), "", f"cost per token: {cost}"])


def _parameter_lines(parameters: Mapping[str, int]) -> list[str]:
    rows = {**parameters, "total": sum(parameters.values())}
    cells = [(f"  {part}", f"{count:,}") for part, count in rows.items()]
    return table(("parameters", " "), cells, left=1)


def run(settings: InspectSettings) -> Inspection | PlainInspection:
    """What `recursify inspect` shows. A recursive checkpoint is loaded; of a plain model only config.json is read.

    Raises:
        UserError: No such model, a damaged one, or a plain model of a family that cannot be converted.
    """
    name, revision = settings.checkpoint, settings.revision
    if is_recursive_checkpoint(name, revision=revision):
        found: Any = checkpoint.load(name, revision=revision, donor=settings.donor)
        return inspect(found.model.config)
    config = open_donor(name, revision=revision).config
    fields = json.loads(config.to_json_string(use_diff=False))
    return PlainInspection(fields, parameters_by_part(config), config.num_hidden_layers, slot_bytes(config))


def inspect(config: RecursiveLLMConfig, *, depths: Sequence[int] | None = None) -> Inspection:
    """Parts and cost of a recursive model, from its configuration.

    Args:
        depths: Cycle counts; where None, 0 to 5 and the configuration's own.
    """
    depths = sorted({0, 1, 2, 3, 4, 5, config.H_cycles}) if depths is None else depths
    fields = json.loads(config.to_json_string(use_diff=False))
    fields.pop("conversion")
    plan = plan_of(config)
    donor = None if plan is None else plan.donor_layers
    costs = {H: config.depth(H) for H in depths}
    return Inspection(fields, plan, notes_of(config), parameters_by_part(config), costs, donor, slot_bytes(config))
