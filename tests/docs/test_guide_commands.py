"""The two guides of docs/: every command and snippet is run, every quoted message is triggered, every figure is recomputed.

One table shrinks what would take long; no command is left out. The guides of the specification are the subject of test_guides.py.
"""

from __future__ import annotations

import gc
import json
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import filelock
import pytest
import torch
from transformers import Qwen2Config

from recursify.cli import main as cli
from recursify.conversion.inspection import inspect
from recursify.conversion.layer_selection import make_plan
from recursify.conversion.settings import ConvertSettings
from recursify.network.configuration_recursive_llm import from_donor
from recursify.network.losses import cycle_shares, cycle_weights
from recursify.network.plan import conversion_record
from recursify.training import TrainSettings, cost
from tests.support import tiny
from tests.support.hub_stand_in import HubStandIn

ROOT = Path(__file__).resolve().parents[2]
CONVERSION, SUPERVISION = "QWEN_TO_RECURSIVE_GUIDE.md", "DEEP_SUPERVISION_GUIDE.md"
GUIDES = {name: (ROOT / "docs" / name).read_text(encoding="utf-8") for name in (CONVERSION, SUPERVISION)}
SCRIPTS: dict[str, Callable[[list[str]], None]] = {
    "convert_qwen_to_recursive.py": cli.convert, "train_qwen_recursive.py": cli.train, "train_qwen_trm.py": cli.train_trm,
    "train_qwen_trm_hybrid.py": cli.train_trm_hybrid, "inference_qwen_recursive.py": cli.generate,
}  # fmt: skip

# What a guide names -> its small replacement here. Wikitext is the stand-in hub's, which is tiny.
SMALL = {
    "Qwen/Qwen2-0.5B": "shallow", "--prelude_layers 4 --L_layers 8 --coda_layers 4": "--prelude_layers 1 --L_layers 2 --coda_layers 1",
    "count=500": "count=2", "count=200": "count=2", "--max_new_tokens 100": "--max_new_tokens 3", "--prompt": "--max_new_tokens 3 --prompt",
    "--eval_every 200": "--eval_every 1", "--save_every 200": "--save_every 1", "num_epochs=3": "max_steps=1, generate_every=0",
}  # fmt: skip
# What a training takes that does not say otherwise.
SHORT = {"--max_steps": "1", "--dataset_name": "my_text.txt", "--eval_batch_size": "16"}

QWEN = Qwen2Config(  # as its config.json on the hub has it
    vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2,
    max_position_embeddings=131072, tie_word_embeddings=True,
)  # fmt: skip


@pytest.fixture(autouse=True)
def quick_collection() -> Iterator[None]:
    """Every training run ends in a full collection of garbage, half of its time here: it need not look at what the imports have made."""
    gc.freeze()
    yield
    gc.unfreeze()


# Reading a guide


def blocks(guide: str) -> list[tuple[str, str]]:
    """Language and content of every block between fences, in order."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", GUIDES[guide], re.DOTALL | re.MULTILINE)


def table(guide: str, first: str) -> list[list[str]]:
    """The cells of the rows of the table whose first heading is `first`, without backticks."""
    (rows,) = re.findall(rf"^\| {re.escape(first)} \|.*\n\|[-|]+\n((?:\|.*\n)+)", GUIDES[guide], re.MULTILINE)
    return [[cell.strip().replace("`", "") for cell in row.strip("|").split("|")] for row in rows.splitlines()]


def quoted(guide: str) -> list[str]:
    """The messages of the troubleshooting section, quoted by `>`."""
    return re.findall(r"^> (.*)$", GUIDES[guide], re.MULTILINE)


# Running its commands


def small(text: str) -> str:
    for said, instead in SMALL.items():
        text = text.replace(said, instead)
    return text


def run(line: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit status of one command, and what it printed."""
    program, *words = shlex.split(line, comments=True)
    assert program in ("recursify", "python"), f"no way to run {line!r}"
    job = cli.main if program == "recursify" else SCRIPTS[words.pop(0)]
    trains = "train" in (words[0], job.__name__[:5])
    status = 0
    try:
        job([*words, *(word for flag, value in SHORT.items() if trains and flag not in words for word in (flag, value))])
    except SystemExit as stop:
        status = int(stop.code or 0)
    return status, "".join(capsys.readouterr())


def shape(line: str) -> str:
    """A line without its numbers and progress bars, for comparison."""
    return re.sub(r"[ █▉▊▋▌▍▎▏]+", " ", re.sub(r"[-+]?\d[\d.,]*(?:e[-+]?\d+)?", "#", line)).strip(" ,")


def tiny_inputs() -> None:
    """The donor and the text that the commands read, in the current folder. It tolerates a start gain of 0.2."""
    tiny.tiny_donor("qwen2", Path("shallow"), num_hidden_layers=6, initializer_range=0.05)
    write("my_text.txt", "\n".join(tiny.sentences(3, 200)))


def write(path: str, text: str) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(text, encoding="utf-8")


@pytest.mark.parametrize("guide", GUIDES)
def test_every_block_is_of_a_kind_that_is_tested(guide: str) -> None:
    assert {language for language, _ in blocks(guide)} == {"bash", "python", "text"}


@pytest.mark.parametrize("guide", GUIDES)
def test_every_command_runs_and_prints_what_is_shown(
    guide: str, hub: HubStandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_inputs()
    printed = ""
    for language, content in blocks(guide):
        if language == "bash":
            for line in content.replace("\\\n", " ").splitlines():
                if line.split("#")[0].strip():
                    status, out = run(small(line), capsys)
                    assert status == 0, f"{line}\n{out[-2000:]}"
                    printed += out + "\n"
        elif language == "python":
            exec(small(content), {})
            capsys.readouterr()
    lines = {shape(line) for line in re.split(r"[\r\n]+", printed)}
    for language, content in blocks(guide):
        if language == "text":
            assert {shape(line) for line in content.splitlines()} <= lines


def test_every_field_of_the_metrics_is_explained(
    hub: HubStandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_inputs()
    terms = "--distill_weight 0.5 --self_distill_weight 0.1 --monotone_weight 0.1 --halting_weight 0.1"
    assert run("recursify convert --qwen_model shallow --output_path m.pt --H_cycles 2 --L_cycles 1", capsys)[0] == 0
    assert run(f"recursify train --checkpoint m.pt --enable_deep_supervision {terms} --start_gain 0.1", capsys)[0] == 0
    entries = [json.loads(line) for line in Path("metrics.jsonl").read_text().splitlines()]
    found = {re.sub(r"_cycle_\d+", "_cycle_i", name) for entry in entries for name in entry}
    assert found == {name.strip() for row in table(SUPERVISION, "field") for name in row[0].split(",")}


# What it quotes


@dataclass
class Case:
    """How a message is triggered: the commands before, which have to succeed."""

    command: str
    before: tuple[str, ...] = ()
    prepare: Callable[[], Any] = lambda: None


TRAIN = "recursify train --checkpoint kept.pt"
QUICK = "--start_gain 0.1 --max_steps 1 --generate_every 0 --save_every 0"

SAVED = "--start_gain 0.1 --max_steps 2 --generate_every 0 --save_every 1 --output_dir runs/long"
HELD: list[Any] = []


def damaged(*steps: int) -> None:
    """A run in runs/long of two steps, and the checkpoints of some of them with another last byte."""
    cli.main([*shlex.split(f"{TRAIN} {SAVED}")[1:], "--dataset_name", "my_text.txt"])
    for step in steps:
        file = Path(f"runs/long/checkpoint_step_{step}.pt")
        content = file.read_bytes()
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def edited(path: str, change: Callable[[dict[str, Any]], Any]) -> None:
    """kept.pt with a change in its content, and its tokenizer."""
    content = torch.load("kept.pt", weights_only=True)
    change(content)
    torch.save(content, path)
    shutil.copytree("kept_tokenizer", f"{Path(path).stem}_tokenizer")


def move_without_tokenizer() -> None:
    Path("elsewhere").mkdir()
    shutil.copy("kept.pt", "elsewhere/kept.pt")


EMBEDDING = "python train_qwen_trm.py --L_layers 1 --H_cycles 1 --L_cycles 0 --output_dir runs/embedding --max_steps 1 --save_every 0"
# Guide -> how the message begins -> its case.
CASES: dict[str, dict[str, Case]] = {
    CONVERSION: {
        "Qwen/Qwen9-0.5B: no such folder": Case("recursify convert --qwen_model Qwen/Qwen9-0.5B"),
        "gemma: this model type": Case(
            "recursify convert --qwen_model gemma", prepare=lambda: write("gemma/config.json", '{"model_type": "gemma2"}')
        ),
        "quantised: has quantised weights": Case(
            "recursify convert --qwen_model quantised",
            prepare=lambda: write("quantised/config.json", '{"model_type": "qwen2", "quantization_config": {"bits": 4}}'),
        ),
        "--L_layers: expected": Case("recursify convert --L_layers 32"),
        "--keep_donor: the loop must be": Case("recursify convert --keep_donor --layer_selection uniform"),
        "--keep_donor: prelude 4": Case("recursify convert --keep_donor --prelude_layers 4 --L_layers 8 --coda_layers 4"),
        "--layer_selection auto": Case("recursify convert --layer_selection auto"),
        "full_folder: is a folder": Case("recursify convert --output_path full_folder", prepare=lambda: write("full_folder/other", "")),
        "elsewhere/kept.pt": Case("recursify generate --checkpoint elsewhere/kept.pt --prompt a", prepare=move_without_tokenizer),
        "edited.pt": Case(
            "recursify inspect --checkpoint edited.pt", prepare=lambda: edited("edited.pt", lambda c: c["config"].update(L_layers=3))
        ),
        "runs/embedding": Case(
            "recursify generate --checkpoint runs/embedding/qwen_recursive_finetuned_best.pt --prompt a", before=(EMBEDDING,)
        ),
        "plain.pt: cannot train": Case(
            "recursify train --checkpoint plain.pt", before=("recursify convert --L_layers 1 --H_cycles 0 --output_path plain.pt",)
        ),
        "the text is too short": Case(
            f"{TRAIN} --dataset_name short.jsonl", prepare=lambda: write("short.jsonl", '{"text": "The ship"}\n{"text": "The song"}\n')
        ),
        "... has no column": Case(f"{TRAIN} --dataset_name story.jsonl", prepare=lambda: write("story.jsonl", '{"story": "The ship"}\n')),
        "--seq_len: expected at least": Case(f"{TRAIN} --dataset_name permutations:difficulty=8,count=2 --seq_len 16"),
        "--seq_len: expected at most": Case(f"{TRAIN} --seq_len 4096"),
        "runs/kept": Case(
            f"{TRAIN} {QUICK} --output_dir runs/kept", prepare=lambda: write("runs/kept/qwen_recursive_finetuned_best.pt", "")
        ),
        "--tune_lm_head: the head was tied": Case("python train_qwen_trm_hybrid.py --tune_lm_head --dry_run"),
    },
    SUPERVISION: {
        "--backprop cycle": Case(f"{TRAIN} --backprop cycle"),
        "--backprop last": Case(f"{TRAIN} --backprop last --enable_deep_supervision"),
        "--monotone_weight": Case(f"{TRAIN} --monotone_weight 0.5"),
        "--depth_curriculum": Case(f"{TRAIN} --depth_curriculum 0.5"),
        "--cycle_choices: expected": Case(f"{TRAIN} --cycle_choices 3 2 1"),
        "--cycle_weights": Case(f"{TRAIN} --cycle_choices 1 2 3 --cycle_weights 1 2"),
        "--start_gain: expected": Case(f"{TRAIN} --start_gain 0.5"),
        "--start_gain: the loop": Case(
            "recursify train --checkpoint sum.pt --start_gain 0.1", before=("recursify convert --injection sum_norm --output_path sum.pt",)
        ),
        "--teacher: Qwen/Qwen2-0.5B has no effect": Case(f"{TRAIN} --teacher Qwen/Qwen2-0.5B"),
        "--teacher: expected one": Case(
            f"{TRAIN} --distill_weight 0.5 --teacher other",
            prepare=lambda: tiny.tiny_donor("qwen2", Path("other"), vocab_size=400, num_hidden_layers=1),
        ),
        "--distill_weight: nameless.pt": Case(
            "recursify train --checkpoint nameless.pt --distill_weight 0.5",
            prepare=lambda: edited("nameless.pt", lambda c: c.update(plan=None, notes={})),
        ),
        "--fsdp": Case(f"{TRAIN} --fsdp"),
        "--resume: runs/long": Case(
            f"{TRAIN} --output_dir runs/long --seq_len 64 --start_gain 0.1 --resume",
            before=(f"{TRAIN} {QUICK.replace('--save_every 0', '--save_every 1')} --output_dir runs/long",),
        ),
        "Start gain 0.05": Case(
            "recursify train --checkpoint touchy.pt --max_steps 1 --save_every 0",
            before=("recursify convert --qwen_model touchy --L_layers 2 --output_path touchy.pt",),
            prepare=lambda: [
                tiny.tiny_donor("qwen2", Path("touchy"), num_hidden_layers=2, initializer_range=1.0),
                torch.manual_seed(0),  # of the initial states: others may lower the loss of such a donor by chance
            ],
        ),
        "Warm-up of": Case(f"{TRAIN} {QUICK} --dry_run"),
        "--resume: no checkpoint_step": Case(f"{TRAIN} --resume --dry_run --output_dir runs/none"),
        "runs/long/checkpoint_step": Case(f"{TRAIN} {SAVED} --resume", prepare=lambda: damaged(2)),
        "--resume: no checkpoint in": Case(f"{TRAIN} {SAVED} --resume", prepare=lambda: damaged(1, 2)),
        "--output_dir: another run": Case(
            f"{TRAIN} {SAVED}", prepare=lambda: HELD.append(filelock.FileLock("runs/long/.recursify.lock").acquire())
        ),
        "step": Case(f"{TRAIN} --start_gain 0.1 --lr 1e30 --max_steps 3 --output_dir runs/hot"),
        "The validation loss": Case(
            f"{TRAIN} --start_gain 0.1 --lr 1e-30 --eval_every 1 --early_stopping_patience 1 --max_steps 3 --save_every 0"
        ),
        "--halt q_head": Case("recursify generate --checkpoint kept.pt --prompt a --halt q_head"),
        "--draft_cycles": Case("recursify generate --checkpoint kept.pt --prompt a --draft_cycles 3"),
    },
}


@pytest.mark.parametrize("guide", GUIDES)
def test_quoted_messages_are_printed(
    guide: str, hub: HubStandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_inputs()
    assert run("recursify convert --qwen_model shallow --keep_donor --L_layers 1 --L_cycles 1 --output_path kept.pt", capsys)[0] == 0
    messages, cases = quoted(guide), CASES[guide]
    assert len(messages) == len(cases)
    for message in messages:
        (case,) = [case for start, case in cases.items() if message.removeprefix("error: ").startswith(start)]
        case.prepare()
        assert [run(command, capsys)[0] for command in case.before] == [0] * len(case.before)
        status, out = run(case.command, capsys)
        assert status == (2 if message.startswith("error: ") else 0), out[-2000:]
        said = ".*".join(re.escape(part) for part in message.split("..."))
        assert any(re.fullmatch(said, line) for line in re.split(r"[\r\n]+", out)), f"{message}\n{out[-2000:]}"


# Its figures


def test_defaults() -> None:
    defaults = {f"--{field.name}": field.default for field in fields(TrainSettings)}
    rows = table(SUPERVISION, "flag")
    assert rows and all(str(defaults[flag]) == default for flag, default in rows)


def test_shares_of_the_schedules() -> None:
    for name, weights, shares, _ in table(SUPERVISION, "schedule"):
        assert weights == ", ".join(f"{weight:.3g}" for weight in cycle_weights(name, 0.5, 3))
        assert shares == ", ".join(f"{share:.2f}" for share in cycle_shares(name, 0.5, 3))


def recursive(flags: str) -> Any:
    """Configuration of the model that `recursify convert` would make of Qwen2-0.5B with these flags."""
    wanted = cli.parse("convert", ConvertSettings, shlex.split(flags))
    names = ("L_layers", "prelude_layers", "coda_layers", "keep_donor", "layer_selection")
    plan = make_plan("Qwen/Qwen2-0.5B", 24, **{name: getattr(wanted, name) for name in names})
    shape = {"prelude_layers": len(plan.prelude), "L_layers": len(plan.loop), "coda_layers": len(plan.coda)}
    shape |= {"H_cycles": wanted.H_cycles, "L_cycles": wanted.L_cycles, "conversion": conversion_record(plan)}
    return from_donor(QWEN, plan.indices, **shape)


def training_cost(config: Any, flags: str = "") -> cost.TrainingCost:
    settings = cli.parse("train", TrainSettings, ["--checkpoint", "m.pt", "--seq_len", "1024", *shlex.split(flags)])
    return cost.estimate(config, settings, 1, teacher_config=QWEN if settings.distill_weight else None)


def test_costs_of_the_plans() -> None:
    donor = training_cost(QWEN)
    for flags, parameters, applications, cache, flops in table(CONVERSION, "flags of `convert`"):
        config = recursive(flags)
        found = inspect(config)
        assert parameters == f"{found.total_parameters / 1e6:.0f}", flags
        assert applications == ", ".join(str(found.applications[H]) for H in range(4)), flags
        assert cache == f"{found.applications[3] * found.slot_bytes / 1e3:.1f}", flags
        assert flops == f"{training_cost(config, '--enable_deep_supervision').flops / donor.flops:.2f}", flags
    assert f"The donor takes {found.donor_applications} applications and {24 * found.slot_bytes / 1e3:.1f} kB" in GUIDES[CONVERSION]


def test_costs_of_training() -> None:
    donor, config = training_cost(QWEN), recursive("--keep_donor --L_layers 4 --L_cycles 1")
    assert f"which takes {donor.memory_total / 1e9:.1f} GB" in GUIDES[SUPERVISION].replace("\n", " ")
    for flags, flops, memory in table(SUPERVISION, "flags of `train`"):
        found = training_cost(config, flags)
        assert (flops, memory) == (f"{found.flops / donor.flops:.2f}", f"{found.memory_total / 1e9:.1f}"), flags


@pytest.mark.parametrize("guide", GUIDES)
def test_links_resolve(guide: str) -> None:
    for target, anchor in re.findall(r"\]\(([^)#]*)#?([^)]*)\)", GUIDES[guide]):
        page = ROOT / "docs" / (target or guide)
        assert page.exists(), target
        headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE) if anchor else []
        assert not anchor or anchor in {heading.lower().replace(" ", "-") for heading in headings}, anchor
