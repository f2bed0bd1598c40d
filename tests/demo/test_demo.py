"""The demo, shortened: all outputs are written, and every number in its page was measured."""

from __future__ import annotations

import html
import re
import shlex
from pathlib import Path

import pytest

from recursify.checkpoints import checkpoint
from recursify.checkpoints.donor import open_donor
from recursify.cli import main as cli
from recursify.demo import prose, state_tracking
from recursify.demo import run as demo
from recursify.errors import UserError
from recursify.training import FitResult
from recursify.training.saving import BEST


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "demo"
    demo.run(demo.DemoSettings(output_dir=str(folder), steps=2, tracking_steps=2))
    return folder


@pytest.mark.slow
def test_demo_writes_a_page_and_a_checkpoint(out: Path) -> None:
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "<svg" in page and not re.search(r"""(src|href)=["']https?:""", page)
    found = checkpoint.load(out / "recursive.pt")
    assert found.plan is not None and found.plan.keeps_donor
    assert found.tokenizer is not None
    for name in (prose.AS_IS, prose.TUNED, prose.RECURSIVE, state_tracking.AS_IS, state_tracking.TUNED, state_tracking.RECURSIVE):
        assert name in page


@pytest.mark.slow
def test_numbers_of_the_page_are_reproducible(out: Path) -> None:
    from recursify.evaluation.evaluate import run
    from recursify.evaluation.settings import EvaluateSettings

    settings = EvaluateSettings(checkpoint=str(out / "recursive.pt"), dataset_name=str(out / "language_reference"), cycles=(1, 5))
    page = (out / "report.html").read_text(encoding="utf-8")
    # the checkpoint is stored in the donor's bfloat16, the page shows the float32 model: equal to two decimals
    measured = run(settings).text
    assert measured is not None
    for row in measured.rows:
        shown = [float(number) for number in re.findall(r"\b\d\.\d{4}\b", page)]
        assert min(abs(number - row.loss) for number in shown) < 0.02


@pytest.mark.slow
def test_commands_of_the_page_reproduce_the_demo(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = html.unescape((out / "report.html").read_text(encoding="utf-8"))
    shown = re.findall(r"recursify (?:convert|train|evaluate|generate) --[^<\n]*", page)
    assert [line.split()[1] for line in shown] == ["convert", "train", "evaluate", "generate", "convert", "train", "evaluate"]
    for line in shown:
        cli.main(shlex.split(line)[1:])
    assert capsys.readouterr().out.count("✓ New best model saved") >= 2
    assert (out / BEST).exists() and (out / "tracker" / BEST).exists()


@pytest.mark.slow
def test_tracker_results_equal_evaluate(out: Path) -> None:
    from recursify.evaluation.evaluate import run
    from recursify.evaluation.settings import EvaluateSettings

    (asked,) = run(
        EvaluateSettings(
            checkpoint=str(out / "tracker.pt"), questions=(state_tracking.ASKED_SET,), judge="labels", cycles=state_tracking.DEPTHS
        )
    ).questions
    page = (out / "report.html").read_text(encoding="utf-8")
    table = re.search(r"<caption>Accuracy in percent by sequence length.*?</table>", page, re.DOTALL)
    assert table is not None
    rows = {name: cells for name, cells in re.findall(r'<tr[^>]*><th scope="row">(.*?)</th>(.*?)</tr>', table[0])}
    for H in state_tracking.DEPTHS:
        shown = [float(cell) for cell in re.findall(r"<td>([\d.]+)</td>", rows[state_tracking.at_depth(H)])][2:]
        measured = {row.difficulty: 100 * row.accuracy for row in asked.rows if row.H_cycles == H}
        # the checkpoint is stored in the donor's bfloat16
        assert all(abs(figure - measured[letters]) < 4 for letters, figure in zip(range(2, 99, 2), shown, strict=False))


@pytest.mark.parametrize(
    ("folder", "size", "words"),
    [
        (prose.donor_folder(), 8_000_000, ("held-out loss", "recipes/demo_donor.py")),
        (state_tracking.tracker_folder(), 2_000_000, ("accuracy at letter", "recipes.demo_tracker")),
    ],
)
def test_bundled_donors_are_small_and_documented(folder: Path, size: int, words: tuple[str, ...]) -> None:
    assert (folder / "model.safetensors").stat().st_size <= size
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert all(word in card for word in words)
    assert open_donor(str(folder)).config.model_type == "qwen2"


def test_output_folder_that_cannot_be_created(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--output_dir"):
        demo.run(demo.DemoSettings(output_dir=str(tmp_path / "file" / "x")))


def test_interrupted_run_is_not_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = FitResult(history=[], steps=1, tokens=1, seconds=1.0, eval_loss=None, best_eval_loss=None, interrupted=True)
    monkeypatch.setattr(prose, "fit", lambda *args: ended)
    monkeypatch.setattr(prose.text_loss, "measure", lambda *args: [None])
    with pytest.raises(KeyboardInterrupt):
        demo.run(demo.DemoSettings(output_dir=str(tmp_path)))
    assert not (tmp_path / "report.html").exists()
