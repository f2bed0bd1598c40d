"""Length: do more cycles than were trained go further than what was trained?

The bundled tracker (products of permutations of three things, up to 6 to 8 letters) is fine-tuned on words of which 16 letters are scored
and 8 more are read, and evaluated at every letter of words of 64, with up to four times the trained cycles. Most words go on from a
product that is told, behind up to 16 letters (`offset`): how far a cycle gets is then a matter of steps, not of places. What differs
between rows is what each cycle is asked for: what can be known after its steps, the answer at every cycle, or the answer at the last.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from recipes.evidence.state_tracking import shares
from recipes.evidence.study import Figures, Row, Size, Study, rows_of_questions
from recursify.data.tasks import generate

SCORED, UNSCORED, OFFSET, ASKED = 16, 8, 16, 64  # letters
EXTRA = 9  # tokens besides the letters: "Question:", "Answer:", the product that is told, the answer, the end
SEQ_LEN = OFFSET + SCORED + UNSCORED + EXTRA
SHOWN = (8, 16, 20, 24, 32, 48, 64)
STEPS_PER_CYCLE = 6

SIZES = {
    "cpu": Size({}, 0, steps=1500, items=200, batch_size=32, seeds=3),
    "gpu": Size({}, 0, steps=6000, items=1000, batch_size=128, seeds=3),
    "test": Size({}, 0, steps=2, items=4, batch_size=4, seeds=1),
}

KEEP = {"keep_donor": True, "L_layers": 2, "H_cycles": 4, "L_cycles": 2}
ONE = KEEP | {"L_cycles": 1}
DEPTHS: dict[str, Any] = {"cycle_choices": (2, 4, 6, 8), "cycle_weights": ()}
STAGED = {
    "cycle_targets": "steps",
    "steps_per_cycle": STEPS_PER_CYCLE,
    "deep_supervision_schedule": "constant",
    "deep_supervision_weight": 1.0,
}
OURS = "ours: targets for every cycle"


def rows() -> list[Row]:
    return [
        Row("donor as it is", budget="none"),
        Row("donor, fine-tuned on the same tokens"),
        Row("donor, fine-tuned for the same FLOPs", budget="flops", seeds=3),
        Row("answers at the last cycle", shape=KEEP, changes=DEPTHS | {"enable_deep_supervision": False}, seeds=3),
        Row("answers at every cycle", shape=KEEP, changes=DEPTHS, seeds=3),
        Row(OURS, shape=KEEP, changes=DEPTHS | STAGED, seeds=3),
        Row("one depth", "parts", KEEP, changes=STAGED | {"cycle_choices": (), "cycle_weights": ()}),
        Row("4 letters per cycle", "parts", KEEP, changes=DEPTHS | STAGED | {"steps_per_cycle": 4}),
        Row("L 1", "parts", ONE, changes=DEPTHS | STAGED),
        Row("L 1, 5 letters per cycle", "parts", ONE, changes=DEPTHS | STAGED | {"steps_per_cycle": 5}),
        Row("L 1, learning rate 1e-3", "parts", ONE, changes=DEPTHS | STAGED | {"lr": 1e-3}),
        Row("L 1, answers at every cycle, learning rate 1e-3", "parts", ONE, changes=DEPTHS | {"lr": 1e-3}),
        Row("L 3", "parts", KEEP | {"L_cycles": 3}, changes=DEPTHS | STAGED),
        Row("loop of all 4 layers, L 1", "parts", ONE | {"L_layers": 4}, changes=DEPTHS | STAGED),
        Row("depth curriculum", "parts", KEEP, changes=DEPTHS | STAGED | {"depth_curriculum": 0.5}),
    ]


def study(size: Size) -> Study:
    settings: dict[str, Any] = {
        "seq_len": SEQ_LEN, "lr": 5e-4, "warmup_steps": size.steps // 10, "weight_decay": 0.1, "lr_schedule": "wsd",
        "dataset_name": f"permutations:difficulty={SCORED},unscored={UNSCORED},offset={OFFSET}",
    }  # fmt: skip

    def donor(folder: Path) -> dict[str, Any]:
        from recursify.demo.state_tracking import tracker_folder

        shutil.copytree(tracker_folder(), folder)
        return {"name": "the tracker that ships"}

    def train(tokenizer: Any, count: int) -> tuple[Any, Any]:
        words = generate("permutations", SCORED, count // 4, 1, unscored=UNSCORED, offset=OFFSET)
        blocks = rows_of_questions(words, tokenizer, SEQ_LEN, with_steps=True)
        return blocks, blocks[:16]

    def measure(model: Any, tokenizer: Any, depths: Any) -> Figures:
        wanted = (1, 2, 4, 6, 8, 10, 12, 16) if depths else ()
        return shares(model, tokenizer, generate("permutations", ASKED, size.items, 2, split="test"), wanted, SHOWN)

    return Study("length", OURS, settings, rows(), donor, train, measure)
