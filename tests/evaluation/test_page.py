"""The page of evaluations: self-contained, complete, escaped, and worded from the numbers."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest

from recursify.evaluation.page import render, write
from recursify.reports.html import number
from tests.support.pages import HOSTILE, Page, coordinates, pictures

PIECES = ("The", " quiet", " ship", " crosses", " the", " old", " river", " .\n", "", "北", " and", " back")


def loss_row(H: int | None, loss: float, error: float | None = 0.0123) -> dict[str, Any]:
    return {
        "H_cycles": H, "loss": loss, "standard_error": error, "layer_applications": 24 + 4 * (H or 0), "bits_per_byte": loss / 2.7,
        "perplexity": math.exp(min(loss, 700)),
    }  # fmt: skip


def telemetry(losses: list[float]) -> dict[str, Any]:
    steps = [
        {"before": c, "after": c + 1, "loss_reduction": losses[c - 1] - losses[c], "loss_reduction_error": 0.0011,
         "corrected": 0.0321, "broken": 0.0123, "distance": 0.4567}
        for c in range(1, len(losses))
    ]  # fmt: skip
    halting = {
        "criterion": "kl", "threshold": 0.01, "H_cycles": 3, "loss": 3.4567, "standard_error": 0.01, "extra_loss": 0.0012,
        "extra_loss_error": 0.0002, "cycles": {1: 0.25, 2: 0.35, 3: 0.4}, "layer_applications": 31.4, "share": 0.81,
    }  # fmt: skip
    return {
        "H_cycles": len(losses), "losses": losses, "right": [0.4] * len(losses), "loss_reduction": losses[0] - losses[-1],
        "loss_reduction_error": 0.0021, "corrected": 0.0543, "broken": 0.0234, "steps": steps, "halting": halting,
    }  # fmt: skip


def question_rows(depths: list[int | None], difficulties: list[int]) -> list[dict[str, Any]]:
    """Falls with difficulty, rises with cycles."""
    rows = []
    for H in depths:
        shares = [round(1 / (1 + math.exp(0.35 * (d - 6 - 3 * (H or 0)))), 3) for d in difficulties]
        for difficulty, share in zip([None, *difficulties], [sum(shares) / len(shares), *shares], strict=True):
            count = 200 * len(difficulties) if difficulty is None else 200
            error = math.sqrt(share * (1 - share) / count)
            rows.append(
                {"H_cycles": H, "halt": None, "difficulty": difficulty, "right": round(share * count), "count": count, "accuracy": share,
                 "standard_error": error}
            )  # fmt: skip
    return rows


def evaluation(name: str = "runs/ours/model.pt", own: int | None = 3, **changes: Any) -> dict[str, Any]:
    """What `recursify evaluate --json` prints, of a recursive model or, without cycles of its own, of a donor."""
    depths: list[int | None] = [None] if own is None else list(range(1, 2 * own + 1))
    losses = [3.7031] if own is None else [3.6121 - 0.14 * (1 - 0.4 ** (c - 1)) + 0.004 * max(0, c - own) for c in range(1, 2 * own + 1)]
    text = {
        "dataset": "wikitext", "windows": 1111, "seq_len": 128, "stride": 128, "scored_tokens": 141_097, "scored_bytes": 612_345,
        "rows": [loss_row(H, loss) for H, loss in zip(depths, losses, strict=True)],
        "telemetry": None if own is None else telemetry(losses),
    }  # fmt: skip
    nats = [[2.5 / c + 0.4 * math.sin(3 * t) * (c > 1) for t in range(len(PIECES) - 1)] for c in range(1, (own or 1) + 1)]
    made = {
        "name": "permutations:difficulty=4-32/4",
        "judge": "answer",
        "items": 1600,
        "rows": question_rows(depths, list(range(4, 33, 4))),
    }
    read = {"name": "babi:qa2_test.txt", "judge": "labels", "items": 200, "rows": question_rows(depths, [1])}
    tasks = [
        {"task": "hellaswag", "metric": "acc_norm", "H_cycles": H, "halt": None, "value": 0.3456, "standard_error": 0.0047} for H in depths
    ]
    passages = [{"tokens": list(PIECES), "nats": nats}] * 2
    whole = {"checkpoint": name, "H_cycles": own, "text": text, "questions": [made, read], "tasks": tasks, "passages": passages}
    return whole | changes


def comparison(**changes: Any) -> dict[str, Any]:
    models = [evaluation("donor", None), evaluation("ours"), evaluation("theirs", 2)]
    text = [
        {"model": model, "H_cycles": H, "baseline_H_cycles": None, "difference": difference, "standard_error": 0.0031, "p": p}
        for model, H, difference, p in (("ours", 3, -0.2321, 0.00001), ("theirs", 2, -0.0012, 0.4321))
    ]
    of_all = {
        "model": "ours", "name": "babi:qa2_test.txt", "judge": "labels", "difficulty": None, "H_cycles": 3, "baseline_H_cycles": None,
        "count": 200, "accuracy": 0.993, "baseline_accuracy": 0.873, "model_only": 41, "baseline_only": 17, "difference": 0.12,
        "standard_error": 0.0371, "p": 0.0022,
    }  # fmt: skip
    asked = [of_all, of_all | {"difficulty": 1}]
    whole = {"baseline": "donor", "models": models, "same_windows": True, "text_differences": text, "question_differences": asked}
    return whole | {"unpaired": []} | changes


def whole() -> str:
    """Both kinds of page at once, for rules that hold for either."""
    return render(evaluation()) + render(comparison())


def test_the_page_loads_nothing_from_outside_and_runs_no_script() -> None:
    for html in (render(evaluation()), render(comparison())):
        page = Page(html)
        assert "http:" not in html and "https:" not in html and "@import" not in html and "url(" not in html
        assert not {"script", "img", "iframe", "object", "embed"} & set(page.tags)
        assert not [key for key, _ in page.attributes if key.startswith("on")]
        assert page.tags.count("h1") == 1 and "default-src 'none'" in html


def test_every_number_is_there() -> None:
    report = evaluation()
    text = Page(render(report)).text
    wanted = [number(line[key]) for line in report["text"]["rows"] for key in ("loss", "bits_per_byte", "standard_error")]
    wanted += [number(100 * line["accuracy"], 1) for asked in report["questions"] for line in asked["rows"]]
    wanted += ["141,097", "612,345", "1,111", "hellaswag", "acc_norm", "0.3456", "0.0047", "3.21%", "1.23%", "0.4567", "5.43%"]
    wanted += ["kl, threshold 0.01", "25.0%", "31.4 layer applications", "runs/ours/model.pt"]
    assert [value for value in wanted if value not in text] == []


def test_comparison_states_winner_and_significance() -> None:
    text = Page(render(comparison(unpaired=[{"model": "theirs", "reason": "theirs reads other tokens"}]))).text
    wanted = ["donor, ours and theirs, compared", "Against donor", "\N{MINUS SIGN}0.2321", "<0.0001", "0.4321", "too close to tell apart"]
    wanted += ["+12.0", "3.7", "41", "17", "0.0022", "better", "theirs reads other tokens"]
    assert [words for words in wanted if words not in text] == []


@pytest.mark.parametrize(
    ("difference", "p", "words"),
    [(-0.1, 0.01, "better"), (0.1, 0.01, "worse"), (0.1, 0.06, "too close to tell apart"), (0.1, None, "how surely is not known")],
)
def test_the_verdict_follows_the_numbers(difference: float, p: float | None, words: str) -> None:
    line = {"model": "ours", "H_cycles": 3, "baseline_H_cycles": None, "difference": difference, "standard_error": 0.02, "p": p}
    text = Page(render(comparison(text_differences=[line], question_differences=[]))).text
    found = {each for each in ("better", "worse", "too close to tell apart", "how surely is not known") if f"against donor: {each}" in text}
    assert found == {words}


def titled(html: str, title: str) -> list[set[str]]:
    """The words in each wide picture of that title."""
    drawn = [svg for svg in pictures(html) if (svg.findtext("title") or "").startswith(title) and float(svg.get("width", "0")) > 500]
    return [{node.text or "" for node in svg.iter("text")} for svg in drawn]


def test_loss_chart_includes_donors() -> None:
    [words] = titled(render(comparison()), "Loss by number of cycles")
    assert {"donor", "ours", "theirs", "loss, nats per token"} <= words


def test_models_with_other_tokenizers_are_charted_in_bits_per_byte() -> None:
    [words] = titled(render(comparison(same_windows=False)), "Loss by number of cycles")
    assert "loss, bits per byte" in words


def test_accuracy_has_a_line_for_each_cycle_count_and_the_donors() -> None:
    together, ours, theirs = titled(render(comparison()), "Accuracy by difficulty")
    assert {"donor", "ours, 3 cycles", "theirs, 2 cycles"} <= together
    assert {"donor", "3 cycles, its own", *(f"{c} cycles" for c in (2, 4, 5, 6))} <= ours
    assert {"donor", "2 cycles, its own", "1 cycle"} <= theirs and "6 cycles" not in theirs


def test_equal_accuracies_have_no_best_depth() -> None:
    report = evaluation()
    for line in report["questions"][0]["rows"]:
        line["accuracy"] = 0.0
    html = render(report)
    assert "answers as many of permutations, 4 to 32 by 4" in html or "answers as many of permutations:difficulty=4-32/4" in html
    assert "at every cycle count: 0.0" in html.replace("\N{NO-BREAK SPACE}", " ") and "answers most of babi" in html


def test_accuracy_axis_is_0_to_100_percent() -> None:
    report = evaluation()
    for line in report["questions"][0]["rows"]:
        line["accuracy"] = 0.0
    [words] = titled(render(report), "Accuracy by difficulty")
    assert {"0", "100"} <= words


def test_of_many_depths_some_are_drawn_and_all_are_in_the_table() -> None:
    html = render(evaluation(own=9))
    [words] = titled(html, "Accuracy by difficulty")
    drawn = {word for word in words if "cycle" in word}
    assert {"1 cycle", "9 cycles, its own", "18 cycles"} <= drawn and len(drawn) <= 7
    assert all(f">{c} cycles</th>" in html for c in range(2, 19) if c != 9)


def test_one_difficulty_is_drawn_by_cycles() -> None:
    [words] = titled(render(evaluation()), "Accuracy by number of cycles, babi")
    assert {"right, %", "1", "6", "the checkpoint's own"} <= words


def test_a_donor_alone_has_tables_and_one_line_by_difficulty() -> None:
    html = render(evaluation("donor", None))
    [words] = titled(html, "Accuracy by difficulty")
    assert "donor" in words and "nats per token, plain model" in Page(html).text and "later cycles" not in Page(html).text


def test_a_run_with_halting_has_a_column_and_no_line() -> None:
    report, halted = evaluation(), {"H_cycles": 3, "halt": "kl"}
    for asked in report["questions"]:
        asked["rows"] += [line | halted | {"accuracy": 0.4321} for line in asked["rows"] if line["H_cycles"] == 3]
    report["tasks"].append(report["tasks"][2] | halted | {"value": 0.2468})
    html = render(report)
    text = Page(html).text
    assert "at most 3, halting by kl" in text and "43.2" in text and "0.2468" in text
    assert not any("halting" in word for words in titled(html, "Accuracy") for word in words)


@pytest.mark.parametrize("missing", ["text", "questions", "tasks", "passages"])
def test_what_was_not_measured_is_left_out(missing: str) -> None:
    html = render(evaluation(**{missing: None if missing == "text" else []}))
    title = {"text": "Loss by cycles", "questions": "permutations", "tasks": "Tasks of lm-eval", "passages": "Where in a text"}[missing]
    assert title not in html and Page(html).tags.count("section") > 3


def spans(html: str) -> list[tuple[str, float, str, str]]:
    found = re.findall(r'<span class="(helped|harmed)" style="--p:([\d.]+)" title="([^"]*)">([^<]*)</span>', html)
    return [(kind, float(strength), title, words) for kind, strength, title, words in found]


def test_tokens_are_coloured_by_the_loss_reduction_of_later_cycles() -> None:
    passage = {"tokens": ["A", " b", " c\n", "", "d"], "nats": [[2.0, 1.0, 0.25, 0.5], [1.0, 2.5, 0.25, 0.5], [0.5, 3.0, 0.0, 0.25]]}
    found = spans(render(evaluation(passages=[passage])))
    assert [(kind, words) for kind, _, _, words in found] == [("helped", " b"), ("harmed", " c\n"), ("helped", "d")]
    assert [strength for _, strength, _, _ in found] == pytest.approx([0.75, 1.0, 0.25])  # reductions of 1.5, -2 and 0.5 together, of 2
    assert found[0][2].startswith("·b") and "1: 2.00, 2: 1.00, 3: 0.50" in found[0][2] and "+1.50" in found[0][2]


def test_passage_text_is_complete() -> None:
    html = render(evaluation())
    [passage, _] = re.findall(r'<p class="passage" dir="auto">(.*?)</p>', html, re.DOTALL)
    assert re.sub(r"<[^>]*>", "", passage) == "".join(PIECES)


def test_cycles_that_change_nothing_are_drawn_pale() -> None:
    passage = {"tokens": ["A", " b"], "nats": [[2.0], [2.0]]}
    assert [strength for _, strength, _, _ in spans(render(evaluation(passages=[passage])))] == [0.0]


def test_hostile_text_is_escaped() -> None:
    report = evaluation(HOSTILE, passages=[{"tokens": [HOSTILE, HOSTILE], "nats": [[1.0], [0.5]]}])
    report["text"]["dataset"] = report["questions"][0]["name"] = report["tasks"][0]["task"] = report["tasks"][0]["metric"] = HOSTILE
    for html in (render(report), render(comparison(models=[evaluation("donor", None), report], baseline=HOSTILE))):
        page = Page(html)
        assert "script" not in page.tags and "<script" not in html and "\x00" not in html and "\u202e" not in html
        html.encode("utf-8")


@pytest.mark.parametrize("loss", [math.nan, math.inf, 0.0, 1e300])
def test_charts_draw_any_numbers_within_their_frame(loss: float) -> None:
    report = evaluation()
    for line in report["text"]["rows"]:
        line["loss"], line["standard_error"], line["bits_per_byte"] = loss, None, None
    for line in report["questions"][0]["rows"]:
        line["accuracy"] = line["standard_error"] = 0.0
    for svg in pictures(render(report)):
        width, height = (float(svg.get(side, "nan")) for side in ("width", "height"))
        assert all(math.isfinite(value) and -0.01 <= value <= max(width, height) for value in coordinates(svg))


def test_every_colour_has_a_style() -> None:
    html = whole()
    classes = {name for names in re.findall(r'class="([^"]*)"', html) for name in names.split()}
    style = html[: html.index("</style>")]
    assert all(f".{name}" in style for name in classes & {"helped", "harmed", "passage", "legend", *(f"d{i}" for i in range(9))})
    assert {"d0", "d6", "helped", "s1", "s3"} <= classes


def test_the_file(tmp_path: Path) -> None:
    path = write(evaluation(), tmp_path / "pages" / "one.html")
    assert path.read_text(encoding="utf-8") == render(evaluation())
