"""Tables for a terminal or a file, in plain text."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence


def table(headings: Sequence[str], rows: Iterable[Sequence[object]], left: int = 0) -> list[str]:
    """Lines of a table, as wide as its cells: figures are never wrapped.

    Args:
        headings: Of the columns; the cells of a column without heading are left-aligned.
        rows: Cells by `str`; a row may be shorter than the headings.
        left: Number of columns at the left that are left-aligned, the others right-aligned.
    """
    from rich.console import Console  # here: what prints no table needs no rich
    from rich.table import Table
    from rich.text import Text

    drawn = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="")
    for place, heading in enumerate(headings):
        drawn.add_column(Text(heading), justify="left" if place < left or not heading else "right", no_wrap=True)
    for row in rows:
        drawn.add_row(*(Text(str(cell)) for cell in row))
    out = io.StringIO()
    Console(file=out, width=10_000, color_system=None).print(drawn)
    return [line.rstrip() for line in out.getvalue().splitlines()]
