"""The demo's second half: the bundled tracker, accuracy by sequence length, and its commands."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from recursify.checkpoints.donor import open_donor
from recursify.data.question_sets import load_questions
from recursify.data.tasks import as_text, generate
from recursify.demo import state_tracking
from recursify.training import FitResult


def test_moves_and_states_are_single_tokens_of_the_tracker() -> None:
    tokenizer = AutoTokenizer.from_pretrained(state_tracking.tracker_folder())
    item = generate("permutations", state_tracking.TRAINED, 1, 0)[0]
    ids = tokenizer(as_text(item))["input_ids"]
    assert len(ids) + 1 == state_tracking.TRAINED + state_tracking.FRAME  # with the end
    text = "Übrigens, 12!"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_tracker_solves_short_sequences_only() -> None:
    items = load_questions(f"permutations:difficulty={state_tracking.TRAINED},count=200", "test")
    tokenizer = AutoTokenizer.from_pretrained(state_tracking.tracker_folder())
    donor = open_donor(str(state_tracking.tracker_folder())).load(dtype=torch.float32)
    (shares,) = state_tracking.accuracy_by_length(donor, tokenizer, items, (None,))
    assert [share.letters for share in shares] == list(range(1, state_tracking.TRAINED + 1))
    assert min(share.accuracy for share in shares[:4]) > 0.95
    assert max(share.accuracy for share in shares[-2:]) < 0.5


def test_baseline_settings_differ_only_in_the_loop() -> None:
    ours = state_tracking.settings(Path("x"), 50, 3)
    ours.validate()
    theirs = state_tracking.baseline_settings(200)
    assert {"lr", "batch_size", "seq_len", "weight_decay", "lr_schedule", "dataset_name", "seed"}.isdisjoint(theirs)
    assert theirs["max_steps"] == 200


def test_interrupted_tracking_run_is_not_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = FitResult(history=[], steps=1, tokens=1, seconds=1.0, eval_loss=None, best_eval_loss=None, interrupted=True)
    monkeypatch.setattr(state_tracking, "fit", lambda *args: ended)
    monkeypatch.setattr(state_tracking, "accuracy_by_length", lambda *args: [()])
    with pytest.raises(KeyboardInterrupt):
        state_tracking.run(tmp_path, 1, 0, state_tracking.Clock())
    assert not (tmp_path / "tracker.pt").exists()
