"""What all pages of results share: one self-contained file, its style, its parts (parts.html.j2), and numbers in words.

document         a whole page: style and pictures are inline, there is no script
write_document   the same into a file, atomically
section, paragraph, preformatted, findings, figure, table, details, row, tiles    parts; text is escaped, markup (`Markup`) is not
number, signed, plural, magnitude, visible                          for reading
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from ..errors import UserError
from ..utils.atomic import write_text
from .charts import Size, chart_style, shown

WIDE, NARROW = Size(820, 390), Size(360, 340)
PLUS_MINUS = "±\N{NO-BREAK SPACE}"
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def templates(package: str, name: str) -> Any:
    """The macros of a package's template, as attributes. Each escapes everything but `Markup` and returns `Markup`."""
    return _environment(package).get_template(name).module


@cache
def _environment(package: str) -> Environment:
    def finalize(value: Any) -> Any:
        return shown(value) if isinstance(value, str) and not isinstance(value, Markup) else value

    return Environment(
        loader=PackageLoader(package, ""), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        finalize=finalize,
    )  # fmt: skip


def _parts() -> Any:
    return templates(__package__, "parts.html.j2")


def document(title: str, *body: str, style: str = "") -> str:
    """The whole page as HTML text.

    Args:
        body: Markup.
        style: Additional style sheet of this page.
    """
    styles = [Markup(each) for each in (chart_style(), style_sheet(__package__, "page.css"), style)]
    return str(_parts().document(title, Markup(POLICY), styles, body))


@cache
def style_sheet(package: str, name: str) -> str:
    """A style sheet of a package."""
    return resources.files(package).joinpath(name).read_text(encoding="utf-8")


def write_document(html: str, path: str | Path) -> Path:
    """Write a page to `path` atomically, creating its folder.

    Raises:
        UserError: It cannot be written.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, html)
    except OSError as error:
        raise UserError(
            f"{path}: the page could not be written ({error.strerror or error}); free some space, or name another file"
        ) from error
    return path


# Formatting of numbers


def number(value: float | None, decimals: int = 4) -> str:
    """Format a number: fixed decimals, a true minus sign, powers of ten if huge, words if not finite."""
    if value is None:
        return ""
    if math.isnan(value):
        return "not a number"
    if math.isinf(value):
        return "infinite" if value > 0 else "infinite and negative"
    written = f"{value:,.{decimals}f}" if abs(value) < 1e6 else f"{value:.3e}"
    return written.replace("-", "\N{MINUS SIGN}")


def signed(value: float, decimals: int = 4) -> str:
    """As `number`, always with a sign."""
    return ("+" if value > 0 else "") + number(value, decimals)


def magnitude(count: int) -> str:
    """A short count, such as 12.6 million."""
    for size, word in ((10**9, "billion"), (10**6, "million")):
        if count >= size:
            return f"{count / size:.3g} {word}"
    return f"{count:,}"


def plural(count: int, one: str, many: str | None = None) -> str:
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def visible(token: str) -> str:
    """A token with visible white space: spaces as ·, line breaks as ↵, tabs as ⇥; an empty one as ∅."""
    return token.replace(" ", "·").replace("\n", "↵").replace("\t", "⇥") or "∅"


# Parts of a page


def header(eyebrow: str, title: str, lede: str, tiles: Sequence[str], sentences: Sequence[str]) -> Markup:
    return _parts().header(eyebrow, title, lede, tiles, sentences)


def main(sections: Sequence[str]) -> Markup:
    return _parts().main(sections)


def footer(words: str) -> Markup:
    return _parts().footer(words)


def section(title: str, *content: str) -> Markup:
    return _parts().section(title, content)


def paragraph(text: str, class_: str | None = None) -> Markup:
    return _parts().paragraph(text, class_)


def preformatted(text: str) -> Markup:
    """Text to be copied, such as a command."""
    return _parts().preformatted(text)


def findings(sentences: Sequence[str]) -> Markup:
    """A list of sentences."""
    return _parts().findings(sentences)


def figure(draw: Callable[[bool], str], caption: str) -> Markup:
    """A figure drawn for wide and for narrow screens; the style sheet shows one of them."""
    return _parts().figure(Markup(draw(False)), Markup(draw(True)), caption)


def chart_size(narrow: bool, labels: int) -> Size:
    """Size of a chart that has room for a label of about two rows per line."""
    usual = NARROW if narrow else WIDE
    return Size(usual.width, max(usual.height, 110 + 40.0 * labels))


def table(head: Sequence[str], rows: Iterable[str], caption: str, class_: str | None = None) -> Markup:
    """A table that scrolls horizontally on narrow screens. Rows are markup, the head is text."""
    return _parts().table(head, list(rows), caption, class_)


def details(title: str, head: Sequence[str], rows: Iterable[str]) -> Markup:
    """A collapsible table."""
    return _parts().details(title, head, list(rows))


def scroll(content: str, label: str, class_: str = "scroll") -> Markup:
    return _parts().scroll(content, label, class_)


def row(name: str, cells: Sequence[str], class_: str | None = None) -> Markup:
    return _parts().row(name, cells, class_)


def tile(colour: str | None, value: str, note: str) -> Markup:
    """One key figure in large type."""
    return _parts().tile(colour, value, note)


def undrawn(count: int) -> str:
    """The end of a caption: number of values that the chart leaves out."""
    return f" {plural(count, 'value')} not drawn, being infinite, not a number, or too large." if count else ""
