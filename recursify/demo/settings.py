"""Flags of the demo."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import UserError
from ..utils.device import check_seed
from ..utils.options import Options


@dataclass(kw_only=True)
class DemoSettings(Options):
    """Run the end-to-end demo on the two bundled base models: convert, fine-tune, evaluate, report."""

    output_dir: str = "runs/demo"
    """Folder for the report and checkpoints; created if missing."""
    steps: int = 90
    """Optimizer steps of both fine-tunings on prose."""
    tracking_steps: int = 220
    """Optimizer steps of the recursive model on state tracking; the base model is fine-tuned for the same time."""
    seed: int = 0
    """Random seed of data order and samples."""

    def validate(self) -> None:
        """Check the values.

        Raises:
            UserError: A value out of range.
        """
        check_seed(self.seed)
        for name in ("steps", "tracking_steps"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name}: expected at least 1, got {getattr(self, name)}")
