"""What a recursive model is made of and what a token costs, from its configuration alone: no tensor is read.

Cost is counted in layer applications per token, the unit that depth is bought in: one application of one transformer layer.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..checkpoints.settings import RecursiveSource
from ..network.configuration_recursive_llm import RecursiveLLMConfig
from ..network.plan import ConversionPlan
from ..network.size import parameters_by_part, slot_bytes
from ..utils.options import JsonOutput


@dataclass(kw_only=True)
class InspectSettings(JsonOutput, RecursiveSource):
    """Show what a checkpoint is made of, and what a token costs at several cycle counts, beside the donor."""


@dataclass(frozen=True)
class Inspection:
    """The make-up of a model.

    Args:
        parameters: Part -> number of parameters; a tied head counts 0.
        applications: H_cycles -> layer applications per token, at the configuration's L_cycles.
        donor_applications: What a token costs in the donor; None when there is no plan.
        slot_bytes: Keys and values of one cache slot, per token of context, at two bytes a number.
    """

    config: dict[str, Any]
    plan: ConversionPlan | None
    parameters: dict[str, int]
    applications: dict[int, int]
    donor_applications: int | None
    slot_bytes: int

    @property
    def total_parameters(self) -> int:
        return sum(self.parameters.values())

    @property
    def cache_slots(self) -> dict[str, dict[int, int]]:
        """Cache policy -> H_cycles -> slots: one per application of a layer, or one per layer."""
        layers = sum(self.config[f"{part}_layers"] for part in ("prelude", "L", "coda"))
        return {"full": self.applications, "last": dict.fromkeys(self.applications, layers)}

    def to_dict(self) -> dict[str, Any]:
        """JSON types."""
        return {
            "config": self.config,
            "plan": None if self.plan is None else self.plan.to_dict(),
            "parameters": {**self.parameters, "total": self.total_parameters},
            "layer_applications_per_token": {str(cycles): cost for cycles, cost in self.applications.items()},
            "donor_layer_applications_per_token": self.donor_applications,
            "cache_bytes_per_token": {
                policy: {str(cycles): slots * self.slot_bytes for cycles, slots in of.items()} for policy, of in self.cache_slots.items()
            },
        }

    def render(self) -> str:
        """The same for a person."""
        c = self.config
        lines = [f"{c['model_type']}: hidden_size={c['hidden_size']}, vocab_size={c['vocab_size']}, injection={c['injection']}"]
        lines += [f"  H_cycles={c['H_cycles']}, L_cycles={c['L_cycles']}, L_layers={c['L_layers']}", ""]
        if self.plan is not None:
            lines += [f"donor {self.plan.donor} ({self.plan.donor_layers} layers), selection {self.plan.layer_selection}"]
            lines += [f"  layer {i:>3}  ->  {self.plan.fate(i)}" for i in range(self.plan.donor_layers)]
            lines += [""]
        lines += ["parameters"] + [f"  {part:<12} {count:>14,}" for part, count in self.parameters.items()]
        lines += [
            f"  {'total':<12} {self.total_parameters:>14,}",
            "",
            "cost per token; the KV cache in kB at two bytes a number, by --cache_policy",
        ]
        lines += [f"  {'H_cycles':>8}  {'layer applications':>18}  {'x donor':>7}  {'full':>8}  {'last':>8}"]
        for cycles, cost in self.applications.items():
            ratio = f"{cost / self.donor_applications:.2f}" if self.donor_applications else "-"
            full, last = (self._kilobytes(of[cycles]) for of in self.cache_slots.values())
            mark = "  <- this checkpoint" if cycles == c["H_cycles"] else ""
            lines += [f"  {cycles:>8}  {cost:>18}  {ratio:>7}  {full:>8}  {last:>8}{mark}"]
        if self.donor_applications:
            lines += [f"  {'donor':>8}  {self.donor_applications:>18}  {'1.00':>7}  {self._kilobytes(self.donor_applications):>8}"]
        return "\n".join(lines)

    def _kilobytes(self, slots: int) -> str:
        return f"{slots * self.slot_bytes / 1e3:,.1f}"


def inspect(config: RecursiveLLMConfig, plan: ConversionPlan | None, depths: Sequence[int] | None = None) -> Inspection:
    """Describe a model that need not exist yet.

    Args:
        depths: Cycle counts to price; 0 to at least 5 and the configuration's own where None.
    """
    depths = sorted({0, 1, 2, 3, 4, 5, config.H_cycles}) if depths is None else depths
    fields = json.loads(config.to_json_string(use_diff=False))
    donor = None if plan is None else plan.donor_layers
    return Inspection(fields, plan, parameters_by_part(config), {H: config.depth(H) for H in depths}, donor, slot_bytes(config))
