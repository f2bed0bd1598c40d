"""Compact plans of a real pretrained donor, which are what the guides' quick start makes: how far behind the donor on equal tokens?

The text is the language reference that every CPython carries; of such text the donor has seen much, so that it is a teacher here: rows
differ in whether its predictions (distilled) and its hidden states (matched) are drawn to. The start gain is the one of the sweep, as in a
training without `--start_gain`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from recipes.evidence.prose import SEQ_LEN, language_reference, losses
from recipes.evidence.real_donor import layers_of, put_donor
from recipes.evidence.study import Figures, Row, Size, Study

SIZES = {
    "cpu": Size({}, 0, steps=60, items=50, batch_size=8, seeds=1),
    "gpu": Size({}, 0, steps=1000, items=10**6, batch_size=32, seeds=3),
    "test": Size({"layers": 6, "hidden_size": 16, "intermediate_size": 32}, 0, steps=1, items=4, batch_size=2, seeds=1),
}

AIMS: dict[str, dict[str, Any]] = {
    "": {},
    ", distilled": {"distill_weight": 1.0},
    ", matched": {"match_hidden_weight": 1.0},
    ", matched and distilled": {"match_hidden_weight": 1.0, "distill_weight": 1.0},
}
OURS = "4 layers, H 3, L 1"


def rows(layers: int) -> list[Row]:
    few, third = ({"L_layers": count, "H_cycles": 3, "L_cycles": 1} for count in (4, max(4, layers // 3)))
    return [
        Row("donor as it is", budget="none"),
        Row("donor, fine-tuned on the same tokens", seeds=3),
        Row("4 layers, as converted", shape=few, budget="none"),
        Row("4 layers without recursion", shape=few | {"H_cycles": 1, "L_cycles": 0}, changes={"enable_deep_supervision": False}),
        *(Row(f"{OURS}{name}", shape=few, changes=changes, seeds=3) for name, changes in AIMS.items()),
        *(Row(f"a third of the layers, H 3, L 1{name}", shape=third, changes=changes) for name, changes in AIMS.items()),
        Row(f"{OURS}, averages of neighbours", shape=few, averaged=True),
    ]


def study(size: Size) -> Study:
    settings: dict[str, Any] = {"seq_len": SEQ_LEN, "lr": 3e-4, "warmup_steps": size.steps // 10, "dataset_name": "pydoc_data.topics"}

    def train(tokenizer: Any, count: int) -> tuple[Any, Any]:
        found = language_reference(tokenizer)
        return found.train, found.validation.select(range(min(size.items, len(found.validation))))

    def measure(model: Any, tokenizer: Any, depths: Any) -> Figures:
        test = language_reference(tokenizer).test
        return losses(model, test.select(range(min(size.items, len(test)))), depths)

    return Study("compact", OURS, settings, rows(layers_of(size)), partial(put_donor, size=size), train, measure, start_gain=None)
