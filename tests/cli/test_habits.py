"""Spellings of transformers and trl give the settings that they mean, on the command line and in recipes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from recursify.cli import main as cli
from recursify.cli.habits import as_ours
from recursify.errors import UserError
from recursify.training import TrainSettings

WORDS = ["--checkpoint", "x.pt"]


@pytest.mark.parametrize(
    ("words", "field", "value"),
    [
        (["--gradient_checkpointing", "True"], "gradient_checkpointing", True),
        (["--gradient_checkpointing", "false"], "gradient_checkpointing", False),
        (["--gradient_checkpointing=True"], "gradient_checkpointing", True),
        (["--gradient_checkpointing"], "gradient_checkpointing", True),
        (["--bf16"], "bf16", True),
        (["--bf16", "False"], "bf16", False),
        (["--bf16", "--seed", "3"], "bf16", True),
        (["--optim", "adamw_torch"], "optimizer", "adamw"),
        (["--optimizer", "adamw_torch_8bit"], "optimizer", "adamw_8bit"),
        (["--lr_scheduler_type", "warmup_stable_decay"], "lr_schedule", "wsd"),
        (["--lr_scheduler_type=cosine"], "lr_schedule", "cosine"),
        (["--report_to", "none"], "report_to", ()),
        (["--report_to", "tensorboard"], "report_to", ("tensorboard",)),
        (["--torch_compile", "True"], "compile", True),
        (["--resume_from_checkpoint"], "resume", True),
    ],
)
def test_spellings(words: list[str], field: str, value: Any) -> None:
    assert getattr(cli.parse("train", TrainSettings, [*WORDS, *words]), field) == value


def test_a_path_for_resume_is_refused_with_the_reason() -> None:
    with pytest.raises(UserError, match=r"--resume_from_checkpoint: takes no value, got 'o1'; it continues the newest checkpoint in"):
        cli.parse("train", TrainSettings, [*WORDS, "--resume_from_checkpoint", "o1"])


def test_our_own_words_are_left_alone() -> None:
    words = ["--checkpoint", "True", "--lr", "1e-4", "--enable_deep_supervision", "--cycle_choices", "1", "2", "--generation_prompt", "a=b"]
    assert as_ours(words, TrainSettings) == words


def test_recipes_take_the_names_of_transformers(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("train: {checkpoint: x.pt, learning_rate: 2.0e-4, optim: adamw_torch, max_length: 64}")
    found = cli.parse("train", TrainSettings, ["--config", str(tmp_path / "r.yaml")])
    assert (found.lr, found.optimizer, found.seq_len) == (2e-4, "adamw", 64)


def test_a_checkpoint_for_an_approach_that_starts_from_a_donor() -> None:
    with pytest.raises(UserError, match="--checkpoint: not used by this approach, .* --model_name; got x.pt"):
        cli.parse("train", TrainSettings, ["--approach", "hybrid", *WORDS])
