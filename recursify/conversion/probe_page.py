"""The page of a probe: heat maps of what looping each block costs, by its place and length, one for each gain."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ..reports.charts import Size, element, escape, svg
from ..reports.html import (
    WIDE,
    document,
    figure,
    findings,
    footer,
    header,
    main,
    number,
    row,
    section,
    signed,
    table,
    tile,
    write_document,
)
from .probe import ProbedBlock, ProbeReport

CELL, LEFT, TOP = 26.0, 64.0, 34.0  # pixels
DARKEST = 1.0  # nats, from which on all cells look alike
NOTES = (
    "A block is run twice; the input of the second run is e + g (F(e) - e), where e is the block's input, F(e) its output and g the gain. "
    "No weight was trained.",
    "A loop that costs little at first is where training starts near the donor. Which loop learns most is another question.",
    "auto is the choice of recursify convert --layer_selection auto on this text: the lowest KL divergence at gain 0.5.",
)


def write(report: ProbeReport, path: str | Path) -> Path:
    """Write the page to `path`, making its folder."""
    return write_document(render(report), path)


def render(report: ProbeReport) -> str:
    """The whole page as HTML text."""
    lowest = min(report.blocks, key=lambda block: block.mean)
    tiles = [
        tile(None, number(report.loss), "nats per token, the donor"),
        tile("s1", signed(lowest.mean), f"nats, layers {lowest.first} to {lowest.last}: the cheapest loop, as a mean over the gains"),
    ]
    read = f"{report.layers} layers, {report.tokens:,} tokens of text."
    commands = [f"{report.command(report.cheapest(length))}" for length in report.lengths]
    body = (
        header("recursify probe", report.donor, read, tiles, [_sentence(report, length) for length in report.lengths]),
        main(
            [
                *(_map(report, gain) for gain in report.gains),
                section("All numbers", _table(report)),
                section("To convert with the cheapest loop", findings(commands)),
                section("How to read this", findings(NOTES)),
            ]
        ),
        footer("Written by recursify probe."),
    )
    return document(report.donor, *body)


def _sentence(report: ProbeReport, length: int) -> str:
    cheapest, auto = report.cheapest(length), report.auto(length)
    same = "which auto chooses, too" if cheapest == auto else f"auto chooses layers {auto.first} to {auto.last} ({signed(auto.mean)})"
    least = f"{cheapest.first} to {cheapest.last} cost least, {signed(cheapest.mean)} nats as a mean over the gains"
    return f"Of {length} layers, {least}; {same}."


def _map(report: ProbeReport, gain: float) -> str:
    def draw(narrow: bool) -> str:
        return _heat_map(report, gain)

    caption = (
        f"Nats more than the donor with the block run twice at gain {gain:g}, by its first layer and its length; outlined: the lowest of "
        "each length."
    )
    return section(f"Gain {gain:g}", figure(draw, caption))


def _heat_map(report: ProbeReport, gain: float) -> str:
    """Blocks by first layer, from left to right, and length, from top to bottom. Wide pictures scroll within the page."""
    cell = min(CELL, (WIDE.width - LEFT) / report.layers)
    size = Size(LEFT + cell * report.layers + 8, TOP + CELL * len(report.lengths) + 26)
    parts = [*_cells(report, gain, cell)]
    for place, length in enumerate(report.lengths):
        y = TOP + CELL * (place + 0.65)
        parts.append(element("text", escape(f"{length} layers"), x=LEFT - 8, y=y, text_anchor="end", class_="tick"))
    for first in range(0, report.layers, max(1, round(40 / cell))):
        x = LEFT + cell * (first + 0.5)
        parts.append(element("text", escape(str(first)), x=x, y=TOP - 8, text_anchor="middle", class_="tick"))
    parts.append(element("text", "first layer", x=LEFT, y=size.height - 6, class_="tick"))
    description = f"Increase of the loss at gain {gain:g} for {len(report.blocks)} blocks"
    return svg(size, f"What a loop costs at gain {gain:g}", description, *parts)


def _cells(report: ProbeReport, gain: float, cell: float) -> Iterator[str]:
    for block in report.blocks:
        cost = block.increase[gain]
        shade = min(1.0, max(0.0, cost / DARKEST)) ** 0.5  # small differences are what matters
        lowest = min((b for b in report.blocks if b.length == block.length), key=lambda b: b.increase[gain]) is block
        tip = element("title", escape(f"layers {block.first} to {block.last}: {signed(cost)} nats"))
        y = TOP + CELL * report.lengths.index(block.length) + 1
        style = f"fill: var(--s2); fill-opacity: {0.06 + 0.94 * shade:.2f}; stroke: {'currentColor' if lowest else 'none'}; stroke-width: 2"
        yield element("rect", tip, x=LEFT + cell * block.first + 1, y=y, width=cell - 2, height=CELL - 2, rx=2, style=style)


def _table(report: ProbeReport) -> str:
    head = ["layers", *(f"gain {gain:g}" for gain in report.gains), "KL at 0.5", ""]
    rows = [row(f"{block.first} to {block.last}", _numbers(report, block)) for block in report.blocks]
    return table(head, rows, "Nats per token above the donor's loss")


def _numbers(report: ProbeReport, block: ProbedBlock) -> list[str]:
    marks = [word for word, other in (("cheapest", report.cheapest(block.length)), ("auto", report.auto(block.length))) if other is block]
    return [*(signed(block.increase[gain]) for gain in report.gains), number(block.divergence), ", ".join(marks)]
