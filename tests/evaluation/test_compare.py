"""Models on the same items: differences and their significance against sums by hand, and the command end to end."""

from __future__ import annotations

import json
import math
import re
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from recursify import convert
from recursify.checkpoints import checkpoint
from recursify.cli import main as cli
from recursify.errors import UserError
from recursify.evaluation import compare as comparison
from recursify.evaluation.accuracy import Accuracy, QuestionsReport
from recursify.evaluation.compare import Comparison, Measured, compare, run, short_names
from recursify.evaluation.cycle_stats import CycleStats, Step
from recursify.evaluation.evaluate import EvaluateReport, Paired
from recursify.evaluation.settings import CompareSettings
from recursify.evaluation.statistics import mcnemar_p, student_p
from recursify.evaluation.text_loss import DepthLoss, PairedText, TextReport
from tests.support.tiny import make_tiny_tokenizer, sentences, tiny_model

DIFFICULTIES = {"addition": [1, 1, 1, 2, 2, 2]}


def measured(name: str, own: int | None, *rows: list[float], key: str = "same", rights: list[list[int]] | None = None) -> Measured:
    """A model with these losses of windows of four tokens, one row per depth from 1 on."""
    depths: list[int | None] = [None] if own is None else list(range(1, len(rows) + 1))
    nats = 4 * torch.tensor(rows, dtype=torch.float64)
    losses = [DepthLoss(H, row.mean().item() / 4, 0.1, 8, bits_per_byte=row.mean().item()) for H, row in zip(depths, nats, strict=True)]
    text = TextReport("t.txt", nats.shape[1], 5, losses, 5, 4 * nats.shape[1], 100)
    right = torch.tensor(rights or [[0] * 6] * len(rows))
    rows_of_set = [Accuracy(H, None, None, int(row.sum()), 6, 0.1) for H, row in zip(depths, right, strict=True)]
    paired = PairedText(nats, torch.full((nats.shape[1],), 4), 1, key, 100.0)
    return Measured(
        EvaluateReport(name, own, text, [QuestionsReport("addition", "answer", 6, rows_of_set)]),
        Paired(depths, paired, {"addition": right}),
    )


def both(ours: Measured, base: Measured) -> Comparison:
    return compare(["a/base", "b/ours"], [base, ours], DIFFICULTIES)


BASE = measured("base", None, [2.0, 3.0, 4.0, 5.0], rights=[[1, 1, 0, 0, 0, 0]])
OURS = measured("ours", 2, [9.0, 9.0, 9.0, 9.0], [1.9, 2.8, 3.9, 5.1], rights=[[0] * 6, [1, 0, 1, 1, 1, 0]])


def test_losses_are_paired_window_by_window_at_each_models_own_depth() -> None:
    [line] = both(OURS, BASE).text_differences
    differences = torch.tensor([-0.1, -0.2, -0.1, 0.1], dtype=torch.float64)
    error = differences.std().item() / 2
    assert (line.model, line.H_cycles, line.baseline_H_cycles) == ("ours", 2, None)
    assert (line.loss, line.baseline_loss, line.difference) == pytest.approx((3.425, 3.5, -0.075))
    assert line.standard_error == pytest.approx(error) and line.p == pytest.approx(student_p(-0.075, error, 4))


def test_answers_are_paired_question_by_question() -> None:
    everything, easy, hard = both(OURS, BASE).question_differences
    assert [line.difficulty for line in (everything, easy, hard)] == [None, 1, 2]
    assert [(line.model_only, line.baseline_only, line.count) for line in (everything, easy, hard)] == [(3, 1, 6), (1, 1, 3), (2, 0, 3)]
    assert (everything.accuracy, everything.baseline_accuracy, everything.difference) == pytest.approx((4 / 6, 2 / 6, 2 / 6))
    each = torch.tensor([0, -1, 1, 1, 1, 0], dtype=torch.float64)
    assert everything.standard_error == pytest.approx(each.std(correction=0).item() / math.sqrt(6))
    assert everything.p == mcnemar_p(3, 1) and easy.p == 1.0


def test_a_set_of_one_difficulty_is_one_line() -> None:
    lines = compare(["a", "b"], [BASE, OURS], {"addition": [3] * 6}).question_differences
    assert [line.difficulty for line in lines] == [None]


def test_other_tokens_are_not_paired_but_their_answers_are() -> None:
    found = both(measured("ours", 1, [1.0, 2.0], key="other", rights=[[1] * 6]), BASE)
    assert not found.same_windows and found.text_differences == []
    [line] = found.unpaired
    assert line["model"] == "ours" and "bits per byte" in line["reason"] and "6.0000 and 14.0000" in line["reason"]
    assert line["reason"] in found.render() and found.question_differences[0].model_only == 4


def test_one_window_has_a_difference_and_no_p() -> None:
    found = both(measured("ours", 1, [1.0]), measured("base", 1, [2.0]))
    [line] = found.text_differences
    assert (line.difference, line.standard_error, line.p) == (-1.0, None, None)
    assert "-1.0000" in found.render()


def test_each_model_is_compared_at_its_own_depth() -> None:
    """Neither first nor last of what was measured, and another one for each."""
    ours = measured("ours", 2, [9.0, 8.0], [1.0, 3.0], [7.0, 5.0], key="a", rights=[[0] * 6, [1, 1, 0, 1, 0, 0], [1] * 6])
    base = measured("base", 1, [2.0, 5.0], [9.0, 7.0], [6.0, 4.0], key="a", rights=[[1, 0, 0, 0, 1, 0], [1] * 6, [0] * 6])
    found = both(ours, base)
    [line] = found.text_differences
    assert (line.H_cycles, line.baseline_H_cycles, line.loss, line.baseline_loss, line.difference) == (2, 1, 2.0, 3.5, -1.5)
    answered = found.question_differences[0]
    assert (answered.H_cycles, answered.baseline_H_cycles, answered.model_only, answered.baseline_only) == (2, 1, 2, 1)
    other = both(ours, replace_key(base, "b"))
    assert "8.0000 and 14.0000" in other.unpaired[0]["reason"]


def replace_key(model: Measured, key: str) -> Measured:
    assert model.paired.text is not None
    return model._replace(paired=replace(model.paired, text=replace(model.paired.text, key=key)))


def test_several_models_each_against_the_first() -> None:
    far, near = measured("far", 1, [1.0, 1.0, 1.0, 1.0], key="other"), measured("near", 1, [2.5, 3.0, 4.0, 5.0])
    found = compare(["base", "ours", "far", "near"], [BASE, OURS, far, near], DIFFICULTIES)
    assert not found.same_windows and [line["model"] for line in found.unpaired] == ["far"]
    assert [(line.model, round(line.difference, 6)) for line in found.text_differences] == [("ours", -0.075), ("near", 0.125)]
    assert [line.model for line in found.question_differences] == ["ours"] * 3 + ["far"] * 3 + ["near"] * 3
    assert found.baseline == "base" and compare(["base", "ours"], [BASE, OURS], {}).same_windows


def test_unequal_windows_are_weighted_by_tokens() -> None:
    tokens = torch.tensor([7, 2, 2, 2, 2])
    nats = torch.tensor([[9.0, 4.0, 3.0, 5.0, 2.0]], dtype=torch.float64)

    def model(name: str, offset: list[float]) -> Measured:
        found = measured(name, 1, [1.0] * 5)
        assert found.paired.text is not None
        text = replace(found.paired.text, nats=nats + torch.tensor(offset, dtype=torch.float64), tokens=tokens, per_piece=2)
        return found._replace(paired=replace(found.paired, text=text))

    [line] = both(model("ours", [1.0, 0, 2.0, -1.0, 0.5]), model("base", [0.0] * 5)).text_differences
    mean = 2.5 / 15
    off = [1 - 9 * mean, 1 - 4 * mean, 0.5 - 2 * mean]
    error = math.sqrt(3 / 2 * sum(x * x for x in off)) / 15
    assert (line.loss, line.baseline_loss, line.difference) == pytest.approx((25.5 / 15, 23 / 15, mean))
    assert line.standard_error == pytest.approx(error) and line.p == pytest.approx(student_p(mean, error, 3))


def test_table_columns() -> None:
    lines = both(OURS, BASE).render().splitlines()
    [loss] = [line for line in lines if "-0.0750" in line]
    found = both(OURS, BASE).text_differences[0]
    assert loss.split() == ["3.4250", "3.5000", "-0.0750", "+-", f"{found.standard_error:.4f}", f"{found.p:.4f}"]
    everything = lines[next(number for number, line in enumerate(lines) if "above 0 is better" in line) + 2]
    assert everything.split() == ["all", "66.7", "33.3", "+33.3", "+-", "30.4", "3", "1", "0.6250"]


def test_the_comparison_comes_first_and_says_which_sign_is_better() -> None:
    lines = both(OURS, BASE).render().splitlines()
    assert lines[0] == "Against base (plain), the baseline,"
    assert lines[4] == "ours (H_cycles 2): loss in nats per token; a difference below 0 is better"
    shown = "\n".join(lines)
    parts = ("below 0 is better", "addition: accuracy in %; a difference above 0", "all depths, the best first", "t.txt, validation split")
    assert sorted(parts, key=shown.index) == list(parts)
    assert "last label" not in shown


@pytest.mark.parametrize(
    ("shift", "spread", "end"),
    [(-1.0, 0.001, "  better"), (1.0, 0.001, "  worse"), (0.001, 1.0, "")],
)
def test_a_difference_is_called_one_only_where_it_is_significant(shift: float, spread: float, end: str) -> None:
    base = [2.0, 3.0, 4.0, 5.0]
    ours = [loss + shift + spread * sign for loss, sign in zip(base, (1, -1, 1, -1), strict=True)]
    found = both(measured("ours", 1, ours), measured("base", 1, base))
    [line] = [line for line in found.render().splitlines() if f"{found.text_differences[0].difference:+.4f} +-" in line]
    assert re.search(r"[\d.]+(.*)$", line.split("+-")[1].split(maxsplit=1)[1]).group(1) == end  # type: ignore[union-attr]


def test_more_right_answers_are_better() -> None:
    many = {"addition": [1] * 12}
    right, wrong = (measured(name, 1, [2.0, 3.0], rights=[[each] * 12]) for name, each in (("right", 1), ("wrong", 0)))
    for ours, base, word in ((right, wrong, "better"), (wrong, right, "worse")):
        assert compare(["a", "b"], [base, ours], many).render().split("addition: accuracy")[1].splitlines()[2].endswith(f"0.0005  {word}")


def test_legend_of_the_cycles_stands_once() -> None:
    def with_cycles(name: str) -> Measured:
        step = Step(1, 2, 0.1, 0.01, 0.1, 0.1, 0.1)
        stats = CycleStats(2, [1.0, 0.9], [0.5, 0.5], 0.1, 0.01, 0.1, 0.1, [step])
        model = measured(name, 2, [1.0, 2.0], [1.5, 2.5])
        assert model.report.text is not None
        return model._replace(report=replace(model.report, text=replace(model.report.text, telemetry=stats)))

    shown = both(with_cycles("ours"), with_cycles("base")).render()
    assert shown.count("what the cycles do") == 2 and shown.count("corrected: the top-1 prediction") == 1
    assert shown.index("corrected: the top-1") > shown.rindex("what the cycles do")
    assert both(OURS, BASE).render().count("corrected: the top-1 prediction") == 0


def test_an_ordinary_comparison_fits_a_terminal() -> None:
    """Names of models stand in lines of their own, so that tables do not grow with them."""
    name = "first/qwen_recursive_finetuned_best.pt"
    shown = both(OURS._replace(report=replace(OURS.report, checkpoint=name)), BASE).render()
    differences = shown[: shown.index("all depths")].splitlines()
    assert all(len(line) <= 80 for line in differences if name not in line)


def in_pieces_of_two(model: Measured) -> Measured:
    assert model.paired.text is not None
    return model._replace(paired=replace(model.paired, text=replace(model.paired.text, per_piece=2)))


def test_all_models_and_depths_are_ranked() -> None:
    shown = both(OURS, BASE).render()
    text, answers = (shown[shown.index(start) :].split("\n\n")[0].splitlines() for start in ("loss, all depths", "addition, all depths"))
    assert [line.split() for line in text[2:]] == [words.split() for words in ("3.4250 8 2 ours", "3.5000 8 plain base", "9.0000 8 1 ours")]
    assert [line.split() for line in answers[2:]] == [["66.7", "2", "ours"], ["33.3", "plain", "base"], ["0.0", "1", "ours"]]
    other = measured("other", None, [2.0, 3.0], key="another")
    assert "loss, all depths" not in both(other, BASE).render()  # losses on other windows are not put in an order


def test_windows_that_overlap_count_in_pieces() -> None:
    [line] = both(in_pieces_of_two(OURS), in_pieces_of_two(BASE)).text_differences
    error = abs(-0.15 - 0.0) / 2  # two pieces of two windows each
    assert line.standard_error == pytest.approx(error) and line.p == pytest.approx(student_p(-0.075, error, 2))


def test_terminal_and_json_output() -> None:
    found = both(OURS, BASE)
    text, reported = found.render(), json.loads(json.dumps(found.to_dict()))
    for words in ("Against base", "-0.0750", "+33.3", "66.7", "only base", "t.txt"):
        assert words in text
    assert reported["baseline"] == "base" and reported["same_windows"] is True
    assert [(model["checkpoint"], model["path"]) for model in reported["models"]] == [("base", "a/base"), ("ours", "b/ours")]
    assert reported["text_differences"][0]["difference"] == pytest.approx(-0.075)
    assert reported["question_differences"][2]["model_only"] == 2


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["runs/a.pt", "runs/b.pt"], ["a.pt", "b.pt"]),
        (["x/1/model.pt", "x/2/model.pt", "Qwen/Qwen2-0.5B"], ["1/model.pt", "2/model.pt", "Qwen/Qwen2-0.5B"]),
        (["a", "b/a"], ["a", "b/a"]),
        (["x", "./x"], ["x", "./x"]),
    ],
)
def test_short_names(paths: list[str], names: list[str]) -> None:
    assert short_names(paths) == names


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"checkpoints": ("x",)}, "at least two checkpoints, the baseline first, got x"),
        ({"checkpoints": ()}, "got none"),
        ({"checkpoints": ("x", "y", "x")}, "got x twice"),
        ({"checkpoints": ("x", "y"), "seq_len": 1}, "--seq_len"),
    ],
)
def test_what_cannot_be_compared(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        run(CompareSettings(**changes))


# --- The command -------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A donor, a recursive model of it, a text and a recipe."""
    folder, tokenizer = tmp_path_factory.mktemp("compared"), make_tiny_tokenizer()
    donor = tiny_model("llama")
    donor.save_pretrained(folder / "donor")
    tokenizer.save_pretrained(folder / "donor")
    torch.manual_seed(1)
    model = convert(str(folder / "donor"), L_layers=2, keep_donor=True, H_cycles=2, L_cycles=1)
    with torch.no_grad():
        for parameter in model.model.recursion.parameters():
            parameter.normal_()
    checkpoint.save(folder / "ours.pt", model, tokenizer)
    (folder / "t.txt").write_text("\n<|endoftext|>\n".join(" ".join(sentences(seed, 3)) for seed in range(30)))
    (folder / "recipe.yaml").write_text(
        f"compare: {{checkpoints: [{folder / 'donor'}, {folder / 'ours.pt'}], dataset_name: {folder / 't.txt'}, seq_len: 16}}"
    )
    return folder


def test_compare_command(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = folder / "page.html"
    questions = ["--questions", "permutations:difficulty=2-3,count=3", "--device", "cpu", "--halt", "kl"]
    cli.main(["compare", "--config", str(folder / "recipe.yaml"), "--cycles", "1", "--json", "--report", str(page), *questions])
    captured = capsys.readouterr()
    reported = json.loads(captured.out)
    assert [model["H_cycles"] for model in reported["models"]] == [None, 2]
    assert [line["H_cycles"] for line in reported["models"][1]["text"]["rows"]] == [1, 2]  # its own is measured, too
    [line] = reported["text_differences"]
    losses = [model["text"]["rows"][-1]["loss"] for model in reported["models"]]
    assert line["difference"] == pytest.approx(losses[1] - losses[0], abs=1e-9) and 0 <= line["p"] <= 1
    assert [line["count"] for line in reported["question_differences"]] == [6, 3, 3]
    html = page.read_text(encoding="utf-8")
    assert "donor and ours.pt, compared" in html and 'class="passage"' in html and str(page) in captured.err


def test_one_model_is_in_memory_at_a_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load, before = comparison.load_model, []

    def load_alone(*names: Any, **hub: Any) -> Any:
        assert all(model() is None for model in before)
        model, tokenizer = load(*names, **hub)
        before.append(weakref.ref(model))
        return model, tokenizer

    monkeypatch.setattr(comparison, "load_model", load_alone)
    paths = tuple(str(folder / name) for name in ("donor", "ours.pt"))
    found = run(CompareSettings(checkpoints=paths, dataset_name=str(folder / "t.txt"), seq_len=16, device="cpu", max_windows=2))
    assert len(before) == 2 and [report.checkpoint for report in found.reports] == ["donor", "ours.pt"]
    assert found.reports[1].text is not None and [row.H_cycles for row in found.reports[1].text.rows] == [1, 2, 3, 4]


def test_common_tokenizer_path(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load(*names: Any, **hub: Any) -> Any:
        asked.append(names)
        raise UserError("enough")

    monkeypatch.setattr(comparison, "load_model", load)
    with pytest.raises(UserError, match="enough"):
        run(CompareSettings(checkpoints=("x", "y"), dataset_name=str(folder / "t.txt"), tokenizer_path="words", device="cpu"))
    assert asked == [("x", "words")]
