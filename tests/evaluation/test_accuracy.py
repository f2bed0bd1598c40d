"""Accuracy by difficulty and cycle count: against answers written one by one, and labels guessed from whole logits."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from recursify import RecursiveLLM, convert
from recursify.data.tasks import Item, as_text, prompt
from recursify.errors import UserError
from recursify.evaluation import accuracy
from recursify.evaluation.accuracy import Accuracy, QuestionsReport, evaluate_questions
from recursify.inference.generation import generate_text
from recursify.inference.options import DecodingOptions, Sampling
from tests.support.tiny import make_tiny_tokenizer, tiny_donor, tiny_model

RUNS = [DecodingOptions(H_cycles=H) for H in (0, 1, 2)]
HALTED = DecodingOptions(H_cycles=2, halt="entropy", halt_threshold=2.0)
TOKENIZER = make_tiny_tokenizer()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> RecursiveLLM:
    """Keep-donor, gains and states well away from 0, so that the depths differ."""
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("donor")
    tiny_donor("llama", folder, num_hidden_layers=3)
    model = convert(str(folder), L_layers=1, keep_donor=True, H_cycles=2, L_cycles=1)
    with torch.no_grad():
        for parameter in model.model.recursion.parameters():
            parameter.normal_()
    return model


def written(model: Any, item: Item, new: int, run: DecodingOptions) -> str:
    sampling = Sampling(H_cycles=run.H_cycles, halt=run.halt, halt_threshold=run.halt_threshold, max_new_tokens=new, temperature=0)
    return generate_text(model, TOKENIZER, prompt(item), sampling).text


def rows_of(report: QuestionsReport, difficulty: int | None) -> list[Accuracy]:
    return [row for row in report.rows if row.difficulty == difficulty]


# --- Judged by the answer ----------------------------------------------------------------------------------------------------------------


def test_batched_accuracy_equals_single_items(model: RecursiveLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a scoring rule that random output can satisfy."""
    monkeypatch.setattr(accuracy, "is_right", lambda item, text: sum(text.encode()) % 2 == 0)
    items = [Item(f"{'the ship ' * (number % 3)}crosses {number}", "a river", 1 + number % 2) for number in range(7)]
    runs = [*RUNS, HALTED]
    report, rights = evaluate_questions(model, TOKENIZER, "some", items, runs, batch_size=3)
    new = 1 + len(TOKENIZER(" a river").input_ids)
    assert rights.tolist() == [[sum(written(model, item, new, run).split("\n")[0].encode()) % 2 == 0 for item in items] for run in runs]
    assert len({tuple(right) for right in rights.tolist()}) > 2
    assert [(row.H_cycles, row.halt) for row in rows_of(report, None)] == [(0, None), (1, None), (2, None), (2, "entropy")]
    for right, row, odd, even in zip(rights, rows_of(report, None), rows_of(report, 1), rows_of(report, 2), strict=True):
        assert (row.right, row.count, odd.count, even.count) == (right.sum(), 7, 4, 3)
        assert row.standard_error == pytest.approx(right.float().std().item() / math.sqrt(7)) and row.accuracy == row.right / 7
        assert (odd.right, even.right) == (right[::2].sum(), right[1::2].sum())


def test_a_plain_donor_has_one_run() -> None:
    report, rights = evaluate_questions(tiny_model("llama"), TOKENIZER, "some", [Item("a ship", "river", 1)], [DecodingOptions()])
    assert rights.shape == (1, 1) and report.items == 1
    assert [(row.H_cycles, row.difficulty, row.count, row.standard_error) for row in report.rows] == [
        (None, None, 1, None),
        (None, 1, 1, None),
    ]
    assert "plain" in report.lines()[2]


def pretend(monkeypatch: pytest.MonkeyPatch, *texts: str) -> list[Sampling]:
    """Make a model generate these texts, and record its arguments."""
    asked: list[Sampling] = []

    def write(model: Any, tokenizer: Any, prompts: list[str], sampling: Sampling) -> list[Any]:
        asked.append(sampling)
        return [type("Written", (), {"text": text})() for text in texts[: len(prompts)]]

    monkeypatch.setattr(accuracy, "generate_batch", write)
    return asked


def test_continued_answer_is_wrong(model: RecursiveLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = pretend(monkeypatch, " river bridge")
    report, _ = evaluate_questions(model, TOKENIZER, "some", [Item("a ship", "river", 1)], RUNS[:1])
    assert report.rows[0].right == 0
    assert asked[0].max_new_tokens == 1 + len(TOKENIZER(" river").input_ids) and asked[0].temperature == 0 and asked[0].stop == ("\n",)


def test_worked_steps_may_take_lines(model: RecursiveLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = pretend(monkeypatch, " 2 and 3\nmake 5\n#### 5")
    item = Item("2 + 3", "5", 2, "number", "2 and 3\nmake 5")
    report, _ = evaluate_questions(model, TOKENIZER, "some", [item], RUNS[:1])
    assert report.rows[0].right == 1 and "\n" not in asked[0].stop and "\nQuestion:" in asked[0].stop
    assert asked[0].max_new_tokens == 1 + len(TOKENIZER(as_text(item, with_steps=True)[len(prompt(item)) :]).input_ids)


def test_the_table(model: RecursiveLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, "river", "ship", "river", "song")
    items = [Item(f"{number} ship", "river", difficulty) for number, difficulty in enumerate((4, 4, 16, 16))]
    report, _ = evaluate_questions(model, TOKENIZER, "rivers", items, [*RUNS, HALTED])
    title, _, head, *lines = report.lines()
    assert title.startswith("rivers: 4 questions") and head.split() == [
        "difficulty", "count", *(word for H in "012" for word in ("H_cycles", H)), "<=", "2,", "entropy",
    ]  # fmt: skip
    assert [line.split()[:4] for line in lines] == [
        ["all", "4", "50.0", "+-28.9"],
        ["4", "2", "50.0", "+-50.0"],
        ["16", "2", "50.0", "+-50.0"],
    ]


def test_halting_runs_are_separate_in_json(model: RecursiveLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, "river")
    found = evaluate_questions(model, TOKENIZER, "rivers", [Item("a ship", "river", 4)], [*RUNS, HALTED])[0].to_dict()
    assert {key: found[key] for key in ("name", "judge", "items")} == {"name": "rivers", "judge": "answer", "items": 1}
    assert [row["H_cycles"] for row in found["rows"]] == [0, 0, 1, 1, 2, 2] and {row["halt"] for row in found["rows"]} == {None}
    assert found["halting"][1] == {
        "H_cycles": 2, "halt": "entropy", "difficulty": 4, "right": 1, "count": 1, "standard_error": None, "accuracy": 1.0,
    }  # fmt: skip


def test_more_than_the_positions(model: RecursiveLLM) -> None:
    items = [Item("ship " * 600, "river", 9)]
    for judge in ("answer", "labels"):
        with pytest.raises(UserError, match="--questions long: the longest question takes .* tokens .* the model has 512 positions"):
            evaluate_questions(model, TOKENIZER, "long", [replace(items[0], labels=(" ",))], RUNS, judge)  # type: ignore[arg-type]


def test_an_answer_may_be_as_long_as_the_longest_of_the_set(model: RecursiveLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = pretend(monkeypatch, "x", "x", "x")
    answered = ["river", "river bridge castle", "a ship"]
    evaluate_questions(model, TOKENIZER, "some", [Item("a ship", answer, 1) for answer in answered], RUNS[:1])
    assert asked[0].max_new_tokens == 1 + max(len(TOKENIZER(f" {answer}").input_ids) for answer in answered)


def test_one_item_with_steps_is_enough_for_answers_of_several_lines(model: RecursiveLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = pretend(monkeypatch, "x", "x")
    evaluate_questions(model, TOKENIZER, "some", [Item("2 + 3", "5", 1, "number"), Item("2 + 3", "5", 2, "number", "2 and 3")], RUNS[:1])
    assert asked[0].stop == ("\n\n", "\nQuestion:")


@pytest.mark.parametrize("judge", ["answer", "labels"])
def test_as_many_tokens_as_there_are_positions(judge: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, "x")
    monkeypatch.setattr(accuracy, "label_tokens", lambda item, tokenizer: (list(tokenizer(prompt(item)).input_ids), [1], [2]))
    item = Item("a ship", "river", 1, labels=("river",))
    tokens = len(TOKENIZER(prompt(item)).input_ids) + (1 + len(TOKENIZER(" river").input_ids) if judge == "answer" else 0)
    for positions in (tokens, tokens - 1):
        donor = tiny_model("llama", num_hidden_layers=1)
        donor.config.max_position_embeddings = positions
        if positions == tokens:
            evaluate_questions(donor, TOKENIZER, "some", [item], [DecodingOptions()], judge)
        else:
            with pytest.raises(UserError, match=f"takes {tokens} tokens .* the model has {positions} positions"):
                evaluate_questions(donor, TOKENIZER, "some", [item], [DecodingOptions()], judge)


# --- Judged by the labels ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def states(model: RecursiveLLM, monkeypatch: pytest.MonkeyPatch) -> list[Item]:
    """Questions of 2 to 4 labels, every other of which is what the model guesses at one cycle."""
    items = [Item(" ".join(["ship", "river", "song", "a"][:count]), "x", count, labels=("x",) * count) for count in (4, 2, 3, 4)]

    def scripted_labels(item: Item, tokenizer: Any) -> tuple[list[int], list[int], list[int]]:
        ids = list(tokenizer(prompt(item)).input_ids)
        places = [2 + 2 * number for number in range(len(item.labels))]
        with torch.no_grad():
            guessed = model(torch.tensor([ids]), H_cycles=1).logits[0, places].argmax(dim=-1).tolist()
        return ids, places, [guess ^ number % 2 for number, guess in enumerate(guessed)]

    monkeypatch.setattr(accuracy, "label_tokens", scripted_labels)
    return items


def test_labels_are_predicted_in_one_pass(states: list[Item], model: RecursiveLLM) -> None:
    report, rights = evaluate_questions(model, TOKENIZER, "states", states, [*RUNS, HALTED], "labels", batch_size=3)
    assert report.judge == "labels" and "every label" in report.lines()[0]
    for index, run in enumerate([*RUNS, HALTED]):
        by_hand = []
        for item in states:
            ids, places, targets = accuracy.label_tokens(item, TOKENIZER)  # type: ignore[misc]
            with torch.no_grad():
                logits = model(torch.tensor([ids]), **run.generate_kwargs(model)).logits[0, places]
            by_hand.append((logits.argmax(dim=-1) == torch.tensor(targets)).tolist())
        assert rights[index].tolist() == [guesses[-1] for guesses in by_hand]
        mine = [row for row in report.rows if (row.H_cycles, row.halt) == (run.H_cycles, None if run.halt == "none" else run.halt)]
        assert [(row.difficulty, row.count) for row in mine] == [(None, 13), (1, 4), (2, 4), (3, 3), (4, 2)]
        assert [row.right for row in mine[1:]] == [sum(g[k] for g in by_hand if len(g) > k) for k in range(4)]
    at_one = [row for row in report.rows if row.H_cycles == 1]
    assert [row.accuracy for row in at_one[1:]] == [1.0, 0.0, 1.0, 0.0]


def test_labels_of_one_question_are_not_independent(states: list[Item], model: RecursiveLLM) -> None:
    """The error is that of a ratio of sums over questions, not of a share of labels."""
    row = evaluate_questions(model, TOKENIZER, "states", states, [RUNS[1]], "labels")[0].rows[0]
    right, count = torch.tensor([2.0, 1, 2, 2]), torch.tensor([4.0, 2, 3, 4])
    off = right - 7 / 13 * count
    assert row.accuracy == 7 / 13 and row.standard_error == pytest.approx(math.sqrt(4 / 3 * off.square().sum().item()) / 13)


def test_label_predictions_with_halting(states: list[Item], model: RecursiveLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other than the model's own, by a threshold that never halts, and one that always does."""
    never, always = (
        DecodingOptions(H_cycles=3, halt="entropy", halt_threshold=0.0),
        DecodingOptions(H_cycles=3, halt="entropy", halt_threshold=1e9),
    )
    real = accuracy.label_tokens

    def scripted_labels(item: Item, tokenizer: Any) -> tuple[list[int], list[int], list[int]]:
        ids, places, _ = real(item, tokenizer)  # type: ignore[misc]
        with torch.no_grad():
            return ids, places, model(torch.tensor([ids]), H_cycles=3).logits[0, places].argmax(dim=-1).tolist()

    monkeypatch.setattr(accuracy, "label_tokens", scripted_labels)
    runs = [never, DecodingOptions(H_cycles=3), DecodingOptions(H_cycles=2), always, DecodingOptions(H_cycles=1)]
    right = [row.right for row in evaluate_questions(model, TOKENIZER, "states", states, runs, "labels")[0].rows if row.difficulty is None]
    assert right[0] == right[1] == 13 > right[2] and right[3] == right[4] < 13


def test_dropout_is_off_for_labels(states: list[Item], monkeypatch: pytest.MonkeyPatch) -> None:
    donor = tiny_model("llama", num_hidden_layers=2, attention_dropout=0.5)
    real = accuracy.label_tokens

    def scripted_labels(item: Item, tokenizer: Any) -> tuple[list[int], list[int], list[int]]:
        ids, places, _ = real(item, tokenizer)  # type: ignore[misc]
        with torch.no_grad():
            return ids, places, donor.eval()(torch.tensor([ids])).logits[0, places].argmax(dim=-1).tolist()

    monkeypatch.setattr(accuracy, "label_tokens", scripted_labels)
    tokens = [scripted_labels(item, TOKENIZER) for item in states]
    monkeypatch.setattr(accuracy, "label_tokens", lambda item, tokenizer: tokens[states.index(item)])
    donor.train()
    assert evaluate_questions(donor, TOKENIZER, "states", states, [DecodingOptions()], "labels")[0].rows[0].right == 13 and donor.training


@pytest.mark.parametrize(("labels", "of"), [((), "questions without labels"), (("A1", "B2"), "labels such as 'B2'")])
def test_unusable_labels(labels: tuple[str, ...], of: str, model: RecursiveLLM) -> None:
    with pytest.raises(UserError, match=f"--judge labels: expected labels of one token each.*; things has {of}; use --judge answer"):
        evaluate_questions(model, TOKENIZER, "things", [Item("a b", "B2", 2, labels=labels)], RUNS, "labels")
