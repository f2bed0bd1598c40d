"""Hops: reference chains and fact chains on a real pretrained donor.

Answered at once, without written steps, a question of more hops needs more serial computation: here depth should pay on words. The donor
is a real one (real_donor.py). Items are of 1 to 8 hops in training, on a CPU chains alone, of two chains and 1 to 4 hops; reach is the
number of hops that are followed at 90 % in test items. Beside it stands the loss on the language reference that every CPython carries:
what the training cost the donor elsewhere.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from recipes.evidence.real_donor import layers_of, put_donor
from recipes.evidence.study import Figures, Row, Size, Study, rows_of_questions
from recursify.data.tasks import Item, generate
from recursify.evaluation.accuracy import evaluate_questions
from recursify.inference.options import DecodingOptions

TASKS: dict[str, dict[str, Any]] = {"chains": {"chains": 3}, "facts": {"people": 8}}
ALL: dict[str, Any] = {"hops": (1, 2, 3, 4, 6, 8), "tasks": TASKS, "seq_len": 256}
FEW: dict[str, Any] = {"hops": (1, 2, 3, 4), "tasks": {"chains": {"chains": 2}}, "seq_len": 64}
WINDOWS = 50  # of the language reference

SIZES = {
    "cpu": Size(FEW, 0, steps=150, items=100, batch_size=8, seeds=1),
    "gpu": Size(ALL, 0, steps=2000, items=500, batch_size=64, seeds=3),
    "test": Size({"layers": 6, "hidden_size": 16, "intermediate_size": 32} | ALL, 0, steps=1, items=1, batch_size=2, seeds=1),
}

ADAPTER = "adapter: loop in the middle"
STAGED = {"cycle_targets": "steps", "steps_per_cycle": 2}


def loop(first: int, last: int, layers: int) -> dict[str, Any]:
    """A loop over the layers from the first to before the last, of all layers of the donor."""
    return {
        "keep_donor": True,
        "prelude_layers": first,
        "L_layers": last - first,
        "coda_layers": layers - last,
        "H_cycles": 4,
        "L_cycles": 1,
    }


def rows(layers: int) -> list[Row]:
    third, block = layers // 3, max(1, layers // 6)
    middle = loop(third, third + block, layers)
    lora = {"lr": 1e-3}
    return [
        Row("donor as it is", budget="none"),
        Row("donor, fine-tuned on the same tokens"),
        Row("donor, fine-tuned for the same FLOPs", budget="flops", against="ours: fully fine-tuned", seeds=3),
        Row("donor, LoRA 16 on all layers, for the same FLOPs", lora_rank=16, changes=lora, budget="flops", seeds=3),
        Row("ours: fully fine-tuned", shape=middle, changes=STAGED, seeds=3),
        Row(ADAPTER, shape=middle, lora_rank=16, changes=lora | STAGED, seeds=3),
        Row("adapter: answers at every cycle", "parts", middle, lora_rank=16, changes=lora),
        Row("adapter: loop early", "parts", loop(block, 2 * block, layers), lora_rank=16, changes=lora | STAGED),
        Row("adapter: loop late", "parts", loop(layers - 2 * block, layers - block, layers), lora_rank=16, changes=lora | STAGED),
    ]


def study(size: Size) -> Study:
    hops, tasks, seq_len = (size.donor[key] for key in ("hops", "tasks", "seq_len"))
    settings: dict[str, Any] = {
        "seq_len": seq_len, "lr": 1e-4, "gain_lr": 1e-3, "warmup_steps": size.steps // 20, "dataset_name": "chains", "halting_weight": 0.0,
    }  # fmt: skip

    def train(tokenizer: Any, count: int) -> tuple[Any, Any]:
        each = max(2, count // len(hops))
        items = [item for name in tasks for number in hops for item in generate(name, number, each, 1, **tasks[name])]
        blocks = rows_of_questions(items, tokenizer, seq_len if tokenizer.vocab_size > 10_000 else 2048, with_steps=True)
        return blocks, blocks[:8]

    def measure(model: Any, tokenizer: Any, depths: Any) -> Figures:
        runs = [DecodingOptions(H_cycles=H) for H in depths] or [DecodingOptions()]
        found: Figures = {}
        for name, options in tasks.items():
            items = [item for number in hops for item in generate(name, number, size.items, 2, split="test", **options)]
            for cycles, shares in _right(model, tokenizer, name, hops, items, runs).items():
                found.setdefault(cycles, {}).update(shares)
        for cycles, loss in zip(found, _text_losses(model, tokenizer, depths, size), strict=True):
            found[cycles]["text, nats"] = round(loss, 4)
        return found

    return Study("hops", ADAPTER, settings, rows(layers_of(size)), partial(put_donor, size=size), train, measure, start_gain=0.1)


def _right(model: Any, tokenizer: Any, name: str, hops: tuple[int, ...], items: list[Item], runs: list[DecodingOptions]) -> Figures:
    """Share of right answers by hops, and the reach: the most hops up to which nine in ten are right."""
    report, _ = evaluate_questions(model, tokenizer, name, items, runs, "answer", batch_size=20)
    found: Figures = {}
    for row in report.rows:
        if row.difficulty is not None:
            cycles = "donor" if row.H_cycles is None else str(row.H_cycles)
            found.setdefault(cycles, {})[f"{name} {row.difficulty}"] = round(row.accuracy, 4)
    for shares in found.values():
        shares[f"{name}, reach"] = next(
            (before for before, number in zip((0, *hops), hops, strict=False) if shares[f"{name} {number}"] < 0.9), hops[-1]
        )
    return found


def _text_losses(model: Any, tokenizer: Any, depths: Any, size: Size) -> list[float]:
    from recipes.shipped_donor import load_text
    from recursify.evaluation.text_loss import window_losses

    test = load_text(tokenizer, ALL["seq_len"]).test
    windows = window_losses(model, test.select(range(min(WINDOWS, size.items, len(test)))), tuple(depths))
    return [row.mean().item() for row in windows]
