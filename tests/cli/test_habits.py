"""Spellings of transformers and trl give the settings that they mean, on the command line and in recipes."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from recursify.cli import main as cli
from recursify.cli.habits import INSTEAD
from recursify.cli.names import fields_by_name
from recursify.conversion.settings import ConvertSettings, InspectSettings, ProbeSettings
from recursify.errors import UserError
from recursify.evaluation.settings import CompareSettings, EvaluateSettings
from recursify.hub.export import ExportSettings
from recursify.inference.settings import ChatSettings, GenerateSettings
from recursify.serving.settings import ServeSettings
from recursify.training import HybridSettings, TrainSettings

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
    wanted = TrainSettings(checkpoint="True", lr=1e-4, enable_deep_supervision=True, cycle_choices=(1, 2), generation_prompt="a=b")
    assert cli.parse("train", TrainSettings, words) == wanted


def test_recipes_take_the_names_of_transformers(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("train: {model: x.pt, learning_rate: 2.0e-4, optim: adamw_torch, max_length: 64}")
    found = cli.parse("train", TrainSettings, ["--config", str(tmp_path / "r.yaml")])
    assert (found.lr, found.optimizer, found.seq_len) == (2e-4, "adamw", 64)


def test_a_checkpoint_for_an_approach_that_starts_from_a_donor() -> None:
    with pytest.raises(UserError, match="--checkpoint: not used by this approach, .* --model_name; got x.pt"):
        cli.parse("train", TrainSettings, ["--approach", "hybrid", *WORDS])


def test_commands_with_positional_arguments_keep_their_switches() -> None:
    """`--json A B` is a switch and two models, `--donor out` a switch and a folder."""
    compared = cli.parse("compare", CompareSettings, ["--json", "A", "B"])
    assert compared.json and compared.checkpoints == ("A", "B")
    exported = cli.parse("export", ExportSettings, ["--checkpoint", "x", "--donor", "out"])
    assert exported.donor and exported.out == "out"


def test_a_value_that_looks_like_a_flag_stays_one_word() -> None:
    assert cli.parse("generate", GenerateSettings, [*WORDS, "--prompt=--foo"]).prompt == "--foo"
    assert cli.parse("train", TrainSettings, [*WORDS, "--generation_prompt=--bf16 True=1"]).generation_prompt == "--bf16 True=1"


COMMANDS: dict[str, Any] = {
    "convert": ConvertSettings, "train": TrainSettings, "generate": GenerateSettings, "chat": ChatSettings, "serve": ServeSettings,
    "evaluate": EvaluateSettings, "compare": CompareSettings, "probe": ProbeSettings, "inspect": InspectSettings, "export": ExportSettings,
}  # fmt: skip


@pytest.mark.parametrize(("job", "flag"), [(job, flag) for job, flags in INSTEAD.items() for flag in flags])
def test_flags_of_other_tools_and_commands_name_ours(job: str, flag: str) -> None:
    """And what is named is a flag of that command, or of the command that is named."""
    with pytest.raises(UserError, match=f"^--{flag}: not a flag of {job}; instead: ") as refused:
        cli.parse(job, COMMANDS[job], [f"--{flag}", "x"])
    every = [*COMMANDS.values(), HybridSettings]
    known = {field.name for settings in every for field in dataclasses.fields(settings)} | {"approach"}
    known |= {name for settings in every for name in fields_by_name(settings)}
    named = re.findall(r"--(\w+)", str(refused.value).partition("instead: ")[2])
    assert set(named) <= known and flag not in {field.name for field in dataclasses.fields(COMMANDS[job])}


def test_a_foreign_name_as_a_value_is_a_value() -> None:
    assert cli.parse("generate", GenerateSettings, [*WORDS, "--prompt=--cycles"]).prompt == "--cycles"
    assert cli.parse("train", HybridSettings, ["--approach", "hybrid", "--H_cycles", "2"]).H_cycles == 2


def test_a_flag_under_two_names_in_a_recipe_is_refused(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("train: {checkpoint: x.pt, learning_rate: 2.0e-4, lr: 1.0e-4}")
    with pytest.raises(UserError, match="learning_rate is another name of lr, which is given too; leave out one of the two"):
        cli.parse("train", TrainSettings, ["--config", str(tmp_path / "r.yaml")])
