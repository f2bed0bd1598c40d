"""The report page of evaluations: loss by cycles, accuracy by difficulty, a text coloured by what later cycles change, and all numbers.

    render   what `recursify evaluate --json` or `recursify compare --json` prints, as HTML text
    write    the same into a file, whole or not at all

Every number was measured by the caller, and sentences are worded from the numbers. Losses are in nats per token; accuracies are shown in
percent. A plain model, such as the donor, is a horizontal line where cycles run across, and a dotted one elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..network.losses import perplexity_text
from ..reports.accuracy_chart import Point, difficulty_figure, difficulty_line, shade
from ..reports.charts import Axes, Level, Line, count_undrawable, line_chart
from ..reports.html import (
    PLUS_MINUS,
    chart_size,
    document,
    figure,
    findings,
    footer,
    header,
    main,
    number,
    paragraph,
    plural,
    row,
    section,
    signed,
    style_sheet,
    table,
    templates,
    tile,
    undrawn,
    visible,
    write_document,
)
from .statistics import SIGNIFICANT, format_p, verdict

Report = Mapping[str, Any]
Rows = Sequence[Mapping[str, Any]]

DEPTHS_DRAWN = 7  # maximum number of lines with distinct colours and labels; tables have no limit
LOOPED_COLOURS, PLAIN_COLOURS = ("s1", "s2", "s4", "s5"), ("s3", "s4", "s5")
NOTES = (
    "Standard errors and p say how far another sample of such texts or questions might be off. Another training run, with another seed, "
    "may be off by more.",
    "The p-values are not corrected for multiple comparisons: of twenty without a difference, one is below 0.05 on average.",
    "Layer applications are a count, not a timing: speed also depends on caches, kernels and batch size.",
)


@dataclass(frozen=True)
class Model:
    """One evaluation, and its colour in every chart."""

    report: Report
    colour: str

    @property
    def name(self) -> str:
        return str(self.report["checkpoint"])

    @property
    def own(self) -> int | None:
        """Its own cycle count; None for a plain model."""
        count: int | None = self.report["H_cycles"]
        return count

    @property
    def text(self) -> Mapping[str, Any] | None:
        found: Mapping[str, Any] | None = self.report["text"]
        return found

    def questions(self, key: tuple[str, str], halting: bool = False) -> Rows:
        """Rows of a question set, by its name and metric; empty if it was not evaluated.

        Args:
            halting: Include runs with early exit.
        """
        rows = [line for asked in self.report["questions"] if _key(asked) == key for line in asked["rows"]]
        return [line for line in rows if halting or line["halt"] is None]


def write(report: Report, path: str | Path) -> Path:
    """Write the page to `path`, making its folder."""
    return write_document(render(report), path)


def render(report: Report) -> str:
    """The whole page as HTML text.

    Args:
        report: `to_dict()` of an evaluation, or of a comparison of several.
    """
    together = "models" in report
    found = report["models"] if together else [report]
    models = _coloured_models(found)
    names = [model.name for model in models]
    title = f"{', '.join(names[:-1])} and {names[-1]}, compared" if together else names[0]
    sections = [
        _differences(report) if together else "",
        _loss_by_cycles(models, not together or report["same_windows"]),
        *(_accuracy(models, key) for key in _question_sets(models)),
        _tasks(models),
        _passages(models),
        _exits(models),
        _cycles(models),
        _numbers(models),
        section("How to read this", findings(NOTES)),
    ]
    body = _header(report, models, title, together), main(sections), _footer(together)
    return document(title, *body, style=style_sheet(__package__, "page.css"))


def _coloured_models(reports: Iterable[Report]) -> list[Model]:
    """Plain models get grey first, to distinguish them from the lines of one model's depths."""
    looped, plain = iter(LOOPED_COLOURS), iter(PLAIN_COLOURS)
    return [Model(one, next(plain if one["H_cycles"] is None else looped, "s6")) for one in reports]


# The head of the page


def _header(report: Report, models: Sequence[Model], title: str, together: bool) -> str:
    tiles = _tiles_together(report) if together else _tiles(models[0])
    sentences = [words for model in models for words in _sentences(model)]
    return header(f"recursify {'compare' if together else 'evaluate'}", title, _what_was_read(models), tiles, sentences)


def _what_was_read(models: Sequence[Model]) -> str:
    first, parts = models[0], []
    if first.text is not None:
        windows = plural(first.text["windows"], "window")
        parts.append(f"{first.text['dataset']}, in {windows} of {first.text['seq_len']} tokens")
    for key in _question_sets(models):
        count = max(asked["items"] for model in models for asked in model.report["questions"] if _key(asked) == key)
        parts.append(f"{plural(count, 'question')} of {_set_name(key)}")
    parts += list(dict.fromkeys(f"{line['task']} of lm-eval" for model in models for line in model.report["tasks"]))
    return f"Measured on {'; '.join(parts)}."


def _tiles(model: Model) -> list[str]:
    found: list[str] = []
    if model.text is not None:
        best = _own_row(model.text["rows"], model)
        found.append(tile("s1", number(best["loss"]), f"nats per token, {_at(best['H_cycles'])}"))
        if best["bits_per_byte"] is not None:
            found.append(tile("s1", number(best["bits_per_byte"]), f"bits per byte of text, {_at(best['H_cycles'])}"))
        stats = model.text["telemetry"]
        if stats is not None and stats["H_cycles"] > 1:
            words = f"nats less loss, from cycle 1 to cycle {stats['H_cycles']}"
            found.append(tile("s2", signed(stats["loss_reduction"]), words))
    for key in _question_sets([model])[:3]:
        line = _own_row(_together(model.questions(key)), model)
        found.append(tile("s4", _percent(line["accuracy"]), f"right, {_set_name(key)}, {_at(line['H_cycles'])}"))
    return found


def _tiles_together(report: Report) -> list[str]:
    base = report["baseline"]
    found: list[str] = [
        tile(None, signed(line["difference"]), f"nats, {line['model']} against {base}: {_verdict(line, less_is_better=True)}")
        for line in report["text_differences"]
    ]
    found += [
        tile(
            None,
            _points(line["difference"]),
            f"points, {_set_name(_key(line))}, {line['model']} against {base}: {_verdict(line, less_is_better=False)}",
        )
        for line in report["question_differences"]
        if line["difficulty"] is None
    ]
    return found[:6]


def _sentences(model: Model) -> list[str]:
    """Findings about the cycles of a model."""
    if model.own is None:
        return []
    found = []
    if model.text is not None and len(model.text["rows"]) > 1:
        best, first = (min(model.text["rows"], key=lambda line: line[key]) for key in ("loss", "H_cycles"))
        opening = f"{model.name} has its lowest loss on the text at {plural(best['H_cycles'], 'cycle')}, {number(best['loss'])} nats"
        found.append(f"{opening}: {_against_first(first, best, number(first['loss']))}.")
    for key in _question_sets([model]):
        rows = _together(model.questions(key))
        if len(rows) > 1:
            best, first = max(rows, key=lambda line: line["accuracy"]), rows[0]
            if len({line["accuracy"] for line in rows}) == 1:
                found.append(f"{model.name} answers as many of {_set_name(key)} at every cycle count: {_percent(first['accuracy'])}.")
                continue
            opening = f"{model.name} answers most of {_set_name(key)} at {plural(best['H_cycles'], 'cycle')}, {_percent(best['accuracy'])}"
            found.append(f"{opening}: {_against_first(first, best, _percent(first['accuracy']))}.")
    return found


def _against_first(first: Mapping[str, Any], best: Mapping[str, Any], figure_of_first: str) -> str:
    return "no other count does better" if best is first else f"{plural(first['H_cycles'], 'cycle')} has {figure_of_first}"


# Differences between models


def _differences(report: Report) -> str:
    base, text, asked = report["baseline"], report["text_differences"], report["question_differences"]
    content: list[str] = [
        paragraph(
            f"Each model at its own cycle count, against {base}, on the same pieces of text and the same questions. "
            f"A difference is called one where p is below {SIGNIFICANT}."
        )
    ]
    if text:
        head = ("model", "cycles", "difference", "std. error", "p", "")
        content.append(
            table(head, map(_text_difference, text), "Loss in nats per token, window by window: below 0 is better (paired t-test).")
        )
    for key in dict.fromkeys(map(_key, asked)):
        words = f"{_set_name(key)}: accuracy in points, question by question: above 0 is better (exact McNemar test)."
        if key[1] == "labels":
            words += " The last label of a question is its answer."
        columns = ("model", "cycles", "difficulty", "difference", "std. error", "only it right", "only baseline", "p", "")
        content.append(table(columns, (_question_difference(line) for line in asked if _key(line) == key), words))
    content += [paragraph(line["reason"]) for line in report["unpaired"]]
    return section(f"Against {base}", *content)


def _text_difference(line: Mapping[str, Any]) -> str:
    figures = [signed(line["difference"]), number(line["standard_error"]), format_p(line["p"])]
    return row(line["model"], [_count(line["H_cycles"]), *figures, _verdict(line, less_is_better=True)])


def _question_difference(line: Mapping[str, Any]) -> str:
    which = "all" if line["difficulty"] is None else str(line["difficulty"])
    figures = [_points(line["difference"]), number(100 * line["standard_error"], 1)]
    figures += [str(line["model_only"]), str(line["baseline_only"]), format_p(line["p"])]
    cells = [_count(line["H_cycles"]), which, *figures, _verdict(line, less_is_better=False)]
    return row(line["model"], cells, "trained" if line["difficulty"] is None else None)


def _verdict(line: Mapping[str, Any], *, less_is_better: bool) -> str:
    unsure = "how surely is not known" if line["p"] is None else "too close to tell apart"
    return verdict(line["difference"], line["p"], less_is_better=less_is_better) or unsure


# Loss by cycles


def _loss_by_cycles(models: Sequence[Model], same_windows: bool) -> str:
    shown = [model for model in models if model.text is not None]
    key, unit = ("loss", "nats per token") if same_windows else ("bits_per_byte", "bits per byte")
    errors = "standard_error" if key == "loss" else ""
    lines, levels = _by_cycles([(model, model.text["rows"]) for model in shown if model.text is not None], key, errors)
    if not lines:
        return ""
    caption = "One pass at the deepest count gives all shallower ones. "
    if key == "loss":
        caption += "Bars and bands: plus and minus one standard error. "
    else:
        caption += "The models cut text into different tokens, so what is drawn is bits per byte, which can be compared. "
    drawn = _cycles_figure("Loss by number of cycles", f"loss, {unit}", shown, lines, levels, caption)
    return section("Loss by cycles", drawn)


def _by_cycles(rows: Iterable[tuple[Model, Rows]], key: str, error: str, scale: float = 1.0) -> tuple[list[Line], list[Level]]:
    """A line per recursive model, a level per plain model; None is not drawn."""
    rows, lines, levels = list(rows), [], []
    alone = len(rows) == 1  # more would cover each other's values
    for model, found in rows:
        ys = [math.nan if line[key] is None else scale * line[key] for line in found]
        errors = [None if line.get(error) is None else scale * line[error] for line in found]
        if model.own is None:
            levels.append(Level(name=model.name, y=ys[0], error=errors[0], colour=model.colour))
        elif found:
            xs = [line["H_cycles"] for line in found]
            order = sorted(range(len(xs)), key=xs.__getitem__)
            lines.append(
                Line(
                    name=model.name, xs=[xs[i] for i in order], ys=[ys[i] for i in order], errors=[errors[i] for i in order],
                    colour=model.colour, dots=True, valued=alone, labelled=not alone,
                )
            )  # fmt: skip
    return lines, levels


def _cycles_figure(title: str, y_label: str, models: Sequence[Model], lines: Sequence[Line], levels: Sequence[Level], caption: str) -> str:
    own = {model.own for model in models if model.own is not None}
    ticks = sorted({int(x) for line in lines for x in line.xs})
    axes = Axes(
        title=title,
        description=f"{y_label} at each number of cycles, for {', '.join(line.name for line in lines)}. The tables below have the values.",
        x_label="cycles",
        y_label=y_label,
        x_ticks=[(tick, (str(tick),)) for tick in ticks],
        x_margin=0.3,
        marked_x=own.pop() if len(own) == 1 else None,
        mark="the checkpoint's own",
    )
    if levels:
        caption += f"Dashed: {', '.join(level.name for level in levels)}, plain. "
    caption += undrawn(count_undrawable(lines, levels))
    return figure(lambda narrow: line_chart(lines, levels, axes, chart_size(narrow, len(lines) + len(levels))), caption.strip())


# Accuracy


def _accuracy(models: Sequence[Model], key: tuple[str, str]) -> str:
    shown = [model for model in models if model.questions(key)]
    words = (
        "Exact match of the generated answer, by the rules of recursify.data.tasks.is_right."
        if key[1] == "answer"
        else "Teacher-forced accuracy: the top-1 prediction at each label, in one pass; difficulty is the index of the label."
    )
    drawn = _by_difficulty(shown, key) if len(_difficulties(shown, key)) > 1 else [_accuracy_by_cycles(shown, key)]
    return section(_set_name(key), paragraph(words), *drawn)


def _difficulties(models: Sequence[Model], key: tuple[str, str]) -> list[int]:
    found = {line["difficulty"] for model in models for line in model.questions(key)}
    return sorted(found - {None})


def _accuracy_by_cycles(models: Sequence[Model], key: tuple[str, str]) -> str:
    pairs = [(model, _together(model.questions(key))) for model in models]
    lines, levels = _by_cycles(pairs, "accuracy", "standard_error", scale=100)
    if not lines:
        return ""
    caption = "Bars and bands: plus and minus one standard error. "
    return _cycles_figure(f"Accuracy by number of cycles, {_set_name(key)}", "right, %", models, lines, levels, caption)


def _by_difficulty(models: Sequence[Model], key: tuple[str, str]) -> list[str]:
    """All models at their own depth, if there are several; then each recursive model, one line per cycle count."""
    title = f"Accuracy by difficulty, {_set_name(key)}"
    looped, plain = [model for model in models if model.own is not None], [model for model in models if model.own is None]
    figures = []
    if len(models) > 1 or plain:
        lines = [_own_line(model, key) for model in models]
        figures.append(difficulty_figure(title, lines, "Each model at its own cycle count. Bars: plus and minus one standard error."))
    for model in looped:
        beside = [_own_line(other, key) for other in plain]
        caption = f"{model.name}, one line per cycle count."
        figures.append(difficulty_figure(title, [*_depth_lines(model, key), *beside], caption))
    return figures


def _own_line(model: Model, key: tuple[str, str]) -> Line:
    own = _own_row(_together(model.questions(key)), model)["H_cycles"]
    name = model.name if own is None else f"{model.name}, {plural(own, 'cycle')}"
    points = _graded(model, key, own)
    return difficulty_line(points, name, model.colour, "solid" if model.own is not None else "dotted", errors=True)


def _depth_lines(model: Model, key: tuple[str, str]) -> list[Line]:
    depths = _some_depths([line["H_cycles"] for line in _together(model.questions(key))], model.own)
    return [difficulty_line(_graded(model, key, H), _cycles_name(H, model), shade(index, len(depths))) for index, H in enumerate(depths)]


def _graded(model: Model, key: tuple[str, str], H_cycles: int | None) -> list[Point]:
    found = [line for line in model.questions(key) if line["H_cycles"] == H_cycles and line["difficulty"] is not None]
    return [(line["difficulty"], line["accuracy"], line["standard_error"]) for line in found]


def _some_depths(depths: Sequence[int], own: int | None) -> list[int]:
    """All depths, or an even selection of them including the model's own."""
    ordered = sorted(depths)
    if len(ordered) <= DEPTHS_DRAWN:
        return ordered
    last, steps = len(ordered) - 1, DEPTHS_DRAWN - 2
    chosen = {ordered[round(index * last / steps)] for index in range(steps + 1)}
    return sorted(chosen | ({own} & set(ordered)))  # type: ignore[operator]  # None is in no list of depths


# Where later cycles help


def _passages(models: Sequence[Model]) -> str:
    found = [(model, [one for one in model.report["passages"] if len(one["nats"]) > 1]) for model in models]
    found = [(model, passages) for model, passages in found if passages]
    if not found:
        return ""
    reductions = [abs(reduction) for _, passages in found for one in passages for reduction in _reductions(one)]
    full = sorted(reductions)[math.ceil(0.95 * len(reductions)) - 1] or 1.0
    explained = (
        "Each token is coloured by its loss at cycle 1 minus its loss at the last cycle. Rest the pointer on a token to see its figures."
    )
    figures = [_coloured(model, passages, full) for model, passages in found]
    return section("Where in a text later cycles help", paragraph(explained), _text().legend(number(full, 2)), *figures)


def _reductions(passage: Mapping[str, Any]) -> list[float]:
    """Loss at cycle 1 minus that at the last, for every token but the first."""
    return [first - last for first, last in zip(passage["nats"][0], passage["nats"][-1], strict=True)]


def _coloured(model: Model, passages: Rows, full: float) -> str:
    depth = len(passages[0]["nats"])
    reductions = [reduction for one in passages for reduction in _reductions(one)]
    share = sum(reduction > 0 for reduction in reductions) / len(reductions)
    caption = (
        f"{model.name}: from cycle 1 to cycle {depth} the loss of these {plural(len(reductions), 'token')} changes by "
        f"{signed(-math.fsum(reductions) / len(reductions))} nats on average, and falls at {share:.0%} of them."
    )
    shown = [{"first": one["tokens"][0], "tokens": list(_coloured_tokens(one, full))} for one in passages]
    return _text().coloured(shown, caption)


def _exits(models: Sequence[Model]) -> str:
    """Where each model went on, and where it left off: tokens by the cycle at which they exited."""
    found = [(model, [one for one in model.report["passages"] if one.get("exits")]) for model in models]
    figures = [_coloured_by_exit(model, passages) for model, passages in found if passages]
    if not figures:
        return ""
    explained = (
        "Each token is coloured by the cycle after which the model exited to predict it: the darker, the more cycles it spent. Rest the "
        "pointer on a token to see its cycle."
    )
    return section("Where the model spends its cycles", paragraph(explained), *figures)


def _coloured_by_exit(model: Model, passages: Rows) -> str:
    exits = [cycle for one in passages for cycle in one["exits"]]
    most = max(1, *exits)
    halting = model.report["text"]["telemetry"]["halting"]
    caption = (
        f"{model.name}: {math.fsum(exits) / len(exits):.2f} of at most {plural(halting['H_cycles'], 'cycle')} per token of these passages; "
        f"on the whole text {halting['share']:.0%} of the layer applications of full depth."
    )
    shown = [{"first": one["tokens"][0], "tokens": list(_tokens_by_exit(one, most))} for one in passages]
    return _text().coloured(shown, caption)


def _tokens_by_exit(passage: Mapping[str, Any], most: int) -> Iterable[dict[str, str]]:
    """Template data per token; tokens of one character are merged, which shows the deepest."""
    deepest = 0
    for token, cycle in zip(passage["tokens"][1:], passage["exits"], strict=True):
        deepest = max(deepest, cycle)
        if token:
            title = f"{visible(token)}  exit " + (f"after cycle {deepest}" if deepest else "before the first cycle")
            yield {"text": token, "class_": "helped", "strength": f"{deepest / most:.2f}", "title": title}
            deepest = 0


def _text() -> Any:
    return templates(__package__, "passages.html.j2")


def _coloured_tokens(passage: Mapping[str, Any], full: float) -> Iterable[dict[str, str]]:
    """Template data per token; tokens of one character are merged."""
    waiting = [0.0] * len(passage["nats"])
    for token, losses in zip(passage["tokens"][1:], zip(*passage["nats"], strict=True), strict=True):
        waiting = [before + loss for before, loss in zip(waiting, losses, strict=True)]
        if token:
            yield _coloured_token(token, waiting, full)
            waiting = [0.0] * len(waiting)


def _coloured_token(token: str, losses: Sequence[float], full: float) -> dict[str, str]:
    reduction = losses[0] - losses[-1]
    by_cycle = ", ".join(f"{cycle}: {number(loss, 2)}" for cycle, loss in enumerate(losses, start=1))
    title = f"{visible(token)}  loss by cycle {by_cycle} nats; {signed(reduction, 2)} less"
    return {
        "text": token,
        "class_": "helped" if reduction >= 0 else "harmed",
        "strength": f"{min(1.0, abs(reduction) / full):.2f}",
        "title": title,
    }


# Tables


def _tasks(models: Sequence[Model]) -> str:
    lines = [(line, model) for model in models for line in model.report["tasks"]]
    if not lines:
        return ""
    order = {name: index for index, name in enumerate(dict.fromkeys((line["task"], line["metric"]) for line, _ in lines))}
    lines.sort(key=lambda pair: order[pair[0]["task"], pair[0]["metric"]])
    rows = [
        row(
            line["task"],
            [line["metric"], model.name, _count(line["H_cycles"], line["halt"]), number(line["value"]), number(line["standard_error"])],
            _marked(model, line["H_cycles"]) if line["halt"] is None else None,
        )
        for line, model in lines
    ]
    head = ("task", "metric", "model", "cycles", "value", "std. error")
    return section("Tasks of lm-eval", table(head, rows, "Measured by the harness itself; metrics are named as it names them."))


def _cycles(models: Sequence[Model]) -> str:
    tables = [_telemetry(model.name, model.text["telemetry"]) for model in models if model.text and model.text["telemetry"]]
    content: list[str] = [part for parts in tables for part in parts]
    explained = (
        "Loss reduction: loss before minus loss after. Corrected: tokens whose top-1 prediction was wrong and became right; broken: right, "
        "became wrong. State moved: the distance between the two states that the head reads, over the length of the first."
    )
    return section("What the cycles do", paragraph(explained), *content) if content else ""


def _telemetry(name: str, stats: Mapping[str, Any]) -> list[str]:
    content: list[str] = []
    if stats["steps"]:
        whole = {
            "before": 1, "after": stats["H_cycles"], "distance": None,
            **{name: stats[name] for name in ("loss_reduction", "loss_reduction_error", "corrected", "broken")},
        }  # fmt: skip
        head = ("cycles", "loss reduction, nats", "std. error", "corrected", "broken", "state moved")
        rows = [_step(step) for step in stats["steps"]] + ([_step(whole, "trained")] if len(stats["steps"]) > 1 else [])
        content.append(table(head, rows, f"{name}; the last line is all cycles together." if len(rows) > 1 else name))
    halting = stats["halting"]
    if halting is not None:
        rows = [
            row(f"cycle {cycle}" if int(cycle) else "before the first cycle", [f"{share:.1%}"])
            for cycle, share in halting["cycles"].items()
        ]
        words = (
            f"{name}, tokens by the cycle that they halted at: by {halting['criterion']}, threshold {halting['threshold']:g}, "
            f"after at most {plural(halting['H_cycles'], 'cycle')}. Loss {number(halting['loss'])}, "
            f"{signed(halting['extra_loss'])} against no halting; "
            f"{halting['layer_applications']:.1f} layer applications per token ({halting['share']:.0%})."
        )
        content.append(table(("halted at", "share of tokens"), rows, words))
    return content


def _step(step: Mapping[str, Any], class_: str | None = None) -> str:
    shares = [f"{step['corrected']:.2%}", f"{step['broken']:.2%}"]
    cells = [signed(step["loss_reduction"]), number(step["loss_reduction_error"]), *shares, number(step["distance"])]
    return row(f"{step['before']} to {step['after']}", cells, class_)


def _numbers(models: Sequence[Model]) -> str:
    content: list[str] = [_text_table(models)] if any(model.text for model in models) else []
    for key in _question_sets(models):
        content += [_question_table(model, key) for model in models if model.questions(key)]
    return section("All numbers", *content) if content else ""


def _text_table(models: Sequence[Model]) -> str:
    head = ("model", "cycles", "loss, nats", "std. error", "perplexity", "bits per byte", "layers per token")
    rows = [
        row(
            model.name,
            [
                _count(line["H_cycles"]), number(line["loss"]), number(line["standard_error"]), perplexity_text(line["loss"]),
                number(line["bits_per_byte"]), f"{line['layer_applications']:,}",
            ],
            _marked(model, line["H_cycles"]),
        )
        for model in models
        if model.text is not None
        for line in model.text["rows"]
    ]  # fmt: skip
    sizes = {(model.text["scored_tokens"], model.text["scored_bytes"]): model.name for model in models if model.text is not None}
    scored = "; ".join(
        f"{plural(tokens, 'token')}, {plural(size, 'byte')} of text" + (f" ({name})" if len(sizes) > 1 else "")
        for (tokens, size), name in sizes.items()
    )
    return table(head, rows, f"Text; scored: {scored}.")


def _question_table(model: Model, key: tuple[str, str]) -> str:
    """One row per difficulty, one column per cycle count."""
    rows = model.questions(key, halting=True)
    runs = list(dict.fromkeys((line["H_cycles"], line["halt"]) for line in rows))
    found = {(line["difficulty"], line["H_cycles"], line["halt"]): line for line in rows}
    graded = _difficulties([model], key)
    difficulties: list[int | None] = [*(graded if len(graded) > 1 else []), None]
    body = []
    for difficulty in difficulties:
        lines = [found[difficulty, *run] for run in runs]
        cells = [f"{lines[0]['count']:,}", *map(_with_error, lines)]
        body.append(row("all" if difficulty is None else str(difficulty), cells, "trained" if difficulty is None else None))
    across = [_cycles_name(H, model) if halt is None else _count(H, halt) for H, halt in runs]
    return table(("difficulty", "guesses", *across), body, f"{_set_name(key)}, {model.name}: right, in percent.")


# Small things


def _key(asked: Mapping[str, Any]) -> tuple[str, str]:
    return str(asked["name"]), str(asked["judge"])


def _question_sets(models: Sequence[Model]) -> list[tuple[str, str]]:
    return list(dict.fromkeys(_key(asked) for model in models for asked in model.report["questions"]))


def _set_name(key: tuple[str, str]) -> str:
    return key[0] if key[1] == "answer" else f"{key[0]}, judged by labels"


def _together(rows: Rows) -> Rows:
    """The rows over all difficulties, by cycles."""
    found = [line for line in rows if line["difficulty"] is None]
    return sorted(found, key=lambda line: -1 if line["H_cycles"] is None else line["H_cycles"])


def _own_row(rows: Rows, model: Model) -> Mapping[str, Any]:
    """The row at the model's own cycle count, or at the largest if that was not measured."""
    return next((line for line in rows if line["H_cycles"] == model.own), rows[-1])


def _marked(model: Model, H_cycles: int | None) -> str | None:
    return "trained" if model.own is not None and H_cycles == model.own else None


def _cycles_name(H_cycles: int | None, model: Model) -> str:
    if H_cycles is None:
        return "plain"
    return plural(H_cycles, "cycle") + (", its own" if H_cycles == model.own else "")


def _at(H_cycles: int | None) -> str:
    return "plain model" if H_cycles is None else f"at {plural(H_cycles, 'cycle')}"


def _count(H_cycles: int | None, halt: str | None = None) -> str:
    if halt is not None:
        return f"at most {H_cycles}, halting by {halt}"
    return "plain" if H_cycles is None else str(H_cycles)


def _percent(share: float) -> str:
    return f"{100 * share:.1f}\N{NO-BREAK SPACE}%"


def _points(share: float) -> str:
    return signed(100 * share, 1)


def _with_error(line: Mapping[str, Any]) -> str:
    error = "" if line["standard_error"] is None else f" {PLUS_MINUS}{number(100 * line['standard_error'], 1)}"
    return number(100 * line["accuracy"], 1) + error


def _footer(together: bool) -> str:
    from .. import __version__

    words = f"Written by recursify {'compare' if together else 'evaluate'}, version {__version__}. This page holds all it needs."
    return footer(words)
