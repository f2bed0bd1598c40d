"""What a study is: a donor, data to fine-tune on, rows that differ in one thing each, and how every row is measured and kept.

A row is one way to spend the same training: the donor as it is, the donor fine-tuned on the same tokens or for the same FLOPs, a baseline's
recursion, ours, ablations of ours. All rows of a study see the same tokens in the same order with the same optimizer settings, but
for what a row changes by its name. FLOPs are those of `recursify.training.cost`: matrix products, readouts included.

Results are written after every run, so an interrupted study loses one run, and `--rows` adds to what is there.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from benchmarks.record import provenance
from recipes.evidence.rivals import RIVALS, replace_loop
from recipes.evidence.starts import average_neighbours
from recursify import as_adapter, convert
from recursify.data.question_rows import question_columns
from recursify.data.tasks import Item
from recursify.network.size import shape_of
from recursify.training import TrainSettings, fit
from recursify.training.arguments import choose_autocast
from recursify.training.cost import estimate
from recursify.utils.device import choose_device

# What all recursive rows are trained with, but for those that change it.
SUPERVISED: dict[str, Any] = {"enable_deep_supervision": True}

RESULTS = Path(__file__).resolve().parent / "results"
Figures = dict[str, dict[str, Any]]  # cycle count, or "donor" -> what was measured -> figure


@dataclass(frozen=True)
class Row:
    """One line of a table.

    Args:
        name: In the table.
        group: The table that it belongs to.
        shape: Arguments of `convert`; None for the donor itself.
        rival: The baseline whose recursion, or the other anchor that, replaces ours.
        averaged: The loop's layers start as averages of their neighbours.
        exits: Measured at every exit, too.
        lora_rank: The donor is frozen: of ours the recursion is an adapter of it, of the donor itself all linear layers get LoRA of that
            rank (PEFT's). None trains everything.
        lora: More arguments of `as_adapter`, or of PEFT's `LoraConfig`.
        changes: Of the study's training settings.
        budget: "none" trains nothing; "tokens" as many steps as all; "flops" as many as cost what another row costs.
        against: That row; the study's main one where None.
        seeds: Of the order of the data and of all that starts at random.
    """

    name: str
    group: str = "main"
    shape: dict[str, Any] | None = None
    rival: str | None = None
    averaged: bool = False
    exits: bool = False
    lora_rank: int | None = None
    lora: dict[str, Any] = field(default_factory=dict)
    changes: dict[str, Any] = field(default_factory=dict)
    budget: Literal["none", "tokens", "flops"] = "tokens"
    against: str | None = None
    seeds: int = 1


@dataclass(frozen=True)
class Size:
    """How large a study is made: for a CPU in half an hour, for a GPU in twenty minutes, or for a test in seconds."""

    donor: dict[str, Any]
    donor_steps: int
    steps: int
    items: int
    batch_size: int
    seeds: int


@dataclass(frozen=True)
class Study:
    """One donor, dataset and evaluation, shared by all rows.

    Args:
        main: The name of the row whose FLOPs the donor baseline gets, too.
        settings: Of training; rows change them.
        donor: Makes the donor, with its tokenizer, in a folder; what it returns is kept with the results.
        train: Rows to fine-tune on, each with `input_ids`; the second part is for validation (the sweep of the start gain reads it).
        measure: Figures of a model at all depths that are given; none for a donor.
        start_gain: Of our rows, but for those that change it; None is by the sweep.
        exits: What early exit costs and saves, beside fixed depth; for rows with `exits`.
    """

    name: str
    main: str
    settings: dict[str, Any]
    rows: Sequence[Row]
    donor: Callable[[Path], dict[str, Any]]
    train: Callable[[Any, int], tuple[Any, Any]]
    measure: Callable[[Any, Any, Sequence[int]], Figures]
    start_gain: float | None = 0.45
    exits: Callable[[Any, Any], list[dict[str, Any]]] | None = None


def rows_of_questions(items: Sequence[Item], tokenizer: Any, seq_len: int, with_steps: bool = False) -> list[dict[str, list[int]]]:
    """Questions packed into rows, without the datasets library: a GPU machine may lack it."""
    columns = question_columns(items, tokenizer, seq_len, with_steps)
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def small_model(shape: dict[str, Any], words: int) -> Qwen2ForCausalLM:
    """A donor before its pretraining, the same every time."""
    torch.manual_seed(0)
    attention: Any = {"attn_implementation": "eager"}
    config = Qwen2Config(
        vocab_size=words, hidden_size=shape["hidden_size"], intermediate_size=shape["intermediate_size"], num_hidden_layers=shape["layers"],
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=128, tie_word_embeddings=False, eos_token_id=0,
        bos_token_id=None, **attention,
    )  # fmt: skip
    return Qwen2ForCausalLM(config)


Maker = Callable[[Size], Study]


def run(
    make: Maker, size_name: str, size: Size, wanted: Sequence[str], output: Path, work: Path, device: str | None, processes: int
) -> dict[str, Any]:
    """Pretrain the donor, train and evaluate every wanted row, and save the results.

    Args:
        wanted: Names of rows; empty for all that are not there yet.
        work: Folder of the donor, which is reused.
        processes: Number of rows at once, on one core each.
    """
    study, where = make(size), choose_device(device)
    folder = donor_folder(study, size_name, work)
    make_donor(study, folder)
    file = output / f"{study.name}-{size_name}.json"
    found, here = earlier(file), about(study, size_name, size, folder, where)
    jobs = [
        (make, size, number, seed, folder, str(where))
        for number, row in enumerate(study.rows)
        for seed in range(min(row.seeds, size.seeds))
        if (row.name in wanted if wanted else not _is_there(found, row, seed))
    ]
    for entry in _done(jobs, processes):
        add(entry, here, file, study)
    return earlier(file)


def donor_folder(study: Study, size_name: str, work: Path) -> Path:
    return work / f"{study.name}-{size_name}-donor"


def is_made(folder: Path) -> bool:
    """Whether there is a complete donor."""
    return (folder / "made.json").exists()


def make_donor(study: Study, folder: Path) -> None:
    """Pretrain the donor of a study, if it is not there."""
    if is_made(folder):
        return
    _say(f"{study.name}: pretraining the donor")
    began = time.monotonic()
    told = study.donor(folder)
    (folder / "made.json").write_text(json.dumps({**told, "seconds": round(time.monotonic() - began, 1)}))


def about(study: Study, size_name: str, size: Size, folder: Path, device: torch.device) -> dict[str, Any]:
    """What all rows of a file have in common, and where they were measured."""
    return {
        "study": study.name, "size": size_name, "settings": study.settings, "steps": size.steps, "batch_size": size.batch_size,
        "donor": json.loads((folder / "made.json").read_text()), "machine": provenance(device),
    }  # fmt: skip


def add(entry: dict[str, Any], here: dict[str, Any], file: Path, study: Study) -> None:
    """Put a run in the place of an earlier one of the same row and seed, and keep all.

    Args:
        here: `about` this run. What the file says holds for its other runs; a run of another machine, commit or version says its own.
    """
    found = here | earlier(file)  # runs, too
    if any(found["machine"].get(key) != here["machine"].get(key) for key in ("cpu", "gpu", "versions", "commit")):
        entry = entry | {"machine": here["machine"]}
    found["runs"] = [e for e in found["runs"] if (e["name"], e["seed"]) != (entry["name"], entry["seed"])] + [entry]
    order = [row.name for row in study.rows]
    found["runs"].sort(key=lambda e: (order.index(e["name"]) if e["name"] in order else len(order), e["seed"]))
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def _done(jobs: Sequence[tuple[Any, ...]], processes: int) -> Iterator[dict[str, Any]]:
    if processes == 1:
        yield from (one(*job) for job in jobs)
        return
    with ProcessPoolExecutor(processes, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        for future in as_completed([pool.submit(one, *job) for job in jobs]):
            yield future.result()


def one(make: Maker, size: Size, number: int, seed: int, folder: Path, device_name: str) -> dict[str, Any]:
    """Train and measure one row with one seed."""
    study, device = make(size), torch.device(device_name)
    row = study.rows[number]
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)  # the auto class takes any tokenizer of a Qwen2 for Qwen2's own
    data = study.train(tokenizer, size.steps * size.batch_size)
    torch.manual_seed(seed)  # what a rival, H_init and L_init start from
    model = _model(row, folder, device)
    settings = choose_autocast(_settings(study, size, row, seed, folder, device), model.config, device)
    if row.budget == "flops":
        budget = _flops_of(row.against or study.main, study, size, folder, device)
        settings = replace(settings, max_steps=max(1, round(budget / _flops(row, model.config, settings, 1))))
    steps = 0 if row.budget == "none" else settings.max_steps or 0
    _say(f"{study.name}: {row.name}, seed {seed}, {steps} steps")
    began, history = time.monotonic(), []
    if steps:
        result = fit(model, tokenizer, *data, settings, teacher=_teacher(settings, folder, device), console=False)
        if result.interrupted:
            raise KeyboardInterrupt
        history = [round(entry["loss"], 4) for entry in result.history if "loss" in entry]
    seconds = time.monotonic() - began
    trained = None if row.shape is None else model.config.H_cycles
    figures = study.measure(model.to(device).eval(), tokenizer, () if trained is None else range(1, 2 * trained + 1))
    exits = {"exits": study.exits(model, tokenizer)} if row.exits and study.exits else {}
    return {
        "name": row.name, "group": row.group, "seed": seed, "shape": row.shape, "rival": row.rival, "changes": row.changes,
        "trained_cycles": trained, "steps": steps, "flops": _flops(row, model.config, settings, steps),
        "parameters": sum(p.numel() for p in model.parameters()), "lora_rank": row.lora_rank, "lora": row.lora,
        "bf16": settings.bf16,
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad) if steps else 0,
        "seconds": round(seconds, 1), "figures": figures, "loss": history, **exits,
    }  # fmt: skip


def _flops_of(name: str, study: Study, size: Size, folder: Path, device: Any) -> float:
    """What the row of that name costs."""
    row = next(row for row in study.rows if row.name == name)
    return _flops(row, _model(row, folder, device).config, _settings(study, size, row, 0, folder, device), size.steps)


def _flops(row: Row, config: Any, settings: TrainSettings, steps: int) -> float:
    """Of training. LoRA on all layers of the donor saves the gradients of its matrices and costs all the rest; its own products are few
    and not counted, here as in an adapter."""
    if not steps:
        return 0.0
    saved = 2.0 * sum(shape_of(config).matrices.values()) if row.lora_rank and row.shape is None else 0.0
    return estimate(config, settings, steps).flops - saved * steps * settings.batch_size * settings.seq_len


def on_layers(*numbers: int) -> dict[str, Any]:
    """LoRA of a donor on all linear layers of some of its layers, as `Row.lora`."""
    return {"target_modules": rf".*\.layers\.({'|'.join(map(str, numbers))})\..*_proj"}


def _model(row: Row, folder: Path, device: Any) -> Any:
    if row.shape is None:
        model: Any = AutoModelForCausalLM.from_pretrained(folder)
        if row.lora_rank:
            from peft import LoraConfig, get_peft_model

            given: dict[str, Any] = {"r": row.lora_rank, "lora_alpha": 2 * row.lora_rank, "target_modules": "all-linear"}
            model = get_peft_model(model, LoraConfig(**given | row.lora)).get_base_model()
    else:
        model = convert(str(folder), **row.shape)
        if row.lora_rank:
            model = as_adapter(model, lora_rank=row.lora_rank, lora_alpha=2.0 * row.lora_rank, **row.lora)
    if device.type == "cpu":
        model.set_attn_implementation("eager")  # at these lengths faster than sdpa
    if row.rival is not None:
        replace_loop(model, row.rival)
    if row.averaged:
        average_neighbours(model, AutoModelForCausalLM.from_pretrained(folder))
    return model.float()


def _settings(study: Study, size: Size, row: Row, seed: int, folder: Path, device: Any) -> TrainSettings:
    values: dict[str, Any] = {
        "checkpoint": str(folder), "max_steps": size.steps, "batch_size": size.batch_size, "seed": seed, "device": str(device),
        "generate_every": 0, "save_every": 0, "log_every": max(1, size.steps // 20),
    }  # fmt: skip
    if row.shape is not None:
        values |= SUPERVISED | varied(row.shape["H_cycles"])
        anchored = row.rival not in RIVALS and row.shape.get("injection") != "sum_norm"
        values |= {"start_gain": study.start_gain} if anchored else {"gain_lr": study.settings["lr"]}
    return TrainSettings(**values | study.settings | row.changes)


def varied(H_cycles: int) -> dict[str, Any]:
    """Depths around the one that is meant, half of the steps at it: an untrained depth is not reliable."""
    others = {1, 2, H_cycles + 1, 2 * H_cycles} - {H_cycles}
    if H_cycles == 1:
        return {}
    choices = sorted({H_cycles, *others})
    return {"cycle_choices": tuple(choices), "cycle_weights": tuple(float(len(others)) if H_cycles == H else 1.0 for H in choices)}


def _teacher(settings: TrainSettings, folder: Path, device: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder).to(device) if settings.needs_teacher else None


def earlier(file: Path) -> dict[str, Any]:
    """What a file of results has; no runs if it is not there."""
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"runs": []}


def _is_there(found: dict[str, Any], row: Row, seed: int) -> bool:
    return any((entry["name"], entry["seed"]) == (row.name, seed) for entry in found["runs"])


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
