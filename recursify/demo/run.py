"""The end-to-end demo, offline and in minutes: convert, fine-tune, evaluate and report.

The first half (prose.py) is about prose, the second (state_tracking.py) about keeping track of a state. Both donors ship with the
package. Every number in the report was measured in this run.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..utils.machine import machine, versions
from ..utils.tables import table
from . import prose, report, state_tracking
from .settings import DemoSettings
from .stages import Clock


def run(settings: DemoSettings) -> Path:
    """Run the demo; returns the path of the report.

    Raises:
        UserError: A setting out of range; the output folder cannot be made.
    """
    settings.validate()
    out, clock = Path(settings.output_dir), Clock()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output_dir: {out} cannot be made ({error.strerror}); name another folder") from error
    text = prose.run(out, settings.steps, settings.seed, clock)
    tracking = state_tracking.run(out, settings.tracking_steps, settings.seed, clock)
    page = replace(
        text, tracking=tracking, machine=machine(), versions=versions(),
        commands=(*text.commands, *state_tracking.commands(out, settings.tracking_steps, settings.seed)),
        stages=tuple(report.Stage(name=name, seconds=seconds) for name, seconds in clock.stages),
    )  # fmt: skip
    path = report.write(page, out / "report.html")
    print_summary(page, path, clock)
    return path


def print_summary(page: report.DemoReport, path: Path, clock: Clock) -> None:
    found: list[tuple[str, Any]] = [(b.name, b) for b in page.baselines] + [(prose.at_depth(d.H_cycles), d) for d in page.depths]
    errors = ["-" if row.standard_error is None else f"{row.standard_error:.4f}" for _, row in found]
    rows = [(name, f"{row.loss:.4f}", error, row.layer_applications) for (name, row), error in zip(found, errors, strict=True)]
    print("\n" + "\n".join(table(("validation loss (nats per token)", "loss", "+-", "layer applications"), rows, left=1)))
    if page.tracking is not None:
        print("\n" + "\n".join(state_tracking.lines(page.tracking)))
    for sample in page.samples:
        print(f"\n{sample.model}: {sample.prompt}{sample.text}")
    print(f"\n✓ {clock.seconds:.0f} seconds; the report is {path}")
