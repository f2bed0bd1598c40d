"""The whole command: text, questions and tasks together, in one process and in several, and what it refuses.

Started by torchrun, this file is also the program that several processes run.
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed

from recursify import RecursiveLLM, convert
from recursify.checkpoints import checkpoint
from recursify.checkpoints.loading import load_model
from recursify.cli import main as cli
from recursify.data import tasks
from recursify.errors import UserError
from recursify.evaluation.evaluate import evaluate, evaluate_paired, run
from recursify.evaluation.settings import EvaluateSettings, question_sets
from recursify.utils.distributed import is_first
from tests.support.parallel_runs import launch
from tests.support.tiny import make_tiny_tokenizer, sentences, tiny_donor, tiny_model

MADE = "pointers:difficulty=1-2,count=3"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> RecursiveLLM:
    """Keep-donor, gains and states well away from 0, so that the depths differ."""
    folder = tmp_path_factory.mktemp("small")
    tiny_donor("llama", folder, num_hidden_layers=3)
    torch.manual_seed(1)
    model = convert(str(folder), L_layers=1, keep_donor=True, H_cycles=2, L_cycles=1)
    with torch.no_grad():
        for parameter in model.model.recursion.parameters():
            parameter.normal_()
    return model


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    for name, seed in (("train", 3), ("validation", 4)):
        (folder / f"{name}.txt").write_text(" ".join(sentences(seed, 4)))
    return folder


def settings(**changes: Any) -> EvaluateSettings:
    return EvaluateSettings(**({"checkpoint": "in memory", "seq_len": 16, "device": "cpu"} | changes))


def measure(model: Any, **changes: Any) -> Any:
    return evaluate(model, make_tiny_tokenizer(), settings(**changes))


# --- Text --------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["m.pt", "folder"])
def test_the_command_reads_both_forms(form: str, model: RecursiveLLM, text: Path, tmp_path: Path) -> None:
    checkpoint.save(tmp_path / form, model, make_tiny_tokenizer())
    report = run(settings(checkpoint=str(tmp_path / form), dataset_name=str(text), max_windows=5))
    assert report.text is not None and report.H_cycles == 2
    assert [row.H_cycles for row in report.text.rows] == [1, 2, 3, 4]  # to twice the checkpoint's own
    assert report.text.windows == 5
    assert f"{report.text.rows[1].loss:.4f}" in report.render() and "own" in report.render()


def test_text_results_are_repeated_at_the_top_level(model: RecursiveLLM, text: Path) -> None:
    """There others read it, such as recursify export."""
    found = measure(model, dataset_name=str(text), stride=8).to_dict()
    assert {"checkpoint", "dataset", "windows", "seq_len", "H_cycles", "rows", "stride", "scored_tokens", "scored_bytes"} < set(found)
    assert (
        found["text"] == {name: found[name] for name in found["text"]} and found["questions"] == found["tasks"] == found["passages"] == []
    )


@pytest.mark.parametrize(("cycles", "most"), [((), 2), ((1, 3), 2), ((1,), 1)])
def test_halting_run_has_the_models_own_depth_or_the_largest_requested(
    cycles: tuple[int, ...], most: int, model: RecursiveLLM, text: Path
) -> None:
    report = measure(model, dataset_name=str(text), cycles=cycles, halt="entropy", halt_threshold=1.0, questions=(MADE,))
    assert report.text.telemetry.halting.H_cycles == most
    assert {(row.H_cycles, row.halt) for row in report.questions[0].rows if row.halt} == {(most, "entropy")}


def test_unsupported_halting(model: RecursiveLLM, text: Path) -> None:
    with pytest.raises(UserError, match="--halt: expected a recursive model, got a LlamaForCausalLM"):
        measure(tiny_model("llama"), dataset_name=str(text), halt="kl")
    with pytest.raises(UserError, match="--halt: expected a run of at least 1 cycle"):
        measure(model, dataset_name=str(text), cycles=(0,), halt="kl")


def test_more_cycles_than_any_pass_has_are_refused(model: RecursiveLLM, text: Path) -> None:
    with pytest.raises(UserError, match=r"--cycles 99999999: .*expected at most 100,000 layer applications in a pass, .*; choose fewer"):
        measure(model, dataset_name=str(text), cycles=(1, 99_999_999))


def test_an_infinite_threshold_is_strict_json(model: RecursiveLLM, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint.save(tmp_path / "m.pt", model, make_tiny_tokenizer())
    flags = ["--dataset_name", str(text), "--seq_len", "16", "--cycles", "1", "--device", "cpu", "--json"]
    cli.main(["evaluate", "--checkpoint", str(tmp_path / "m.pt"), *flags, "--halt", "entropy", "--halt_threshold", "inf"])

    def refuse(word: str) -> None:
        raise AssertionError(word)

    found = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert float(found["telemetry"]["halting"]["threshold"]) == float("inf")


def test_wikitext_is_measured_unless_something_else_is() -> None:
    assert settings().text == "wikitext" and settings(questions=(MADE,)).text is None and settings(tasks=("a",)).text is None
    assert settings(questions=(MADE,), dataset_name="x.txt").text == "x.txt"


# --- Questions and tasks -----------------------------------------------------------------------------------------------------------------


def test_questions_are_those_of_the_test_split(model: RecursiveLLM) -> None:
    asked = settings(questions=(MADE, f"{MADE},seed=1"), cycles=(0, 2))
    report, paired = evaluate_paired(model, make_tiny_tokenizer(), asked, "mine", question_sets(asked))
    assert report.checkpoint == "mine" and report.text is None and "text" not in report.render()
    assert [part.name for part in report.questions] == [MADE, f"{MADE},seed=1"] and report.questions[0].items == 6
    assert [(row.H_cycles, row.difficulty, row.count) for row in report.questions[0].rows] == [
        (0, None, 6), (0, 1, 3), (0, 2, 3), (2, None, 6), (2, 1, 3), (2, 2, 3),
    ]  # fmt: skip
    assert paired.depths == [0, 2] and paired.text is None and paired.rights[MADE].shape == (2, 6)
    assert report.to_dict()["text"] is None and "rows" not in report.to_dict()


def test_paired_results_exclude_halting_runs(model: RecursiveLLM, text: Path) -> None:
    asked = settings(questions=(MADE,), dataset_name=str(text), halt="kl", cycles=(1, 2))
    report, paired = evaluate_paired(model, make_tiny_tokenizer(), asked, "mine", question_sets(asked))
    assert paired.rights[MADE].shape == (2, 6) and paired.text is not None and paired.text.nats.shape[0] == 2
    assert len(report.to_dict()["questions"][0]["halting"]) == 3 and f"{MADE}: 6 questions" in report.render()


@pytest.mark.parametrize(("most", "numbers"), [(None, range(6)), (9, range(6)), (4, (0, 1, 3, 4)), (1, (0,))])
def test_max_items_selects_evenly(most: int | None, numbers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tasks.Item] = []

    def evaluate_questions(model: Any, tokenizer: Any, name: str, items: list[tasks.Item], runs: Any, judge: str, **kwargs: Any) -> Any:
        asked.extend(items)
        return None, torch.ones(1, len(items))

    monkeypatch.setattr("recursify.evaluation.evaluate.evaluate_questions", evaluate_questions)
    measure(tiny_model("llama"), questions=(MADE,), max_items=most)
    every = [item for difficulty in (1, 2) for item in tasks.generate("pointers", difficulty, 3, 0, split="test")]
    assert asked == [every[number] for number in numbers]


def test_tasks_are_run_at_every_depth(model: RecursiveLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def run_tasks(model: Any, tokenizer: Any, names: Any, runs: Any, **kwargs: Any) -> list[Any]:
        asked.update(names=names, runs=[(run.H_cycles, run.halt) for run in runs], **kwargs)
        return []

    monkeypatch.setattr("recursify.evaluation.evaluate.run_tasks", run_tasks)
    monkeypatch.setattr("recursify.evaluation.lm_eval_harness.check", lambda tasks, folder: None)
    measure(model, tasks=("a", "b", "c"), tasks_folder="here", cycles=(1, 3), halt="kl", batch_size=5, max_items=7)
    assert asked == {
        "names": ("a", "b", "c"), "runs": [(1, "none"), (3, "none"), (2, "kl")], "folder": "here", "batch_size": 5, "max_items": 7,
    }  # fmt: skip


def test_a_page_is_written(model: RecursiveLLM, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint.save(tmp_path / "m.pt", model, make_tiny_tokenizer())
    flags = ["--dataset_name", str(text), "--seq_len", "16", "--device", "cpu", "--questions", MADE, "--report", str(tmp_path / "r.html")]
    cli.main(["evaluate", "--checkpoint", str(tmp_path / "m.pt"), *flags, "--json"])
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert len(found["passages"]) == 3 and all(len(passage["nats"]) == 4 for passage in found["passages"])
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert MADE in page and f"{found['rows'][1]['loss']:.4f}" in page and str(tmp_path / "r.html") in captured.err


def test_boundary_values_are_valid(monkeypatch: pytest.MonkeyPatch) -> None:
    known: list[Any] = []
    monkeypatch.setattr("recursify.evaluation.lm_eval_harness.check", lambda *asked: known.append(asked))
    for edge in ({"cycles": (0,)}, {"seq_len": 2, "stride": 2, "batch_size": 1}, {"stride": 1, "max_windows": 1}, {"stride": 128}):
        settings(**({"seq_len": 128} | edge)).validate()
    assert known == []
    settings(tasks=("a", "b"), tasks_folder="here", max_items=1).validate()
    assert known == [(("a", "b"), "here")]


def test_a_window_may_be_as_long_as_the_positions(text: Path) -> None:
    donor = tiny_model("llama", num_hidden_layers=1)
    donor.config.max_position_embeddings = 16
    assert measure(donor, dataset_name=str(text), seq_len=16).text.seq_len == 16
    with pytest.raises(UserError, match="at most 16, .* got 17"):
        measure(donor, dataset_name=str(text), seq_len=17)


def test_text_settings_reach_the_loader(model: RecursiveLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def open_text(source: Any, tokenizer: Any, **windows: Any) -> Any:
        asked.append((source.dataset_name, source.dataset_config_name, source.text_column, windows))
        raise UserError("enough")

    monkeypatch.setattr("recursify.evaluation.evaluate.open_text", open_text)
    with pytest.raises(UserError, match="enough"):
        measure(
            model,
            dataset_name="some/set",
            dataset_config_name="one",
            text_column="body",
            seq_len=8,
            stride=3,
            max_windows=4,
            split="validation",
        )
    assert asked == [("some/set", "one", "body", {"seq_len": 8, "stride": 3, "max_windows": 4, "split": "validation"})]


def test_judge_and_threshold_are_used(model: RecursiveLLM, text: Path) -> None:
    states = "permutations:difficulty=3,count=2"
    found = measure(model, dataset_name=str(text), questions=(states,), judge="labels", halt="entropy", halt_threshold=1.5, cycles=(1,))
    assert found.questions[0].judge == "labels" and found.text.telemetry.halting.threshold == 1.5


def test_passages_are_limited_in_number_and_length(
    model: RecursiveLLM, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("recursify.evaluation.evaluate._PASSAGE_TOKENS", 5)
    page = {"dataset_name": str(text), "report": str(tmp_path / "r.html"), "cycles": (3, 1)}
    few, many = measure(model, **page, max_windows=2).passages, measure(model, **page).passages
    assert len(few) == 2 and len(many) == 3
    assert all(len(passage.tokens) == 5 and len(passage.nats) == 3 and len(passage.nats[0]) == 4 for passage in many)


@pytest.mark.parametrize("kind", ["recursive", "donor"])
def test_tokenizer_path(kind: str, model: RecursiveLLM, text: Path, tmp_path: Path) -> None:
    path = tmp_path / ("m.pt" if kind == "recursive" else "donor")
    if kind == "recursive":
        checkpoint.save(path, model, None)
    else:
        tiny_model("llama", num_hidden_layers=1).save_pretrained(path)
    make_tiny_tokenizer(tmp_path / "words")
    asked = {"checkpoint": str(path), "dataset_name": str(text), "max_windows": 1, "cycles": (1,)}
    found = run(settings(**asked, tokenizer_path=str(tmp_path / "words")))
    assert found.text is not None and found.text.rows[0].H_cycles == (1 if kind == "recursive" else None)


# --- What is refused ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"cycles": (-1,)}, "--cycles"),
        ({"cycles": (1, 2, 1)}, r"--cycles: .* each once, got \[1, 2, 1\]"),
        ({"seq_len": 1}, "--seq_len"),
        ({"batch_size": 0}, "--batch_size"),
        ({"stride": 0}, "--stride: expected 1 to the 128 tokens of a window .--seq_len., got 0"),
        ({"stride": 129}, "--stride: .* got 129"),
        ({"max_windows": 0}, "--max_windows: expected at least 1, got 0"),
        ({"max_items": 0}, "--max_items: expected at least 1, got 0"),
        ({"max_items": 3}, "--max_items: expected --questions or --tasks with it, got 3 and neither"),
        ({"halt": "q_head", "halt_threshold": 1.5}, "--halt_threshold: expected 0"),
        ({"halt_threshold": 0.5}, "--halt_threshold: expected --halt"),
        ({"questions": ("riddles",)}, "--questions: expected one of permutations, .* with a file as NAME:FILE, got 'riddles'"),
        (
            {"questions": ("gsm8k",)},
            "--questions: gsm8k is read from a file: a local one, gsm8k:FILE, such as gsm8k:test.jsonl, or one of a dataset on the hub, "
            "gsm8k:OWNER/NAME/PATH, such as gsm8k:openai/gsm8k/main/test-00000-of-00001.parquet",
        ),
        ({"questions": (MADE, MADE)}, f"--questions: {MADE} is given twice"),
        ({"questions": ("babi:nowhere.txt",)}, "nowhere.txt"),
        ({"questions": (MADE,), "stride": 4}, "--stride: applies to text, and none is measured; .* leave out --stride 4"),
        ({"questions": (MADE,), "max_windows": 4}, "--max_windows: applies to text, and none is measured"),
        ({"questions": (MADE,), "dataset_config_name": "x"}, "--dataset_config_name: applies to text, and none is measured"),
        ({"judge": "labels"}, "--judge: expected --questions with it, got labels and no --questions"),
        ({"tasks_folder": "x"}, "--tasks_folder: expected --tasks with it, got x and no --tasks"),
        ({"tasks": ("a",), "tasks_folder": "nowhere"}, "--tasks_folder: expected a folder of YAML tasks, got nowhere"),
        ({"report": "no/such/folder/r.html"}, "--report: expected a file in a folder that exists, such as report.html, got no/such"),
        ({"report": "."}, "--report: expected a file"),
    ],
)
def test_settings_out_of_range(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        run(EvaluateSettings(checkpoint="x.pt", **wrong))


def test_windows_longer_than_the_positions(model: RecursiveLLM, text: Path) -> None:
    with pytest.raises(UserError, match="--seq_len: expected at most 512"):
        measure(model, dataset_name=str(text), seq_len=513)


def test_a_donor_that_is_refused_says_why(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma2", "final_logit_softcapping": 30.0}))
    with pytest.raises(UserError, match="soft-capping"):
        load_model(str(tmp_path))


def test_missing_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such"):
        load_model(str(tmp_path / "nothing.pt"))
    with pytest.raises(UserError, match="no such"):
        load_model(str(tmp_path / "nothing"))


# --- Several processes -------------------------------------------------------------------------------------------------------------------

TASK = """\
task: ships
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/ships.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: ["river", "castle"]
doc_to_target: 0
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
TEXT = ["--dataset_name", "FOLDER/text", "--seq_len", "16"]
LAUNCHES: dict[str, list[str]] = {
    "overlapping": [*TEXT, "--stride", "5", "--batch_size", "3", "--halt", "entropy", "--halt_threshold", "1.0"],
    "fewer batches than processes": [*TEXT, "--max_windows", "2", "--cycles", "0", "2"],
    "questions": ["--questions", MADE, "--batch_size", "2", "--halt", "entropy"],
    "labels": ["--questions", "permutations:difficulty=8,count=5", "--judge", "labels", "--batch_size", "2"],
    "tasks": ["--tasks", "ships", "--tasks_folder", "FOLDER", "--cycles", "0", "1", "2"],
}


def command(folder: Path, name: str) -> list[str]:
    flags = [flag.replace("FOLDER", str(folder)) for flag in LAUNCHES[name]]
    return ["evaluate", "--checkpoint", str(folder / "m.pt"), "--device", "cpu", "--json", *flags]


def work(folder: Path) -> None:
    """What each process prints goes to a file of its own."""
    with (folder / f"said_{os.environ['RANK']}").open("w") as printed, redirect_stdout(printed):
        for name in LAUNCHES:
            cli.main(command(folder, name))
    (folder / f"first_{distributed.get_rank()}").write_text(str(is_first()))


if __name__ == "__main__":
    work(Path(sys.argv[1]))
    distributed.destroy_process_group()
    sys.exit()


@pytest.mark.slow
def test_distributed_equals_one_process(model: RecursiveLLM, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint.save(tmp_path / "m.pt", model, make_tiny_tokenizer())
    (tmp_path / "text").symlink_to(text)
    (tmp_path / "ships.yaml").write_text(TASK.replace("FOLDER", str(tmp_path)))
    (tmp_path / "ships.jsonl").write_text("\n".join(json.dumps({"question": sentence}) for sentence in sentences(7, 3)))
    done = launch([__file__, tmp_path])
    assert done.returncode == 0, done.stdout
    theirs = dict(zip(LAUNCHES, map(json.loads, (tmp_path / "said_0").read_text().splitlines()), strict=True))
    capsys.readouterr()
    ours = {}
    for name in LAUNCHES:
        cli.main(command(tmp_path, name))
        ours[name] = json.loads(capsys.readouterr().out)
    assert ours["overlapping"]["windows"] % 3 and ours["fewer batches than processes"]["windows"] == 2
    assert ours["questions"]["questions"][0]["items"] == 6 and len(ours["tasks"]["tasks"]) == 3
    assert theirs == ours  # to the last digit
    assert not (tmp_path / "said_1").read_text()
    assert is_first() and [(tmp_path / f"first_{rank}").read_text() for rank in (0, 1)] == ["True", "False"]
