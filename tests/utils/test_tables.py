"""Tables in plain text: aligned, never wrapped, without markup."""

from __future__ import annotations

from recursify.utils.tables import table


def test_columns_are_aligned_and_as_wide_as_their_cells() -> None:
    rows = [("a", 1.5, "x"), ("longer", -20.25, "<- this [one]"), ("b", "-")]
    assert table(("name", "loss", ""), rows, left=1) == [
        "name      loss",
        "a          1.5  x",
        "longer  -20.25  <- this [one]",
        "b            -",
    ]


def test_wide_tables_are_not_wrapped() -> None:
    (head, row) = table([f"column {i}" for i in range(60)], [[123456.789] * 60])
    assert head.split() == [word for i in range(60) for word in ("column", str(i))] and row.split() == ["123456.789"] * 60
