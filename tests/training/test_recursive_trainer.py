"""RecursiveTrainer, as users of transformers' Trainer call it: the same training as `fit`, and what they expect around it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from recursify.errors import UserError
from recursify.training import FitSettings, RecursiveTrainer, fit
from recursify.training.saving import BEST
from tests.support.runs import SEQ_LEN, blocks, recursive
from tests.support.tiny import make_tiny_tokenizer, sentences


def rows_and_model(**changes: Any) -> tuple[Any, Any, dict[str, Any]]:
    """12 rows to train on, 3 to validate on, and settings of one epoch."""
    shape = {"lr": 1e-3, "seq_len": SEQ_LEN, "num_epochs": 1, "warmup_steps": 0, "device": "cpu", "generate_every": 0}
    return blocks(12), blocks(3, seed=2), shape | changes


def test_trainer_equals_fit(tmp_path: Path) -> None:
    """The same weights and losses, from settings, and from transformers' own arguments."""
    train_rows, held, shape = rows_and_model(enable_deep_supervision=True)
    expected, model = recursive(), recursive()
    done = fit(expected, make_tiny_tokenizer(), train_rows, held, FitSettings(**shape), console=False)
    trainer = RecursiveTrainer(
        model=model, args=FitSettings(**shape, output_dir=str(tmp_path)), train_dataset=train_rows, eval_dataset=held,
        processing_class=make_tiny_tokenizer(), console=False,
    )  # fmt: skip
    out = trainer.train()
    assert isinstance(trainer, Trainer) and out.global_step == done.steps == 3
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), expected.parameters(), strict=True))
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(done.eval_loss, rel=1e-6) and "eval_loss_cycle_1" in metrics
    trainer.save_model(str(tmp_path / "out"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert all(torch.equal(one, other) for one, other in zip(loaded.parameters(), expected.parameters(), strict=True))
    assert (tmp_path / BEST).exists() and (tmp_path / "metrics.jsonl").exists()


def test_the_trainer_takes_transformers_arguments(tmp_path: Path) -> None:
    train_rows, held, shape = rows_and_model(seed=7, weight_decay=0.5, num_epochs=2, batch_size=2, lr_schedule="cosine", max_grad_norm=0.5)
    args = TrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=2, learning_rate=1e-3, num_train_epochs=2, seed=7, weight_decay=0.5,
        max_grad_norm=0.5, lr_scheduler_type="cosine", optim="adamw_torch", use_cpu=True, report_to="none", max_steps=5,
    )  # fmt: skip
    expected, model = recursive(), recursive()
    fit(expected, None, train_rows, held, FitSettings(**shape | {"warmup_steps": 100, "max_steps": 5}), console=False)
    RecursiveTrainer(model, args, train_rows, held, console=False).train()
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), expected.parameters(), strict=True))


def test_trainer_refuses_invalid_arguments(tmp_path: Path) -> None:
    train_rows, held, shape = rows_and_model()
    with pytest.raises(UserError, match=r"args: label_smoothing_factor, neftune_noise_alpha: not supported; use FitSettings"):
        args = TrainingArguments(output_dir=str(tmp_path), label_smoothing_factor=0.1, neftune_noise_alpha=5, use_cpu=True)
        RecursiveTrainer(recursive(), args, train_rows, held)
    with pytest.raises(UserError, match=r"args: expected FitSettings, or transformers' TrainingArguments, got NoneType"):
        RecursiveTrainer(recursive(), None, train_rows, held)
    with pytest.raises(UserError, match=r"train_dataset: expected rows with input_ids, with text, or with .*; got the columns words"):
        RecursiveTrainer(recursive(), FitSettings(**shape), Dataset.from_dict({"words": ["a"]}), held, saver=None)
    with pytest.raises(UserError, match=r"resume_from_checkpoint: expected a checkpoint_step_N.pt with its _state folder in .*, got none"):
        RecursiveTrainer(recursive(), FitSettings(**shape, output_dir=str(tmp_path)), train_rows, held, console=False).train(True)


def test_trainer_packs_text_and_works_without_validation(tmp_path: Path) -> None:
    tokenizer, model = make_tiny_tokenizer(), recursive()
    texts = Dataset.from_dict({"text": sentences(3, 200)})
    _, _, shape = rows_and_model(max_steps=2)
    trainer = RecursiveTrainer(model, FitSettings(**shape, output_dir=str(tmp_path)), texts, processing_class=tokenizer, console=False)
    assert {len(row["input_ids"]) for row in trainer.train_dataset} == {SEQ_LEN}
    assert trainer.train().global_step == 2 and not (tmp_path / BEST).exists()


def test_trainer_resumes_from_its_checkpoint(tmp_path: Path) -> None:
    """As if it had never stopped, whatever the weights of the model that it is given."""
    train_rows, held, shape = rows_and_model(save_every=2, max_steps=4, optimizer="adamw")
    whole, again = recursive(), recursive()
    RecursiveTrainer(whole, FitSettings(**shape, output_dir=str(tmp_path)), train_rows, held, make_tiny_tokenizer(), console=False).train()
    (tmp_path / "checkpoint_step_4.pt").unlink()
    trainer = RecursiveTrainer(
        again, FitSettings(**shape, output_dir=str(tmp_path)), train_rows, held, make_tiny_tokenizer(), console=False
    )
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 4
    assert all(torch.equal(one, other) for one, other in zip(again.parameters(), whole.parameters(), strict=True))
