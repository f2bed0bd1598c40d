"""--cycle_targets steps: every cycle is scored on what is known after its steps, and on that alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from recursify.checkpoints import checkpoint
from recursify.data.question_rows import STEP_COLUMNS, question_columns
from recursify.data.tasks import Item, generate, prompt, read
from recursify.errors import UserError
from recursify.network.losses import IGNORED
from recursify.training import TrainSettings, train
from recursify.training.collate import Collate
from recursify.training.loss_module import LossModule, Supervision
from tests.support.runs import recursive
from tests.support.tiny import make_tiny_tokenizer

TOKENIZER = make_tiny_tokenizer()


def rows(items: list[Item], seq_len: int) -> list[dict[str, Any]]:
    columns = question_columns(items, TOKENIZER, seq_len, with_steps=True)
    return [{name: columns[name][n] for name in columns} for n in range(len(columns["input_ids"]))]


def words_at(labels: torch.Tensor) -> dict[int, str]:
    """Place -> word of what is scored, without the end of text."""
    unwanted = (IGNORED, TOKENIZER.eos_token_id)
    return {place: TOKENIZER.decode([label]).strip() for place, label in enumerate(labels.tolist()) if label not in unwanted}


def collated(items: list[Item], cycles: int, steps_per_cycle: int, seq_len: int = 64) -> dict[str, torch.Tensor]:
    return Collate(TOKENIZER.eos_token_id, cycles, steps_per_cycle)(rows(items, seq_len))


def test_states_are_known_after_as_many_steps_as_letters() -> None:
    item = generate("permutations", 5, 1, 0)[0]
    batch = collated([item], 4, 2, 32)
    places = list(words_at(batch["labels"][0]))
    states, answer = places[:5], places[5:]
    assert len(set(item.labels[i] for i in (1, 3, 4))) > 1 and answer
    for cycle, letters in enumerate((2, 4, 5, 5)):
        found = words_at(batch["cycle_labels"][0, cycle])
        assert {place: word for place, word in found.items() if place in states} == dict(zip(states[:letters], item.labels, strict=False))
        # at the answer's place: the state after these letters, and at last the answer
        told = [word for place, word in found.items() if place in answer]
        assert told[-1:] == [item.labels[letters - 1]] or item.labels[letters - 1] == item.answer
    assert torch.equal(batch["cycle_labels"][0, 2], batch["labels"][0])  # the last steps, end of text included
    assert torch.equal(batch["cycle_labels"][0, 3], batch["labels"][0])  # and a cycle more has to hold it


def test_letters_that_are_not_scored_have_no_label() -> None:
    item = generate("permutations", 4, 1, 0, unscored=3)[0]
    batch = collated([item], 3, 2, 32)
    assert len(item.question.split()) == 7 and len(item.labels) == 4
    whole = {item.question: item.labels for item in generate("permutations", 7, 300, 0)}
    assert list(words_at(batch["labels"][0]).values()) == list(item.labels) and whole
    assert [len(words_at(batch["cycle_labels"][0, cycle])) for cycle in range(3)] == [2, 4, 4]
    assert batch["input_ids"][0].tolist().count(TOKENIZER.eos_token_id) > 0
    assert TOKENIZER.eos_token_id not in batch["labels"][0].tolist()


@pytest.mark.parametrize("name", ["pointers", "chains", "facts"])
def test_at_the_answers_place_is_what_was_reached(name: str) -> None:
    options = {"facts": {"people": 4}, "chains": {"chains": 2}, "pointers": {"nodes": 8}}[name]
    item = generate(name, 4, 1, 0, **options)[0]
    reached = item.reached or item.labels
    batch = collated([item], 4, 1, 600)
    place = len(TOKENIZER(prompt(item)).input_ids)
    for cycle in range(4):
        target = batch["cycle_labels"][0, cycle, place].item()
        ids = TOKENIZER(f"{prompt(item)} {reached[cycle]}").input_ids
        final = TOKENIZER(f"{prompt(item)} {item.answer}").input_ids
        assert target == (ids[place] if ids[place] != final[place] or cycle == 3 else target)
    two = collated([item], 2, 2, 600)["cycle_labels"][0]
    assert torch.equal(two[1], batch["labels"][0]) and two[0, place] == batch["cycle_labels"][0, 1, place]


def test_worked_solutions(tmp_path: Path) -> None:
    worked = {"question": "How many?", "answer": "He has 5*4=<<5*4=20>>20.\nThen some.\nThat is 20+9=<<20+9=29>>29.\n#### 29"}
    (tmp_path / "a.jsonl").write_text(json.dumps(worked) + "\n")
    (item,) = read("gsm8k", tmp_path / "a.jsonl")
    assert item.reached == ("20", "", "29")
    found = [words_at(each) for each in collated([item], 3, 1)["cycle_labels"][0]]
    answer = words_at(collated([item], 3, 1)["labels"][0])
    assert found[2] == answer and found[0] == found[1] and len(found[0]) == 1
    place = len(TOKENIZER(prompt(item)).input_ids)
    assert min(found[0]) >= place and TOKENIZER.decode(TOKENIZER(f"{prompt(item)} 20").input_ids[min(found[0]) :]).strip() in ("0", "20")

    sets = [{"question": "Is Tom a lem or rix?", "answer": "Tom is a lem.", "steps": ["Tom is a zor.", "Every zor is a lem."]}]
    (tmp_path / "b.json").write_text(json.dumps(sets))
    (item,) = read("prosqa", tmp_path / "b.json")
    first, last = (words_at(each) for each in collated([item], 2, 1)["cycle_labels"][0])
    assert len(first) == 1 and len(last) > 1  # the token in which the sentences differ


def test_rows_of_several_questions() -> None:
    items = generate("chains", 3, 4, 0, chains=1)
    parts = [rows([item], 400)[0] for item in items]
    packed, begins = rows(items, 400)[0], 0
    assert packed["step_counts"] == sorted(packed["step_counts"])
    found = set(zip(*(packed[name] for name in STEP_COLUMNS), strict=True))
    for part in parts:
        own = zip(*(part[name] for name in STEP_COLUMNS), strict=True)
        assert {(begins + place, count, label) for place, count, label in own} <= found
        begins += part["input_ids"].index(TOKENIZER.eos_token_id) + 1
    assert len(found) == sum(len(part["step_places"]) for part in parts)


@pytest.mark.parametrize("backprop", ["full", "cycle"])
def test_loss_is_that_of_each_cycles_own_labels(backprop: str) -> None:
    model = recursive(H_cycles=3)
    torch.manual_seed(1)
    ids = torch.randint(0, 300, (2, 9))
    cycle_labels = torch.randint(0, 300, (2, 2, 9))
    cycle_labels[:, 0, 4:] = IGNORED  # the first cycle is scored on fewer tokens
    labels = cycle_labels[:, 1].clone()
    module = LossModule(model, Supervision(every_cycle=True, weight=0.5, schedule="constant", backprop=backprop))
    outputs = module(ids, labels, cycle_labels=cycle_labels)
    outputs["loss"].backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    model.zero_grad()
    base = model.model
    e, block, read = base.begin_pass(ids, None)
    shares = module.supervision.shares(3)
    expected = torch.zeros(())
    states: Any = base.recursion.steps(e, block, 3, 1, backprop)
    sums = []
    for c, z in enumerate(states):
        logits = model.lm_head(read(z))[:, :-1].flatten(0, 1)
        target = cycle_labels[:, min(c, 1), 1:].flatten()
        sums.append(F.cross_entropy(logits, target, ignore_index=IGNORED, reduction="sum"))
        expected = expected + shares[c] * sums[-1] / (labels[:, 1:] != IGNORED).sum()
    torch.testing.assert_close(outputs["loss"].detach(), expected.detach())
    if backprop == "full":
        expected.backward()
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, dict(model.named_parameters())[name].grad, atol=1e-5, rtol=1e-4)
    # the log shows means over a cycle's own tokens
    own = [(cycle_labels[:, min(c, 1), 1:] != IGNORED).sum() for c in range(3)]
    means = outputs["cycle_losses"] / outputs["scored"]
    torch.testing.assert_close(means, torch.stack([s.detach() / n for s, n in zip(sums, own, strict=True)]))


def test_equal_labels_are_the_usual_loss() -> None:
    model = recursive()
    ids = torch.randint(0, 300, (2, 9))
    module = LossModule(model, Supervision(every_cycle=True, schedule="constant"))
    usual, own = module(ids, ids), module(ids, ids, cycle_labels=ids[:, None].expand(-1, 5, -1))
    for name in ("loss", "cycle_losses", "scored"):
        torch.testing.assert_close(usual[name], own[name])


def flags(folder: Path, **changes: Any) -> TrainSettings:
    common: dict[str, Any] = {
        "checkpoint": str(folder / "init.pt"), "dataset_name": "permutations:difficulty=4,count=200", "seq_len": 64, "max_steps": 2,
        "batch_size": 2, "output_dir": str(folder / "out"), "device": "cpu", "bf16": False, "enable_deep_supervision": True,
        "cycle_targets": "steps", "steps_per_cycle": 2, "generate_every": 0, "log_every": 1,
    }  # fmt: skip
    return TrainSettings(**common | changes)


def test_a_run(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "init.pt", recursive(), TOKENIZER)
    result = train(flags(tmp_path, cycle_choices=(1, 2, 3, 5), save_every=1))
    assert result.fit is not None and result.best is not None
    assert result.fit.history[-1]["eval_loss"] > 0
    with pytest.raises(UserError, match="--resume: .* --steps_per_cycle was 2, is 3"):
        train(flags(tmp_path, steps_per_cycle=3, resume=True, cycle_choices=(1, 2, 3, 5)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"enable_deep_supervision": False}, "--cycle_targets steps: gives every cycle a target, but only the last is scored; add"),
        ({"monotone_weight": 0.1}, "--monotone_weight: compares the losses of cycles, whose targets differ with --cycle_targets steps"),
        ({"halting_weight": 0.1}, "--halting_weight: compares the losses of cycles"),
        ({"cycle_targets": "answer"}, "--steps_per_cycle: 2 has no effect without --cycle_targets steps; add it"),
        ({"steps_per_cycle": 0}, "--steps_per_cycle: expected at least 1, got 0"),
        ({"dataset_name": "addition:count=20"}, "--cycle_targets steps: expected questions that say what is known after each step"),
        (
            {"dataset_name": "text.txt"},
            "--cycle_targets steps: expected question sets, whose steps are known, .*, got text.txt, which is text",
        ),
        ({"mix": ("text.txt=1",)}, "--cycle_targets steps: expected question sets, .*, got text.txt, which is text"),
    ],
)
def test_refused_by_name(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    checkpoint.save(tmp_path / "init.pt", recursive(), TOKENIZER)
    with pytest.raises(UserError, match=message):
        train(flags(tmp_path, **changes))


def test_columns_are_there_only_where_they_are_wanted() -> None:
    items = generate("pointers", 2, 3, 0)
    assert not set(STEP_COLUMNS) & set(question_columns(items, TOKENIZER, 256))
    assert set(STEP_COLUMNS) < set(question_columns(items, TOKENIZER, 256, with_steps=True))
