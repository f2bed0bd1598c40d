"""The demo's report: self-contained, complete, escaped, honest, and drawable whatever the numbers are."""

import math
import re
from dataclasses import replace
from pathlib import Path

import pytest

from recursify.demo.report import (
    Architecture,
    Baseline,
    Curve,
    DemoReport,
    DepthPoint,
    Donor,
    Guess,
    Sample,
    Stage,
    TokenRow,
    findings,
    number,
    render,
    running_mean,
    signed,
    visible,
    write,
)
from recursify.errors import UserError
from recursify.network.losses import perplexity
from tests.support.pages import HOSTILE, Page, coordinates, pictures


def depths(*losses: float, error: float | None = 0.0123) -> tuple[DepthPoint, ...]:
    return tuple(
        DepthPoint(H_cycles=cycles, loss=loss, layer_applications=4 + 16 * cycles, standard_error=error)
        for cycles, loss in enumerate(losses, start=1)
    )


def example() -> DemoReport:
    guesses = (Guess(text=" dog", probability=0.31, right=False), Guess(text=" cat", probability=0.62, right=True))
    steps = tuple(range(1, 61))
    curve = Curve(
        name="recursive", steps=steps, train_loss=tuple(4 + 1 / step for step in steps), eval_steps=(0, 60), eval_loss=(5.4321, 4.1234)
    )
    return DemoReport(
        donor=Donor(name="tiny", parameters=5_243_904, layers=8),
        architecture=Architecture(prelude=(0, 1), loop=(2, 3, 4), coda=(7,), H_cycles=3, L_cycles=2, parameters=4_999_111),
        data="forty articles",
        train_tokens=983_040,
        validation_tokens=65_536,
        curves=(curve, replace(curve, name="donor, fine-tuned", eval_loss=(5.1111, 4.0999))),
        depths=depths(3.6121, 3.4982, 3.4713, 3.4689, 3.4801),
        donor_as_is=Baseline(name="donor, as is", loss=3.7031, layer_applications=8, standard_error=0.0131),
        donor_tuned=Baseline(name="donor, fine-tuned", loss=3.4502, layer_applications=8, standard_error=0.0119),
        difference_error=0.0031,
        sentence=(TokenRow(token="The", true_next=" cat", guesses=guesses),),
        samples=(Sample(model="recursive, 3 cycles", prompt="Once", text=" upon\na time"),),
        machine="two cores",
        versions=(("recursify", "9.8.7"), ("torch", "6.5.4")),
        stages=(Stage(name="convert", seconds=0.4), Stage(name="fine-tune", seconds=121.7)),
        commands=("recursify convert --L_layers 4", "recursify train --seed 0"),
        limits=("A limit of this run.",),
    )


# The page


def test_page_loads_nothing_from_outside_and_runs_no_script() -> None:
    html = render(example())
    page = Page(html)
    assert "http:" not in html and "https:" not in html and "@import" not in html and "url(" not in html
    assert not {"script", "img", "iframe", "object", "embed"} & set(page.tags)
    assert all((value or "").startswith("data:") for key, value in page.attributes if key in ("src", "href", "xlink:href"))
    assert not [key for key, _ in page.attributes if key.startswith("on")]
    assert "default-src 'none'" in html


def test_every_number_given_appears() -> None:
    report = example()
    text = Page(render(report)).text
    wanted = [number(point.loss) for point in report.depths] + [number(base.loss) for base in report.baselines]
    wanted += [number(value) for curve in report.curves for value in (*curve.train_loss, *curve.eval_loss)]
    wanted += [f"{point.layer_applications}" for point in report.depths]
    wanted += ["0.0123", "0.0131", "0.0119", "0.0031", "983,040", "65,536", "5,243,904", "4,999,111", "31%", "62%", "0.4", "121.7", "122.1"]
    assert [value for value in wanted if value not in text] == []


def test_every_text_given_appears() -> None:
    text = Page(render(example())).text
    wanted = ["tiny", "forty articles", "two cores", "torch 6.5.4", "recursify 9.8.7", "upon\na time", "Once", "A limit of this run."]
    wanted += ["recursify convert --L_layers 4\nrecursify train --seed 0", "·cat", "·dog", "convert", "fine-tune", "Left out: 5, 6."]
    assert [words for words in wanted if words not in text] == []


def test_hostile_text_is_escaped() -> None:
    base = example()
    hostile = replace(
        base,
        donor=replace(base.donor, name=HOSTILE),
        data=HOSTILE,
        machine=HOSTILE,
        model_name=HOSTILE,
        curves=(replace(base.curves[0], name=HOSTILE),),
        donor_as_is=replace(base.donor_as_is, name=HOSTILE),
        donor_tuned=replace(base.donor_tuned, name=HOSTILE),
        further_baselines=(Baseline(name=HOSTILE, loss=3.0, layer_applications=1),),
        sentence=(TokenRow(token=HOSTILE, true_next=HOSTILE, guesses=(Guess(text=HOSTILE, probability=0.5, right=True),)),),
        samples=(Sample(model=HOSTILE, prompt=HOSTILE, text=HOSTILE),),
        versions=((HOSTILE, HOSTILE),),
        stages=(Stage(name=HOSTILE, seconds=1.0),),
        commands=(HOSTILE,),
        limits=(HOSTILE,),
    )
    html = render(hostile)
    page = Page(html)
    assert "script" not in page.tags and "<script" not in html
    assert "\x00" not in html and "\u202e" not in html and "⟨00⟩" in html and "⟨202E⟩" in html
    html.encode("utf-8")
    assert len(pictures(html)) == 6


def test_page_is_accessible() -> None:
    html = render(example())
    page = Page(html)
    assert '<html lang="en">' in html and page.tags.count("h1") == 1 and page.tags.count("main") == 1
    for svg in pictures(html):
        assert svg.get("role") == "img" and svg.get("aria-label")
        assert [child.tag for child in svg][:2] == ["title", "desc"] and all(child.text for child in svg[:2])
    assert ("scope", "col") in page.attributes and ("scope", "row") in page.attributes


def test_minimal_report() -> None:
    bare = replace(
        example(),
        curves=(),
        depths=(),
        sentence=(),
        samples=(),
        machine="",
        versions=(),
        stages=(),
        commands=(),
        limits=(),
        difference_error=None,
    )
    text = Page(render(bare)).text
    assert "No depth was measured." in text and "No training loss was recorded." in text and "cannot be compared" in text


# The token table


def test_white_space_in_tokens_is_visible() -> None:
    assert visible(" a\n\tb") == "·a↵⇥b" and visible("") == "∅"


def test_token_table_marks_right_and_wrong_in_words_and_counts_them() -> None:
    html = render(example())
    assert re.search(r'class="token right" style="--p:0\.620">✓ ·cat<span class="hidden">, right</span>', html)
    assert re.search(r'class="token wrong" style="--p:0\.310">·dog<span class="hidden">, wrong</span>', html)
    assert "0 of 1" in html and "1 of 1" in html


def test_last_position_without_a_known_next_token_is_neither_right_nor_wrong() -> None:
    row = TokenRow(token=".", true_next=None, guesses=(Guess(text="x", probability=math.nan, right=None),))
    html = render(replace(example(), sentence=(row,)))
    assert '<td class="token" style="--p:0.000">x<small>not a number</small></td>' in html and "0 of 0" in html


# Findings


def verdict(loss: float, error: float | None) -> str:
    return findings(replace(example(), depths=depths(3.6, 3.5, loss, error=None), difference_error=error))[0]


@pytest.mark.parametrize(
    ("loss", "error", "words"),
    [
        (3.4713, 0.0031, "+0.0211 nats ±\N{NO-BREAK SPACE}0.0031: the recursive model is worse."),
        (3.4002, 0.0031, "\N{MINUS SIGN}0.0500 nats ±\N{NO-BREAK SPACE}0.0031: the recursive model is better."),
        (3.4522, 0.0031, "too close to tell apart on this text."),
        (3.4602, None, "+0.0100 nats: the recursive model is worse (how surely was not measured)."),
        (3.4502, None, "no difference."),
        (math.nan, 0.0031, "cannot be compared."),
    ],
)
def test_verdict_against_the_fine_tuned_donor_follows_the_numbers(loss: float, error: float | None, words: str) -> None:
    assert verdict(loss, error).endswith(words)


def test_without_a_paired_error_the_two_errors_are_combined() -> None:
    report = replace(example(), difference_error=None)
    assert f"±\N{NO-BREAK SPACE}{number(math.hypot(0.0123, 0.0119))}: too close" in findings(report)[0]


@pytest.mark.parametrize(
    ("losses", "words"),
    [
        ((3.6, 3.5, 3.47, 3.46), "The best depth is 4 cycles (3.4600 nats), 0.0100 below the trained depth and 0.1400 below 1 cycle."),
        ((3.6, 3.5, 3.47, 3.48), "The best depth is the trained one, 3 cycles (3.4700 nats), 0.1300 below 1 cycle."),
        ((3.4, 3.5, 3.6), "further cycles do not lower the loss (+0.2000 nats at 3)."),
        ((3.6, 3.5, math.inf), "The best depth is 2 cycles (3.5000 nats), 0.1000 below 1 cycle."),
    ],
)
def test_best_depth_is_found_in_the_numbers(losses: tuple[float, ...], words: str) -> None:
    assert findings(replace(example(), depths=depths(*losses)))[1].endswith(words)


def test_number_formatting() -> None:
    assert number(-0.25) == "\N{MINUS SIGN}0.2500" and signed(0.25) == "+0.2500" and signed(0.0) == "0.0000" and number(None) == ""
    assert number(math.nan) == "not a number" and number(math.inf) == "infinite" and number(2.5e9) == "2.500e+09"
    assert perplexity(1e4) == math.inf


# Charts


@pytest.mark.parametrize(
    "losses",
    [
        (3.5, math.nan, 3.4, math.inf, -math.inf),
        (math.nan,) * 5,
        (3.5,),
        (3.5,) * 5,
        (0.0,) * 5,
        (3.4000, 3.4001, 3.4002, 3.4001, 3.4000),
        (13.5, 8.0, 3.5, 3.4, 3.3),
        (1e300, 3.0, 2.9, 2.8, 2.7),
    ],
    ids=["holes", "nothing", "one", "equal", "zero", "flat", "steep", "absurd"],
)
@pytest.mark.parametrize("error", [None, 0.01, math.nan, math.inf])
def test_charts_draw_any_losses_within_their_frame(losses: tuple[float, ...], error: float | None) -> None:
    steps = tuple(range(1, len(losses) + 1))
    curves = (Curve(name="recursive", steps=steps, train_loss=losses, eval_steps=steps, eval_loss=losses),)
    html = render(replace(example(), depths=depths(*losses, error=error), curves=curves))
    for svg in pictures(html):
        width, height = (float(svg.get(side, "nan")) for side in ("width", "height"))
        assert all(math.isfinite(value) and -0.01 <= value <= max(width, height) for value in coordinates(svg))
    for svg in re.findall(r"<(?:path|polyline|polygon)[^>]*>", html):
        assert "nan" not in svg and "inf" not in svg


def test_values_left_out_of_a_chart_are_counted_on_the_page() -> None:
    text = Page(render(replace(example(), depths=depths(3.5, math.nan, 3.4, math.inf)))).text
    assert "2 values not drawn" in text and "not a number" in text


def test_depth_chart_names_its_lines_and_marks_the_trained_depth() -> None:
    wide = next(svg for svg in pictures(render(example())) if svg.findtext("title") == "Validation loss by number of cycles")
    words = [node.text for node in wide.iter("text")]
    assert {"trained depth", "recursive", "donor, as is", "donor, fine-tuned", "3.471", "3.703", "52"} <= set(words)


def test_each_model_keeps_its_colour_in_every_chart() -> None:
    labelled = {
        (group.findtext("text"), group.get("class"))
        for svg in pictures(render(example()))
        for group in svg.iter("g")
        if "label" in (group.get("class") or "").split() and group.findtext("text") != "donor,"
    }
    assert labelled == {("recursive", "s1 label"), ("donor, fine-tuned", "s2 label"), ("donor, as is", "s3 label")}


def test_running_mean_skips_non_finite_values() -> None:
    assert running_mean((1, 2, 3, 4), (1.0, math.nan, 3.0, 5.0), 2) == ([3, 4], [2.0, 4.0])
    assert running_mean((1, 2), (1.0, 3.0), 5) == ([2], [2.0])
    assert running_mean((), (), 3) == ([], [])


# The file


def test_write_makes_the_folder_and_replaces_the_file(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "demo" / "report.html"
    assert write(example(), path) == path
    write(replace(example(), machine="another machine"), path)
    assert "another machine" in path.read_text(encoding="utf-8")
    assert [file.name for file in path.parent.iterdir()] == ["report.html"]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(example(), tmp_path / "report.html")
    before = path.read_bytes()
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(UserError, match=r"report.html: the page could not be written \(disk full\); free some space, or name another file"):
        write(replace(example(), machine="another machine"), path)
    assert path.read_bytes() == before and [file.name for file in tmp_path.iterdir()] == ["report.html"]
