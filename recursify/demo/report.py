"""The demo's report page: setup, results, and their limits.

The page is one file that asks for nothing from outside: style and pictures are inline, there is no script. It is made
only of what the caller measured: no number here is typed in by hand, and the findings are worded from the numbers, so
that a recursive model that came out worse than its donor is said to be worse.

    DemoReport   all that is shown, as frozen values
    render       DemoReport to HTML
    write        the same into a file, whole or not at all

Units: losses and their standard errors in nats per token, times in seconds, cost in layer applications per token.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..network.losses import perplexity_text
from ..reports.charts import Axes, Level, Line, architecture_picture, count_undrawable, is_drawable, line_chart
from ..reports.html import (
    NARROW,
    PLUS_MINUS,
    WIDE,
    details,
    document,
    figure,
    footer,
    header,
    magnitude,
    main,
    number,
    paragraph,
    plural,
    row,
    scroll,
    section,
    signed,
    table,
    templates,
    tile,
    undrawn,
    visible,
    write_document,
)
from ..reports.html import findings as bullet_list
from . import report_tracking
from .report_tracking import Tracking

CLEARLY = 2.0
STANDING_LIMITS = (
    "One run with one seed: another seed moves the losses, and the standard errors given here are those of the validation text only.",
    "A small model, a small text and a short fine-tuning: differences at this size need not hold at a larger one.",
    "Loss on held-out text is not skill at a task; the samples are for reading, not for counting. The one task is synthetic and small.",
    "Layer applications are a count, not a timing: speed also depends on caches, kernels and batch size.",
)


@dataclass(frozen=True, kw_only=True)
class Donor:
    """The pretrained model that was converted."""

    name: str
    parameters: int
    layers: int


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """The donor layers of prelude, loop and coda, and the number of loop applications at the trained depth."""

    prelude: tuple[int, ...]
    loop: tuple[int, ...]
    coda: tuple[int, ...]
    H_cycles: int
    L_cycles: int
    parameters: int

    @property
    def passes(self) -> int:
        """Loop applications per token at the trained depth; one plain pass without cycles."""
        return max(1, self.H_cycles * (self.L_cycles + 1))


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One step of the demo and its duration."""

    name: str
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Loss over the optimizer steps of one fine-tuning run. `name` is the model's, for consistent colours."""

    name: str
    steps: tuple[int, ...]
    train_loss: tuple[float, ...]
    eval_steps: tuple[int, ...] = ()
    eval_loss: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class DepthPoint:
    """Validation loss of the recursive model at one number of cycles."""

    H_cycles: int
    loss: float
    layer_applications: int
    standard_error: float | None = None


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """Validation loss of a baseline on the same text."""

    name: str
    loss: float
    layer_applications: int
    standard_error: float | None = None


@dataclass(frozen=True, kw_only=True)
class Guess:
    """The top token of one cycle. `right` is None if the true next token is unknown."""

    text: str
    probability: float
    right: bool | None


@dataclass(frozen=True, kw_only=True)
class TokenRow:
    """One position of the sentence, and the prediction of each cycle, first cycle first."""

    token: str
    true_next: str | None
    guesses: tuple[Guess, ...]


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A completion without its prompt; `model` starts with the model's name in other parts of the page."""

    model: str
    prompt: str
    text: str


@dataclass(frozen=True, kw_only=True)
class DemoReport:
    """The data of the page.

    `donor_tuned` is the donor fine-tuned on the same tokens, in the same order, as the recursive model: without it a
    conversion looks better or worse for the data it saw. `difference_error` is the standard error of (recursive at its
    trained depth minus `donor_tuned`), token by token; None falls back on the two separate errors, which overstates it.
    """

    donor: Donor
    architecture: Architecture
    data: str
    train_tokens: int
    validation_tokens: int
    curves: tuple[Curve, ...]
    depths: tuple[DepthPoint, ...]
    donor_as_is: Baseline
    donor_tuned: Baseline
    further_baselines: tuple[Baseline, ...] = ()
    difference_error: float | None = None
    sentence: tuple[TokenRow, ...] = ()
    samples: tuple[Sample, ...] = ()
    machine: str = ""
    versions: tuple[tuple[str, str], ...] = ()
    stages: tuple[Stage, ...] = ()
    commands: tuple[str, ...] = ()
    limits: tuple[str, ...] = ()
    model_name: str = "recursive"
    tracking: Tracking | None = None

    @property
    def baselines(self) -> tuple[Baseline, ...]:
        return (self.donor_as_is, self.donor_tuned, *self.further_baselines)

    @property
    def at_trained_depth(self) -> DepthPoint | None:
        return next((point for point in self.depths if point.H_cycles == self.architecture.H_cycles), None)

    @property
    def best_depth(self) -> DepthPoint | None:
        return min((point for point in self.depths if math.isfinite(point.loss)), key=lambda point: point.loss, default=None)


def write(report: DemoReport, path: str | Path) -> Path:
    """Write the page to `path` atomically, creating its folder."""
    return write_document(render(report), path)


def render(report: DemoReport) -> str:
    """The whole page as HTML text."""
    title = f"{report.donor.name}, made recursive"
    sections = [
        _plan(report),
        _loss_by_cycles(report),
        _fine_tuning(report),
        _sentence(report),
        _samples(report),
        report_tracking.render(report.tracking) if report.tracking else "",
        _numbers(report),
        _making(report),
        _limits(report),
    ]
    return document(title, _header(report, title), main(sections), _footer(report))


# Findings


def difference_to_tuned(report: DemoReport) -> tuple[float, float | None] | None:
    """Loss of the recursive model at its trained depth minus the fine-tuned donor's, and its standard error; None if either is missing."""
    ours, theirs = report.at_trained_depth, report.donor_tuned
    if ours is None or not (math.isfinite(ours.loss) and math.isfinite(theirs.loss)):
        return None
    error = report.difference_error
    if error is None and ours.standard_error is not None and theirs.standard_error is not None:
        error = math.hypot(ours.standard_error, theirs.standard_error)
    return ours.loss - theirs.loss, error


def findings(report: DemoReport) -> list[str]:
    """Findings as sentences; each is omitted, or says that nothing can be concluded, if its numbers are missing."""
    sentences = [_against_tuned(report), _across_cycles(report), _against_as_is(report), _cost(report)]
    if report.tracking is not None:
        sentences.append(report_tracking.finding(report.tracking))
    return [sentence for sentence in sentences if sentence]


def _against_tuned(report: DemoReport) -> str:
    compared = difference_to_tuned(report)
    depth = plural(report.architecture.H_cycles, "cycle")
    if compared is None:
        return f"At its trained depth of {depth} no finite loss was measured for both models, so they cannot be compared."
    difference, error = compared
    ours = report.at_trained_depth
    assert ours is not None
    opening = (
        f"At its trained depth of {depth} the recursive model has a loss of {number(ours.loss)} nats per token; the donor "
        f"fine-tuned on the same tokens has {number(report.donor_tuned.loss)}. The difference is {signed(difference)} nats"
    )
    return f"{opening}{f' {PLUS_MINUS}{number(error)}' if error is not None else ''}: {_verdict(difference, error)}."


def _verdict(difference: float, error: float | None) -> str:
    if error is not None and abs(difference) < CLEARLY * error:
        return "too close to tell apart on this text"
    if difference == 0:
        return "no difference"
    unsure = "" if error is not None else " (how surely was not measured)"
    return f"the recursive model is {'worse' if difference > 0 else 'better'}{unsure}"


def _across_cycles(report: DemoReport) -> str:
    best = report.best_depth
    finite = sorted((point for point in report.depths if math.isfinite(point.loss)), key=lambda point: point.H_cycles)
    if best is None or len(finite) < 2:
        return ""
    first = finite[0]
    if best is first:
        last = finite[-1]
        return (
            f"The best depth is the shallowest one measured, {plural(first.H_cycles, 'cycle')}: further cycles do not lower the loss "
            f"({signed(last.loss - first.loss)} nats at {last.H_cycles})."
        )
    reduction = f"{number(first.loss - best.loss)} below {plural(first.H_cycles, 'cycle')}"
    trained = report.at_trained_depth
    if best is trained:
        return f"The best depth is the trained one, {plural(best.H_cycles, 'cycle')} ({number(best.loss)} nats), {reduction}."
    known = trained is not None and trained is not first and math.isfinite(trained.loss)
    also = f"{number(trained.loss - best.loss)} below the trained depth and " if trained is not None and known else ""
    return f"The best depth is {plural(best.H_cycles, 'cycle')} ({number(best.loss)} nats), {also}{reduction}."


def _against_as_is(report: DemoReport) -> str:
    ours, theirs = report.at_trained_depth, report.donor_as_is
    if ours is None or not (math.isfinite(ours.loss) and math.isfinite(theirs.loss)):
        return ""
    difference = ours.loss - theirs.loss
    return (
        f"Against the donor as it came ({number(theirs.loss)} nats) the difference is {signed(difference)}, but that donor was not "
        "fine-tuned on this text, so this says little about recursion."
    )


def _cost(report: DemoReport) -> str:
    ours, theirs = report.at_trained_depth, report.donor_tuned
    if ours is None or theirs.layer_applications <= 0:
        return ""
    ratio = ours.layer_applications / theirs.layer_applications
    return (
        f"Per token the recursive model applies {plural(ours.layer_applications, 'layer')} where the donor applies "
        f"{theirs.layer_applications:,}, {ratio:.2f} times the work; it holds {report.architecture.parameters:,} parameters where the "
        f"donor holds {report.donor.parameters:,}."
    )


# Parts of the page


def _colours(report: DemoReport) -> dict[str, str]:
    """One colour per model, the same in every chart."""
    names = (report.model_name, report.donor_tuned.name, report.donor_as_is.name, *(line.name for line in report.further_baselines))
    return {name: f"s{min(index, 6)}" for index, name in reversed(list(enumerate(names, start=1)))}


def _header(report: DemoReport, title: str) -> str:
    plan = report.architecture
    kept = len(plan.prelude) + len(plan.loop) + len(plan.coda)
    looped = "all of them" if kept == len(plan.loop) else f"{len(plan.loop)} of them"
    lede = (
        f"{report.donor.name} ({magnitude(report.donor.parameters)} parameters, {plural(report.donor.layers, 'layer')}) was turned into a "
        f"recursive model of {magnitude(plan.parameters)} parameters. It keeps {kept} of the donor's layers, "
        f"{looped} in a loop that every token passes {plural(plan.passes, 'time')} at the trained depth. Then it was fine-tuned, "
        f"beside the donor itself, on the same {plural(report.train_tokens, 'token')}."
    )
    return header("recursify demo", title, lede, _tiles(report), findings(report))


def _tiles(report: DemoReport) -> list[str]:
    ours, best, compared = report.at_trained_depth, report.best_depth, difference_to_tuned(report)
    tiles: list[str] = []
    if ours is not None:
        tiles.append(tile("s1", number(ours.loss), f"nats per token, {report.model_name}, {plural(ours.H_cycles, 'cycle')}"))
    tiles.append(tile("s2", number(report.donor_tuned.loss), f"nats per token, {report.donor_tuned.name}"))
    if compared is not None:
        difference, error = compared
        spread = f", {PLUS_MINUS}{number(error)}" if error is not None else ""
        tiles.append(tile(None, signed(difference), f"nats of difference{spread}: {_verdict(difference, error)}"))
    if best is not None:
        measured = ", ".join(str(point.H_cycles) for point in report.depths)
        tiles.append(tile(None, plural(best.H_cycles, "cycle"), f"had the lowest loss, of {measured} measured"))
    return tiles


def _plan(report: DemoReport) -> str:
    plan = report.architecture

    def draw(narrow: bool) -> str:
        return architecture_picture(
            prelude=plan.prelude,
            loop=plan.loop,
            coda=plan.coda,
            donor_layers=report.donor.layers,
            H_cycles=plan.H_cycles,
            L_cycles=plan.L_cycles,
            narrow=narrow,
        )

    dropped = sorted(set(range(report.donor.layers)) - {*plan.prelude, *plan.loop, *plan.coda})
    omitted = f"Left out: {', '.join(map(str, dropped))}." if dropped else "None is left out."
    caption = (
        f"Numbers are the donor's own layers. {omitted} One cycle applies the loop {plural(plan.L_cycles, 'time')} to the inner state z_L "
        f"and once to z_H; {plural(plan.H_cycles, 'cycle')} make {plural(plan.passes, 'pass', 'passes')} with the same weights."
    )
    return section("The plan", figure(draw, caption))


def _loss_by_cycles(report: DemoReport) -> str:
    if not report.depths:
        return section("Loss by cycles", paragraph("No depth was measured.", "quiet"))
    points, colours = sorted(report.depths, key=lambda point: point.H_cycles), _colours(report)
    line = Line(
        name=report.model_name,
        xs=[point.H_cycles for point in points],
        ys=[point.loss for point in points],
        errors=[point.standard_error for point in points],
        colour=colours[report.model_name],
        dots=True,
        valued=True,
    )
    levels = [Level(name=base.name, y=base.loss, error=base.standard_error, colour=colours[base.name]) for base in report.baselines]
    axes = _depth_axes(report, points)
    costs = "; ".join(f"{base.name} ({base.layer_applications:,})" for base in report.baselines)
    errors = [measured.standard_error for measured in points] + [base.standard_error for base in report.baselines]
    caption = (
        f"Validation loss of one and the same model, run with more or fewer cycles than it was trained for. "
        f"Dashed: plain models, and their layers per token: {costs}. "
        f"{'Bars and bands: plus and minus one standard error.' if any(errors) else ''}{undrawn(count_undrawable([line], levels))}"
    )
    return section("Loss by cycles", figure(lambda narrow: line_chart([line], levels, axes, NARROW if narrow else WIDE), caption))


def _depth_axes(report: DemoReport, points: Sequence[DepthPoint]) -> Axes:
    heights = ", ".join(f"{point.H_cycles}: {number(point.loss)}" for point in points)
    levels = ", ".join(f"{base.name}: {number(base.loss)}" for base in report.baselines)
    return Axes(
        title="Validation loss by number of cycles",
        description=f"Loss in nats per token at each number of cycles: {heights}. Horizontal lines: {levels}.",
        x_label="cycles; below, layers per token",
        y_label="validation loss, nats per token",
        x_ticks=[(point.H_cycles, (str(point.H_cycles), f"{point.layer_applications:,}")) for point in points],
        x_margin=0.3,
        marked_x=report.architecture.H_cycles,
        mark="trained depth",
    )


def _fine_tuning(report: DemoReport) -> str:
    lines = [line for curve in report.curves for line in _curve_lines(curve, _colours(report).get(curve.name, "s6"))]
    if not lines:
        return section("Fine-tuning", paragraph("No training loss was recorded.", "quiet"))
    axes = Axes(
        title="Loss during fine-tuning",
        description="Training loss over optimizer steps, with validation loss as dots, for "
        + " and ".join(curve.name for curve in report.curves)
        + ". The values are in the tables below.",
        x_label="optimizer step",
        y_label="loss, nats per token",
    )
    smooth = any(_window(curve) > 1 for curve in report.curves)
    how = "Thin: the training loss as logged. Thick: its running mean." if smooth else "Lines: the training loss as logged."
    caption = (
        f"{how} Dots: validation loss. The figure at a line's end is its last. Both models read the same tokens: {report.data}."
        f"{undrawn(count_undrawable(_given(lines)))}"
    )
    return section("Fine-tuning", figure(lambda narrow: line_chart(lines, [], axes, NARROW if narrow else WIDE), caption))


def _given(lines: Iterable[Line]) -> list[Line]:
    """Names of lines with raw values rather than running means."""
    return [line for line in lines if line.stroke != "solid"]


def _curve_lines(curve: Curve, colour: str) -> Iterator[Line]:
    if curve.steps:
        yield Line(name=curve.name, xs=curve.steps, ys=curve.train_loss, colour=colour, stroke="faint", labelled=False)
        steps, means = running_mean(curve.steps, curve.train_loss, _window(curve))
        yield Line(name=curve.name, xs=steps, ys=means, colour=colour)
    if curve.eval_steps:
        name = f"{curve.name}, validation"
        yield Line(name=name, xs=curve.eval_steps, ys=curve.eval_loss, colour=colour, stroke="dotted", dots=True, labelled=not curve.steps)


def _window(curve: Curve) -> int:
    return max(1, len(curve.steps) // 25)


def running_mean(steps: Sequence[int], values: Sequence[float], window: int) -> tuple[list[int], list[float]]:
    """Running means of the last `window` finite values, at the steps where the windows end."""
    kept = [(step, value) for step, value in zip(steps, values, strict=True) if is_drawable(value)]
    ends = range(min(window, len(kept)), len(kept) + 1) if kept else range(0)
    means = [math.fsum(value for _, value in kept[max(0, end - window) : end]) / min(window, end) for end in ends]
    return [kept[end - 1][0] for end in ends], means


def _sentence(report: DemoReport) -> str:
    if not report.sentence:
        return ""
    depth = max(len(row.guesses) for row in report.sentence)
    explained = (
        "At each position the model reads one more token and must name the next. Each column is what it would have said had it stopped "
        "after that cycle, with the probability it gave. Blue with ✓ is right, orange is wrong; the stronger the colour, the surer it was. "
        "A space is shown as ·, a line break as ↵."
    )
    rows = [_token_row(row, depth) for row in report.sentence]
    drawn = _own().sentence(_sentence_head(report, depth), rows, _sentence_foot(report, depth))
    return section(
        "One sentence, cycle by cycle", paragraph(explained), _own().unlabelled(scroll(drawn, "What each cycle would have said"))
    )


def _own() -> Any:
    return templates(__package__, "report.html.j2")


def _sentence_head(report: DemoReport, depth: int) -> list[dict[str, Any]]:
    trained = report.architecture.H_cycles
    cycles = [
        {"words": f"cycle {cycle}, trained depth" if cycle == trained else f"cycle {cycle}", "trained": cycle == trained}
        for cycle in range(1, depth + 1)
    ]
    return [*({"words": words, "trained": False} for words in ("reads", "true next")), *cycles]


def _sentence_foot(report: DemoReport, depth: int) -> list[str]:
    cells = []
    for cycle in range(depth):
        judged = [row.guesses[cycle].right for row in report.sentence if cycle < len(row.guesses) and row.guesses[cycle].right is not None]
        cells.append(f"{sum(map(bool, judged))} of {len(judged)}")
    return cells


def _token_row(row: TokenRow, depth: int) -> dict[str, Any]:
    following = visible(row.true_next) if row.true_next is not None else "?"
    guesses = [*map(_guess, row.guesses), *[None] * (depth - len(row.guesses))]
    return {"token": visible(row.token), "next": following, "guesses": guesses}


def _guess(guess: Guess) -> dict[str, Any]:
    known = math.isfinite(guess.probability)
    share = min(1.0, max(0.0, guess.probability)) if known else 0.0
    chance = f"{guess.probability:.0%}" if known else number(guess.probability)
    verdict = {True: "right", False: "wrong", None: None}[guess.right]
    return {"text": visible(guess.text), "verdict": verdict, "share": f"{share:.3f}", "chance": chance}


def _samples(report: DemoReport) -> str:
    if not report.samples:
        return ""
    prompts = [
        {"text": prompt, "samples": [_sample(report, sample) for sample in report.samples if sample.prompt == prompt]}
        for prompt in dict.fromkeys(sample.prompt for sample in report.samples)
    ]
    return section("Samples", paragraph("Each prompt, and how each model went on.", "quiet"), _own().samples(prompts))


def _sample(report: DemoReport, sample: Sample) -> dict[str, Any]:
    fitting = [(name, colour) for name, colour in _colours(report).items() if sample.model.startswith(name)]
    colour = max(fitting, key=lambda pair: len(pair[0]))[1] if fitting else None
    return {"model": sample.model, "text": sample.text.lstrip(" ") or "∅", "colour": colour}


def _numbers(report: DemoReport) -> str:
    caption = f"Validation on {plural(report.validation_tokens, 'token')}; losses in nats per token."
    head = ("model", "cycles", "loss", "std. error", "perplexity", "vs. donor tuned", "layers per token")
    rows = [_depth_row(report, point) for point in sorted(report.depths, key=lambda point: point.H_cycles)]
    rows += [row(base.name, ["", *_loss_cells(report, base)]) for base in report.baselines]
    return section("All numbers", table(head, rows, caption), *(_curve_details(curve) for curve in report.curves))


def _depth_row(report: DemoReport, point: DepthPoint) -> str:
    trained = point.H_cycles == report.architecture.H_cycles
    name = f"{report.model_name}, trained depth" if trained else report.model_name
    return row(name, [str(point.H_cycles), *_loss_cells(report, point)], "ours trained" if trained else "ours")


def _loss_cells(report: DemoReport, measured: DepthPoint | Baseline) -> list[str]:
    difference = measured.loss - report.donor_tuned.loss
    return [
        number(measured.loss),
        number(measured.standard_error),
        perplexity_text(measured.loss),
        "" if measured is report.donor_tuned or not math.isfinite(difference) else signed(difference),
        f"{measured.layer_applications:,}",
    ]


def _curve_details(curve: Curve) -> str:
    trained, validated = dict(zip(curve.steps, curve.train_loss, strict=True)), dict(zip(curve.eval_steps, curve.eval_loss, strict=True))
    rows = [row(f"{step:,}", [number(trained.get(step)), number(validated.get(step))]) for step in sorted({*trained, *validated})]
    if not rows:
        return ""
    title = f"Fine-tuning of {curve.name}, {plural(len(rows), 'logged step')}"
    return details(title, ("step", "training loss", "validation loss"), rows)


def _making(report: DemoReport) -> str:
    plan = report.architecture
    layers = [("prelude", plan.prelude), ("loop", plan.loop), ("coda", plan.coda)]
    facts = [
        ("Donor", f"{report.donor.name}: {report.donor.parameters:,} parameters, {plural(report.donor.layers, 'layer')}"),
        ("Recursive model", f"{plan.parameters:,} parameters; H_cycles {plan.H_cycles}, L_cycles {plan.L_cycles}"),
        ("Donor layers", "; ".join(f"{name} {', '.join(map(str, indices))}" for name, indices in layers if indices)),
        ("Text", report.data),
        ("Tokens", f"{report.train_tokens:,} to fine-tune each model, {report.validation_tokens:,} to validate"),
        ("Machine", report.machine),
        ("Versions", ", ".join(f"{name} {version}" for name, version in report.versions)),
    ]
    listed = [(name, value) for name, value in facts if value]
    return section("How it was made", _own().facts(listed), _stages(report), _commands(report))


def _stages(report: DemoReport) -> str:
    if not report.stages:
        return ""
    finite = [stage.seconds for stage in report.stages if math.isfinite(stage.seconds)]
    total, longest = math.fsum(finite), max(finite, default=0.0)
    rows = [_stage_row(stage, longest) for stage in report.stages]
    return _own().titled("Time", table(("stage", "seconds", ""), rows, f"{number(total, 1)} seconds in all", "stages"))


def _stage_row(stage: Stage, longest: float) -> str:
    share = stage.seconds / longest if longest > 0 and math.isfinite(stage.seconds) else 0.0
    return _own().stage(stage.name, number(stage.seconds, 1), f"{share:.3f}")


def _commands(report: DemoReport) -> str:
    if not report.commands:
        return ""
    return _own().titled("To repeat it", _own().commands("\n".join(report.commands)))


def _limits(report: DemoReport) -> str:
    return section("What this does not show", bullet_list((*report.limits, *STANDING_LIMITS)))


def _footer(report: DemoReport) -> str:
    version = dict(report.versions).get("recursify", "")
    return footer(f"Written by recursify {version}".strip() + ". This page holds all it needs.")
