"""HTML pages and their pictures, taken apart."""

import re
from html.parser import HTMLParser
from xml.etree import ElementTree


def coordinates(svg: ElementTree.Element) -> list[float]:
    places = {"x", "y", "x1", "x2", "y1", "y2", "cx", "cy", "width", "height"}
    found = [value for node in svg.iter() for key, value in node.attrib.items() if key in places]
    found += [value for node in svg.iter() for value in node.attrib.get("points", "").replace(",", " ").split()]
    return [float(value) for value in found]


HOSTILE = '</style></svg><script src="http://bad">&amp;"\'\x00\u202e\ud800'


VOID = {"meta", "link"}


class Page(HTMLParser):
    """The page's tags, attributes and text; fails on tags that do not close in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.words: list[str] = []
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return "\n".join(self.words)


def pictures(html: str) -> list[ElementTree.Element]:
    return [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", html, re.DOTALL)]
