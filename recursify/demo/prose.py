"""First half of the demo: a bundled language model, made recursive, fine-tuned on prose and measured at every depth beside its baselines.

The text is the language reference that every CPython carries (`pydoc_data.topics`). The donor is also fine-tuned as it is, on the same
tokens in the same order with the same settings: that line is the baseline.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from ..checkpoints import checkpoint
from ..checkpoints.donor import open_donor
from ..conversion import convert as conversion
from ..data.loading import DataSettings, load_documents, tokenize
from ..evaluation import text_loss
from ..evaluation.statistics import standard_error
from ..inference.cycle_table import recursive_steps
from ..inference.generation import generate_text
from ..inference.options import Sampling
from ..network.plan import ConversionPlan
from ..training import FitResult, TrainSettings, fit
from ..training.saving import BEST
from . import report
from .stages import Clock, raise_if_interrupted

DEPTHS = (1, 2, 3, 4, 5)
RECURSIVE, TUNED, AS_IS = "recursive", "donor fine-tuned", "donor as is"
PROMPT = "The statement is executed"
SENTENCE_TOKENS = 24
HELD_OUT_EVERY = 6  # topics: more than the usual share, for a meaningful error bar


def donor_folder() -> Path:
    """The donor's folder inside the package."""
    return Path(str(resources.files(__package__) / "donors" / "prose"))


def run(out: Path, steps: int, seed: int, clock: Clock) -> report.DemoReport:
    """Convert, fine-tune twice, evaluate and generate; writes checkpoint and text into the folder.

    Raises:
        KeyboardInterrupt: Ctrl-C stopped a fine-tuning.
    """
    convert = conversion.ConvertSettings(
        qwen_model=str(donor_folder()), keep_donor=True, L_layers=2, H_cycles=3, L_cycles=1,
        output_path=str(out / "recursive_init.pt"),
    )  # fmt: skip
    with clock.stage("convert"):
        conversion.run(convert)
    found = checkpoint.load(convert.output_path)
    model, tokenizer = found.model.float(), checkpoint.require_tokenizer(found, convert.output_path)
    donor = open_donor(convert.qwen_model).load(dtype=torch.float32).eval()

    text = write_text(out)
    documents = load_documents(DataSettings(dataset_name=str(text)))
    train = TrainSettings(
        checkpoint=convert.output_path, dataset_name=str(text), seq_len=128, batch_size=8, max_steps=steps, lr=3e-4, gain_lr=3e-3,
        warmup_steps=10, enable_deep_supervision=True, halting_weight=0.1, generate_every=0, log_every=5, save_every=0, seed=seed,
        output_dir=str(out),
    )  # fmt: skip
    blocks, held = (tokenize(part, tokenizer, train.seq_len) for part in (documents.train, documents.validation))
    with clock.stage("measure the donor as it is"):
        as_is = text_loss.measure(donor, held)[0]
    with clock.stage("fine-tune the recursive model"):
        fitted = raise_if_interrupted(fit(model, tokenizer, blocks, held, train))
    checkpoint.save(out / "recursive.pt", model, tokenizer, found.plan, {**found.notes, "trained_on": "pydoc_data.topics"})
    with clock.stage("fine-tune the donor on the same tokens"):
        tuned = raise_if_interrupted(fit(donor, tokenizer, blocks, held, train))
    with clock.stage("measure every depth"):
        losses, tuned_losses = (text_loss.window_losses(m, held, DEPTHS) for m in (model, donor))
    with clock.stage("write text"):
        samples = write_samples(model, donor, tokenizer, seed)
        sentence = guess_sentence(model, tokenizer, first_sentence(documents.validation["text"]))

    return make_page(
        found.plan, model, donor, data=(len(held) * train.seq_len, as_is), runs=(fitted, tuned), losses=(losses, tuned_losses),
        sentence=sentence, samples=samples, commands=commands(convert, train, out),
    )  # fmt: skip


def make_page(
    plan: ConversionPlan | None,
    model: Any,
    donor: Any,
    *,
    data: tuple[int, text_loss.DepthLoss],
    runs: tuple[FitResult, FitResult],
    losses: tuple[torch.Tensor, torch.Tensor],
    **rest: Any,
) -> report.DemoReport:
    """The report's data from the measurements.

    Args:
        data: Validation tokens, and the donor's loss on them before any training.
        runs: The two fine-tunings, of the recursive model and of the donor.
        losses: Of both afterwards, `[depths, windows]` and `[1, windows]`.
        rest: Further fields of the report.
    """
    assert plan is not None
    (validation_tokens, as_is), (fitted, tuned), (ours, theirs), config = data, runs, losses, model.config
    return report.DemoReport(
        donor=report.Donor(name="recursify's demo donor", parameters=sum(p.numel() for p in donor.parameters()), layers=plan.donor_layers),
        architecture=report.Architecture(
            prelude=plan.prelude, loop=plan.loop, coda=plan.coda, H_cycles=config.H_cycles, L_cycles=config.L_cycles,
            parameters=sum(p.numel() for p in model.parameters()),
        ),
        data=f"the language reference of Python {platform.python_version()} (pydoc_data.topics)",
        train_tokens=fitted.tokens,
        validation_tokens=validation_tokens,
        curves=(curve(RECURSIVE, fitted), curve(TUNED, tuned)),
        depths=tuple(
            report.DepthPoint(H_cycles=H, loss=d.loss, layer_applications=d.layer_applications, standard_error=d.standard_error)
            for H, d in zip(DEPTHS, text_loss.summarise(model, ours, DEPTHS), strict=True)
        ),
        donor_as_is=baseline(AS_IS, as_is),
        donor_tuned=baseline(TUNED, text_loss.summarise(donor, theirs)[0]),
        difference_error=standard_error(ours[DEPTHS.index(config.H_cycles)] - theirs[0]),
        model_name=RECURSIVE,
        **rest,
    )  # fmt: skip


def write_text(folder: Path) -> Path:
    """Write the language reference as two files, one topic per line, for the commands in the report."""
    from pydoc_data.topics import topics

    path = folder / "language_reference"
    path.mkdir(exist_ok=True)
    texts = [json.dumps({"text": topics[name]}) + "\n" for name in sorted(topics)]
    held = set(texts[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY])
    (path / "train.jsonl").write_text("".join(text for text in texts if text not in held), encoding="utf-8")
    (path / "validation.jsonl").write_text("".join(text for text in texts if text in held), encoding="utf-8")
    return path


def write_samples(model: Any, donor_tuned: Any, tokenizer: Any, seed: int) -> tuple[report.Sample, ...]:
    """The same prompt continued by each model."""
    as_is = open_donor(str(donor_folder())).load(dtype=torch.float32).eval()
    writers = [(AS_IS, as_is, None), (TUNED, donor_tuned, None), *((at_depth(H), model, H) for H in (1, 3, 5))]
    samples = []
    for name, writer, H in writers:
        done = generate_text(writer, tokenizer, PROMPT, Sampling(max_new_tokens=60, temperature=0.7, top_p=0.9, H_cycles=H), seed=seed)
        samples.append(report.Sample(model=name, prompt=PROMPT, text=done.text))
    return tuple(samples)


def at_depth(H_cycles: int) -> str:
    return f"{RECURSIVE}, {H_cycles} cycle{'s' if H_cycles > 1 else ''}"


def first_sentence(texts: Iterable[str]) -> str:
    """The first paragraph of prose, on one line, without headings, rules and code."""
    paragraphs = (" ".join(part.split()) for text in texts for part in text.split("\n\n"))
    return next(part for part in paragraphs if len(part) > 120 and part[0].isalpha() and "**" not in part)


def guess_sentence(model: Any, tokenizer: Any, text: str) -> tuple[report.TokenRow, ...]:
    """The prediction of every cycle for each token at the beginning of a held-out text."""
    ids = tokenizer(text)["input_ids"][:SENTENCE_TOKENS]
    words = [tokenizer.decode([i]) for i in ids]
    rows = []
    for position, step in enumerate(recursive_steps(model, ids, 1, DEPTHS[-1])):
        guesses = tuple(
            report.Guess(text=tokenizer.decode([g.token]), probability=g.probability, right=g.token == step.token) for g in step.cycles
        )
        rows.append(report.TokenRow(token=words[position], true_next=words[position + 1], guesses=guesses))
    return tuple(rows)


def curve(name: str, fitted: FitResult) -> report.Curve:
    train = [row for row in fitted.history if "loss" in row]
    held = [row for row in fitted.history if "eval_loss" in row]
    last_cycle = [row.get(max((key for key in row if key.startswith("loss_cycle_")), default="loss"), row["loss"]) for row in train]
    return report.Curve(
        name=name,
        steps=tuple(row["step"] for row in train),
        train_loss=tuple(last_cycle),
        eval_steps=tuple(row["step"] for row in held),
        eval_loss=tuple(row["eval_loss"] for row in held),
    )


def baseline(name: str, point: text_loss.DepthLoss) -> report.Baseline:
    return report.Baseline(name=name, loss=point.loss, layer_applications=point.layer_applications, standard_error=point.standard_error)


def commands(convert: conversion.ConvertSettings, train: TrainSettings, out: Path) -> tuple[str, ...]:
    """The same steps as shell commands."""
    return (
        f"recursify convert --qwen_model {convert.qwen_model} --keep_donor --L_layers {convert.L_layers} --H_cycles {convert.H_cycles} "
        f"--L_cycles {convert.L_cycles} --output_path {convert.output_path}",
        f"recursify train --checkpoint {train.checkpoint} --dataset_name {train.dataset_name} --seq_len {train.seq_len} "
        f"--batch_size {train.batch_size} --max_steps {train.max_steps} --lr {train.lr} --gain_lr {train.gain_lr} "
        f"--warmup_steps {train.warmup_steps} --enable_deep_supervision --halting_weight {train.halting_weight} "
        f"--seed {train.seed} --output_dir {out}",
        f"recursify evaluate --checkpoint {out / BEST} --dataset_name {train.dataset_name} --cycles {' '.join(map(str, DEPTHS))}",
        f'recursify generate --checkpoint {out / BEST} --prompt "{PROMPT}" --H_cycles 5 --show_recursive_steps',
    )
