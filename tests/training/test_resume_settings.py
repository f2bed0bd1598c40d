"""Every setting at a resume is obeyed, or refused by name; so is every change of the data."""

from __future__ import annotations

import json
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from recursify.checkpoints import checkpoint
from recursify.conversion import convert
from recursify.conversion.settings import ConvertSettings
from recursify.errors import UserError
from recursify.training import TrainSettings, train
from recursify.training.run import fingerprint
from tests.support.tiny import sentences, tiny_donor

# Another value of each setting that changes the steps after a resume.
OBEYED: dict[str, Any] = {
    "lr": 3e-3, "gain_lr": 0.2, "weight_decay": 9.0, "lr_schedule": "cosine", "warmup_steps": 1, "max_grad_norm": 1e-3, "num_epochs": 3,
    "max_steps": 5, "max_tokens": 1000, "deep_supervision_weight": 5.0, "deep_supervision_schedule": "constant",
    "self_distill_weight": 9.0, "monotone_weight": 9.0, "cycle_choices": (1, 2), "enable_deep_supervision": False,
    "distill_weight": 9.0, "match_hidden_weight": 9.0,
}  # fmt: skip
# Other values that need others beside them, or an effect other than on the weights: shown elsewhere (tests/cli/test_settings.py).
ELSEWHERE = {
    "output_dir", "resume", "device", "eval_batch_size", "eval_every", "early_stopping_patience", "save_every", "keep_last", "log_every",
    "generate_every", "generation_prompt", "report_to", "dry_run", "compile", "gradient_checkpointing", "bf16", "tf32", "fsdp", "deepspeed",
    "distill_temperature", "teacher", "cycle_weights", "depth_curriculum", "decay_share", "tokenizer_path", "donor", "load_in_4bit",
}  # fmt: skip


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> TrainSettings:
    """Settings of a run that was stopped after 2 of 4 steps."""
    folder = tmp_path_factory.mktemp("resume")
    tiny_donor("qwen2", folder / "donor", num_hidden_layers=4)
    convert.run(
        ConvertSettings(qwen_model=str(folder / "donor"), output_path=str(folder / "m.pt"), L_layers=2, H_cycles=2, L_cycles=1),
        lambda _: None,
    )
    (folder / "text.txt").write_text("\n<|endoftext|>\n".join(sentences(1, 40)))
    settings = TrainSettings(
        checkpoint=str(folder / "m.pt"), dataset_name=str(folder / "text.txt"), seq_len=16, batch_size=2, max_steps=4, save_every=2,
        warmup_steps=0, start_gain=0.2, lr=1e-3, output_dir=str(folder / "out"), device="cpu", enable_deep_supervision=True, log_every=1,
    )  # fmt: skip
    train(settings)
    for name in ("checkpoint_step_4.pt", "qwen_recursive_finetuned_best.pt"):
        (folder / "out" / name).unlink()
    (folder / "out" / "checkpoint_step_2_state" / "SHA256SUMS").unlink()  # tests change what is written there
    return settings


def resumed(started: TrainSettings, tmp_path: Path, **changes: Any) -> Any:
    import shutil

    shutil.copytree(started.output_dir, tmp_path / "out")
    return train(replace(started, output_dir=str(tmp_path / "out"), resume=True, save_every=0, **changes)).fit


def test_the_table_has_every_setting() -> None:
    names = {field.name for field in fields(TrainSettings)}
    refused = set(TrainSettings.resume_fields) & names
    assert names == refused | set(OBEYED) | ELSEWHERE and not refused & (set(OBEYED) | ELSEWHERE)


@pytest.mark.parametrize("name", OBEYED)
def test_obeyed(name: str, started: TrainSettings, tmp_path: Path) -> None:
    plain = resumed(started, tmp_path / "plain")
    other = resumed(
        started, tmp_path / "other", **{name: OBEYED[name]} | ({"max_steps": None} if name in ("num_epochs", "max_tokens") else {})
    )
    before, after = ([{k: v for k, v in row.items() if k not in TIMES} for row in fit.history] for fit in (plain, other))
    assert before[:2] == after[:2] and before[2:] != after[2:]


def test_run_of_an_earlier_default_text_column_is_resumed(started: TrainSettings, tmp_path: Path) -> None:
    """It was "text" before there were conversations."""
    import shutil

    shutil.copytree(started.output_dir, tmp_path / "old")
    (run,) = (tmp_path / "old").glob("checkpoint_step_2_state/run.json")
    content = json.loads(run.read_text())
    assert content["settings"]["text_column"] is None
    content["settings"]["text_column"] = "text"
    run.write_text(json.dumps(content))
    assert resumed(replace(started, output_dir=str(tmp_path / "old")), tmp_path / "new").steps == 4


TIMES = ("seconds", "tokens_per_second", "memory", "epoch")


def test_the_learning_rate_is_the_new_one(started: TrainSettings, tmp_path: Path) -> None:
    rates = [row["learning_rate"] for row in resumed(started, tmp_path, lr=5e-4).history if "learning_rate" in row]
    old = [row["learning_rate"] for row in resumed(started, tmp_path / "same").history if "learning_rate" in row]
    assert rates[:2] == old[:2] and rates[2:] == pytest.approx([rate / 2 for rate in old[2:]])


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_equal_settings_resume_bit_for_bit(optimizer: str, started: TrainSettings, tmp_path: Path) -> None:
    whole = replace(started, output_dir=str(tmp_path / "whole"), optimizer=optimizer)
    train(whole)
    (tmp_path / "whole" / "checkpoint_step_4.pt").rename(tmp_path / "end.pt")
    train(replace(whole, resume=True))
    one, other = (checkpoint.load(path).model for path in (tmp_path / "end.pt", tmp_path / "whole" / "checkpoint_step_4.pt"))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("name", sorted({*TrainSettings.resume_fields} & {field.name for field in fields(TrainSettings)}))
def test_refused_by_name(name: str, started: TrainSettings, tmp_path: Path) -> None:
    now = asdict(started)[name]
    text = "muon" if name == "optimizer" else "other"
    other = {bool: not now, int: 3, float: 0.7, str: text, tuple: ("a=1",), type(None): "x"}[type(now)]
    run = Path(started.output_dir) / "checkpoint_step_2_state" / "run.json"
    before = run.read_text()
    record = json.loads(before)
    record["settings"][name] = other  # as if that run had it: this one's own value stays valid
    run.write_text(json.dumps(record))
    try:
        with pytest.raises(UserError, match=rf"comes from another run: --{name} was "):
            train(replace(started, resume=True))
    finally:
        run.write_text(before)


def test_changed_data_are_refused(started: TrainSettings, tmp_path: Path) -> None:
    text = Path(started.dataset_name)
    before = text.read_text()
    try:
        text.write_text(before + "\n<|endoftext|>\n" + " ".join(sentences(9, 3)))
        with pytest.raises(UserError, match=r"--resume: .*checkpoint_step_2.pt was trained on other data: their contents have changed"):
            resumed(started, tmp_path)
    finally:
        text.write_text(before)
    assert resumed(started, tmp_path / "again").steps == 4  # the same contents, written anew


def test_fingerprints(tmp_path: Path) -> None:
    settings = TrainSettings(checkpoint="x", dataset_name=str(tmp_path / "a.txt"), streaming=False)
    rows = [{"input_ids": [1, 2]}, {"input_ids": [3, 4]}]

    class Table(list[Any]):
        def __getitem__(self, chosen: Any) -> Any:
            return {"input_ids": [list.__getitem__(self, i)["input_ids"] for i in chosen]}

    one = fingerprint(Table(rows), settings)
    assert one == fingerprint(Table(rows), settings) != fingerprint(Table(rows[:1]), settings)
    assert one != fingerprint(Table([rows[0], {"input_ids": [3, 5]}]), settings)
    streamed = replace(settings, streaming=True)
    (tmp_path / "a.txt").write_text("one\n")
    first = fingerprint(None, streamed)
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    assert first != fingerprint(None, streamed) and fingerprint(None, replace(streamed, dataset_name="org/data")) is None
