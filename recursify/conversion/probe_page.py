"""The page of a probe: heat maps of what looping each block costs, by its place and length, one for each gain."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from statistics import median

from ..reports.charts import Size, element, escape, svg
from ..reports.html import (
    NARROW,
    WIDE,
    document,
    figure,
    findings,
    footer,
    header,
    main,
    number,
    paragraph,
    plural,
    preformatted,
    row,
    section,
    signed,
    table,
    tile,
    write_document,
)
from .probe_report import CHOSEN, ProbedBlock, ProbeReport

CELL, LEFT, TOP = 26.0, 80.0, 34.0  # pixels
KEY, STEPS = 40.0, (0.0, 0.25, 0.5, 0.75, 1.0)  # height of the key of the colours, and its shades
LEAST_DARK = 0.01  # nats that are not drawn darkest even where all costs are tiny
NOTES = (
    "No weight was trained: the donor's layers run as the recursive model's do after recursify convert with --gain.",
    "The gain is the weight of a state in its own update; that of the other state is the same, or what is left of 0.9, the largest sum of "
    "the two. At 0 a loop changes nothing. At 0.45 both states count most; at 0.9 each state sees only itself, which can cost less.",
    "A loop that costs little at first is where training starts near the donor. Which loop learns most is another question.",
    "auto is the choice of recursify convert --layer_selection auto, measured on these windows of text: the lowest KL divergence from the "
    "donor with the block run twice at gain 0.5.",
    "Blocks whose costs differ by less than a few hundredths of a nat may change places on another text.",
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
    shape = f"H_cycles {report.H_cycles}, L_cycles {report.L_cycles}: a looped block is run {plural(report.applications, 'time')}."
    read = f"{report.layers} layers, {report.tokens:,} tokens of text; {shape}"
    body = (
        header("recursify probe", report.donor, read, tiles, [_sentence(report, length) for length in report.lengths]),
        main(
            [
                *(_map(report, gain) for gain in report.gains),
                section("Where to loop", *_choices(report)),
                section("All numbers", _table(report)),
                section("How to read this", findings(NOTES)),
            ]
        ),
        footer("Written by recursify probe."),
    )
    return document(report.donor, *body)


def _sentence(report: ProbeReport, length: int) -> str:
    cheapest, auto = report.cheapest(length), report.auto(length)
    same = "which auto chooses, too" if cheapest is auto else f"auto chooses {_place(auto)} ({signed(auto.mean)})"
    least = f"{_place(cheapest)} cost least, {signed(cheapest.mean)} nats as a mean over the gains"
    return f"Of {plural(length, 'layer')}: {least}; {same}."


def _place(block: ProbedBlock) -> str:
    return f"layers {block.first} to {block.last}"


def _map(report: ProbeReport, gain: float) -> str:
    caption = (
        f"Nats per token above the donor with a block looped at gain {gain:g}, by the block's first layer and its length. Outlined: the "
        "lowest of each length; dashed: what auto chooses."
    )
    return section(f"Gain {gain:g}", figure(lambda narrow: _heat_map(report, gain, narrow), caption))


def _heat_map(report: ProbeReport, gain: float, narrow: bool) -> str:
    """Blocks by first layer, from left to right, and length, from top to bottom; below, the key of the colours."""
    cell = min(CELL, ((NARROW if narrow else WIDE).width - LEFT - 8) / report.layers)
    bottom = TOP + CELL * len(report.lengths)
    size = Size(max(LEFT + cell * report.layers, LEFT + len(STEPS) * KEY) + 8, bottom + 16 + KEY)
    darkest = _darkest(report, gain)
    parts = [element("text", "first layer", x=LEFT - 8, y=TOP - 8, text_anchor="end", class_="tick")]
    parts += _cells(report, gain, cell, darkest)
    for place, length in enumerate(report.lengths):
        y = TOP + CELL * (place + 0.65)
        parts.append(element("text", escape(plural(length, "layer")), x=LEFT - 8, y=y, text_anchor="end", class_="tick"))
    for first in range(0, report.layers, max(1, round(40 / cell))):
        x = LEFT + cell * (first + 0.5)
        parts.append(element("text", str(first), x=x, y=TOP - 8, text_anchor="middle", class_="tick"))
    parts += _key(darkest, bottom + 16)
    description = f"Increase of the loss at gain {gain:g} for {plural(len(report.blocks), 'block')}"
    return svg(size, f"What a loop costs at gain {gain:g}", description, *parts)


def _darkest(report: ProbeReport, gain: float) -> float:
    """Nats from which on all cells look alike: twice the median, since a few blocks at the ends cost many times what all others do."""
    return max(LEAST_DARK, 2 * median(block.increase[gain] for block in report.blocks))


def _shade(share: float) -> str:
    """How a share of the darkest cost is filled."""
    return f"fill: var(--s2); fill-opacity: {0.06 + 0.94 * min(1.0, max(0.0, share)):.2f}"


def _cells(report: ProbeReport, gain: float, cell: float, darkest: float) -> Iterator[str]:
    lowest = {length: min((b for b in report.blocks if b.length == length), key=lambda b: b.increase[gain]) for length in report.lengths}
    for block in report.blocks:
        cost, length = block.increase[gain], block.length
        tip = element("title", escape(f"{_place(block)}: {signed(cost)} nats"))
        stroke = "var(--ink)" if block in (lowest[length], report.auto(length)) else "none"
        dashes = "none" if block is lowest[length] else "3 2"
        style = f"{_shade(cost / darkest)}; stroke: {stroke}; stroke-width: 2; stroke-dasharray: {dashes}"
        place = {"x": LEFT + cell * block.first + 1, "y": TOP + CELL * report.lengths.index(length) + 1}
        yield element("rect", tip, **place, width=cell - 2, height=CELL - 2, rx=2, style=style)


def _key(darkest: float, y: float) -> Iterator[str]:
    """Shades with the costs that they stand for."""
    for place, share in enumerate(STEPS):
        x = LEFT + KEY * place
        words = (
            "\N{LESS-THAN OR EQUAL TO} " if share == 0 else "\N{GREATER-THAN OR EQUAL TO} " if share == 1 else ""
        ) + f"{share * darkest:.2g}"
        yield element("rect", x=x, y=y, width=KEY, height=12, style=_shade(share))
        yield element("text", escape(words), x=x + KEY / 2, y=y + 26, text_anchor="middle", class_="tick")
    yield element("text", "nats", x=LEFT - 8, y=y + 11, text_anchor="end", class_="tick")


def _choices(report: ProbeReport) -> Iterator[str]:
    """The conversions that loop the blocks of choice."""
    for block in report.choices:
        marks = " and ".join(CHOSEN[mark] for mark in report.marks(block))
        yield paragraph(f"{plural(block.length, 'layer')}, {block.first} to {block.last}, {signed(block.mean)} nats, {marks}:")
        yield preformatted(report.command(block))


def _table(report: ProbeReport) -> str:
    head = ["", *(f"gain {gain:g}" for gain in report.gains), "KL of auto", ""]
    rows = [row(_place(block), _numbers(report, block)) for block in report.blocks]
    return table(head, rows, "Nats per token above the donor's loss")


def _numbers(report: ProbeReport, block: ProbedBlock) -> list[str]:
    return [*(signed(block.increase[gain]) for gain in report.gains), number(block.divergence), ", ".join(report.marks(block))]
