"""What all pages of results are made of: one file that asks for nothing from outside, its look, its parts, and numbers in words.

document         a whole page: style and pictures are inline, there is no script
write_document   the same into a file, whole or not at all
section, paragraph, figure, table, row, scroll, tiles    markup from text and numbers; text is escaped here
number, signed, plural, magnitude, visible               for reading
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from importlib import resources
from pathlib import Path

from ..utils.atomic import write_text
from .charts import Size, chart_style, element, escape

WIDE, NARROW = Size(820, 390), Size(360, 340)
PLUS_MINUS = "±\N{NO-BREAK SPACE}"
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def document(title: str, *body: str, style: str = "") -> str:
    """The whole page as HTML text.

    Args:
        body: Markup.
        style: What this page has beyond the common look.
    """
    head = [
        '<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<link rel="icon" href="data:,">',
        element("title", escape(title)),
        element("style", chart_style(), style_sheet(__package__, "page.css"), style),
    ]
    return f'<!DOCTYPE html>\n<html lang="en">\n<head>\n{"".join(head)}\n</head>\n<body>\n{"".join(body)}\n</body>\n</html>\n'


@cache
def style_sheet(package: str, name: str) -> str:
    """A style sheet that lies in a package."""
    return resources.files(package).joinpath(name).read_text(encoding="utf-8")


def write_document(html: str, path: str | Path) -> Path:
    """Write a page to `path`, making its folder. A crash leaves the old file, never half a new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, html)
    return path


# Numbers in words


def number(value: float | None, decimals: int = 4) -> str:
    """A number for reading: fixed decimals, a true minus sign, powers of ten where it is huge, words where it is none."""
    if value is None:
        return ""
    if math.isnan(value):
        return "not a number"
    if math.isinf(value):
        return "infinite" if value > 0 else "infinite and negative"
    written = f"{value:,.{decimals}f}" if abs(value) < 1e6 else f"{value:.3e}"
    return written.replace("-", "\N{MINUS SIGN}")


def signed(value: float, decimals: int = 4) -> str:
    """The same with its sign always shown."""
    return ("+" if value > 0 else "") + number(value, decimals)


def magnitude(count: int) -> str:
    """A count in short: 12.6 million."""
    for size, word in ((10**9, "billion"), (10**6, "million")):
        if count >= size:
            return f"{count / size:.3g} {word}"
    return f"{count:,}"


def plural(count: int, one: str, many: str | None = None) -> str:
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def visible(token: str) -> str:
    """A token with its white space shown: spaces as ·, line breaks as ↵, tabs as ⇥; an empty one as ∅."""
    return token.replace(" ", "·").replace("\n", "↵").replace("\t", "⇥") or "∅"


# Parts of a page


def section(title: str, *content: str) -> str:
    return element("section", element("h2", escape(title)), *content)


def paragraph(text: str, class_: str | None = None) -> str:
    return element("p", escape(text), class_=class_)


def figure(draw: Callable[[bool], str], caption: str) -> str:
    """A picture drawn twice, for wide and for narrow screens; the style sheet shows the one that fits."""
    wide = element("div", draw(False), class_="wide")
    narrow = element("div", draw(True), class_="narrow")
    return element("figure", wide, narrow, element("figcaption", escape(caption)))


def chart_size(narrow: bool, labels: int) -> Size:
    """Of a chart that is tall enough for a label of about two rows for every line."""
    usual = NARROW if narrow else WIDE
    return Size(usual.width, max(usual.height, 110 + 40.0 * labels))


def table(head: Sequence[str], rows: Iterable[str], caption: str, class_: str | None = None) -> str:
    """A table that scrolls by itself where the screen is narrow. Rows are markup, the head is text."""
    heading = element("thead", element("tr", *(element("th", escape(words), scope="col") for words in head)))
    whole = element("table", element("caption", escape(caption)), heading, element("tbody", *rows), class_=class_)
    return scroll(whole, caption)


def scroll(content: str, label: str, class_: str = "scroll") -> str:
    return element("div", content, class_=class_, tabindex="0", role="region", aria_label=label)


def row(name: str, cells: Sequence[str], class_: str | None = None) -> str:
    return element("tr", element("th", escape(name), scope="row"), *(element("td", escape(cell)) for cell in cells), class_=class_)


def tile(colour: str | None, value: str, note: str) -> str:
    """One figure in large type, of a list of the class `tiles`."""
    return element("li", element("b", escape(value)), element("span", escape(note)), class_=colour)


def undrawn(count: int) -> str:
    """The end of a caption: how many values its chart leaves out."""
    return f" {plural(count, 'value')} not drawn, being infinite, not a number, or too large." if count else ""
