"""Accuracy by difficulty: drawn in percent, in order, in shades."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from recursify.reports.accuracy_chart import difficulty_figure, difficulty_line, shade
from recursify.reports.charts import Level, chart_style


def test_points_are_in_order_and_in_percent() -> None:
    line = difficulty_line([(8, 0.25, 0.1), (4, 0.5, None)], "some", "s1", "dashed", errors=True)
    assert (list(line.xs), list(line.ys), list(line.errors), line.stroke) == ([4, 8], [50.0, 25.0], [None, 10.0], "dashed")
    assert not difficulty_line([(4, 0.5, 0.1)], "some", "s1").errors


@given(st.integers(1, 30))
def test_shades_run_from_the_first_colour_to_the_last_and_have_a_look(count: int) -> None:
    shades = [shade(index, count) for index in range(count)]
    assert shades == sorted(shades) and shades[0] == "d0" and (count == 1 or shades[-1] == "d6")
    assert all(f".{name} {{" in chart_style() for name in shades)


def test_a_figure_has_its_lines_its_levels_and_its_axes() -> None:
    lines = [difficulty_line([(4, 0.5, None), (8, 0.25, None)], "some", "s1")]
    html = difficulty_figure("A title", lines, "A caption.", levels=[Level(name="guessing", y=12.5, colour="muted")], x_label="letters")
    assert html.count("<svg") == 2
    assert all(words in html for words in ("A title", "A caption.", "guessing", "letters", ">100<", ">0<", "some"))
    assert "difficulty" in difficulty_figure("A title", lines, "")
