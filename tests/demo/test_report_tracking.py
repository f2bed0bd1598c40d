"""The section on state tracking: every figure is there, and the sentences follow the figures."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recursify.demo.report_tracking import Share, Tracker, Tracking, finding, render, sentences, shown_lengths

LETTERS = range(1, 11)


def tracker(name: str, *accuracies: float, H_cycles: int | None = None, error: float | None = 0.01, **training: float) -> Tracker:
    """Accuracies of the first positions; the last one holds to the end."""
    filled = [*accuracies, *[accuracies[-1]] * (len(LETTERS) - len(accuracies))]
    shares = tuple(Share(letters=n, accuracy=share, standard_error=error) for n, share in zip(LETTERS, filled, strict=True))
    return Tracker(name=name, shares=shares, H_cycles=H_cycles, **training)  # type: ignore[arg-type]


def example(*at_depths: float, tuned: float = 0.4, **changes: float) -> Tracking:
    """A donor that fails from the fifth position on; all others are right at four, and at the rest as given."""
    known = 1.0, 0.99, 0.98, 0.97
    return Tracking(
        states=6, words=321, example=("a b <c>", "A B C"), pretrained=4, trained=8, H_cycles=2,
        donor_as_is=tracker("as is", *known, 0.2134),
        donor_tuned=tracker("tuned", *known, tuned, steps=77, seconds=12.3, **changes),
        depths=tuple(
            tracker(f"ours at {H}", *known, share, H_cycles=H, steps=25, seconds=11.9, **changes)
            for H, share in enumerate(at_depths, start=1)
        ),
    )  # fmt: skip


def test_every_number_and_name_is_shown() -> None:
    tracking = example(0.45, 0.8761, 0.7)
    html = render(tracking)
    wanted = ["21.3", "87.6", "45.0", "70.0", "97.0", "12.3", "11.9", "77", "25", "321", "as is", "tuned", "ours at 3", "16.7"]
    assert [words for words in wanted if words not in html] == []
    assert "a b &lt;c&gt;" in html and "trained length" in html
    assert html.count("<svg") == 2
    assert 'class="series dashed"' in html and 'class="series dotted"' in html
    details = html.split("<details>")[1]
    assert len(re.findall("<td>", details)) == len(LETTERS) * 5


def test_short_table_exceeds_the_trained_length() -> None:
    assert shown_lengths(example(0.5, 0.6)) == [2, 4, 6, 8, 10]


@pytest.mark.parametrize(
    ("ours", "tuned", "words"),
    [
        (0.8, 0.4, "+40.0 points ±\N{NO-BREAK SPACE}1.4: recursion helps."),
        (0.3, 0.4, "\N{MINUS SIGN}10.0 points ±\N{NO-BREAK SPACE}1.4: recursion does not help here."),
        (0.41, 0.4, "too close to tell apart."),
        (0.4, 0.4, "too close to tell apart."),
    ],
)
def test_the_finding_follows_the_figures(ours: float, tuned: float, words: str) -> None:
    sentence = finding(example(0.4, ours, tuned=tuned))
    assert sentence.endswith(words) and "over lengths 5 to 8" in sentence


def test_without_errors_any_difference_counts() -> None:
    assert finding(example(0.4, 0.41, error=None)).endswith("recursion helps.")


def test_donor_that_never_fails() -> None:
    tracking = replace(example(0.8, 0.9), donor_as_is=tracker("as is", 1.0))
    assert "nothing to gain" in finding(tracking)
    assert "tracks the state up to length 10" in sentences(tracking)[0]
    assert "Accuracy by cycles" in sentences(tracking)[2]


def test_donor_reach_follows_the_numbers() -> None:
    sentence = sentences(example(0.4, 0.8))[0]
    assert "up to length 4" in sentence and "from length 5 on" in sentence and "has 21.3\N{NO-BREAK SPACE}% at length 8" in sentence
    blind = replace(example(0.4, 0.8), donor_as_is=tracker("as is", 0.1))
    assert "at no measured length" in sentences(blind)[0]


@pytest.mark.parametrize(
    ("depths", "words"),
    [
        ((0.4, 0.8, 0.9), "The best, 3 cycles, is +50.0 points"),
        ((0.4, 0.8, 0.5), "The best, 2 cycles, is +40.0 points"),
        ((0.8, 0.8, 0.8), "No depth is clearly better than 1 cycle."),
        ((0.8, 0.805, 0.7), "No depth is clearly better than 1 cycle."),
    ],
)
def test_findings_across_cycles_follow_the_numbers(depths: tuple[float, ...], words: str) -> None:
    assert words in sentences(example(*depths))[2]


def test_cost_is_stated() -> None:
    assert "12 seconds, which were 25 steps; the donor for 12, which were 77 steps" in sentences(example(0.4, 0.8))[3]


@given(st.lists(st.floats(0, 1), min_size=2, max_size=5), st.floats(0, 1))
def test_chart_of_any_accuracies(depths: list[float], tuned: float) -> None:
    html = render(example(*depths, tuned=tuned))
    assert "nan" not in html and "inf" not in html.replace("information", "")
