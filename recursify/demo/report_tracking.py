"""The state-tracking section of the demo's page: accuracy by sequence length, one line per cycle count, beside the baselines.

    Tracking    what was measured, as frozen values
    render      Tracking to the markup of one section
    finding     what it says in one sentence; sentences: in some more

Findings are worded from the numbers, so that recursion that did not help is said not to have helped. Accuracies are shares of right
guesses, shown in percent; lengths are in letters, times in seconds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ..reports.accuracy_chart import difficulty_figure, difficulty_line, shade
from ..reports.charts import Level, Line
from ..reports.html import PLUS_MINUS, details, findings, number, paragraph, plural, row, section, signed, table

CLEARLY = 2.0  # standard errors
KNOWN, LOST = 0.9, 0.5  # accuracy above which the state counts as tracked, and below which as lost


@dataclass(frozen=True, kw_only=True)
class Share:
    """Accuracy after a number of moves."""

    letters: int
    accuracy: float
    standard_error: float | None = None


@dataclass(frozen=True, kw_only=True)
class Tracker:
    """A model at one depth. `H_cycles` is None for a donor; `steps` and `seconds` are of its fine-tuning, None without one."""

    name: str
    shares: tuple[Share, ...]
    H_cycles: int | None = None
    steps: int | None = None
    seconds: float | None = None

    def over(self, letters: Sequence[int]) -> tuple[float, float]:
        """Mean accuracy over these lengths, and an upper bound of its standard error: predictions within a sequence are correlated."""
        found = [share for share in self.shares if share.letters in letters]
        errors = [share.standard_error or 0.0 for share in found]
        return math.fsum(share.accuracy for share in found) / len(found), math.fsum(errors) / len(found)


@dataclass(frozen=True, kw_only=True)
class Tracking:
    """The data of the section.

    Args:
        states: Number of states.
        words: Number of evaluated sequences.
        example: One sequence and its states.
        pretrained, trained: Sequence lengths of the donor's pretraining and of the fine-tuning.
        H_cycles: The trained depth.
        depths: The recursive model, by depth.
    """

    states: int
    words: int
    example: tuple[str, str]
    pretrained: int
    trained: int
    H_cycles: int
    donor_as_is: Tracker
    donor_tuned: Tracker
    depths: tuple[Tracker, ...]

    @property
    def models(self) -> tuple[Tracker, ...]:
        return (self.donor_as_is, self.donor_tuned, *self.depths)

    @property
    def at_trained_depth(self) -> Tracker:
        return next(tracker for tracker in self.depths if tracker.H_cycles == self.H_cycles)

    @property
    def lost(self) -> list[int]:
        """The fine-tuning lengths at which the pretrained donor's accuracy is below one half."""
        return [share.letters for share in self.donor_as_is.shares if share.accuracy < LOST and share.letters <= self.trained]


def render(tracking: Tracking) -> str:
    """The section."""
    word, states = tracking.example
    explained = (
        "A second donor, tiny and trained on one synthetic task: it reads a sequence of permutations of three things, and after each "
        f"element predicts the product so far, one of {tracking.states}; for {word} these are {states}. It was pretrained on sequences "
        f"of length {tracking.pretrained}. It was made recursive and fine-tuned on length {tracking.trained}; as a baseline, the donor "
        "itself was fine-tuned for the same time."
    )
    found = findings(sentences(tracking))
    return section("State tracking", paragraph(explained), found, _chart(tracking), _summary(tracking), _details(tracking))


# Findings


def finding(tracking: Tracking) -> str:
    """The finding against the donor fine-tuned for the same time."""
    lost, ours, theirs = tracking.lost, tracking.at_trained_depth, tracking.donor_tuned
    if not lost:
        return "State tracking: the donor solves every measured length, so there is nothing to gain."
    (mine, my_error), (other, other_error) = ours.over(lost), theirs.over(lost)
    difference, error = 100 * (mine - other), 100 * math.hypot(my_error, other_error)
    return (
        f"State tracking over {_span(lost)}, where the donor fails: after {plural(tracking.H_cycles, 'cycle')} the recursive "
        f"model has an accuracy of {_percent(mine)}, the donor fine-tuned for the same time {_percent(other)}. The difference is "
        f"{signed(difference, 1)} points {PLUS_MINUS}{number(error, 1)}: {_verdict(difference, error)}."
    )


def sentences(tracking: Tracking) -> list[str]:
    return [_reach(tracking), finding(tracking), _across_cycles(tracking), _cost(tracking)]


def _reach(tracking: Tracking) -> str:
    known = [share.letters for share in tracking.donor_as_is.shares if share.accuracy >= KNOWN]
    tracks = f"tracks the state up to length {max(known)}" if known else "tracks the state at no measured length"
    if not tracking.lost:
        return f"The pretrained donor {tracks} (accuracy of {KNOWN:.0%} or more)."
    last = max(tracking.lost)
    (after,) = (share.accuracy for share in tracking.donor_as_is.shares if share.letters == last)
    return (
        f"The pretrained donor {tracks} (accuracy of {KNOWN:.0%} or more), fails from length {min(tracking.lost)} on (less than "
        f"{LOST:.0%}), and has {_percent(after)} at length {last}, where chance is {_percent(1 / tracking.states)}."
    )


def _across_cycles(tracking: Tracking) -> str:
    """Over the lengths at which the donor fails; over all if there are none."""
    letters = tracking.lost or [share.letters for share in tracking.donor_as_is.shares]
    found = [(tracker.H_cycles or 0, *tracker.over(letters)) for tracker in tracking.depths]
    if len(found) < 2:
        return ""
    by_cycle = ", ".join(f"{H}: {_percent(mean)}" for H, mean, _ in found)
    (first, low, low_error), (best, high, high_error) = found[0], max(found, key=lambda depth: depth[1])
    opening = f"Accuracy by cycles at these lengths: {by_cycle}."
    improvement, error = high - low, math.hypot(low_error, high_error)
    if improvement < CLEARLY * error or best == first:
        return f"{opening} No depth is clearly better than {plural(first, 'cycle')}."
    points = f"{signed(100 * improvement, 1)} points {PLUS_MINUS}{number(100 * error, 1)}"
    return f"{opening} The best, {plural(best, 'cycle')}, is {points} from {plural(first, 'cycle')}."


def _cost(tracking: Tracking) -> str:
    ours, theirs = tracking.at_trained_depth, tracking.donor_tuned
    return (
        f"The recursive model was fine-tuned for {number(ours.seconds, 0)} seconds, which were {plural(ours.steps or 0, 'step')}; the "
        f"donor for {number(theirs.seconds, 0)}, which were {plural(theirs.steps or 0, 'step')} of the same batch size."
    )


def _verdict(difference: float, error: float) -> str:
    if abs(difference) < CLEARLY * error or difference == 0:
        return "too close to tell apart"
    return "recursion helps" if difference > 0 else "recursion does not help here"


# The picture and the tables


def _chart(tracking: Tracking) -> str:
    lines = [
        *(_line(tracker, shade(index, len(tracking.depths))) for index, tracker in enumerate(tracking.depths)),
        _line(tracking.donor_tuned, "s4", "dashed"),
        _line(tracking.donor_as_is, "s3", "dotted"),
    ]
    caption = (
        f"Accuracy at each position of {tracking.words:,} held-out sequences, whose beginnings occur in no training. The same "
        "recursive model at several depths; dashed and dotted: the donor, and chance. Sequences longer than those of the "
        "fine-tuning are to the right of the mark."
    )
    chance = Level(name="chance", y=100 / tracking.states, colour="muted")
    return difficulty_figure(
        "Accuracy by sequence length",
        lines,
        caption,
        levels=[chance],
        x_label="length read",
        marked_x=tracking.trained,
        mark="trained length",
    )


def _line(tracker: Tracker, colour: str, stroke: Literal["solid", "dotted", "dashed"] = "solid") -> Line:
    points = [(share.letters, share.accuracy, share.standard_error) for share in tracker.shares]
    return difficulty_line(points, tracker.name, colour, stroke)


def shown_lengths(tracking: Tracking) -> list[int]:
    """The lengths of the short table: every second one up to 4 beyond those of the fine-tuning."""
    return [share.letters for share in tracking.donor_as_is.shares if share.letters % 2 == 0 and share.letters <= tracking.trained + 4]


def _summary(tracking: Tracking) -> str:
    lengths = shown_lengths(tracking)
    head = ("model", "steps", "seconds", *(plural(length, "letter") for length in lengths))
    rows = [
        row(
            tracker.name,
            ["" if tracker.steps is None else f"{tracker.steps:,}", number(tracker.seconds, 1), *_cells(tracker, lengths)],
            _class(tracking, tracker),
        )
        for tracker in tracking.models
    ]
    return table(head, rows, "Accuracy in percent by sequence length; steps and seconds of the fine-tuning.")


def _cells(tracker: Tracker, lengths: Sequence[int]) -> list[str]:
    return [number(100 * share.accuracy, 1) for share in tracker.shares if share.letters in lengths]


def _class(tracking: Tracking, tracker: Tracker) -> str | None:
    if tracker.H_cycles is None:
        return None
    return "ours trained" if tracker.H_cycles == tracking.H_cycles else "ours"


def _details(tracking: Tracking) -> str:
    """All figures with standard errors."""
    names = [tracker.name for tracker in tracking.models]
    rows = [
        row(str(shares[0].letters), [_with_error(share) for share in shares])
        for shares in zip(*(tracker.shares for tracker in tracking.models), strict=True)
    ]
    return details("Accuracy at every position, in percent, with standard errors", ("length", *names), rows)


def _with_error(share: Share) -> str:
    error = "" if share.standard_error is None else f" {PLUS_MINUS}{number(100 * share.standard_error, 1)}"
    return number(100 * share.accuracy, 1) + error


def _span(letters: Sequence[int]) -> str:
    return f"length {letters[0]}" if len(letters) == 1 else f"lengths {min(letters)} to {max(letters)}"


def _percent(share: float) -> str:
    return f"{number(100 * share, 1)}\N{NO-BREAK SPACE}%"
