"""The drawing functions: pure, and drawable whatever the numbers are."""

import itertools
import math
from collections.abc import Sequence
from xml.etree import ElementTree

import pytest

from recursify.reports import charts
from tests.support.pages import coordinates


def test_labels_do_not_overlap() -> None:
    centres = charts.spread([50, 51, 52, 10], [20, 20, 20, 20], 0, 200)
    ordered = sorted(centres)
    assert all(later - earlier >= 20 for earlier, later in itertools.pairwise(ordered))
    assert charts.spread([195], [20], 0, 200) == [190] and charts.spread([], [], 0, 10) == []


def test_long_names_are_truncated() -> None:
    rows = charts.wrap("a name that goes on and on " * 9 + "x" * 99, 90, 3)
    assert len(rows) == 3 and rows[-1].endswith("…") and all(charts.text_width(row) <= 90 for row in rows)


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (3.4, 3.41), (3.0, 13.0), (-2.0, 5000.0), (1.0, 1.000002)])
def test_ticks_are_round_few_and_distinct(low: float, high: float) -> None:
    ticks, decimals = charts.nice_ticks(low, high, 5)
    written = [f"{tick:.{decimals}f}" for tick in ticks]
    assert 2 <= len(ticks) <= 8 and len(set(written)) == len(written)
    assert all(low - 1e-9 <= tick <= high + 1e-9 for tick in ticks)


def test_non_finite_coordinates_are_refused() -> None:
    with pytest.raises(ValueError, match="must be finite"):
        charts.element("circle", cx=math.nan)


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize(
    ("prelude", "loop", "coda"),
    [((), (0, 8, 16, 23), ()), (range(10), range(10, 14), range(14, 24)), ((), (3,), (4,))],
    ids=["compact", "whole donor", "two layers"],
)
def test_picture_of_the_plan_shows_every_layer_once_in_each_half(
    prelude: Sequence[int], loop: Sequence[int], coda: Sequence[int], narrow: bool
) -> None:
    svg = ElementTree.fromstring(
        charts.architecture_picture(prelude=prelude, loop=loop, coda=coda, donor_layers=24, H_cycles=3, L_cycles=2, narrow=narrow)
    )
    words = [node.text for node in svg.iter("text")]
    kept = {*prelude, *loop, *coda}
    assert all(words.count(str(layer)) == (2 if layer in kept else 1) for layer in range(24))
    assert ("prelude" in words) == bool(prelude) and ("coda" in words) == bool(coda) and "\N{MULTIPLICATION SIGN} 3 (2 + 1) = 9" in words
    assert max(coordinates(svg)) <= max(float(svg.get("width", "0")), float(svg.get("height", "0")))


def test_standalone_chart_has_style_and_background() -> None:
    drawn = charts.architecture_picture(prelude=(0,), loop=(1, 2), coda=(), donor_layers=3, H_cycles=2, L_cycles=1, narrow=False)
    root, inner = ElementTree.fromstring(charts.standalone(drawn, margin=10)), ElementTree.fromstring(drawn)
    space = "{http://www.w3.org/2000/svg}"
    assert root.tag == space + "svg" and [child.tag for child in root][:2] == [space + "style", space + "rect"]
    assert [float(root.attrib[side]) - float(inner.attrib[side]) for side in ("width", "height")] == pytest.approx([20, 20])
    left, top, width, height = map(float, root.attrib["viewBox"].split())
    assert (left, top) == (-10, -10) and (width, height) == (float(root.attrib["width"]), float(root.attrib["height"]))
    classes = {name for node in inner.iter() for name in node.attrib.get("class", "").split()}
    assert classes and all(f".{name}" in charts.chart_style() for name in classes)
