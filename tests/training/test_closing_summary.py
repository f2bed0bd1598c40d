"""The summary at the end of a run: losses by cycle, the best model, and commands to run next."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from recursify.cli import main as cli
from recursify.conversion.convert import convert
from recursify.data.loading import load_blocks
from recursify.evaluation.settings import EvaluateSettings
from recursify.inference.settings import GenerateSettings
from recursify.training import EmbeddingSettings, FitResult, TrainSettings, train
from recursify.training.run import closing_summary
from recursify.training.saving import best_name
from tests.support.tiny import make_tiny_tokenizer, sentences, tiny_donor


def summary(settings: Any, **losses: float) -> str:
    entries = [{"eval_loss": 9.0}, {"eval_loss": 2.0, **losses}, {"loss": 1.0}]
    result = FitResult(history=entries, steps=4, tokens=9, seconds=1.0, eval_loss=2.0, best_eval_loss=1.5)
    return closing_summary(result, Path("my runs/best.pt"), settings)


def test_losses_by_cycle_and_the_lowest() -> None:
    printed = summary(TrainSettings(checkpoint="x"), eval_loss_cycle_1=2.5, eval_loss_cycle_2=1.75, eval_loss_cycle_3=2.0)
    assert "Validation loss by cycle at the end: 1: 2.5000, 2: 1.7500, 3: 2.0000; lowest at cycle 2" in printed
    assert "Best validation loss 1.5000: my runs/best.pt" in printed
    assert "by cycle" not in summary(TrainSettings(checkpoint="x"), eval_loss_cycle_1=2.5)


def test_the_folder_is_named_in_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without --output_dir the files are in the folder that the run was started in, which a bare name does not say."""
    monkeypatch.chdir(tmp_path)
    assert f"All files of this run are in {tmp_path}\n" in summary(TrainSettings(checkpoint="x"))
    assert f"All files of this run are in {tmp_path / 'runs' / 'a'}\n" in summary(TrainSettings(checkpoint="x", output_dir="runs/a"))


@pytest.mark.parametrize(
    ("name", "text", "questions"),
    [("wikitext", "wikitext", ()), ("my text.txt", "my text.txt", ()), ("permutations:difficulty=2-4,count=20", None, None)],
)
def test_the_commands_can_be_given(name: str, text: str | None, questions: Any, tmp_path: Path) -> None:
    printed = summary(TrainSettings(checkpoint="x", dataset_name=name))
    commands = [shlex.split(line.removeprefix("Next: ")) for line in printed.splitlines() if "recursify " in line]
    generated, evaluated = (words[words.index("recursify") + 1 :] for words in commands)
    assert cli.parse("generate", GenerateSettings, generated[1:]).checkpoint == "my runs/best.pt"
    asked = cli.parse("evaluate", EvaluateSettings, evaluated[1:])
    assert asked.checkpoint == "my runs/best.pt" and asked.dataset_name == text
    assert asked.questions == ((name,) if questions is None else questions)
    assert asked.split == ("validation" if text else None)


def test_after_conversations_comes_a_chat() -> None:
    result = FitResult(history=[{"eval_loss": 2.0}], steps=4, tokens=9, seconds=1.0, eval_loss=2.0, best_eval_loss=1.5)
    said = closing_summary(result, Path("my runs/best.pt"), TrainSettings(checkpoint="x", dataset_name="a.jsonl"), converses=True)
    (command,) = [line.removeprefix("Next: ") for line in said.splitlines() if "recursify " in line]
    assert shlex.split(command)[1:] == ["chat", "--checkpoint", "my runs/best.pt"]


@pytest.mark.parametrize(
    ("model_type", "name"),
    [("recursive_qwen2", "qwen"), ("recursive_qwen3", "qwen"), ("qwen2", "qwen"), ("recursive_llama", "llama"), ("phi3", "phi3")],
)
def test_the_best_model_is_named_after_the_family(model_type: str, name: str) -> None:
    assert best_name(SimpleNamespace(model_type=model_type)) == f"{name}_recursive_finetuned_best.pt"


def test_a_model_without_a_head_has_no_next_command() -> None:
    assert "recursify" not in summary(EmbeddingSettings())


@pytest.mark.parametrize("kept", [True, False])
def test_the_loss_of_the_donor_stands_beside(kept: bool, tmp_path: Path, caplog: Any) -> None:
    """Validated before the first step, where a model of all layers is its donor at 0 cycles; not where layers were dropped."""
    donor, text = tmp_path / "donor", tmp_path / "text.txt"
    tiny_donor("qwen2", donor, num_hidden_layers=4)
    text.write_text("\n\n".join(sentences(0, 400)))
    made = convert(str(donor), L_layers=2, keep_donor=kept, gain=0.3)
    made.save_pretrained(tmp_path / "m")
    make_tiny_tokenizer().save_pretrained(tmp_path / "m")
    options: Any = {"checkpoint": str(tmp_path / "m"), "dataset_name": str(text), "seq_len": 32, "generate_every": 0, "device": "cpu"}
    settings = TrainSettings(**options, output_dir=str(tmp_path / "out"), max_steps=2, save_every=1)
    with caplog.at_level("INFO", "recursify"):
        result = train(settings)
    assert result.fit is not None
    losses = [entry["donor_loss"] for entry in result.fit.history if "donor_loss" in entry]
    if not kept:
        assert losses == [] and "of the donor" not in caplog.text
        return
    rows = torch.tensor(load_blocks(settings, make_tiny_tokenizer(), 32, settings.seed).validation["input_ids"])
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(donor)(rows, labels=rows).loss.item()
    assert losses == [pytest.approx(expected, rel=1e-4)]
    assert f"; of the donor: {expected:.4f}" in caplog.text
    (tmp_path / "out" / "checkpoint_step_2.pt").unlink()
    resumed = train(replace(settings, resume=True)).fit  # remembered, not measured again on a trained model
    assert resumed is not None and resumed.history[0]["donor_loss"] == losses[0]
    again = train(replace(settings, checkpoint=str(tmp_path / "out" / "checkpoint_step_1.pt"), output_dir=str(tmp_path / "two"))).fit
    assert again is not None and not [entry for entry in again.history if "donor_loss" in entry]
