"""Charts as text: pure functions from numbers to inline SVG.

No plotting library, no script: every function takes values and gives back one
`<svg>` element that a page can hold as it is. Colours are class names (`s1` ... `s6`, `muted`),
so that a style sheet decides what they look like by day, by night and on paper.

    line_chart            lines, levels (horizontal lines) and their direct labels
    architecture_picture  which donor layer went where, and how often it is applied
    standalone            either of them as the contents of an .svg file, with `chart_style`, its look

What cannot be drawn (NaN, infinities, absurd magnitudes) is left out, never drawn somewhere:
`count_undrawable` says how many values that were.

Units: pixels of the viewBox, y downwards. Text is about `FONT` pixels high.
"""

from __future__ import annotations

import html
import math
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Literal

FONT = 13.0
LINE_HEIGHT = 16.0
LARGEST_DRAWN = 1e9
MARKED_CATEGORIES = frozenset({"Cc", "Cf", "Cs", "Co", "Cn"})


@dataclass(frozen=True)
class Size:
    """Width and height of a picture, in pixels of its viewBox."""

    width: float
    height: float


@dataclass(frozen=True, kw_only=True)
class Line:
    """One series. `errors` are half-lengths of error bars, in the units of `ys`; `valued` writes each value at its point."""

    name: str
    xs: Sequence[float]
    ys: Sequence[float]
    colour: str
    errors: Sequence[float | None] = ()
    stroke: Literal["solid", "faint", "dotted", "dashed"] = "solid"
    dots: bool = False
    valued: bool = False
    labelled: bool = True


@dataclass(frozen=True, kw_only=True)
class Level:
    """A horizontal line across the plot, with a band of plus and minus `error` where one is known."""

    name: str
    y: float
    colour: str
    error: float | None = None


@dataclass(frozen=True, kw_only=True)
class Axes:
    """Titles and ticks of a chart. `x_ticks` maps each labelled x to rows of text; empty chooses ticks. `y_reach` are values that the
    y axis always includes."""

    title: str
    description: str
    x_label: str
    y_label: str
    x_ticks: Sequence[tuple[float, Sequence[str]]] = ()
    x_margin: float = 0.0
    y_reach: Sequence[float] = ()
    marked_x: float | None = None
    mark: str = ""


@dataclass(frozen=True)
class Frame:
    """The plot area and the two scales that lead into it."""

    left: float
    right: float
    top: float
    bottom: float
    x_range: tuple[float, float]
    y_range: tuple[float, float]

    @property
    def decimals(self) -> int:
        """Decimals of values in the plot: one more than the ticks'."""
        return min(4, nice_ticks(*self.y_range, 5)[1] + 2)

    def x(self, value: float) -> float:
        low, high = self.x_range
        return self.left + (value - low) / (high - low) * (self.right - self.left)

    def y(self, value: float) -> float:
        low, high = self.y_range
        return self.bottom - (value - low) / (high - low) * (self.bottom - self.top)


@dataclass(frozen=True)
class Label:
    """Direct label of a line: rows of text, ideally at height `y`."""

    full: str
    rows: tuple[str, ...]
    y: float
    colour: str

    @property
    def height(self) -> float:
        return LINE_HEIGHT * len(self.rows) + 4


# Markup


def shown(text: str) -> str:
    """Text with invisible characters replaced by their code, as in ⟨200B⟩."""
    return "".join(f"⟨{ord(c):02X}⟩" if unicodedata.category(c) in MARKED_CATEGORIES and c not in "\n\t" else c for c in text)


def escape(text: str) -> str:
    """Escape text for HTML and SVG, attributes included, after `shown`."""
    return html.escape(shown(text), quote=True)


def element(name: str, *children: str, **attributes: str | float | None) -> str:
    """An element. Children are markup; attributes are escaped here.

    Underscores in attribute names become hyphens and a trailing one is dropped (`class_`); floats get two decimals; None is left out.
    """
    written = "".join(f' {_attribute_name(key)}="{_attribute(value)}"' for key, value in attributes.items() if value is not None)
    return f"<{name}{written}>{''.join(children)}</{name}>"


def _attribute_name(key: str) -> str:
    return key if key == "viewBox" else key.rstrip("_").replace("_", "-")


def _attribute(value: str | float) -> str:
    if isinstance(value, str):
        return escape(value)
    if not math.isfinite(value):
        raise ValueError(f"a coordinate must be finite, got {value}: leave such values out before drawing")
    return f"{value:.2f}".rstrip("0").rstrip(".")


def svg(size: Size, title: str, description: str, *children: str) -> str:
    """A picture with its title and description, for those who cannot see it."""
    return element(
        "svg",
        element("title", escape(title)),
        element("desc", escape(description)),
        *children,
        viewBox=f"0 0 {size.width:g} {size.height:g}",
        width=size.width,
        height=size.height,
        role="img",
        aria_label=f"{title}. {description}",
    )


@cache
def chart_style() -> str:
    """The style sheet of the pictures, for a page that holds some."""
    return resources.files(__package__).joinpath("charts.css").read_text(encoding="utf-8")


def standalone(svg: str, margin: float = 16.0) -> str:
    """A picture as a standalone file, with its style and a background.

    Args:
        svg: What a function of this module returned.
        margin: Margin in pixels.
    """
    opening, rest = svg.split(">", 1)
    width, height = (float(number) for number in opening.split('viewBox="0 0 ', 1)[1].split('"', 1)[0].split())
    box = {"x": -margin, "y": -margin, "width": width + 2 * margin, "height": height + 2 * margin}
    for name, old, new in (("width", width, box["width"]), ("height", height, box["height"])):
        opening = opening.replace(f' {name}="{_attribute(old)}"', f' {name}="{_attribute(new)}"', 1)
    opening = opening.replace(f'"0 0 {width:g} {height:g}"', '"' + " ".join(_attribute(value) for value in box.values()) + '"', 1)
    opening = opening.replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg"', 1)
    style, paper = element("style", chart_style()), element("rect", **box, rx=12, class_="paper")
    return f"{opening}>{style}{paper}{rest}\n"


def _text(x: float, y: float, words: str, **attributes: str | float | None) -> str:
    return element("text", escape(words), x=x, y=y, **attributes)


# Words that fit


def text_width(text: str, size: float = FONT) -> float:
    """Estimated width in pixels, without font metrics: wide scripts count full, others slightly too wide."""
    return sum(size if unicodedata.east_asian_width(c) in "WF" else 0.56 * size for c in text)


def wrap(text: str, width: float, rows: int) -> list[str]:
    """Wrap at spaces into at most `rows` lines of `width` pixels, with an ellipsis if truncated."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if not lines[-1] or text_width(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    if len(lines) > rows:
        lines = [*lines[: rows - 1], " ".join(lines[rows - 1 :])]
    return [_shorten(line, width) for line in lines]


def _shorten(text: str, width: float) -> str:
    if text_width(text) <= width:
        return text
    kept = text
    while kept and text_width(kept + "…") > width:
        kept = kept[:-1]
    return kept.rstrip() + "…"


# Scales


def is_drawable(value: float) -> bool:
    return math.isfinite(value) and abs(value) <= LARGEST_DRAWN


def drawable_points(line: Line) -> list[tuple[float, float, float | None]]:
    """The finite (x, y, error) of a line in order; a non-finite error becomes None."""
    errors = [*line.errors, *[None] * (len(line.xs) - len(line.errors))]
    points = zip(line.xs, line.ys, errors, strict=True)
    return [(x, y, _drawable_error(error)) for x, y, error in points if is_drawable(x) and is_drawable(y)]


def _drawable_error(error: float | None) -> float | None:
    return error if error is not None and is_drawable(error) else None


def count_undrawable(lines: Iterable[Line], levels: Iterable[Level] = ()) -> int:
    """Number of non-finite values that a chart leaves out."""
    return sum(len(line.xs) - len(drawable_points(line)) for line in lines) + sum(not is_drawable(level.y) for level in levels)


def padded_range(values: Sequence[float], margin: float = 0.08) -> tuple[float, float]:
    """The values' range with a margin; never empty, even if all values are equal."""
    low, high = min(values), max(values)
    smallest = 1e-6 * max(1.0, abs(low), abs(high))
    if high - low < smallest:
        return low - max(0.01, 0.02 * abs(low)), high + max(0.01, 0.02 * abs(high))
    return low - margin * (high - low), high + margin * (high - low)


def nice_ticks(low: float, high: float, count: int) -> tuple[list[float], int]:
    """About `count` round values within [low, high], and the decimals that distinguish them."""
    raw = (high - low) / max(1, count)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)], max(0, -math.floor(math.log10(step) + 1e-9))


def spread(wanted: Sequence[float], heights: Sequence[float], low: float, high: float) -> list[float]:
    """Centres of non-overlapping labels of these heights within [low, high], in order, close to the wanted ones.

    If they do not all fit, they continue below `high` rather than overlap.
    """
    order = sorted(range(len(wanted)), key=lambda index: wanted[index])
    tops = [0.0] * len(wanted)
    floor = low
    for index in order:
        tops[index] = max(floor, wanted[index] - heights[index] / 2)
        floor = tops[index] + heights[index]
    ceiling = high
    for index in reversed(order):
        tops[index] = min(tops[index], ceiling - heights[index])
        ceiling = tops[index]
    shift = max(0.0, low - min(tops, default=low))
    return [top + shift + height / 2 for top, height in zip(tops, heights, strict=True)]


# The line chart


def line_chart(lines: Sequence[Line], levels: Sequence[Level], axes: Axes, size: Size) -> str:
    """Lines and levels over one pair of axes, each named at its right end."""
    ys = _all_ys(lines, levels)
    xs = [x for line in lines for x, _, _ in drawable_points(line)] + [x for x, _ in axes.x_ticks]
    if not ys or not xs:
        return _empty_chart(axes, size)
    label_width = _label_width(lines, levels, size)
    frame = _frame(xs, [*ys, *axes.y_reach], axes, size, label_width)
    return svg(
        size,
        axes.title,
        axes.description,
        *_y_axis(frame, axes),
        *_x_axis(frame, axes, size),
        *_mark(frame, axes),
        *(_level(frame, level) for level in levels if is_drawable(level.y)),
        *(_line(frame, line) for line in lines),
        *_labels(frame, _wanted_labels(frame, lines, levels, label_width)),
    )


def _all_ys(lines: Sequence[Line], levels: Sequence[Level]) -> list[float]:
    spans = [(y, error or 0.0) for line in lines for _, y, error in drawable_points(line)]
    spans += [(level.y, _drawable_error(level.error) or 0.0) for level in levels if is_drawable(level.y)]
    return [edge for y, error in spans for edge in (y - error, y + error)]


def _empty_chart(axes: Axes, size: Size) -> str:
    note = "nothing to draw: no finite values were given"
    return svg(size, axes.title, note, _text(size.width / 2, size.height / 2, note, class_="muted", text_anchor="middle"))


def _label_width(lines: Sequence[Line], levels: Sequence[Level], size: Size) -> float:
    names = [line.name for line in lines if line.labelled] + [level.name for level in levels]
    widest = max((text_width(name) for name in names), default=0.0)
    return min(max(widest, text_width("00.0000")), 0.26 * size.width)


def _frame(xs: Sequence[float], ys: Sequence[float], axes: Axes, size: Size, label_width: float) -> Frame:
    rows = max((len(words) for _, words in axes.x_ticks), default=1)
    low, high = min(xs) - axes.x_margin, max(xs) + axes.x_margin
    x_range = (low, high) if high > low else (low - 0.5, high + 0.5)
    y_range = padded_range(ys)
    ticks, decimals = nice_ticks(*y_range, 5)
    left = 14 + max(text_width(f"{tick:.{decimals}f}") for tick in ticks or [0.0])
    bottom = size.height - 14 - LINE_HEIGHT * (rows + 1)
    return Frame(left, size.width - label_width - 16, 30 + LINE_HEIGHT * bool(axes.mark), bottom, x_range, y_range)


def _y_axis(frame: Frame, axes: Axes) -> list[str]:
    ticks, decimals = nice_ticks(*frame.y_range, 5)
    parts = [_text(0, LINE_HEIGHT - 3, axes.y_label, class_="axis-label")]
    for tick in ticks:
        y = frame.y(tick)
        parts.append(element("line", x1=frame.left, x2=frame.right, y1=y, y2=y, class_="grid"))
        parts.append(_text(frame.left - 8, y + 4, f"{tick:.{decimals}f}", class_="tick", text_anchor="end"))
    return parts


def _x_axis(frame: Frame, axes: Axes, size: Size) -> list[str]:
    parts = [element("line", x1=frame.left, x2=frame.right, y1=frame.bottom, y2=frame.bottom, class_="axis")]
    for value, rows in axes.x_ticks or _chosen_x_ticks(frame):
        x = frame.x(value)
        parts.append(element("line", x1=x, x2=x, y1=frame.bottom, y2=frame.bottom + 4, class_="axis"))
        for row, words in enumerate(rows):
            y = frame.bottom + LINE_HEIGHT * (row + 1) + 2
            parts.append(_text(x, y, words, class_="tick second" if row else "tick", text_anchor="middle"))
    middle = (frame.left + frame.right) / 2
    parts.append(_text(middle, size.height - 6, _shorten(axes.x_label, 2 * middle), class_="axis-label", text_anchor="middle"))
    return parts


def _chosen_x_ticks(frame: Frame) -> list[tuple[float, list[str]]]:
    """Integer ticks: x is a count."""
    ticks, _ = nice_ticks(*frame.x_range, max(2, int((frame.right - frame.left) / 80)))
    return [(tick, [f"{tick:,.0f}"]) for tick in ticks if abs(tick - round(tick)) < 1e-6]


def _mark(frame: Frame, axes: Axes) -> list[str]:
    if axes.marked_x is None or not frame.x_range[0] <= axes.marked_x <= frame.x_range[1]:
        return []
    x = frame.x(axes.marked_x)
    half = text_width(axes.mark) / 2
    middle = min(max(x, frame.left + half), frame.right - half)
    return [
        element("line", x1=x, x2=x, y1=frame.top - 8, y2=frame.bottom, class_="mark"),
        _text(middle, frame.top - 14, axes.mark, class_="axis-label", text_anchor="middle"),
    ]


def _level(frame: Frame, level: Level) -> str:
    y = frame.y(level.y)
    error = _drawable_error(level.error)
    band = ""
    if error:
        top, bottom = frame.y(level.y + error), frame.y(level.y - error)
        band = element("rect", x=frame.left, y=top, width=frame.right - frame.left, height=bottom - top, class_="band")
    rule = element("line", _tip(level.name, level.y, error), x1=frame.left, x2=frame.right, y1=y, y2=y, class_="series dashed")
    return element("g", band, rule, class_=level.colour)


def _line(frame: Frame, line: Line) -> str:
    points = drawable_points(line)
    path = " ".join(f"{frame.x(x):.2f},{frame.y(y):.2f}" for x, y, _ in points)
    parts = [element("polyline", points=path, class_=f"series {line.stroke}")] if len(points) > 1 else []
    parts += [_error_bar(frame, x, y, error) for x, y, error in points if error]
    if line.dots or len(points) == 1:
        parts += [
            element("circle", _tip(f"{line.name}, {x:g}", y, error), cx=frame.x(x), cy=frame.y(y), r=4.5, class_="dot")
            for x, y, error in points
        ]
    if line.valued:
        parts += [_value(frame, x, y, error or 0.0) for x, y, error in points]
    return element("g", *parts, class_=line.colour)


def _value(frame: Frame, x: float, y: float, error: float) -> str:
    return _text(frame.x(x), min(frame.y(y + error), frame.y(y) - 5) - 8, f"{y:.{frame.decimals}f}", class_="value", text_anchor="middle")


def _error_bar(frame: Frame, x: float, y: float, error: float) -> str:
    return element("line", x1=frame.x(x), x2=frame.x(x), y1=frame.y(y + error), y2=frame.y(y - error), class_="series")


def _tip(name: str, value: float, error: float | None) -> str:
    return element("title", escape(f"{name}: {value:.4f}" + (f" ± {error:.4f}" if error else "")))


def _wanted_labels(frame: Frame, lines: Sequence[Line], levels: Sequence[Level], width: float) -> list[Label]:
    ends = [
        (line.name, drawable_points(line)[-1][1], line.colour, line.valued) for line in lines if line.labelled and drawable_points(line)
    ]
    ends += [(level.name, level.y, level.colour, False) for level in levels if is_drawable(level.y)]
    labels = []
    for name, y, colour, valued in ends:
        value = [] if valued else [f"{y:.{frame.decimals}f}"]
        labels.append(Label(f"{name}: {y:.4f}", (*wrap(name, width, 3), *value), frame.y(y), colour))
    return labels


def _labels(frame: Frame, labels: Sequence[Label]) -> list[str]:
    centres = spread([label.y for label in labels], [label.height for label in labels], 0, frame.bottom + LINE_HEIGHT)
    return [_label(frame.right, label, centre) for label, centre in zip(labels, centres, strict=True)]


def _label(right: float, label: Label, centre: float) -> str:
    first = centre - label.height / 2 + LINE_HEIGHT - 2
    rows = [_text(right + 16, first + LINE_HEIGHT * row, words) for row, words in enumerate(label.rows)]
    path = f"{right + 1:.2f},{label.y:.2f} {right + 12:.2f},{centre:.2f}"
    leader = element("polyline", points=path, class_="leader")
    return element("g", element("title", escape(label.full)), leader, *rows, class_=f"{label.colour} label")


# The diagram of the architecture

CELL, GAP, PAD, ARROW = 26.0, 4.0, 12.0, 26.0
LOOP_ROOM = 62.0


@dataclass(frozen=True)
class Block:
    """One box of the diagram: its name, and the donor layers in it (none for the embedding and the head)."""

    name: str
    colour: str
    layers: tuple[int, ...] = ()

    def columns(self, limit: int) -> int:
        return max(1, min(limit, len(self.layers)))

    def size(self, limit: int) -> Size:
        columns = self.columns(limit)
        rows = math.ceil(len(self.layers) / columns)
        width = max(columns * (CELL + GAP) - GAP, text_width(self.name)) + 2 * PAD
        return Size(width, LINE_HEIGHT + 2 * PAD + (rows * (CELL + GAP) + 4 if rows else 0))


def architecture_picture(
    *, prelude: Sequence[int], loop: Sequence[int], coda: Sequence[int], donor_layers: int, H_cycles: int, L_cycles: int, narrow: bool
) -> str:
    """Diagram: above, the donor's layers, coloured by the part they went to; below, the recursive model.

    Wide diagrams run left to right, narrow ones (for phones) top to bottom.
    """
    named = [Block("prelude", "s4", tuple(prelude)), Block("loop", "s1", tuple(loop)), Block("coda", "s5", tuple(coda))]
    blocks = [Block("embed", "muted"), *(block for block in named if block.layers), Block("norm + head", "muted")]
    repeats = f"\N{MULTIPLICATION SIGN} {H_cycles} ({L_cycles} + 1) = {H_cycles * (L_cycles + 1)}" if H_cycles else "once"
    strip, strip_height = _donor_strip(named, donor_layers, 11 if narrow else 24)
    drawn, size = (_stacked if narrow else _in_a_row)(blocks, repeats, strip_height + 12)
    strip_width = min(donor_layers, 11 if narrow else 24) * (CELL + GAP)
    return svg(Size(max(size.width, strip_width + 2), size.height), "The plan", _plan_in_words(named, repeats), *strip, *drawn)


def _plan_in_words(blocks: Sequence[Block], repeats: str) -> str:
    parts = [f"{block.name}: donor layers {', '.join(map(str, block.layers))}" for block in blocks if block.layers]
    return f"embed, then {'; '.join(parts)}; then norm and head. Passes through the loop per token: {repeats}"


def _donor_strip(blocks: Sequence[Block], donor_layers: int, columns: int) -> tuple[list[str], float]:
    colours = {layer: block.colour for block in blocks for layer in block.layers}
    parts = [_text(0, LINE_HEIGHT - 3, "the donor's layers", class_="axis-label")]
    for layer in range(donor_layers):
        x, y = 1 + (layer % columns) * (CELL + GAP), LINE_HEIGHT + 6 + (layer // columns) * (CELL + GAP)
        parts.append(_cell(x, y, layer, colours.get(layer, "dropped")))
    return parts, LINE_HEIGHT + 6 + math.ceil(donor_layers / columns) * (CELL + GAP)


def _cell(x: float, y: float, layer: int, colour: str) -> str:
    box = element("rect", x=x, y=y, width=CELL, height=CELL, rx=5)
    return element("g", box, _text(x + CELL / 2, y + CELL / 2 + 4.5, str(layer), text_anchor="middle"), class_=f"cell {colour}")


def _block(block: Block, x: float, y: float, size: Size, columns: int) -> str:
    title_y = y + PAD + LINE_HEIGHT - 5 if block.layers else y + size.height / 2 + 4.5
    parts = [
        element("rect", x=x, y=y, width=size.width, height=size.height, rx=9),
        _text(x + size.width / 2, title_y, block.name, text_anchor="middle"),
    ]
    inset = (size.width - block.columns(columns) * (CELL + GAP) + GAP) / 2
    for index, layer in enumerate(block.layers):
        column, row = index % columns, index // columns
        parts.append(_cell(x + inset + column * (CELL + GAP), y + PAD + LINE_HEIGHT + 4 + row * (CELL + GAP), layer, block.colour))
    return element("g", *parts, class_=f"block {block.colour}")


def _in_a_row(blocks: Sequence[Block], repeats: str, top: float) -> tuple[list[str], Size]:
    columns = max(4, *(math.ceil(len(block.layers) / 5) for block in blocks))
    sizes = [block.size(columns) for block in blocks]
    tallest = max(size.height for size in sizes)
    middle = top + LOOP_ROOM + tallest / 2
    x, parts = 1.0, []
    for block, size in zip(blocks, sizes, strict=True):
        if x > 1:
            parts.append(_arrow(x - ARROW + 3, middle, x - 4, middle))
        if block.name == "loop":
            parts.append(_loop_above(x, x + size.width, middle - size.height / 2, repeats))
        parts.append(_block(block, x, middle - size.height / 2, size, columns))
        x += size.width + ARROW
    return parts, Size(x - ARROW + 1, middle + tallest / 2 + 2)


def _stacked(blocks: Sequence[Block], repeats: str, top: float) -> tuple[list[str], Size]:
    columns = 7
    sizes = [block.size(columns) for block in blocks]
    width = max(size.width for size in sizes)
    y, parts = top, []
    for block, size in zip(blocks, sizes, strict=True):
        if y > top:
            parts.append(_arrow(1 + width / 2, y - ARROW + 3, 1 + width / 2, y - 4))
        if block.name == "loop":
            parts.append(_loop_beside(1 + width, y, y + size.height, repeats))
        parts.append(_block(block, 1, y, Size(width, size.height), columns))
        y += size.height + ARROW
    return parts, Size(width + 40 + text_width(repeats), y - ARROW + 2)


def _arrow(x1: float, y1: float, x2: float, y2: float) -> str:
    shaft = element("line", x1=x1, y1=y1, x2=x2, y2=y2, class_="flow")
    return element("g", shaft, _arrow_head(x2, y2, x2 - x1, y2 - y1), class_="muted")


def _arrow_head(x: float, y: float, along_x: float, along_y: float) -> str:
    """A small triangle with its tip at (x, y), pointing along the vector."""
    length = math.hypot(along_x, along_y)
    ux, uy = 8 * along_x / length, 8 * along_y / length
    corners = [(x, y), (x - ux - uy / 2, y - uy + ux / 2), (x - ux + uy / 2, y - uy - ux / 2)]
    return element("polygon", points=" ".join(f"{px:.2f},{py:.2f}" for px, py in corners), class_="head")


def _loop_above(left: float, right: float, top: float, repeats: str) -> str:
    start, end, high = right - 16, left + 16, top - 40
    arc = element(
        "path", d=f"M{start:.2f},{top:.2f} C{start + 6:.2f},{high:.2f} {end - 6:.2f},{high:.2f} {end:.2f},{top - 6:.2f}", class_="back"
    )
    words = _text((left + right) / 2, top - 40, repeats, text_anchor="middle")
    return element("g", arc, _arrow_head(end + 0.7, top - 2, 6, 34), words, class_="s1 repeats")


def _loop_beside(right: float, top: float, bottom: float, repeats: str) -> str:
    start, end, out = bottom - 16, top + 16, right + 36
    arc = element(
        "path", d=f"M{right:.2f},{start:.2f} C{out:.2f},{start + 6:.2f} {out:.2f},{end - 6:.2f} {right + 6:.2f},{end:.2f}", class_="back"
    )
    words = _text(out, (top + bottom) / 2 + 4.5, repeats)
    return element("g", arc, _arrow_head(right + 2, end + 0.7, -30, 6), words, class_="s1 repeats")
