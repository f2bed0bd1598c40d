"""Tasks of lm-eval at every depth, against sums by hand; all of them YAML files of a folder, on data beside them."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from recursify import RecursiveLLM, convert
from recursify.errors import UserError
from recursify.evaluation import lm_eval_harness
from recursify.evaluation.lm_eval_harness import TaskScore, run_tasks
from recursify.inference.generation import generate_text
from recursify.inference.options import DecodingOptions, Sampling
from tests.support.tiny import make_tiny_tokenizer, tiny_donor, tiny_model

RUNS = [DecodingOptions(H_cycles=H) for H in (0, 2)]
HALTED = DecodingOptions(H_cycles=2, halt="entropy", halt_threshold=2.0)
TOKENIZER = make_tiny_tokenizer()
QUESTIONS = [f"The ship {words}" for words in ("crosses the", "near the old", "builds a", "under the small", "follows", "describes no")]
CHOICES = ["river", "castle", "engine", "village", "song"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> RecursiveLLM:
    """Keep-donor, gains and states well away from 0, so that every depth says something else."""
    folder = tmp_path_factory.mktemp("donor")
    tiny_donor("llama", folder, num_hidden_layers=3)
    torch.manual_seed(1)
    model = convert(str(folder), L_layers=1, keep_donor=True, H_cycles=2, L_cycles=1)
    with torch.no_grad():
        for parameter in model.model.recursion.parameters():
            parameter.normal_()
    return model


def task(folder: Path, name: str, rows: list[dict[str, Any]], *lines: str) -> None:
    (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    common = [f"task: {name}", "dataset_path: json", f"dataset_kwargs: {{data_files: {{test: {folder / name}.jsonl}}}}", "test_split: test"]
    (folder / f"{name}.yaml").write_text("\n".join([*common, 'doc_to_text: "{{question}}"', *lines]))


def choose(model: Any, question: str, run: DecodingOptions) -> int:
    """The choice that the model finds likeliest."""
    context, found = len(TOKENIZER(question).input_ids), []
    for choice in CHOICES:
        ids = torch.tensor([TOKENIZER(f"{question} {choice}").input_ids])
        with torch.no_grad():
            logs = model(ids, **run.generate_kwargs(model)).logits[0].log_softmax(dim=-1)
        found.append(logs[context - 1 : -1].gather(1, ids[0, context:, None]).sum().item())
    return found.index(max(found))


def scores(found: list[TaskScore]) -> dict[tuple[str, int | None, str | None], float]:
    return {(score.metric, score.H_cycles, score.halt): score.value for score in found}


def test_multiple_choice_tasks_at_every_depth(model: RecursiveLLM, tmp_path: Path) -> None:
    rows = [{"question": question, "choices": CHOICES, "label": choose(model, question, RUNS[1])} for question in QUESTIONS]
    rows[0]["label"] = (rows[0]["label"] + 1) % 5
    task(tmp_path, "ships", rows, "output_type: multiple_choice", 'doc_to_choice: "{{choices}}"', "doc_to_target: label",
         "metric_list: [{metric: acc}]")  # fmt: skip
    runs = [*RUNS, HALTED]
    found = run_tasks(model, TOKENIZER, ["ships"], runs, folder=str(tmp_path), batch_size=2)
    by_hand = [sum(choose(model, row["question"], run) == row["label"] for row in rows) / 6 for run in runs]
    assert [(score.task, score.metric, score.H_cycles, score.halt) for score in found] == [
        ("ships", "acc", 0, None), ("ships", "acc", 2, None), ("ships", "acc", 2, "entropy"),
    ]  # fmt: skip
    assert [score.value for score in found] == pytest.approx(by_hand) and found[1].value == pytest.approx(5 / 6) and by_hand[0] < 5 / 6
    assert found[1].standard_error == pytest.approx(1 / 6)
    first, _, head, line = lm_eval_harness.lines(found)
    assert "lm-eval" in first and head.split()[:4] == ["task", "metric", "H_cycles", "0"] and "0.8333 +-0.1667" in line
    assert run_tasks(model, TOKENIZER, ["ships"], RUNS[1:], folder=str(tmp_path), max_items=1)[0].value == 0
    assert run_tasks(tiny_model("llama"), TOKENIZER, ["ships"], [DecodingOptions()], folder=str(tmp_path), max_items=1)[0].H_cycles is None


def test_generation_tasks_at_every_depth(model: RecursiveLLM, tmp_path: Path) -> None:
    sampling = Sampling(H_cycles=2, temperature=0, max_new_tokens=3)
    rows = [{"question": q, "answer": generate_text(model, TOKENIZER, q, sampling).text.split("\n")[0]} for q in QUESTIONS[:3]]
    task(tmp_path, "rivers", rows, "output_type: generate_until", 'doc_to_target: "{{answer}}"',
         'generation_kwargs: {until: ["\\n"], max_gen_toks: 3}', "metric_list: [{metric: exact_match}]",
         "filter_list: [{name: first, filter: [{function: take_first}]}]")  # fmt: skip
    found = scores(run_tasks(model, TOKENIZER, ["rivers"], RUNS, folder=str(tmp_path)))
    assert found == {("exact_match,first", 0, None): 0.0, ("exact_match,first", 2, None): 1.0}


def test_harness_does_not_print_to_stdout(model: RecursiveLLM, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: Any) -> None:
    task(tmp_path, "bridges", [{"question": QUESTIONS[0], "answer": "x"}], "output_type: generate_until", 'doc_to_target: "{{answer}}"',
         'generation_kwargs: {until: ["\\n"], max_gen_toks: 1}', "metric_list: [{metric: exact_match}]")  # fmt: skip
    model.train()
    with caplog.at_level(logging.WARNING):
        run_tasks(model, TOKENIZER, ["bridges"], RUNS[:1], folder=str(tmp_path))
    assert not capsys.readouterr().out and model.training and "already" not in caplog.text
    model.eval()


def test_a_task_that_cannot_be_run(model: RecursiveLLM, tmp_path: Path) -> None:
    task(tmp_path, "castles", [], "output_type: multiple_choice", 'doc_to_choice: "{{choices}}"', "doc_to_target: label")
    (tmp_path / "castles.jsonl").unlink()
    with pytest.raises(UserError, match=r"--tasks castles: lm-eval could not run it: FileNotFoundError: .*castles.jsonl"):
        run_tasks(model, TOKENIZER, ["castles"], RUNS, folder=str(tmp_path))


def test_every_metric_has_its_filter_and_error(model: RecursiveLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order of tasks and then runs; what stands beside the figures is left out. Other processes' tasks are none of ours."""
    figures = {"alias": "a", "name": "a", "sample_len": 9, "sample_count": 9, "acc,none": 0.5, "acc_stderr,none": 0.25, "f1,first": 0.75,
               "f1_stderr,first": 0.125, "f1,last": 1, "f1_stderr,last": "N/A", "told,none": "text"}  # fmt: skip
    asked: list[Any] = []

    def evaluate(wrapped: Any, task: str, manager: Any, max_items: int | None) -> dict[str, Any]:
        asked.append((task, max_items, model.training, os.environ.get("LOCAL_RANK"), wrapped.batch_size))
        return {task: figures}

    monkeypatch.setattr(lm_eval_harness, "_evaluate", evaluate)
    monkeypatch.setattr(lm_eval_harness, "check", lambda *asked: None)
    monkeypatch.setattr(lm_eval_harness, "_manager", lambda *asked: None)
    monkeypatch.setenv("LOCAL_RANK", "1")
    model.train()
    found = run_tasks(model, TOKENIZER, ["a", "b"], [RUNS[0], HALTED], batch_size=3, max_items=5)
    assert model.eval() and os.environ["LOCAL_RANK"] == "1"
    assert asked == [(task, 5, False, None, 3) for task in "aabb"]
    runs = [(0, None), (2, "entropy")]
    assert [(score.task, score.H_cycles, score.halt) for score in found] == [
        (task, *run) for task in "ab" for run in runs for _ in range(3)
    ]
    assert [(score.metric, score.value, score.standard_error) for score in found[:3]] == [
        ("acc", 0.5, 0.25), ("f1,first", 0.75, 0.125), ("f1,last", 1.0, None),
    ]  # fmt: skip
    _, _, _, acc, first, last, *_ = lm_eval_harness.lines(found)
    assert acc.endswith("0.5000 +-0.2500") and first.split()[:2] == ["a", "f1,first"] and last.endswith("1.0000")


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lm_eval_harness, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'lm_eval is not installed; pip install "recursify\[lm_eval\]"'):
        lm_eval_harness.check(["hellaswag"])


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """A harness that knows hellaswag, and finds ships in a folder; whether it was asked for its own tasks, time by time."""
    asked: list[bool] = []

    class Manager:
        def __init__(self, include_path: str | None = None, include_defaults: bool = True) -> None:
            asked.append(include_defaults)
            self.all_subtasks = self.all_tasks = [*(["hellaswag"] if include_defaults else []), *(["ships"] if include_path else [])]

    monkeypatch.setattr("lm_eval.tasks.TaskManager", Manager)
    lm_eval_harness._manager.cache_clear()
    return asked


def test_harness_index_is_loaded_only_if_needed(known: list[bool], tmp_path: Path) -> None:
    lm_eval_harness.check(["ships"], str(tmp_path))
    assert known == [False]
    lm_eval_harness.check(["ships", "hellaswag"], str(tmp_path))
    assert known == [False, False, True]
    lm_eval_harness.check(["ships", "hellaswag"], str(tmp_path))
    assert len(known) == 3
    lm_eval_harness._manager.cache_clear()


def test_unknown_task(known: list[bool], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--tasks: no task 'helaswag' in lm-eval; `lm_eval ls tasks` lists its own"):
        lm_eval_harness.check(["helaswag"])
    with pytest.raises(UserError, match=f"no task 'boats' in lm-eval and {tmp_path}; "):
        lm_eval_harness.check(["hellaswag", "boats"], str(tmp_path))
    with pytest.raises(UserError, match="--tasks_folder: expected a folder of YAML tasks, got .*nowhere"):
        lm_eval_harness.check(["hellaswag"], str(tmp_path / "nowhere"))
    lm_eval_harness._manager.cache_clear()
