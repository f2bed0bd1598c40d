"""Our labels beside those of TRL's SFTTrainer on the same rows: as it made them once (trl_rows.json), and live where it is installed."""

from __future__ import annotations

import json
from typing import Any

import pytest

from recursify.data.conversation_blocks import encode, pack
from recursify.data.conversation_rows import Encoder
from recursify.data.conversations import COLUMN, form_of, row_json
from tests.support.trl_rows import CASES, FILE, by_trl, named_template, tokenizer_for

IGNORED = -100
RECORDED = json.loads(FILE.read_text(encoding="utf-8"))["cases"]


def ours(tokenizer: Any, case: dict[str, Any]) -> list[dict[str, list[int]]]:
    """The rows as they come out of the blocks, which have room for one each."""
    rows = [row_json(row, form_of(row) or (), "row") for row in case["rows"]]
    encoded = encode({COLUMN: [row for row in rows if row], "place": ["row"] * len(rows)}, Encoder(tokenizer, case["train_on"]))
    table = [dict(zip(encoded, row, strict=True)) for row in zip(*encoded.values(), strict=True)]
    most = case["most"] or 1000
    found = []
    for row in table:
        for block in pack([row], most, tokenizer.eos_token_id):
            size = min(len(row["input_ids"]), most)
            assert set(block["labels"][size:].tolist()) <= {IGNORED}
            found.append({name: block[name][:size].tolist() for name in ("input_ids", "labels")})
    return found


def check(case: dict[str, Any], theirs: list[dict[str, list[int]]]) -> None:
    tokenizer = tokenizer_for(case["template"])
    mine = ours(tokenizer, case)
    assert [row["input_ids"] for row in mine] == [row["input_ids"] for row in theirs]
    without_markers = "messages" in case["rows"][0] and case["train_on"] == "assistant" and "{% generation" not in case["template"]
    if not without_markers:
        assert [row["labels"] for row in mine] == [row["labels"] for row in theirs]
        return
    # TRL then takes its own copy of a known template, with markers around the line ends before and after an answer, too
    for own, other in zip(mine, theirs, strict=True):
        assert any(label != IGNORED for label in own["labels"])
        pairs = list(zip(own["labels"], other["labels"], strict=True))
        assert all(label == IGNORED for label, their in pairs if their == IGNORED)
        more = {their for label, their in pairs if label != their}
        assert {tokenizer.decode([token]) for token in more} <= {"\n"}


@pytest.mark.parametrize("name", CASES)
def test_labels_are_those_that_trl_made(name: str) -> None:
    case = RECORDED[name]
    assert (case["rows"], case["train_on"], case["most"]) == CASES[name][1:], "tests/support/trl_rows.py makes the file anew"
    check(case, case["trl"])


@pytest.mark.parametrize("name", CASES)
def test_labels_are_those_that_trl_makes(name: str) -> None:
    pytest.importorskip("trl")
    template, rows, train_on, most = CASES[name]
    template = named_template(template)
    check({"template": template, "rows": rows, "train_on": train_on, "most": most}, by_trl(template, rows, train_on, most))
