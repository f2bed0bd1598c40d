"""Prose: the bundled donor, on the language reference that every CPython carries.

Such text needs few serial steps, and the donor is small: here recursion must at least cost nothing. Losses are measured on held-out
topics, which were not used for selection either.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from recipes.evidence.exits import every_exit
from recipes.evidence.study import Figures, Row, Size, Study, on_layers
from recursify.evaluation.text_loss import window_losses

SEQ_LEN = 128
SIZES = {
    "cpu": Size({}, 0, steps=120, items=10**6, batch_size=8, seeds=3),
    "gpu": Size({}, 0, steps=600, items=10**6, batch_size=32, seeds=3),
    "test": Size({}, 0, steps=1, items=4, batch_size=2, seeds=1),
}

KEEP = {"keep_donor": True, "L_layers": 2, "H_cycles": 3, "L_cycles": 1}
COMPACT = {"L_layers": 4, "H_cycles": 3, "L_cycles": 1}
OURS = "ours: keep_donor, H 3, L 1, start gain 0"


def rows() -> list[Row]:
    return [
        Row("donor as it is", budget="none"),
        Row("ours, as converted", shape=KEEP, budget="none"),
        Row("naive loop, as converted", shape=KEEP, rival="naive", budget="none"),
        Row("bare sum (TRM), as converted", shape=KEEP | {"injection": "sum_norm"}, budget="none"),
        Row("concat adapter, as converted", shape=KEEP, rival="concat", budget="none"),
        Row("selective gate, as converted", shape=KEEP, rival="gate", budget="none"),
        Row("donor, fine-tuned on the same tokens", seeds=3),
        Row(OURS, shape=KEEP, seeds=3),
        Row("start gain 0.1", "parts", KEEP, changes={"start_gain": 0.1}),
        Row("start gain 0.45", "parts", KEEP, changes={"start_gain": 0.45}),
        Row(
            "4 of 8 layers without recursion",
            "shape",
            COMPACT | {"H_cycles": 1, "L_cycles": 0},
            changes={"enable_deep_supervision": False},
        ),
        Row("compact, H 3, L 1", "shape", COMPACT),
        Row("compact, H 3, L 1, distilled", "shape", COMPACT, changes={"distill_weight": 1.0}),
        Row("compact, H 3, L 1, matched", "shape", COMPACT, changes={"match_hidden_weight": 1.0}),
        Row("compact, H 3, L 1, matched and distilled", "shape", COMPACT, changes={"match_hidden_weight": 1.0, "distill_weight": 1.0}),
        Row("compact, H 2, L 0", "shape", COMPACT | {"H_cycles": 2, "L_cycles": 0}),
        Row("compact, H 2, L 0, matched", "shape", COMPACT | {"H_cycles": 2, "L_cycles": 0}, changes={"match_hidden_weight": 1.0}),
        Row("compact of 6 layers, H 3, L 1", "shape", COMPACT | {"L_layers": 6}),
        Row("compact of 6 layers, H 3, L 1, matched", "shape", COMPACT | {"L_layers": 6}, changes={"match_hidden_weight": 1.0}),
        Row("compact, H 3, L 1, evenly picked layers", "starts", COMPACT),  # again: the same machine and precision as the rows beside it
        Row("compact, H 3, L 1, start gain by the sweep", "starts", COMPACT, changes={"start_gain": None}),
        Row("compact, H 3, L 1, start gain 0.45", "starts", COMPACT, changes={"start_gain": 0.45}),
        Row("compact, H 3, L 1, averages of neighbours", "starts", COMPACT, averaged=True),
        *(Row(f"compact, H 3, L 1, {name} layers", "starts", COMPACT | {"layer_selection": name}) for name in ("first", "middle", "last")),
        Row("1 layer before, 2 looped, 1 behind, H 3, L 1", "starts", COMPACT | {"L_layers": 2, "prelude_layers": 1, "coda_layers": 1}),
        Row("start gain 0.45, with a halting head", "exits", KEEP, changes={"start_gain": 0.45, "halting_weight": 0.1}, exits=True),
        Row("adapter: donor frozen, LoRA 16 in the loop", "adapter", KEEP, lora_rank=16, changes={"lr": 3e-3, "start_gain": 0.1}, seeds=3),
        Row("adapter: start gain 0.45", "adapter", KEEP, lora_rank=16, changes={"lr": 3e-3, "start_gain": 0.45}),
        Row("adapter: loop of 6 layers", "adapter", KEEP | {"L_layers": 6}, lora_rank=16, changes={"lr": 3e-3, "start_gain": 0.1}),
        Row("donor, LoRA 16 on all layers, same tokens", "adapter", lora_rank=16, changes={"lr": 3e-3}, seeds=3),
        Row("donor, LoRA 16 on the looped layers, same tokens", "adapter", lora_rank=16, lora=on_layers(3, 4), changes={"lr": 3e-3}),
        Row("naive loop", shape=KEEP, rival="naive"),
        Row("bare sum (TRM)", shape=KEEP | {"injection": "sum_norm"}),
        Row("concat adapter (retrofitting-recurrence)", shape=KEEP, rival="concat"),
        Row("selective gate (LoopUS)", shape=KEEP, rival="gate"),
        Row("donor, fine-tuned for the same FLOPs", budget="flops"),
        Row("distilled from the donor", "parts", KEEP, changes={"distill_weight": 0.5}),
        Row("gains at 30 times the rate", "parts", KEEP, changes={"gain_lr": 9e-3}),
    ]


def study(size: Size) -> Study:
    settings: dict[str, Any] = {"seq_len": SEQ_LEN, "lr": 3e-4, "warmup_steps": 10, "dataset_name": "pydoc_data.topics"}

    def donor(folder: Path) -> dict[str, Any]:
        from recursify.demo.prose import donor_folder

        shutil.copytree(donor_folder(), folder)
        return {"name": "the donor that ships"}

    def train(tokenizer: Any, count: int) -> tuple[Any, Any]:
        found = language_reference(tokenizer)
        return found.train, found.validation.select(range(min(size.items, len(found.validation))))

    def measure(model: Any, tokenizer: Any, depths: Any) -> Figures:
        test = language_reference(tokenizer).test
        depths = [0, *depths] if getattr(model.config, "is_adapter", False) else depths
        return losses(model, test.select(range(min(size.items, len(test)))), depths)

    def exits(model: Any, tokenizer: Any) -> list[dict[str, Any]]:
        """Of the test windows; thresholds are set on validation windows."""
        found = language_reference(tokenizer)
        ids, held_out = (torch.tensor(part[: min(size.items, 100)]["input_ids"]) for part in (found.test, found.validation))
        return every_exit(model, ids, ids, torch.ones_like(ids[:, 1:], dtype=torch.bool), held_out, model.config.H_cycles)

    return Study("prose", OURS, settings, rows(), donor, train, measure, start_gain=0.0, exits=exits)


# Imported in functions: the rows alone need no datasets library.
def language_reference(tokenizer: Any) -> Any:
    """Windows of the text in three parts."""
    from recipes.shipped_donor import load_text

    return load_text(tokenizer, SEQ_LEN)


def losses(model: Any, windows: Any, depths: Any) -> Figures:
    """Loss at every depth, and that of every window for paired differences."""
    found = window_losses(model, windows, tuple(depths))
    return {
        "donor" if H is None else str(H): {"loss": round(row.mean().item(), 5), "windows": [round(loss, 4) for loss in row.tolist()]}
        for H, row in zip(list(depths) or [None], found, strict=True)
    }
