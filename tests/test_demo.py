"""The demo, shortened: everything it makes is made, and every number in its page was measured."""

from __future__ import annotations

import html
import re
import shlex
from pathlib import Path

import pytest

from recursify import checkpoint, cli, demo
from recursify.donor import open_donor
from recursify.errors import UserError
from recursify.training import FitResult


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "demo"
    demo.run(demo.DemoSettings(output_dir=str(folder), steps=2))
    return folder


@pytest.mark.slow
def test_the_demo_makes_a_page_and_a_checkpoint(out: Path) -> None:
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "<svg" in page and not re.search(r"""(src|href)=["']https?:""", page)
    found = checkpoint.load(out / "recursive.pt")
    assert found.plan is not None and found.plan.keeps_donor
    assert found.tokenizer is not None
    for name in (demo.AS_IS, demo.TUNED, demo.RECURSIVE):
        assert name in page


@pytest.mark.slow
def test_the_numbers_in_the_page_can_be_measured_again(out: Path) -> None:
    from recursify.evaluation import EvaluateSettings, run

    settings = EvaluateSettings(checkpoint=str(out / "recursive.pt"), dataset_name=str(out / "language_reference"), cycles=(1, 5))
    page = (out / "report.html").read_text(encoding="utf-8")
    # the checkpoint is stored in the donor's bfloat16, the page shows the float32 model: equal to two decimals
    measured = run(settings).text
    assert measured is not None
    for row in measured.rows:
        shown = [float(number) for number in re.findall(r"\b\d\.\d{4}\b", page)]
        assert min(abs(number - row.loss) for number in shown) < 0.02


@pytest.mark.slow
def test_the_commands_in_the_page_do_the_same_one_by_one(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = html.unescape((out / "report.html").read_text(encoding="utf-8"))
    shown = re.findall(r"recursify (?:convert|train|evaluate|generate) --[^<\n]*", page)
    assert [line.split()[1] for line in shown] == ["convert", "train", "evaluate", "generate"]
    for line in shown:
        cli.main(shlex.split(line)[1:])
    assert capsys.readouterr().out.count("✓ New best model saved") == 1


def test_the_donor_that_ships_is_small_and_says_how_it_was_made() -> None:
    folder = demo.donor_folder()
    assert (folder / "model.safetensors").stat().st_size <= 8_000_000
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "held-out loss" in card and "recipes/demo_donor.py" in card
    assert open_donor(str(folder)).config.model_type == "qwen2"


def test_an_output_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--output_dir"):
        demo.run(demo.DemoSettings(output_dir=str(tmp_path / "file" / "x")))


def test_a_run_that_ctrl_c_has_ended_is_not_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = FitResult(history=[], steps=1, tokens=1, seconds=1.0, eval_loss=None, best_eval_loss=None, interrupted=True)
    monkeypatch.setattr(demo, "fit", lambda *args: ended)
    monkeypatch.setattr(demo.text_losses, "measure", lambda *args: [None])
    with pytest.raises(KeyboardInterrupt):
        demo.run(demo.DemoSettings(output_dir=str(tmp_path)))
    assert not (tmp_path / "report.html").exists()
