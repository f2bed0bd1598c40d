"""README and the pages of docs/: every command runs on small stand-ins, or its flags are parsed and a reason says why it is not run.

The guides have tests of their own (test_guides.py, test_guide_commands.py), as have the client code of serving.md (tests/serving) and the
signatures of api.md (test_api.py).
"""

from __future__ import annotations

import dataclasses
import io
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

from recursify import FitSettings, convert, fit
from recursify.checkpoints import checkpoint
from recursify.cli import main as cli
from recursify.conversion.settings import LoopSettings
from recursify.training.settings import Adapter, LossTerms, Optimizer, Recursion
from tests.support import tiny
from tests.support.corpora import write_jsonl
from tests.support.hub_stand_in import HubStandIn
from tests.support.runs import blocks
from tests.support.tokenizers import with_template
from tests.support.trl_rows import say

ROOT = Path(__file__).resolve().parents[2]
GUIDES = ("QWEN_TO_RECURSIVE_GUIDE.md", "DEEP_SUPERVISION_GUIDE.md")
PAGES = [ROOT / "README.md", *sorted(path for path in (ROOT / "docs").glob("*.md") if path.name not in GUIDES)]
# Start of a command that is not run here -> why.
NOT_RUN = {
    "make ": "builds, tests or measures for minutes",
    "pip ": "installs",
    "curl ": "run in tests/serving",
    ".venv/bin/python -m benchmarks": "run in tests/benchmarks",
    "python - <<": "measures the memory of a process of its own",
    "torchrun": "several processes: tests/training/test_torchrun.py",
    "vllm serve": "does not end; make test-vllm runs the same in an environment of its own",
    "recursify export --checkpoint hub_folder --check": "asks a running server: tests/hub/test_engine_check.py",
    "recursify serve": "does not end; run in tests/serving",
    "recursify evaluate --checkpoint model.pt --tasks hellaswag": "reads datasets of the hub",
    "recursify train --config recipes": "a donor of full size; tests/recipes checks every recipe",
}
# What a page names -> its replacement here.
SMALL = {
    "=4-32/4 --dataset_name": "=4-5,count=2 --dataset_name",
    "count=200": "count=2", "difficulty=4-32/4": "difficulty=4-5", "difficulty=32": "difficulty=4", "--cycles 0 1 2 3 6": "--cycles 0 1",
    "--prompt": "--max_new_tokens 3 --prompt", "--compute_budget 0.6": "--compute_budget 1.0", "--L_layers 4": "--L_layers 2",
    "recursify train": "recursify train --max_steps 1 --start_gain 0.1 --generate_every 0 --save_every 0",
}  # fmt: skip


def commands(page: Path) -> list[str]:
    text = re.sub(r"<<'(\w+)'\n.*?^\1$", "<<", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    lines = "\n".join(re.findall(r"^```bash\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)).replace("\\\n", " ").splitlines()
    return [line for line in lines if line.split("#")[0].strip()]


def snippets(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def small(line: str) -> str:
    for printed, instead in SMALL.items():
        line = line.replace(printed, instead)
    return line


def reason(line: str) -> str | None:
    return next((why for start, why in NOT_RUN.items() if line.strip().startswith(start)), None)


@pytest.fixture
def workdir(hub: HubStandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what the pages' commands read: a model whose q_head is trained, a tuned donor, texts, questions, a task."""
    monkeypatch.chdir(tmp_path)
    model, tokenizer = convert("Qwen/Qwen2-0.5B", L_layers=2, H_cycles=3, L_cycles=1), tiny.make_tiny_tokenizer()
    learns: dict[str, Any] = {"enable_deep_supervision": True, "halting_weight": 0.1, "start_gain": 0.1, "seq_len": 16, "device": "cpu"}
    fit(model, tokenizer, blocks(2), blocks(1), FitSettings(max_steps=1, **learns), console=False)
    for name in ("model.pt", "m.pt"):
        checkpoint.save(name, model, tokenizer)
    tiny.tiny_donor("qwen2", Path("tuned-donor"), num_hidden_layers=2)
    tiny.tiny_donor("llama", Path("chatting"), num_hidden_layers=4)
    with_template().save_pretrained("chatting")
    hub.add_model("HuggingFaceTB/SmolLM2-135M-Instruct", tmp_path / "chatting")
    write_jsonl(Path("chats.jsonl"), [{"messages": say("Hello", f"Ship {number}.")} for number in range(40)])
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello\n"))
    Path("my_text.txt").write_text("\n".join(tiny.sentences(3, 120)), encoding="utf-8")
    babi = "1 Mary went to the hall.\n2 John went to the garden.\n3 Where is Mary? \thall\t1\n"
    Path("qa2_two-supporting-facts_test.txt").write_text(babi, encoding="utf-8")
    Path("test.jsonl").write_text(json.dumps({"question": "How much is 2 + 3?", "answer": "5 it is.\n#### 5"}) + "\n", encoding="utf-8")
    Path("my_tasks").mkdir()
    Path("my_tasks/my_task.yaml").write_text(
        "task: my_task\ndataset_path: json\ndataset_kwargs: {data_files: {test: " + str(tmp_path / "my_tasks" / "items.jsonl") + "}}\n"
        'test_split: test\noutput_type: multiple_choice\ndoc_to_text: "{{q}}"\ndoc_to_choice: ["yes", "no"]\ndoc_to_target: a\n'
        "metric_list: [{metric: acc}]\n",
        encoding="utf-8",
    )
    Path("my_tasks/items.jsonl").write_text('{"q": "a ship", "a": "yes"}\n{"q": "a song", "a": "no"}\n', encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)], ids=lambda page: page.name)
def test_every_command_runs_or_a_reason_says_why_not(page: Path, workdir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for line in commands(page):
        program, *words = shlex.split(small(line), comments=True)
        if reason(line):
            continue
        assert program == "recursify", f"no way to run {line!r}, and no reason in NOT_RUN"
        cli.main(words)
        capsys.readouterr()


def test_every_reason_is_needed() -> None:
    every = [line.strip() for page in PAGES for line in commands(page)]
    assert [start for start in NOT_RUN if not any(line.startswith(start) for line in every)] == []


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)], ids=lambda page: page.name)
def test_flags_of_commands_that_are_not_run_are_flags(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All recursify commands are parsed, not run."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(cli, "_command", lambda name, settings_class, job, argv: cli.parse(name, settings_class, argv))
    for line in commands(page):
        words = shlex.split(line, comments=True)
        if reason(line) and "recursify" in words:
            cli.main(words[words.index("recursify") + 1 :])


@pytest.mark.parametrize(
    "page", [page for page in PAGES if snippets(page) and page.name not in ("serving.md", "api.md")], ids=lambda page: page.name
)
def test_every_snippet_runs(page: Path, workdir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = checkpoint.load("model.pt", H_cycles=3).model
    names: dict[str, Any] = {"model": model, "input_ids": torch.tensor([[5, 6, 7]])}
    for snippet in snippets(page):
        exec(small(snippet), names)
    capsys.readouterr()


def test_readme_is_short_and_its_figures_are_those_of_the_evidence() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(readme.splitlines()) <= 120
    evidence = (ROOT / "docs" / "evidence.md").read_text(encoding="utf-8")
    table = evidence.split("<!-- table state_tracking accuracy main -->")[1].split("<!-- end -->")[0]
    pairs = {
        "base model of 4 layers, fine-tuned for the same FLOPs": "donor, fine-tuned for the same FLOPs",
        "the same layers, recursive, 3 cycles": "ours: keep_donor, H 3, L 1",
    }
    for shown, measured in pairs.items():
        (cells,) = re.findall(rf"^\| {re.escape(shown)} \| (.*) \|$", readme, re.MULTILINE)
        (found,) = re.findall(rf"^\| {re.escape(measured)} \| (.*) \|$", table, re.MULTILINE)
        by_length = dict(zip(table.splitlines()[1].strip("|").replace(" ", "").split("|")[1:], found.split(" | "), strict=True))
        assert cells.split(" | ") == [by_length[length].split(" ±")[0] for length in ("8", "10", "12", "14")]


def anchors(page: Path) -> set[str]:
    """Of the headings of a page, as GitHub makes them."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))], ids=lambda page: page.name)
def test_every_anchor_is_a_heading(page: Path) -> None:
    for target, anchor in re.findall(r"\]\(([^)\s#]*)#([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert anchor in anchors(page.parent / target if target else page), f"{target}#{anchor}"


DEFAULTS = (Recursion, Adapter, Optimizer, LossTerms, LoopSettings)
NOT_A_CHOICE = {"teacher", "distill_temperature", "cycle_weights", "steps_per_cycle", "load_in_4bit", "adapter"}


def test_every_default_of_loop_objective_and_optimizer_names_what_it_rests_on() -> None:
    page = (ROOT / "docs" / "decisions" / "defaults.md").read_text(encoding="utf-8")
    rows = "\n".join(line.split("|")[1] for line in page.splitlines() if line.startswith("| "))
    for settings in DEFAULTS:
        for field in dataclasses.fields(settings):
            if field.name in NOT_A_CHOICE or field.name not in vars(settings):  # of a class that it inherits from
                continue
            assert (found := re.search(rf"--{field.name}\b ?([\d.e-]+)?", rows)), f"{field.name} is not in docs/decisions/defaults.md"
            if isinstance(field.default, (int, float)) and not isinstance(field.default, bool):
                assert found[1] and float(found[1]) == field.default, f"{field.name}: {found[0]}"
