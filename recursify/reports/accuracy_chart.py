"""The chart of accuracy by difficulty, shared by the evaluation and demo pages.

Accuracies come as shares and are drawn in percent. Lines of the same model at several depths are shades, from the first colour to the
last (`shade`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

from .charts import Axes, Level, Line, count_undrawable, line_chart
from .html import chart_size, figure, undrawn

Point = tuple[int, float, float | None]  # difficulty, accuracy, its standard error

SHADES = 7
TICKS = 12  # maximum number of labelled difficulties


def shade(index: int, count: int) -> str:
    """Colour of a depth, from the shallowest to the deepest."""
    return f"d{round(index * (SHADES - 1) / max(1, count - 1))}"


def difficulty_line(
    points: Iterable[Point], name: str, colour: str, stroke: Literal["solid", "dotted", "dashed"] = "solid", *, errors: bool = False
) -> Line:
    """One model at one depth; `errors` draws them."""
    found = sorted(points, key=lambda point: point[0])
    return Line(
        name=name,
        xs=[difficulty for difficulty, _, _ in found],
        ys=[100 * share for _, share, _ in found],
        errors=[None if error is None else 100 * error for _, _, error in found] if errors else (),
        colour=colour,
        stroke=stroke,
        dots=True,
    )


def difficulty_figure(
    title: str, lines: Sequence[Line], caption: str, *, levels: Sequence[Level] = (), x_label: str = "difficulty", **axes: Any
) -> str:
    """Lines by difficulty, the whole way from 0 to 100 %; `axes` are further words of `charts.Axes`."""
    ticks = sorted({int(x) for line in lines for x in line.xs})
    drawn = Axes(
        title=title,
        description=f"Share of right answers in percent, for {'; '.join(line.name for line in lines)}. The values are in the tables below.",
        x_label=x_label,
        y_label="right, %",
        x_ticks=[(tick, (str(tick),)) for tick in ticks] if len(ticks) <= TICKS else (),
        x_margin=0.02 * (ticks[-1] - ticks[0]),
        y_reach=(0, 100),
        **axes,
    )
    count = len(lines) + len(levels)
    words = caption + undrawn(count_undrawable(lines, levels))
    return figure(lambda narrow: line_chart(lines, levels, drawn, chart_size(narrow, count)), words)
