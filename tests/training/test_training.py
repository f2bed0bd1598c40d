"""Training from end to end on models that fit in a cache line: what is learnt, what is printed, what is written, and going on from it."""

from __future__ import annotations

import inspect
import json
import math
import os
import re
import shutil
import signal
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args, get_type_hints

import pytest
import torch
from transformers import TrainerCallback, TrainerControl, TrainerState

from recursify.checkpoints import checkpoint
from recursify.conversion.convert import convert
from recursify.data.settings import DataSettings
from recursify.errors import UserError
from recursify.network.losses import SCHEDULES
from recursify.training import EmbeddingSettings, FitResult, HybridSettings, TrainSettings, callbacks, fit, fitting, train, trainer
from recursify.training import arguments as training_arguments_module
from recursify.training import run as training_run
from recursify.training.approaches import freeze_rest
from recursify.training.arguments import check_tf32, choose_autocast, total_steps, training_arguments
from recursify.training.collate import Collate
from recursify.training.cost import pass_flops
from recursify.training.depth import DepthSchedule
from recursify.training.fitting import depth_schedule
from recursify.training.gains import set_gains
from recursify.training.lock import LOCK
from recursify.training.loss_module import LossModule, Supervision
from recursify.training.saving import BEST, Saver, resume_points, training_notes
from tests.support import tiny
from tests.support.runs import SEQ_LEN, blocks, logged, recursive, run, settings
from tests.support.tiny import make_tiny_tokenizer, sentences, tiny_config, tiny_donor


def weights_of(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_one_forward_pass_per_batch() -> None:
    """One forward pass per batch, whatever the length and the number of cycles; no cache."""
    model, seen = recursive(), []
    model.model.embed_tokens.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    model.model.layers[1].register_forward_pre_hook(lambda *args: seen.append(args[2]["past_key_values"]), with_kwargs=True)
    run(model, enable_deep_supervision=True)
    assert [shape for shape in seen if shape is not None] == [(4, SEQ_LEN)] * 2 + [(4, SEQ_LEN), (1, SEQ_LEN)]
    assert seen.count(None) == 4 * 6  # no application was given a cache


# The loop


def test_loss_falls_at_every_cycle() -> None:
    model = recursive()
    result = run(model, train_blocks=blocks(24), num_epochs=4, lr=3e-3, enable_deep_supervision=True)
    for cycle in (1, 2, 3):
        losses, held = logged(result, f"loss_cycle_{cycle}"), logged(result, f"eval_loss_cycle_{cycle}")
        assert losses[-1] < losses[0] - 0.5 and held[-1] < held[0]
    assert result.steps == 24 and result.tokens == 4 * 24 * SEQ_LEN and result.seconds > 0
    assert result.eval_loss == logged(result, "eval_loss")[-1] and result.best_eval_loss == min(logged(result, "eval_loss"))
    assert not model.training and model.config.use_cache


def test_trainer_trains_a_plain_model() -> None:
    donor = tiny_donor("qwen2", num_hidden_layers=2)
    batch = torch.tensor([row["input_ids"] for row in blocks(4)])
    expected = donor(batch, labels=batch).loss.item()
    result = run(donor, train_blocks=blocks(4), enable_deep_supervision=True, num_epochs=3)
    assert logged(result, "loss")[0] == pytest.approx(expected, rel=1e-6)
    assert logged(result, "loss") == pytest.approx(logged(result, "loss_cycle_1"), rel=1e-6)
    assert logged(result, "loss")[-1] < expected and "eval_loss_cycle_2" not in result.history[-1]
    assert donor.config.use_cache


def test_accumulated_micro_batches_equal_one_batch() -> None:
    """Six sequences in one batch, and as micro-batches of four and two: a mean of their means would differ."""
    whole, parts = recursive(), recursive()
    common: dict[str, Any] = {"train_blocks": blocks(6), "num_epochs": 2, "enable_deep_supervision": True, "eval_batch_size": 1}
    one, two = run(whole, batch_size=8, **common), run(parts, batch_size=4, grad_accum_steps=2, **common)
    assert one.steps == two.steps == 2 and one.tokens == two.tokens
    for key in ("loss", "loss_cycle_1", "loss_cycle_3", "grad_norm", "train_loss", "eval_loss"):
        assert logged(two, key) == pytest.approx(logged(one, key), rel=1e-4), key


def test_validation_is_a_mean_over_tokens() -> None:
    """Five sequences in batches of two: a mean over batches would give the last one twice its weight."""
    model = recursive()
    result = run(model, eval_batch_size=2)
    held = torch.tensor([row["input_ids"] for row in blocks(5, seed=2)])
    with torch.no_grad():
        expected = [model(held, labels=held, H_cycles=H).loss.item() for H in (1, 2, 3)]
    assert [logged(result, f"eval_loss_cycle_{c}")[0] for c in (1, 2, 3)] == pytest.approx(expected, rel=1e-6)
    assert result.eval_loss == pytest.approx(expected[2], rel=1e-6)
    assert logged(result, "eval_perplexity") == [pytest.approx(math.exp(expected[2]), rel=1e-5)]


def test_last_step_counts_as_an_epoch_end() -> None:
    result = run(recursive(), max_steps=3)
    assert result.steps == 3 and [entry["step"] for entry in result.history if "eval_loss" in entry] == [2, 3]
    assert result.history[-1]["epoch"] == 1.5


def test_train_loss_is_the_epoch_mean_at_the_last_cycle() -> None:
    result = run(recursive(), train_blocks=blocks(8), num_epochs=2, enable_deep_supervision=True)
    steps, epochs = logged(result, "loss_cycle_3"), logged(result, "train_loss")
    assert epochs == pytest.approx([sum(steps[:2]) / 2, sum(steps[2:]) / 2], rel=1e-6)
    # as many entries as asked for, and one at each end: what they say is the mean since the one before
    rare = run(recursive(), train_blocks=blocks(8), num_epochs=2, enable_deep_supervision=True, log_every=100)
    assert logged(rare, "train_loss") == pytest.approx(epochs, rel=1e-6)
    assert [entry["step"] for entry in rare.history if "loss" in entry] == [1, 2, 4]


def test_tie_and_frozen_embeddings() -> None:
    model = recursive(freeze_embeddings=True)
    before = weights_of(model)
    run(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, before["lm_head.weight"])
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    frozen = {"lm_head.weight", "model.embed_tokens.weight", "model.recursion.q_head.weight", "model.recursion.q_head.bias"}
    assert moved == set(before) - frozen


def test_tied_embeddings_are_trained_and_stay_tied() -> None:
    model = recursive()
    before = weights_of(model)
    run(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not torch.equal(model.lm_head.weight, before["lm_head.weight"])


def test_autocast_computes_in_bfloat16_with_float32_master_weights() -> None:
    model, reference = recursive().bfloat16(), recursive().bfloat16()
    result = run(model, bf16=True, enable_deep_supervision=True)
    expected = run(reference, bf16=False, enable_deep_supervision=True)
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert logged(result, "loss") != logged(expected, "loss")
    assert logged(result, "loss") == pytest.approx(logged(expected, "loss"), rel=3e-2)
    assert result.eval_loss == pytest.approx(expected.eval_loss, rel=3e-2)


def test_gradient_checkpointing_gives_equal_results() -> None:
    model = recursive()
    result = run(model, gradient_checkpointing=True, enable_deep_supervision=True)
    assert logged(result, "grad_norm") == pytest.approx(logged(run(recursive(), enable_deep_supervision=True), "grad_norm"), rel=1e-5)
    assert not model.is_gradient_checkpointing


def test_same_seed_same_run() -> None:
    first, second, other = recursive(), recursive(), recursive()
    run(first), run(second), run(other, seed=43)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)


def test_the_schedule_counts_optimizer_steps() -> None:
    """Three micro-batches and a rest of one make two steps: counted in optimizer steps, not in batches."""
    assert total_steps(range(9), settings(grad_accum_steps=2, num_epochs=3)) == 6
    assert total_steps(range(9), settings(max_steps=50)) == 50
    assert total_steps(range(9), settings(max_tokens=4 * SEQ_LEN * 2 + 1, grad_accum_steps=2)) == 2
    result = run(recursive(), train_blocks=blocks(10), batch_size=3, grad_accum_steps=3, num_epochs=2, lr=1.0, max_grad_norm=1e-9)
    assert logged(result, "learning_rate") == [1.0, 0.75, 0.5, 0.25]


# What it prints


def test_samples_are_generated_every_n_optimizer_steps(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    real, calls = callbacks.generate_text, []

    def spy(*args: Any, **kwargs: Any) -> Any:
        calls.append(args[2])
        return real(*args, **kwargs)

    monkeypatch.setattr(callbacks, "generate_text", spy)
    run(
        recursive(), train_blocks=blocks(24), batch_size=1, grad_accum_steps=4, generate_every=2, console=True,
        generation_prompt="The old ship",
    )  # fmt: skip
    out = capsys.readouterr().out
    assert calls == ["The old ship"] * 3
    assert re.findall(r"Step (\d+) - Generating sample:\nPrompt: The old ship\nOutput: The old ship.", out) == ["2", "4", "6"]


def test_sampling_does_not_change_the_run() -> None:
    quiet, loud = recursive(), recursive()
    run(quiet), run(loud, generate_every=1, console=True)
    assert all(torch.equal(a, b) for a, b in zip(quiet.parameters(), loud.parameters(), strict=True))


def test_console_output_of_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    """Summaries in the shape of the guide on stdout, the bar on stderr, nothing else anywhere."""
    result = run(recursive(), num_epochs=2, console=True)
    captured = capsys.readouterr()
    losses = zip(logged(result, "train_loss"), logged(result, "eval_loss"), strict=True)
    assert captured.out == "".join(
        f"\nEpoch {epoch} Summary:\n  Train Loss: {train:.4f}\n  Val Loss: {held:.4f}\n  Perplexity: {math.exp(held):.2f}\n"
        for epoch, (train, held) in enumerate(losses, start=1)
    )
    last = logged(result, "loss")[-1]
    speed = r"[\d,]+ tok/s, \d+\.\d G"  # where nobody watches, older versions of tqdm cut the line here
    assert re.search(rf"Training: 100%\|█+\| 4/4 \[\d\d:\d\d<\d\d:\d\d, loss={last:.4f}, lr=0.00025, {speed}", captured.err)
    assert "{" not in captured.err and "Epoch" not in captured.err


def test_console_false_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    run(recursive(), generate_every=1)
    captured = capsys.readouterr()
    assert captured.out == "" and "Training" not in captured.err


# From files to files


@pytest.fixture(scope="module")
def corner(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with init.pt (float32), init_bf16.pt, their tokenizers, and text.txt: 12 sequences of 32 tokens, 2 for validation."""
    folder = tmp_path_factory.mktemp("training")
    tiny_donor("qwen2", folder / "donor", num_hidden_layers=3)
    torch.manual_seed(0)
    model = convert(str(folder / "donor"), L_layers=1, keep_donor=True, H_cycles=2, L_cycles=1, gain=0.2)
    for name, dtype in (("init.pt", torch.float32), ("init_bf16.pt", torch.bfloat16)):
        checkpoint.save(folder / name, model, make_tiny_tokenizer(), notes={"donor": "tiny"}, dtype=dtype)
    tokenizer: Any = make_tiny_tokenizer()
    for name, seed, sequences in (("train", 5, 12), ("validation", 6, 2)):
        text = tokenizer.decode(tokenizer(" ".join(sentences(seed, 50))).input_ids[: 32 * sequences])
        (folder / "text").mkdir(exist_ok=True)
        (folder / "text" / f"{name}.txt").write_text(text)
    return folder


@pytest.fixture
def files(corner: Path, tmp_path: Path) -> TrainSettings:
    """Settings of a run over the corner: 3 steps per epoch, 6 in all."""
    return settings(
        checkpoint=str(corner / "init.pt"), dataset_name=str(corner / "text"), seq_len=32, num_epochs=2, output_dir=str(tmp_path / "out"),
        enable_deep_supervision=True, keep_last=0,
    )  # fmt: skip


def load(path: Path) -> Any:
    return checkpoint.load(path).model


def test_train_writes_the_files_of_the_guide(files: TrainSettings, capsys: pytest.CaptureFixture[str]) -> None:
    result = train(replace(files, save_every=2, generate_every=4, log_every=4))
    out = Path(files.output_dir)
    names = [f"checkpoint_step_{n}{end}" for n in (2, 4, 6) for end in (".pt", "_tokenizer")] + [BEST, BEST.replace(".pt", "_tokenizer")]
    states = ["checkpoint_step_4_state", "checkpoint_step_6_state"]  # of the two newest only
    assert sorted(p.name for p in out.iterdir()) == sorted([*names, *states, "metrics.jsonl", LOCK])
    assert all((out / name / "tokenizer.json").is_file() for name in names if name.endswith("_tokenizer"))

    captured = capsys.readouterr()
    held = logged(result.fit, "eval_loss")
    assert held[1] < held[0] and captured.out.count(f"  ✓ New best model saved: {out / BEST}\n") == 2
    assert captured.out.count("Generating sample") == 1
    assert "12 training and 2 validation sequences of 32 tokens: 6 steps" in captured.err
    assert [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()] == result.fit.history
    assert [entry["step"] for entry in result.fit.history if "loss" in entry] == [1, 2, 3, 4, 6]

    best: Any = checkpoint.load(out / BEST)
    assert result.best == out / BEST and best.notes["donor"] == "tiny" and best.notes["training"]["eval_loss"] == held[1]
    assert best.model.lm_head.weight is best.model.model.embed_tokens.weight and best.model.config.use_cache
    assert all(torch.equal(a, b) for a, b in zip(best.model.parameters(), load(out / "checkpoint_step_6.pt").parameters(), strict=True))
    told = best.notes["training"]
    assert (told["step"], told["tokens"], told["dataset_name"], told["lr"]) == (6, result.fit.tokens, files.dataset_name, files.lr)
    assert told["eval_loss_cycles"][-1] == told["eval_loss"] and len(told["eval_loss_cycles"]) == 2 and "distill_weight" not in told
    early, later = (checkpoint.load(out / f"checkpoint_step_{step}.pt").notes["training"] for step in (2, 4))
    assert "eval_loss" not in early and (later["step"], later["eval_step"], later["eval_loss"]) == (4, 3, held[0])
    prompt = best.tokenizer("The old ship", return_tensors="pt").input_ids
    assert best.model.generate(prompt, max_new_tokens=3, do_sample=False).shape[1] > prompt.shape[1]


def test_best_checkpoint_has_the_lowest_validation_loss(
    files: TrainSettings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    luck, own = iter([1.0, 0.5, 2.0, math.nan]), LossModule.row_sums
    monkeypatch.setattr(LossModule, "row_sums", lambda *args, **kwargs: own(*args, **kwargs) * next(luck))
    result = train(replace(files, num_epochs=4, save_every=0))
    held = logged(result.fit, "eval_loss")
    assert held.index(min(held[:3])) == 1 and math.isnan(held[3]) and result.fit.best_eval_loss == held[1]
    assert re.findall(r"Epoch (\d) Summary:(?:\n  \w.*)+\n  ✓ New best", capsys.readouterr().out) == ["1", "2"]
    notes = checkpoint.load(Path(files.output_dir) / BEST).notes["training"]
    assert notes.items() >= {"epoch": 2.0, "eval_loss": held[1]}.items()


def test_checkpoints_keep_the_dtype_of_the_donor(files: TrainSettings, corner: Path) -> None:
    train(replace(files, checkpoint=str(corner / "init_bf16.pt"), save_every=4))
    out = Path(files.output_dir)
    assert load(out / BEST).dtype == load(out / "checkpoint_step_4.pt").dtype == torch.bfloat16
    masters = torch.load(out / "checkpoint_step_4_state" / "float32_weights.pt", weights_only=True)
    assert {tensor.dtype for tensor in masters.values()} == {torch.float32}


def test_full_disk_during_save_leaves_no_partial_checkpoint(files: TrainSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Any, folder: str) -> None:
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")

    monkeypatch.setattr(TrainerState, "save_to_json", full)
    with pytest.raises(UserError, match="the disk is full"):
        train(replace(files, save_every=2, output_dir=str(tmp_path / "run")))
    assert not list((tmp_path / "run").glob("checkpoint_step*"))


def test_invalid_run_creates_no_folder(files: TrainSettings, tmp_path: Path) -> None:
    data = tmp_path / "d.jsonl"
    data.write_text('{"text": "a"}\n')
    with pytest.raises(UserError, match="nope"):
        train(replace(files, dataset_name=str(data), text_column="nope", output_dir=str(tmp_path / "never" / "made")))
    assert not (tmp_path / "never").exists()


def test_resume_skips_a_truncated_checkpoint(files: TrainSettings, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = replace(files, save_every=2, max_steps=4, output_dir=str(tmp_path / "run"))
    train(run)
    newest = tmp_path / "run" / "checkpoint_step_4.pt"
    newest.write_bytes(newest.read_bytes()[:-500])
    capsys.readouterr()
    train(replace(run, max_steps=6, resume=True))
    assert f"Resuming from {tmp_path / 'run' / 'checkpoint_step_2.pt'}" in capsys.readouterr().err


def test_short_runs_warm_up_for_a_tenth_of_their_steps(files: TrainSettings, capsys: pytest.CaptureFixture[str]) -> None:
    result = train(replace(files, num_epochs=4, warmup_steps=100, save_every=0))
    assert "100 (--warmup_steps) exceed half of the" in capsys.readouterr().err
    assert logged(result.fit, "learning_rate")[:2] == pytest.approx([0.5e-3, 1e-3])


class Killed(Exception):
    """Stands for a process that is gone."""


def at_the_sample(do: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    def sample(*args: Any, **kwargs: Any) -> Any:
        do()
        return SimpleNamespace(text="")

    monkeypatch.setattr(callbacks, "generate_text", sample)


def kill() -> None:
    raise Killed


def same_run(found: FitResult, expected: FitResult) -> bool:
    machine = ("seconds", "tokens_per_second", "memory")
    without = [[{k: v for k, v in entry.items() if k not in machine} for entry in result.history] for result in (found, expected)]
    return without[0] == without[1] and (found.steps, found.tokens) == (expected.steps, expected.tokens)


# save_every, step of the kill: within an epoch; at the end of one, before its validation is repeated; in the second one
@pytest.mark.parametrize(("save_every", "killed_at", "name"), [(2, 2, "init"), (3, 4, "init"), (4, 5, "init_bf16")])
def test_resumed_equals_uninterrupted(
    save_every: int, killed_at: int, name: str, files: TrainSettings, corner: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Bit for bit, logs included."""
    files = replace(files, checkpoint=str(corner / f"{name}.pt"), save_every=save_every, grad_accum_steps=1)
    whole = train(files)
    cut = replace(files, output_dir=str(tmp_path / "cut"))
    with monkeypatch.context() as patch:
        at_the_sample(kill, patch)
        with pytest.raises(Killed):
            train(replace(cut, generate_every=killed_at + (killed_at == save_every)))
    saved = resume_points(Path(cut.output_dir))
    assert [path.name for path in saved] == [f"checkpoint_step_{save_every}.pt"]
    resumed = train(replace(cut, resume=True))
    assert f"Resuming from {saved[0]}" in capsys.readouterr().err
    assert same_run(resumed.fit, whole.fit)
    assert [json.loads(line) for line in (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()] == resumed.fit.history
    for file in (BEST, f"checkpoint_step_{6 // save_every * save_every}.pt"):
        one, other = load(Path(files.output_dir) / file), load(Path(cut.output_dir) / file)
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_ctrl_c_saves_a_checkpoint_and_prints_the_resume_command(
    files: TrainSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = train(replace(files, save_every=0))
    cut, handler = replace(files, output_dir=str(tmp_path / "cut"), save_every=0), signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        at_the_sample(lambda: os.kill(os.getpid(), signal.SIGINT), patch)
        stopped = train(replace(cut, generate_every=2))
    assert stopped.fit.interrupted and stopped.fit.steps == 2 and stopped.best is None and stopped.fit.eval_loss is None
    assert signal.getsignal(signal.SIGINT) is handler
    err = capsys.readouterr().err
    assert (
        "Stopping after this step" in err and "Interrupted and saved at step 2; the same command with --resume continues from there" in err
    )
    resumed = train(replace(cut, resume=True))
    assert not resumed.fit.interrupted and same_run(resumed.fit, whole.fit)


def test_resume_requires_equal_settings(files: TrainSettings, corner: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The newest whole checkpoint by when it was written; a half-written one and one of an earlier, longer run are passed over."""
    short = replace(files, num_epochs=1, save_every=2)
    result = train(replace(short, resume=True))
    assert "no checkpoint_step_N.pt with its _state folder" in capsys.readouterr().err and result.fit.steps == 3
    out = Path(files.output_dir)
    shutil.copy(out / "checkpoint_step_2.pt", out / "checkpoint_step_9.pt")
    old = json.loads((out / "checkpoint_step_2_state" / "run.json").read_text())
    shutil.copytree(out / "checkpoint_step_2_state", out / "checkpoint_step_7_state")
    shutil.copy(out / "checkpoint_step_2.pt", out / "checkpoint_step_7.pt")
    (out / "checkpoint_step_7_state" / "run.json").write_text(json.dumps({**old, "saved_at": old["saved_at"] - 60}))
    assert [path.name for path in resume_points(out)] == ["checkpoint_step_2.pt", "checkpoint_step_7.pt"]
    with pytest.raises(UserError, match=r"step_2.pt comes from another run: --batch_size was 4, is 2; give the same flags"):
        train(replace(short, resume=True, batch_size=2))
    done = train(replace(short, resume=True, max_steps=2))
    assert "is already the end of this run" in capsys.readouterr().err and done.fit.steps == 2


# What a run can do besides


def evaluations(result: FitResult) -> list[int]:
    return [entry["step"] for entry in result.history if "eval_loss" in entry]


def test_validation_every_so_many_steps(capsys: pytest.CaptureFixture[str]) -> None:
    """At the end of an epoch one, not two; each with the training loss since the one before."""
    result = run(recursive(), train_blocks=blocks(20), num_epochs=2, eval_every=2, console=True)
    assert evaluations(result) == [2, 4, 5, 6, 8, 10]
    steps = logged(result, "loss_cycle_3")
    assert logged(result, "train_loss") == pytest.approx(
        [sum(steps[a:b]) / (b - a) for a, b in ((0, 2), (2, 4), (4, 5), (5, 6), (6, 8), (8, 10))], rel=1e-6
    )
    out = capsys.readouterr().out
    assert re.findall(r"(\w+ \d+) Summary", out) == ["Step 2", "Step 4", "Epoch 1", "Step 6", "Step 8", "Epoch 2"]


def test_validation_does_not_change_the_run() -> None:
    often, seldom = recursive(), recursive()
    run(often, eval_every=1, num_epochs=2), run(seldom, num_epochs=2)
    assert all(torch.equal(a, b) for a, b in zip(often.parameters(), seldom.parameters(), strict=True))


def test_early_stopping(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Two validations in a row without a lower loss; one that is not a number is none."""
    luck, own = iter([1.0, 0.5, math.nan, 0.4, 2.0, 2.0, 0.1]), LossModule.row_sums
    monkeypatch.setattr(LossModule, "row_sums", lambda *args, **kwargs: own(*args, **kwargs) * next(luck))
    result = run(recursive(), num_epochs=5, eval_every=1, early_stopping_patience=2, eval_batch_size=8)
    assert evaluations(result) == [1, 2, 3, 4, 5, 6] and result.steps == 6
    assert "has not improved for 2 validations: stopping" in capsys.readouterr().err


def test_two_step_checkpoints_are_kept_by_default(files: TrainSettings) -> None:
    train(replace(files, save_every=1, keep_last=TrainSettings.keep_last))
    steps = [f"checkpoint_step_{step}.pt" for step in (5, 6)]
    assert sorted(path.name for path in Path(files.output_dir).glob("checkpoint_step_*.pt")) == steps


def test_averaged_weights_are_validated_and_saved(files: TrainSettings, tmp_path: Path) -> None:
    """Against the average kept by hand; the run itself goes on with its own weights, so it learns as without."""
    plain = train(replace(files, output_dir=str(tmp_path / "plain"), save_every=1))
    averaged = train(replace(files, ema_decay=0.5, save_every=1))
    assert logged(averaged.fit, "loss") == logged(plain.fit, "loss")
    shadow = weights_of(load(Path(files.checkpoint)))
    with torch.no_grad():
        held = load(Path(files.checkpoint))
        for n in range(6):
            decay = min(0.5, (1 + n) / (10 + n))
            now = load(tmp_path / "plain" / f"checkpoint_step_{n + 1}.pt").state_dict()
            shadow = {name: decay * value + (1 - decay) * now[name] for name, value in shadow.items()}
            saved = load(Path(files.output_dir) / f"checkpoint_step_{n + 1}.pt").state_dict()
            for name, value in shadow.items():
                torch.testing.assert_close(saved[name], value, rtol=1e-4, atol=1e-6)
        held.load_state_dict(shadow)
    expected = fit(
        held, make_tiny_tokenizer(), held_out(files), held_out(files), replace(files, lr=1e-12, gain_lr=1e-12, max_steps=1), console=False
    )
    assert averaged.fit.eval_loss == pytest.approx(expected.eval_loss, rel=1e-4)
    assert averaged.fit.eval_loss != plain.fit.eval_loss


def held_out(files: TrainSettings) -> list[dict[str, Any]]:
    ids = make_tiny_tokenizer()(Path(files.dataset_name, "validation.txt").read_text()).input_ids
    return [{"input_ids": ids[i : i + 32]} for i in (0, 32)]


def test_depth_is_drawn_and_logged() -> None:
    """Only the cycles that were trained are logged; validation goes to the deepest of all."""
    changes: dict[str, Any] = {"cycle_choices": (1, 2, 4), "enable_deep_supervision": True, "depth_curriculum": 0.5}
    model = recursive()
    result = run(model, train_blocks=blocks(40), **changes)
    drawn = [max(int(name[-1]) for name in entry if name.startswith("loss_cycle_")) for entry in result.history if "loss" in entry]
    assert drawn[0] == 1 and set(drawn) == {1, 2, 4}
    assert {name for name in result.history[-1] if name.startswith("eval_loss_cycle")} == {f"eval_loss_cycle_{i}" for i in range(1, 5)}
    assert result.eval_loss == result.history[-1]["eval_loss_cycle_3"]  # the depth that the checkpoint is read at
    # every application of every step is counted
    costs = [pass_flops(model.config, settings(**changes), 4 * SEQ_LEN, H) for H in drawn]
    assert result.history[-1]["flops"] == pytest.approx(sum(costs), rel=1e-6) and len(set(costs)) == 3


def test_logged_losses_are_those_of_the_checkpoint(files: TrainSettings) -> None:
    """Recomputed from the file that was saved before the step."""
    result = train(replace(files, save_every=1, grad_accum_steps=3, backprop="cycle"))
    tokenizer: Any = make_tiny_tokenizer()
    ids = tokenizer(Path(files.dataset_name, "train.txt").read_text()).input_ids
    rows = torch.tensor([ids[i : i + 32] for i in range(0, 12 * 32, 32)])  # one optimizer step sees them all
    model = load(Path(files.output_dir) / "checkpoint_step_1.pt")
    with torch.no_grad():
        expected = [model(rows, labels=rows, H_cycles=H).loss.item() for H in (1, 2)]
    entry = result.fit.history[[entry["step"] for entry in result.fit.history].index(2)]
    assert [entry["loss_cycle_1"], entry["loss_cycle_2"]] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("backprop", ["full", "cycle", "last"])
def test_packed_documents_equal_single_documents(backprop: str) -> None:
    """Packed and kept apart, against each document in a row of its own, with padding that does not count."""
    tokenizer: Any = make_tiny_tokenizer()
    eos = tokenizer.eos_token_id
    texts = [[*tokenizer(text).input_ids[:n], eos] for text, n in zip(sentences(3, 2), (5, 9), strict=True)]
    packed = torch.tensor([texts[0] + texts[1]])
    alone = torch.full((2, 10), eos)
    labels = torch.full((2, 10), -100)
    for i, ids in enumerate(texts):
        alone[i, : len(ids)] = labels[i, : len(ids)] = torch.tensor(ids)
    supervision = Supervision(every_cycle=backprop != "last", schedule="constant", backprop=backprop)
    gradients = []
    for one in (True, False):
        model = recursive()
        freeze_rest(model, settings(backprop=backprop, enable_deep_supervision=backprop != "last"))
        batch = Collate(eos)([{"input_ids": packed[0]}]) if one else {"input_ids": alone, "labels": labels}
        outputs = LossModule(model, supervision)(**batch)
        outputs["loss"].backward()
        gradients.append((outputs["cycle_losses"], {name: p.grad for name, p in model.named_parameters() if p.requires_grad}))
    torch.testing.assert_close(gradients[0][0], gradients[1][0], rtol=1e-5, atol=1e-6)
    for name, expected in gradients[1][1].items():
        torch.testing.assert_close(gradients[0][1][name], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("backprop", "graphs"), [("full", 2), ("cycle", 2), ("last", 3)])
def test_further_depths_compile_nothing_further(backprop: str, graphs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run at three depths, validated at a fourth, compiles what a run at one depth does: the layer, in training and in validation, and
    with the last cycle alone once more, for those before, without gradients."""
    compiled, own = [], torch.nn.Module.compile

    def counted(graph: Any, inputs: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: own(self, backend=counted, dynamic=False))
    common: dict[str, Any] = {"enable_deep_supervision": backprop != "last", "backprop": backprop, "batch_size": 5, "compile": True}
    found: dict[tuple[int, ...], int] = {}
    for depths in ((2,), (1, 2, 3)):
        torch._dynamo.reset()
        compiled.clear()
        result = run(recursive(H_cycles=4), train_blocks=blocks(30), cycle_choices=depths, log_every=1, **common)
        assert {DepthSchedule(depths, [1.0] * len(depths), seed=42).at(step) for step in range(6)} == set(depths)
        assert "eval_loss_cycle_4" in result.history[-1]
        found[depths] = len(compiled)
    assert found == {(2,): graphs, (1, 2, 3): graphs}


@pytest.mark.parametrize("backprop", ["full", "cycle"])
def test_the_layers_are_compiled_once(backprop: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """For all applications and depths of a run, with the same result; samples and later use are not compiled."""
    graphs, own = [], torch.nn.Module.compile

    def counted(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: own(self, backend=counted, dynamic=False))
    plain, compiled = recursive(), recursive()
    common: dict[str, Any] = {"cycle_choices": (1, 2, 3), "enable_deep_supervision": True, "num_epochs": 3, "eval_batch_size": 4}
    common["backprop"] = backprop
    expected = run(plain, train_blocks=blocks(16), **common)
    found = run(compiled, train_blocks=blocks(16), compile=True, generate_every=4, console=True, **common)
    assert logged(found, "loss") == pytest.approx(logged(expected, "loss"), rel=1e-4)
    assert 1 <= len(graphs) <= 4  # training, validation, and its last batch, which is smaller; not one for each of 3 x 12 applications
    assert all(layer._compiled_call_impl is None for layer in compiled.model.layers)


def test_distillation_keeps_the_model_close_to_the_donor(files: TrainSettings, corner: Path) -> None:
    """A run from the donor itself, at a rate that takes it away: the divergence that is logged stays smaller with the term than without."""
    common = replace(files, lr=3e-3, num_epochs=4, start_gain=0.1, teacher=str(corner / "donor"))
    weak, strong = (train(replace(common, distill_weight=weight)) for weight in (1e-6, 10.0))
    assert logged(strong.fit, "loss_distill")[0] == pytest.approx(logged(weak.fit, "loss_distill")[0], rel=1e-4)
    assert logged(strong.fit, "loss_distill")[-1] < 0.5 * logged(weak.fit, "loss_distill")[-1]


def test_default_teacher_is_the_donor_of_the_checkpoint(files: TrainSettings, corner: Path, tmp_path: Path) -> None:
    found, path = checkpoint.load(files.checkpoint), tmp_path / "named.pt"
    short = replace(files, checkpoint=str(path), distill_weight=1.0, max_steps=1, save_every=0, lr=1e-12, gain_lr=1e-12)
    checkpoint.save(path, found.model, found.tokenizer, notes={})
    with pytest.raises(UserError, match=r"--distill_weight: .*named.pt does not say which donor it comes from; name one with --teacher"):
        train(short)
    checkpoint.save(path, found.model, found.tokenizer, notes={"donor": str(corner / "donor")})
    named = train(short)
    assert logged(named.fit, "loss_distill") == logged(train(replace(short, teacher=str(corner / "donor"))).fit, "loss_distill")
    # the folder of a relative name is the recorded one, wherever the run starts
    checkpoint.save(path, found.model, found.tokenizer, notes={"donor": "x/donor", "donor_folder": str(corner / "donor")})
    assert logged(train(short).fit, "loss_distill") == logged(named.fit, "loss_distill")
    checkpoint.save(path, found.model, found.tokenizer, notes={"donor": "x/donor", "donor_folder": "/nowhere/donor"})
    with pytest.raises(UserError, match=r"converted from the folder /nowhere/donor, which is not there; name it with --teacher"):
        train(short)


def test_a_teacher_of_another_vocabulary(files: TrainSettings, tmp_path: Path) -> None:
    for words in (tiny.VOCAB_SIZE + 8, tiny.VOCAB_SIZE - 8):
        tiny_donor("qwen2", tmp_path / str(words), num_hidden_layers=1, vocab_size=words)
        with pytest.raises(UserError, match=rf"--teacher: .* {words} entries, the model {tiny.VOCAB_SIZE}"):
            train(replace(files, distill_weight=1.0, teacher=str(tmp_path / str(words))))


def test_trackers(files: TrainSettings, tmp_path: Path) -> None:
    """TensorBoard gets what metrics.jsonl gets."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    result = train(replace(files, report_to=("tensorboard",)))
    events = accumulator.EventAccumulator(str(Path(files.output_dir) / "tensorboard"))
    events.Reload()
    found = [event.value for event in events.Scalars("train/loss_cycle_1")]
    assert found == pytest.approx(logged(result.fit, "loss_cycle_1"), rel=1e-5)
    assert [event.value for event in events.Scalars("eval/loss_cycle_2")] == pytest.approx(logged(result.fit, "eval_loss_cycle_2"))


def test_unknown_trackers(files: TrainSettings) -> None:
    with pytest.raises(UserError, match=r"--report_to: expected one of .*tensorboard.*, got 'tensorbored'"):
        train(replace(files, report_to=("tensorbored",)))
    with pytest.raises(UserError, match=r"--report_to clearml: cannot be used: .*clearml"):
        train(replace(files, report_to=("clearml",)))


def gains_of(path: str, gain: float) -> None:
    """Set the gains of a checkpoint on disk."""
    found = checkpoint.load(path)
    set_gains(found.model, gain)
    checkpoint.save(path, found.model, found.tokenizer, found.plan)


def test_dry_run_prints_the_estimated_cost(files: TrainSettings, capsys: pytest.CaptureFixture[str]) -> None:
    result = train(replace(files, dry_run=True))
    out = capsys.readouterr().out
    assert result.fit is None and not Path(files.output_dir).exists()
    assert re.search(rf"steps +6\ntokens +{6 * 4 * 32}\nFLOPs +\S+e\+\d\d", out) and "optimizer" in out
    gains_of(files.checkpoint, 0.0)
    train(replace(files, dry_run=True))
    assert "before the first step, the start gain is chosen on" in capsys.readouterr().out
    train(replace(files, dry_run=True, start_gain=0.1))
    assert "start gain" not in capsys.readouterr().out


def test_token_budgets(files: TrainSettings) -> None:
    """Rounded up to whole steps of 4 x 32 tokens."""
    assert train(replace(files, max_tokens=4 * 32 * 2 + 1, save_every=0)).fit.tokens == 4 * 32 * 3


def test_mixed_and_streamed_text(files: TrainSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """A stream of two datasets trains, and goes on where it was as if it had never stopped."""
    other = tmp_path / "other"
    other.mkdir()
    for name in ("train", "validation"):
        (other / f"{name}.txt").write_text("The old ship sailed. " * 200)
    common = replace(files, mix=(f"{other}=1.5",), streaming=True, max_steps=5, save_every=2)
    with pytest.raises(UserError, match="--streaming: the length of a stream is unknown; .* --max_steps or --max_tokens"):
        train(replace(common, max_steps=None))
    whole = train(common)
    assert "\nStep 5 Summary:\n" in capsys.readouterr().out
    cut = replace(common, output_dir=str(tmp_path / "cut"))
    with monkeypatch.context() as patch:
        at_the_sample(kill, patch)
        with pytest.raises(Killed):
            train(replace(cut, generate_every=3))
    assert same_run(train(replace(cut, resume=True)).fit, whole.fit)
    assert whole.fit.steps == 5 and evaluations(whole.fit) == [5]
    mixed = train(replace(files, mix=(f"{other}=1.5",), output_dir=str(tmp_path / "mixed"), save_every=0))
    assert mixed.fit.tokens == 2 * (12 + 18) * 32


# That flags act


class Watch(TrainerCallback):
    """What a run is made of, and what it was before and after each step of its optimizer."""

    def __init__(self, model: Any):
        self.model = model
        self.optimizer: Any = None
        self.checkpointed = False
        self.rates, self.norms, self.weights = list[list[float]](), list[float](), list[dict[str, torch.Tensor]]()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.optimizer, self.checkpointed = kwargs["optimizer"], self.model.is_gradient_checkpointing

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        gradients = [p.grad.flatten() for p in self.model.parameters() if p.grad is not None]
        self.norms.append(torch.cat(gradients).norm().item())
        self.rates.append([float(group["lr"]) for group in self.optimizer.param_groups])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.weights.append(weights_of(self.model))


def watched(model: Any, **changes: Any) -> tuple[FitResult, Watch]:
    watch = Watch(model)
    return run(model, callbacks=[watch], **changes), watch


@pytest.mark.parametrize("bound", [0.0, 0.1, 1e6])
def test_gradients_are_clipped_to_max_grad_norm(bound: float) -> None:
    """What is logged is the norm that they had; 0 is no bound."""
    result, watch = watched(recursive(), max_grad_norm=bound)
    before = logged(result, "grad_norm")
    assert min(before) > 0.5
    assert watch.norms == pytest.approx([bound] * 2 if bound == 0.1 else before, rel=1e-3)


@pytest.mark.parametrize(
    ("flags", "factors"),
    [
        ({"lr_schedule": "wsd", "decay_share": 0.5}, [1 / 3, 2 / 3, 1, 1, 1, 0.75, 0.5, 0.25]),
        ({"lr_schedule": "wsd"}, [1 / 3, 2 / 3, 1, 1, 1, 1, 1, 1 / 1.6]),
        ({"lr_schedule": "cosine"}, [1 / 3, 2 / 3, *((1 + math.cos(math.pi * i / 6)) / 2 for i in range(6))]),
        ({}, [1 / 3, 2 / 3, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]),
    ],
)
def test_learning_rates_follow_lr_schedule(flags: dict[str, Any], factors: list[float]) -> None:
    """Those of the gains, too, in their proportion."""
    result, watch = watched(recursive(), batch_size=1, warmup_steps=2, lr=2e-3, gain_lr=5e-3, **flags)
    assert logged(result, "learning_rate") == pytest.approx([2e-3 * factor for factor in factors])
    for rates, factor in zip(watch.rates, factors, strict=True):
        assert rates == pytest.approx([2e-3 * factor, 2e-3 * factor, 5e-3 * factor])


@pytest.mark.parametrize("name", ["adamw", "muon", "adamw_8bit"])
def test_each_optimizer_completes_a_run(name: str) -> None:
    """That optimizer, with the rates and the decay of the flags; and the loss falls."""
    kinds = {"adamw": "AdamW", "muon": "MuonAdamW", "adamw_8bit": "AdamW8bit"}
    torch.compiler.set_stance("force_eager")  # torchao's step takes a quarter of a minute for each shape of parameter to compile
    try:
        result, watch = watched(recursive(), optimizer=name, lr=4e-3, gain_lr=0.02, weight_decay=0.3, num_epochs=2)
    finally:
        torch.compiler.set_stance("default")
    assert type(watch.optimizer.optimizer).__name__ == kinds[name]
    groups = [(float(group["initial_lr"]), group["weight_decay"]) for group in watch.optimizer.param_groups]
    matrices = [(4e-3, 0.3)] * (2 if name == "muon" else 1)
    assert groups == [pytest.approx(group) for group in (*matrices, (4e-3, 0.0), (0.02, 0.0))]
    assert logged(result, "loss")[-1] < logged(result, "loss")[0] - 0.2 and result.eval_loss == result.best_eval_loss


def test_ema_decay_is_used(tmp_path: Path) -> None:
    """A decay that the second step reaches; the best model that is kept is the average that was validated."""
    model, reference = recursive(), recursive()
    average = {name: tensor for name, tensor in weights_of(model).items() if tensor.is_floating_point()}
    saver = Saver(tmp_path, make_tiny_tokenizer(), torch.float32)
    result, watch = watched(model, batch_size=2, ema_decay=0.12, lr=1e-2, saver=saver)
    for decay, weights in zip((0.1, 0.12, 0.12, 0.12), watch.weights, strict=True):
        average = {name: decay * mean + (1 - decay) * weights[name] for name, mean in average.items()}
    reference.load_state_dict(average)
    held = torch.tensor([row["input_ids"] for row in blocks(5, seed=2)])
    with torch.no_grad():
        expected, own = (each(held, labels=held).loss.item() for each in (reference, model))
    assert result.eval_loss == pytest.approx(expected, rel=1e-6) and result.eval_loss != pytest.approx(own, rel=1e-5)
    kept = load(tmp_path / BEST)
    for name, tensor in kept.state_dict().items():
        torch.testing.assert_close(tensor, average[name], rtol=1e-5, atol=1e-7)
    assert all(torch.equal(tensor, watch.weights[-1][name]) for name, tensor in model.state_dict().items())


def test_depths_of_a_run() -> None:
    """Every step is trained at the depth that the schedule has for it, shallower than the model is read at; the training loss is that of
    the last cycle of each step."""
    changes: dict[str, Any] = {"cycle_choices": (1, 2), "cycle_weights": (1.0, 2.0), "depth_curriculum": 0.5, "seed": 7}
    result = run(recursive(), train_blocks=blocks(12), batch_size=1, enable_deep_supervision=True, **changes)
    steps = [entry for entry in result.history if "loss" in entry]
    drawn = [2 if "loss_cycle_2" in entry else 1 for entry in steps]
    schedule = DepthSchedule((1, 2), (1.0, 2.0), curriculum_steps=6, seed=7)
    assert depth_schedule(recursive().config, settings(**changes), 12) == schedule
    assert drawn == [schedule.at(step) for step in range(12)] != [schedule.at(step + 1) for step in range(12)]
    expected = [entry[f"loss_cycle_{depth}"] for entry, depth in zip(steps, drawn, strict=True)]
    assert logged(result, "train_loss") == [pytest.approx(sum(expected) / 12, rel=1e-5)]
    last = result.history[-1]
    assert result.eval_loss == last["eval_loss_cycle_3"] and "eval_loss_cycle_4" not in last


def test_depth_schedules_by_default() -> None:
    assert depth_schedule(recursive().config, settings(), 12) == DepthSchedule((3,), (1.0,), curriculum_steps=0, seed=42)
    assert depth_schedule(recursive().config, settings(cycle_choices=(1, 4)), 12) == DepthSchedule(
        (1, 4), (1.0, 1.0), curriculum_steps=0, seed=42
    )
    assert depth_schedule(tiny_config("qwen2"), settings(), 12) is None


def test_validation_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    """In bfloat16 where the run computes in it, in evaluation mode; and what the steps before it lost is logged with it."""
    modes, own = [], LossModule.row_sums

    def spy(self: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        modes.append(self.training)
        return own(self, *args, **kwargs)

    monkeypatch.setattr(LossModule, "row_sums", spy)
    model = recursive()
    result = run(model, train_blocks=blocks(20), bf16=True, lr=1e-12, gain_lr=1e-12, log_every=100, eval_every=2)
    assert modes and not any(modes)
    held = torch.tensor([row["input_ids"] for row in blocks(5, seed=2)])
    with torch.autocast("cpu", torch.bfloat16):
        rounded = own(LossModule(model), held, held)[:, 2].sum().item() / 75
    assert result.eval_loss == pytest.approx(rounded, rel=1e-5)
    assert result.eval_loss != pytest.approx(own(LossModule(model), held, held)[:, 2].sum().item() / 75, rel=1e-5)
    assert [entry["step"] for entry in result.history if "loss" in entry] == [1, 2, 4, 5] and evaluations(result) == [2, 4, 5]


def test_separate_documents_masks_across_documents() -> None:
    rows = blocks(4)
    for row in rows:
        row["input_ids"] = [*row["input_ids"][:5], 0, *row["input_ids"][6:]]
    losses = {}
    for apart in (False, True):
        batch = Collate(0 if apart else None)(rows)
        losses[apart] = LossModule(recursive())(**batch)["loss"].item()
        result = run(recursive(), rows, separate_documents=apart, gradient_checkpointing=apart, max_steps=1)
        assert logged(result, "loss") == [pytest.approx(losses[apart], rel=1e-5)]
    assert losses[True] != pytest.approx(losses[False], rel=1e-3)


def test_gradient_checkpointing_flag_checkpoints_layers() -> None:
    assert [watched(recursive(), gradient_checkpointing=wanted, max_steps=1)[1].checkpointed for wanted in (False, True)] == [False, True]


def test_overflowing_gradient_norm_stops_before_the_optimizer_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its norm is infinite, though it is a number; and where nothing is saved, nothing is said of a file."""
    model, own = recursive(), LossModule.forward
    watch = Watch(model)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        outputs = own(self, *args, **kwargs)
        return outputs | ({"loss": outputs["loss"] * 1e30} if watch.weights else {})

    monkeypatch.setattr(LossModule, "forward", forward)
    with pytest.raises(
        UserError,
        match=r"^step 2: expected a finite gradient norm, got inf. The weights were not updated. Continue from the last checkpoint",
    ):
        run(model, callbacks=[watch], gradient_checkpointing=True)
    assert not model.training and not model.is_gradient_checkpointing
    assert all(torch.equal(tensor, watch.weights[0][name]) for name, tensor in model.state_dict().items())


def test_resumed_run_keeps_gains_and_elapsed_time(files: TrainSettings, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From the middle of another run's checkpoints: gains are not set anew, times and tokens are added to what there was. One that an
    earlier version wrote, which had fewer settings, will do."""
    common = replace(files, max_steps=4, save_every=2, start_gain=0.1, gain_lr=0.05)
    whole = train(common)
    out, cut = Path(common.output_dir), tmp_path / "cut"
    cut.mkdir()
    for path in out.glob("checkpoint_step_2*"):
        (shutil.copytree if path.is_dir() else shutil.copy)(path, cut / path.name)
    shutil.copy(out / BEST, cut / BEST)
    state, told = (cut / "checkpoint_step_2_state" / name for name in ("trainer_state.json", "run.json"))
    record, settings_then = json.loads(state.read_text()), json.loads(told.read_text())
    record["log_history"][-1]["seconds"] += 1000
    record["num_input_tokens_seen"] += 10**12
    state.write_text(json.dumps(record))
    del settings_then["settings"]["ema_decay"]
    told.write_text(json.dumps(settings_then))
    told.with_name("SHA256SUMS").unlink()  # as of an earlier version
    capsys.readouterr()
    resumed = train(replace(common, output_dir=str(cut), resume=True))
    assert "already exists" not in capsys.readouterr().err
    last, expected = load(cut / "checkpoint_step_4.pt"), load(out / "checkpoint_step_4.pt")
    assert all(torch.equal(a, b) for a, b in zip(last.parameters(), expected.parameters(), strict=True))
    assert logged(resumed.fit, "loss") == logged(whole.fit, "loss")
    assert resumed.fit.tokens == whole.fit.tokens + 10**12 and 1000 < resumed.fit.seconds < 2000
    assert max(logged(resumed.fit, "tokens_per_second")) < 10**9


def test_run_loads_its_data_once(files: TrainSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every setting of the text reaches its reader; and a tokenizer as large as the vocabulary fits."""

    class Read(Exception):
        pass

    def load_blocks(*args: Any, with_steps: bool) -> Any:
        raise Read(*args)

    monkeypatch.setattr("recursify.data.loading.load_blocks", load_blocks)
    tokenizer = make_tiny_tokenizer()
    tokenizer.add_tokens([f"<extra {i}>" for i in range(tiny.VOCAB_SIZE - len(tokenizer))])
    tokenizer.save_pretrained(tmp_path / "whole")
    changes: dict[str, Any] = {
        "dataset_name": "some", "dataset_config_name": "part", "text_column": "prose", "mix": ("other=0.5",), "streaming": True,
        "max_steps": 3, "seed": 11, "seq_len": 24, "tokenizer_path": str(tmp_path / "whole"),
    }  # fmt: skip
    with pytest.raises(Read) as read:
        train(replace(files, **changes))
    source, found, seq_len, seed = read.value.args
    wanted = DataSettings(dataset_name="some", dataset_config_name="part", text_column="prose", mix=("other=0.5",), streaming=True)
    assert {field.name: getattr(source, field.name) for field in fields(DataSettings)} == asdict(wanted)
    assert (len(found), seq_len, seed) == (tiny.VOCAB_SIZE, 24, 11)


def test_teacher_flag_overrides_the_donor_and_counts_in_the_cost(
    files: TrainSettings, corner: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found, path, opened, own = checkpoint.load(files.checkpoint), tmp_path / "named.pt", [], training_run.open_donor
    checkpoint.save(path, found.model, found.tokenizer, notes={"donor": str(corner / "donor")})
    tiny_donor("qwen2", tmp_path / "other", num_hidden_layers=2)

    def spy(name: str, **hub: Any) -> Any:
        opened.append(name)
        return own(name, **hub)

    monkeypatch.setattr(training_run, "open_donor", spy)
    flops = []
    for changes in ({}, {"distill_weight": 1.0}, {"distill_weight": 1.0, "teacher": str(tmp_path / "other")}):
        train(replace(files, checkpoint=str(path), dry_run=True, **changes))  # type: ignore[arg-type]
        said = re.search(r"FLOPs +(\S+e\+\d\d)", capsys.readouterr().out)
        assert said is not None
        flops.append(float(said[1]))
    assert opened == [str(corner / "donor"), str(tmp_path / "other")]
    assert flops[0] < flops[2] < flops[1]


def chosen(device: str, config: Any = None, **changes: Any) -> bool:
    found = choose_autocast(settings(**changes), config or tiny_config("qwen2"), torch.device(device)).bf16
    assert found is not None
    return found


def test_bf16_default_by_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the flag says so, and without it on GPUs that have it."""
    for has in (True, False):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda has=has: has)
        assert chosen("cuda") is has and not chosen("cuda", bf16=False)
    assert [chosen("cpu", bf16=flag) for flag in (None, True, False)] == [False, True, False]
    assert not chosen("mps")
    for device in ("mps", "cuda"):
        with pytest.raises(UserError, match=f"--bf16: {device} does not support bfloat16"):
            chosen(device, bf16=True)


def test_bf16_on_a_cpu_where_a_probe_finds_it_faster(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    probed: list[tuple[Any, ...]] = []
    seconds = {torch.float32: 1.6, torch.bfloat16: 1.0}

    def product(dtype: Any, *shape: int, rounds: int) -> float:
        probed.append(shape)
        return seconds[dtype]

    monkeypatch.setattr(training_arguments_module, "product_seconds", product)
    large = tiny_config("qwen2", hidden_size=512, intermediate_size=2048)
    with caplog.at_level("INFO", "recursify"):
        assert chosen("cpu", large, batch_size=4, seq_len=128) and set(probed) == {(512, 512, 2048)}
    assert "Training in bfloat16 autocast, which is faster on this CPU" in caplog.text
    seconds[torch.bfloat16] = 1.1  # not faster by enough
    assert not chosen("cpu", large, batch_size=4, seq_len=128)
    before = len(probed)
    assert not chosen("cpu", large, batch_size=1, seq_len=128) and len(probed) == before  # too small to matter
    assert not chosen("cpu", large, batch_size=4, seq_len=128, bf16=False) and len(probed) == before
    monkeypatch.setattr(training_arguments_module, "processes", lambda: 2)  # each would choose for itself
    assert not chosen("cpu", large, batch_size=4, seq_len=128) and len(probed) == before


def test_a_resumed_run_keeps_the_type_that_was_chosen(files: TrainSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_arguments_module, "_bf16_pays", lambda tokens, config: True)
    train(replace(files, max_steps=2, save_every=1))
    assert json.loads((Path(files.output_dir) / "checkpoint_step_2_state" / "run.json").read_text())["settings"]["bf16"] is True
    monkeypatch.setattr(training_arguments_module, "_bf16_pays", lambda tokens, config: pytest.fail("probed again"))
    train(replace(files, max_steps=3, save_every=1, resume=True))


@pytest.mark.parametrize("before", ["highest", "high"])
def test_tf32_is_on_inside_a_run_alone(before: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what was set before holds afterwards; without the flag nothing is changed."""
    seen: list[str] = []

    class Watch(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.append(torch.get_float32_matmul_precision())

    torch.set_float32_matmul_precision(before)
    try:
        run(recursive(), callbacks=[Watch()])
        monkeypatch.setattr(fitting, "check_tf32", lambda *args: None)  # as on a GPU that has it
        run(recursive(), callbacks=[Watch()], tf32=True)
        assert seen == [before] * 2 + ["high"] * 2 and torch.get_float32_matmul_precision() == before
    finally:
        torch.set_float32_matmul_precision("highest")


def test_tf32_is_refused_where_there_is_none(files: TrainSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    for there, device in ((True, "cpu"), (False, "cuda")):
        monkeypatch.setattr(training_arguments_module, "is_torch_tf32_available", lambda there=there: there)
        with pytest.raises(UserError, match=f"--tf32: expected an NVIDIA GPU .*, got {device}; leave the flag out"):
            check_tf32(settings(tf32=True), torch.device(device))
        check_tf32(settings(), torch.device(device))
    monkeypatch.setattr(training_arguments_module, "is_torch_tf32_available", lambda: True)
    check_tf32(settings(tf32=True), torch.device("cuda"))
    monkeypatch.setattr(training_run, "_starting_model", lambda *args: pytest.fail("a model was read first"))
    for call in (lambda: train(replace(files, tf32=True)), lambda: run(recursive(), tf32=True)):
        with pytest.raises(UserError, match="--tf32"):
            call()


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_batches_go_to_a_gpu_from_pinned_memory_while_it_works(device: str) -> None:
    arguments = training_arguments(settings(), torch.device(device), None)
    on_gpu = device == "cuda"
    assert (arguments.dataloader_pin_memory, arguments.accelerator_config.non_blocking) == (on_gpu, on_gpu)


def test_the_second_gpu_is_refused() -> None:
    with pytest.raises(UserError, match=r"--device: training uses the first visible GPU, got cuda:1; .*CUDA_VISIBLE_DEVICES=1"):
        training_arguments(settings(), torch.device("cuda:1"), None)


# The parts of a run


def test_checkpoint_notes_describe_the_run() -> None:
    """All that was set, in JSON types; the last validation, the cycles in their order."""
    flags: dict[str, Any] = {
        "dataset_name": "some", "dataset_config_name": "part", "mix": ("other=0.5",), "seq_len": 24, "separate_documents": True,
        "batch_size": 3, "grad_accum_steps": 5, "cycle_choices": (1, 2), "backprop": "cycle", "lr": 0.25, "gain_lr": 0.75,
        "lr_schedule": "wsd", "warmup_steps": 7, "optimizer": "muon", "weight_decay": 0.125, "ema_decay": 0.5,
        "enable_deep_supervision": True, "distill_weight": 1.5, "self_distill_weight": 2.5, "monotone_weight": 3.5, "halting_weight": 4.5,
    }  # fmt: skip
    state = TrainerState(epoch=1.5, global_step=9, num_input_tokens_seen=1234)
    notes = training_notes(settings(**flags, seed=5, output_dir="secret"), state)
    listed = {name: list(value) if isinstance(value, tuple) else value for name, value in flags.items()}
    assert notes == {"epoch": 1.5, "tokens": 1234, "processes": 1, "seed": 5} | listed
    one, two = ({"eval_loss": x, "eval_loss_cycle_1": x + 1, "eval_loss_cycle_2": x, "step": s} for x, s in ((3.0, 4), (2.0, 8)))
    state.log_history = [one, two, {"loss": 1.0, "step": 9}]
    measured = training_notes(settings(warmup_steps=0), state)
    assert (measured["eval_loss"], measured["eval_loss_cycles"], measured["eval_step"]) == (2.0, [3.0, 2.0], 8)
    assert not {"warmup_steps", "mix", "ema_decay", "gain_lr", "cycle_choices", "output_dir"} & set(measured)
    assert json.loads(json.dumps(notes)) == notes


def test_throughput_excludes_stopped_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(trainer.time, "perf_counter", lambda: now[0])
    clock = trainer.Throughput()
    clock.start(1000)
    now[0] = 102.0
    assert clock.rate(1500) == 250.0
    with pytest.raises(RuntimeError), clock.stopped():
        now[0] = 202.0
        raise RuntimeError
    now[0] = 206.0
    assert clock.rate(1700) == 50.0


def test_memory_is_in_bytes_on_every_system(monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux says it in KiB, macOS in bytes."""
    monkeypatch.setattr("resource.getrusage", lambda who: SimpleNamespace(ru_maxrss=3 * 2**20))
    found = {}
    for system in ("linux", "darwin"):
        monkeypatch.setattr(trainer.sys, "platform", system)
        found[system] = trainer.peak_memory(torch.device("cpu"))
    assert found == {"linux": 3 * 2**30, "darwin": 3 * 2**20}
    monkeypatch.setattr(trainer.sys, "platform", "linux")
    assert logged(run(recursive(), max_steps=1), "memory") == [3.0]


def test_samples_are_short_seeded_and_fit_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, seen = make_tiny_tokenizer(), []

    def spy(model: Any, tokenizer: Any, prompt: str, sampling: Any, seed: int | None = None) -> Any:
        seen.append((prompt, sampling.max_new_tokens, seed))
        return SimpleNamespace(text="")

    monkeypatch.setattr(callbacks, "generate_text", spy)
    prompt = "The old ship follows the river"
    length = len(tokenizer(prompt).input_ids)
    for positions, new in ((512, 50), (length + 51, 50), (length + 50, 50), (length + 49, 49), (length + 1, 1)):
        model = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=positions))
        sample = callbacks.Samples(model, tokenizer, settings(generate_every=3, generation_prompt=prompt, seed=9), nullcontext)
        for step in (1, 2, 3):
            sample.on_step_end(None, TrainerState(global_step=step), TrainerControl())
        assert seen.pop() == (prompt, new, 9) and not seen
    model.config.max_position_embeddings = length
    with pytest.raises(UserError, match=rf"--generation_prompt: expected fewer tokens than the model's {length} positions, got {length}"):
        callbacks.Samples(model, tokenizer, settings(generation_prompt=prompt), nullcontext)


@pytest.mark.parametrize(
    ("loss", "best", "is_best"),
    [(1.0, None, True), (1.0, 1.5, True), (1.0, 1.0, False), (1.5, 1.0, False), (math.nan, None, False), (math.inf, None, False)],
)
def test_best_has_a_finite_lower_loss(loss: float, best: float | None, is_best: bool, capsys: pytest.CaptureFixture[str]) -> None:
    saved = []

    def save(metrics: Any) -> Path:
        saved.append(metrics["eval_loss"])
        return Path("there.pt")

    metrics = {"eval_loss": loss, "train_loss": 2.0, "eval_perplexity": 7.0}
    state = TrainerState(epoch=1.5, global_step=6, max_steps=6, best_metric=best)
    callbacks.Summary(save).on_evaluate(None, state, TrainerControl(), metrics=metrics)
    assert saved == [loss] * is_best
    said = capsys.readouterr().out
    assert said.startswith("\nStep 6 Summary:\n  Train Loss: 2.0000\n") and ("New best model saved: there.pt" in said) is is_best


@pytest.mark.parametrize(
    ("epoch", "streamed", "title"),
    [(2.0, False, "Epoch 2"), (1.5, False, "Step 6"), (0.12, False, "Step 6"), (1.0, True, "Step 6")],
)
@pytest.mark.parametrize("last", [6, 9])
def test_only_a_whole_epoch_is_summed_up_as_one(epoch: float, streamed: bool, title: str, last: int, capsys: Any) -> None:
    """Not the end of a run in the middle of an epoch, nor that of a stream, which the Trainer counts as one epoch."""
    state = TrainerState(epoch=epoch, global_step=6, max_steps=last)
    metrics = {"eval_loss": 1.0, "train_loss": 2.0}
    callbacks.Summary(lambda _: None, streamed=streamed).on_evaluate(None, state, TrainerControl(), metrics=metrics)
    assert capsys.readouterr().out.startswith(f"\n{title} Summary:\n")


def test_progress_bar_shows_each_cycle_loss_if_there_are_several() -> None:
    logs = {
        "loss": 2.45214,
        "loss_cycle_1": 2.61,
        "loss_cycle_2": 2.466,
        "learning_rate": 1e-5,
        "tokens_per_second": 1210.4,
        "memory": 1.94,
    }
    bar = callbacks.ProgressBar()
    assert bar._postfix(logs) == "loss=2.4521, cycles=2.61/2.47, lr=1e-05, 1,210 tok/s, 1.9 GiB"
    del logs["loss_cycle_1"]
    assert bar._postfix(logs) == "loss=2.4521, lr=1e-05, 1,210 tok/s, 1.9 GiB"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_second_signal_stops_immediately(number: signal.Signals, capsys: pytest.CaptureFixture[str]) -> None:
    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    stop = callbacks.StopOnSignal(None, lambda asked: asked)
    control = TrainerControl()
    with pytest.raises(KeyboardInterrupt), stop.listening():
        stop.on_step_end(None, TrainerState(global_step=1, max_steps=9, epoch=0.5), control)
        assert not control.should_training_stop
        os.kill(os.getpid(), number)
        assert stop.requested and not stop.stopped
        stop.on_step_end(None, TrainerState(global_step=2, max_steps=9, epoch=0.7), control)
        assert control.should_training_stop and stop.stopped and not control.should_save
        os.kill(os.getpid(), number)
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == before
    assert capsys.readouterr().err.count("Stopping after this step") == 1


def test_several_processes_stop_after_the_same_step() -> None:
    """A step after the signal, whichever of them got it, and without waiting for the device to know."""
    asked, stops = [False, True, False, False, False], []  # of the other process, step by step

    def reduce(own: torch.Tensor, kind: str) -> torch.Tensor:
        return own + float(asked[len(stops)])

    several: Any = SimpleNamespace(
        flags=None, args=SimpleNamespace(device=torch.device("cpu")), accelerator=SimpleNamespace(num_processes=2, reduce=reduce)
    )
    stop = callbacks.StopOnSignal(None, lambda flag: trainer.CycleTrainer.any_rank(several, flag))
    for step, own in enumerate((False, False, True, True)):
        stop.requested |= own
        control = TrainerControl()
        stop.on_step_end(None, TrainerState(global_step=step, max_steps=9, epoch=0.1 * step), control)
        stops.append(control.should_training_stop)
    assert stops == [False, False, True, True] and stop.requested
    one: Any = SimpleNamespace(accelerator=SimpleNamespace(num_processes=1))
    assert [trainer.CycleTrainer.any_rank(one, flag) for flag in (True, False)] == [True, False]


@pytest.mark.parametrize(("epoch", "validated"), [(0.5, False), (1.0, True), (2.0, True)])
def test_stopped_run_is_validated_at_an_epoch_end_only(epoch: float, validated: bool) -> None:
    """A signal in the last step of an epoch takes its validation from nobody."""
    for asked in (False, True):
        stop, control = callbacks.StopOnSignal(None, lambda asked: asked), TrainerControl(should_evaluate=True)
        stop.requested = stop.stopped = asked
        stop.on_epoch_end(None, TrainerState(global_step=3, max_steps=9, epoch=epoch), control)
        assert control.should_evaluate is (validated or not asked)


@pytest.mark.parametrize(
    ("losses", "stops"),
    [
        ([1.0, 1.0], False),
        ([1.0, 1.0, 1.0], True),
        ([3.0, 1.0, 2.0], False),
        ([1.0, 0.9, 1.0, 0.9], True),
        ([math.nan, 1.0, math.nan], False),
    ],
)  # fmt: skip
def test_early_stopping_requires_a_strictly_lower_loss(losses: list[float], stops: bool) -> None:
    """For two validations in a row; entries of training do not count."""
    control, state = TrainerControl(), TrainerState()
    state.log_history = [entry for i, loss in enumerate(losses) for entry in ({"loss": -float(i)}, {"eval_loss": loss})]
    callbacks.EarlyStopping(2).on_evaluate(None, state, control)
    assert control.should_training_stop is stops


@pytest.mark.parametrize(("every", "at_once", "after_validation"), [(2, [2, 4, 8], [6]), (3, [], [3, 6, 9]), (4, [4, 8], []), (0, [], [])])
def test_checkpoint_trigger_steps(every: int, at_once: list[int], after_validation: list[int]) -> None:
    """Within an epoch at once, with everything before it logged; at its end after the validation, and only there."""
    save, found, late = callbacks.SaveSteps(every), [], []
    for step in range(1, 10):  # three epochs of three steps
        control, state = TrainerControl(), TrainerState(global_step=step, max_steps=12, epoch=step / 3)
        save.on_step_end(None, state, control)
        assert control.should_log is control.should_save
        found += [step] * control.should_save
        if step % 3 == 0:
            control = TrainerControl()
            save.on_epoch_end(None, state, control)
            assert control.should_log
            late += [step] * control.should_save
    assert (found, late) == (at_once, after_validation)


# Bad input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"checkpoint": "/nowhere/init.pt"}, r"/nowhere/init.pt: no such checkpoint"),
        ({"seq_len": 1000}, r"--seq_len: expected at most 512, the positions that the model has, got 1000"),
        ({"seq_len": 0}, r"--seq_len: expected at least 2 tokens"),
        ({"seq_len": 1}, r"--seq_len: expected at least 2 tokens"),
        ({"batch_size": 0}, r"--batch_size: expected at least 1, got 0"),
        ({"grad_accum_steps": -1}, r"--grad_accum_steps: expected at least 1, got -1"),
        ({"eval_batch_size": 0}, r"--eval_batch_size: expected at least 1, got 0"),
        ({"num_epochs": 0}, r"--num_epochs: expected at least 1, got 0"),
        ({"max_steps": 0}, r"--max_steps: expected at least 1, got 0"),
        ({"log_every": 0}, r"--log_every: expected at least 1, got 0"),
        ({"lr": 0.0}, r"--lr: expected a number above 0, got 0.0"),
        ({"lr": math.nan}, r"--lr: expected a number above 0, got nan"),
        ({"gain_lr": -1.0}, r"--gain_lr: expected a number above 0, got -1.0"),
        ({"warmup_steps": -1}, r"--warmup_steps: expected at least 0, got -1"),
        ({"weight_decay": math.inf}, r"--weight_decay: expected at least 0, got inf"),
        ({"max_grad_norm": -1.0}, r"--max_grad_norm: expected at least 0"),
        ({"deep_supervision_weight": -0.5}, r"--deep_supervision_weight: expected at least 0, got -0.5"),
        ({"deep_supervision_schedule": "cosine"}, r"--deep_supervision_schedule: expected one of linear_decay, constant, .*, got 'cosine'"),
        ({"generate_every": 5, "generation_prompt": " "}, r"--generation_prompt: expected some text to continue"),
        ({"save_every": -1}, r"--save_every: expected at least 0, got -1"),
        ({"device": "cuda:9"}, r"--device: expected cpu, which this machine has"),
        ({"output_dir": __file__}, r"--output_dir: expected a folder, got .*test_training.py, which is a file"),
        ({"output_dir": "/proc/nowhere"}, r"--output_dir: the folder /proc/nowhere cannot be created"),
        ({"dataset_name": "/nowhere/text.txt"}, r"/nowhere/text.txt"),
        ({"cycle_choices": (2, 1)}, r"--cycle_choices: expected different cycle counts of at least 1, ascending, got 2 1"),
        ({"cycle_choices": (0, 1)}, r"--cycle_choices: expected different cycle counts of at least 1, ascending, got 0 1"),
        ({"cycle_choices": (1, 2), "cycle_weights": (1.0,)}, r"--cycle_weights: expected one for each of --cycle_choices \(1 2\), got 1.0"),
        ({"cycle_weights": (1.0,)}, r"--cycle_weights: expected one for each of --cycle_choices \(none\), got 1.0"),
        ({"cycle_choices": (1, 2), "cycle_weights": (1.0, 0.0)}, r"--cycle_weights: expected numbers above 0, got 1.0 0.0"),
        ({"depth_curriculum": 0.5}, r"--depth_curriculum: expected several --cycle_choices, got one depth"),
        ({"depth_curriculum": 1.0, "cycle_choices": (1, 2)}, r"--depth_curriculum: expected at least 0 and less than 1, got 1.0"),
        ({"backprop": "cycle", "enable_deep_supervision": False}, r"--backprop cycle: .* add --enable_deep_supervision"),
        ({"backprop": "last"}, r"--backprop last: only the last cycle has gradients, .* use --backprop cycle"),
        ({"backprop": "none"}, r"--backprop: expected one of full, cycle, last, got 'none'"),
        ({"halting_weight": 1.0, "enable_deep_supervision": False}, r"--halting_weight: compares cycles, .* add --enable_deep_supervision"),
        ({"teacher": "x"}, r"--teacher: x has no effect without --distill_weight or --match_hidden_weight; set the weight of one"),
        ({"distill_weight": -1.0}, r"--distill_weight: expected at least 0, got -1.0"),
        ({"distill_temperature": 0.0}, r"--distill_temperature: expected a number above 0, got 0.0"),
        ({"ema_decay": 1.0}, r"--ema_decay: expected at least 0 and less than 1, got 1.0"),
        ({"optimizer": "sgd"}, r"--optimizer: expected one of adamw, muon, adamw_8bit, got 'sgd'"),
        ({"lr_schedule": "step"}, r"--lr_schedule: expected one of linear, cosine, wsd, got 'step'"),
        ({"max_steps": 1, "max_tokens": 1}, r"--max_tokens: expected it or --max_steps, got both"),
        ({"eval_every": 0}, r"--eval_every: expected at least 1, got 0"),
        ({"keep_last": -1}, r"--keep_last: expected at least 0, got -1"),
        ({"fsdp": True}, r"--fsdp: expected several processes .* torchrun"),
        ({"deepspeed": "ds.json"}, r"--deepspeed"),
        ({"mix": ("x",)}, r"--mix"),
    ],
)
def test_bad_flags(changes: dict[str, Any], message: str, files: TrainSettings) -> None:
    with pytest.raises(UserError, match=message):
        train(replace(files, **changes))
    assert not any(Path(files.output_dir).glob("*.pt"))


def test_zero_cycles_cannot_be_trained(files: TrainSettings, tmp_path: Path) -> None:
    path = tmp_path / "zero.pt"
    checkpoint.save(path, recursive(H_cycles=0), make_tiny_tokenizer())
    with pytest.raises(UserError, match=r"zero.pt: cannot train at 0 cycles.*convert with --H_cycles 1 or more"):
        train(replace(files, checkpoint=str(path)))


def test_tokenizers_that_do_not_fit(files: TrainSettings, tmp_path: Path) -> None:
    bare = tmp_path / "bare.pt"
    checkpoint.save(bare, recursive(), None)
    with pytest.raises(UserError, match=r"bare.pt: no tokenizer in .*bare_tokenizer; name one with --tokenizer_path"):
        train(replace(files, checkpoint=str(bare)))
    larger = make_tiny_tokenizer()
    larger.add_tokens([f"<extra {i}>" for i in range(100)])
    larger.save_pretrained(tmp_path / "larger")
    with pytest.raises(UserError, match=rf"larger: the tokenizer has tokens up to id {len(larger) - 1}, .* only {tiny.VOCAB_SIZE} rows"):
        train(replace(files, tokenizer_path=str(tmp_path / "larger")))


def test_generation_prompt_longer_than_the_context() -> None:
    model = recursive()
    with pytest.raises(UserError, match=r"--generation_prompt: expected fewer tokens than the model's 512 positions, got \d+"):
        run(model, generate_every=1, generation_prompt="ship " * 600, console=True)


# The settings


def test_flags_of_the_guides_exist() -> None:
    expected = {
        "tokenizer_path": None, "dataset_name": "wikitext", "dataset_config_name": None, "text_column": None, "seq_len": 128,
        "batch_size": 4, "lr": 1e-5, "num_epochs": 3, "max_steps": None, "grad_accum_steps": 1, "warmup_steps": 100,
        "enable_deep_supervision": False, "deep_supervision_weight": 0.5, "deep_supervision_schedule": "linear_decay",
        "generate_every": 500, "generation_prompt": "The quick brown fox", "save_every": 1000, "output_dir": ".", "resume": False,
        "device": None, "max_grad_norm": 1.0,
    }  # fmt: skip
    made = TrainSettings(checkpoint="x")
    assert {name: getattr(made, name) for name in expected} == expected
    assert made.gain_learning_rate == pytest.approx(1e-4)
    made.validate()
    assert set(get_args(get_type_hints(TrainSettings)["deep_supervision_schedule"])) == set(SCHEDULES)


def test_every_flag_has_a_help_text() -> None:
    """Under its one declaration."""
    kinds = TrainSettings, EmbeddingSettings, HybridSettings
    classes = {each for kind in kinds for each in kind.__mro__ if each is not object}
    source = "\n".join(inspect.getsource(each) for each in classes)
    for name in {field.name for kind in kinds for field in fields(kind)}:
        assert len(re.findall(rf'^    {name}: .*\n    """\S[^"]*"""$', source, re.MULTILINE)) == 1, name
