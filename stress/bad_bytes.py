"""Files, recipes, command lines and requests with something wrong in them, drawn by case, each given to the command that reads it.

A command ends with status 2, one message and nothing written, or it has done all that it was asked for. Nothing else is right: no
traceback, no part of an output, no code that runs because a file says so, no memory or time without bound. The server answers each request
with what was asked for or with an error in OpenAI's form, and the next request as ever.

    Material      good files of every kind, made once: what is broken
    Case          a command line, the folder with what it reads, and how its result is known to be whole
    fault_of      what is wrong with how a case ended, if anything
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
import re
import shutil
import tempfile
import zipfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from recursify.training.lock import LOCK
from tests.support.tiny import CHATML, make_tiny_tokenizer, sentences, tiny_donor

from . import breaking, http_requests
from .forks import Ended, Forks
from .part import Outcome, draw, left

SECONDS = 60.0  # that a command may take
MEMORY = 2**30  # bytes that it may take beyond those before it
MARKER = "marker"  # the file that code in a file would write
FRESH = 0.002  # share of the commands that get a Python of their own
_CACHED = 500  # cases whose texts stay in the cache of datasets
_STOPPED = r"expected a finite (gradient|loss).*\n?.*the batches of the step are in"  # a run that has begun, and says what it leaves
_SHOWN = 2000  # characters of an output in a fault

_LOOP = ["--L_layers", "1", "--prelude_layers", "1", "--coda_layers", "1", "--H_cycles", "2", "--L_cycles", "1", "--gain", "0.3"]
_CONVERT = ["convert", "--qwen_model", "donor", *_LOOP, "--output_path", "out.pt"]
_EVALUATE = ["evaluate", "--checkpoint", "model.pt", "--cycles", "1", "--seq_len", "16", "--max_windows", "2", "--json", "--device", "cpu"]
_GENERATE = ["generate", "--checkpoint", "model.pt", "--max_new_tokens", "4", "--temperature", "0", "--device", "cpu"]
_TRAIN = ["train", "--checkpoint", "model.pt", "--dataset_name", "text.txt", "--seq_len", "16", "--max_steps", "1", "--batch_size", "2",
          "--device", "cpu", "--output_dir", "out"]  # fmt: skip
_ON_TEXT = ["--dataset_name", "text.txt"]
_ON_PROMPT = ["--prompt", "The old"]
_EXPORT = ["export", "--checkpoint", "model.pt", "--out", "out"]
_SERVE = ["serve", "--checkpoint", "model.pt"]
_BAD_PORT = ["--port", "70000"]  # a server that starts goes on
# What a command line is made from: a good one, and what always stands at its end.
_LINES: tuple[tuple[list[str], list[str]], ...] = (
    (_CONVERT, []), (_EVALUATE + _ON_TEXT, []), (_GENERATE + _ON_PROMPT, []), (["inspect", "--checkpoint", "model.pt", "--json"], []),
    (_TRAIN, []), (_EXPORT, []), (_SERVE, _BAD_PORT), (["compare", "model.pt", "folder", *_EVALUATE[3:], *_ON_TEXT], []),
    (["probe", "--checkpoint", "donor", "--text", "text.txt", "--lengths", "1", "--seq_len", "16", "--json"], []),
)  # fmt: skip
# Flags that make a job longer or larger as they say, whose large values are no mistake.
_LASTING = frozenset(
    f"--{name}"
    for name in (
        "max_steps", "num_epochs", "H_cycles", "L_cycles", "grad_accum_steps", "max_tokens", "lora_rank", "cycles", "cycle_choices",
        "batch_size", "steps_per_cycle", "max_new_tokens", "cycle_weights", "depths", "questions", "mix", "tasks", "eval_batch_size",
        "max_windows",
    )
)  # fmt: skip
_NOT_DRAWN = {"compile", "push", "fsdp", "deepspeed"}  # minutes of compilation, a network, several processes


@dataclass(frozen=True)
class Material:
    """Good files, made once in a folder: `donor`, `model.pt` with its tokenizer, `folder` and `adapter`, `text.txt`."""

    folder: Path

    def into(self, folder: Path, *names: str) -> None:
        """Copy files and folders, each with what belongs to it."""
        for name in names:
            for each in (name, "model_tokenizer") if name == "model.pt" else (name,):
                place = self.folder / each
                (shutil.copytree if place.is_dir() else shutil.copy)(place, folder / each)


@dataclass(frozen=True)
class Case:
    """A command and how its success is known.

    Args:
        kind: For the counts.
        what: What is broken, in words.
        makes: Paths that a success leaves behind; other new files are faults where this is not None.
        whole: What is wrong with the result of a success (folder, stdout), if anything.
    """

    kind: str
    what: str
    argv: list[str]
    makes: tuple[str, ...] | None = None
    whole: Callable[[Path, str], str | None] = lambda folder, stdout: None


Drawer = Callable[[random.Random, Material, Path], Case]


# The kinds of cases


def _checkpoint(rng: random.Random, material: Material, folder: Path) -> Case:
    name = rng.choice(("donor", "donor", "model.pt", "model.pt", "model.pt", "folder", "folder", "adapter"))
    material.into(folder, name, "text.txt", *(["donor"] if name == "adapter" else []))
    what = _break_checkpoint(rng, folder, name)
    if name == "donor":
        argv = rng.choice((_CONVERT, _CONVERT, [*_CONVERT[:-1], "out"], ["inspect", "--checkpoint", "donor", "--json"]))
    else:
        argv = rng.choice((_GENERATE + _ON_PROMPT, _GENERATE + _ON_PROMPT, ["inspect", "--json"], _EVALUATE + _ON_TEXT, _EXPORT, _TRAIN))
        argv = [argv[0], "--checkpoint", name, *_without(argv[1:], "--checkpoint")]
    return Case(f"checkpoint, {name}", f"{what}; {argv[0]}", argv, *_result_of(argv))


def _break_checkpoint(rng: random.Random, folder: Path, name: str) -> str:
    """Break one file of a checkpoint; says which."""
    inside = "model_tokenizer" if name == "model.pt" else name
    files = sorted(path for path in (folder / inside).iterdir() if path.suffix in (".json", ".safetensors"))
    weights = [folder / name] * 8 if name == "model.pt" else [path for path in files if path.suffix == ".safetensors"] * 3
    path = rng.choice(
        [*weights, *files, *(path for path in files if path.name in ("config.json", "adapter_config.json") for _ in range(2))]
    )
    if rng.random() < 0.02:
        path.unlink()
        return f"{path.name} missing"
    good = path.read_bytes()
    if path.suffix == ".json":
        path.write_bytes(breaking.json_text(rng, json.loads(good)))
    else:
        path.write_bytes((breaking.pt if path.suffix == ".pt" else breaking.safetensors)(rng, good))
    return f"{path.relative_to(folder)} broken"


_TEXT_ROWS = [{"text": line} for line in sentences(3, 12)]
_MESSAGES = [
    {"messages": [{"role": "system", "content": "Be of help."}, {"role": "user", "content": ask}, {"role": "assistant", "content": answer}]}
    for ask, answer in zip(sentences(4, 8), sentences(5, 8), strict=True)
]
_ROWS: tuple[list[dict[str, Any]], ...] = (
    _TEXT_ROWS,
    _MESSAGES,
    [{"prompt": row["text"][:20], "completion": row["text"][20:]} for row in _TEXT_ROWS],
    [{"instruction": row["text"], "input": "", "output": row["text"]} for row in _TEXT_ROWS],
    [{"messages": row["messages"], "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}]} for row in _MESSAGES],
)
_QUESTIONS: dict[str, list[dict[str, Any]] | str] = {
    "gsm8k": [{"question": "How many?", "answer": "2 + 3 = <<2+3=5>>5\n#### 5"}, {"question": "And?", "answer": "It is 7.\n#### 1,007"}],
    "svamp": [{"Body": "Tom has 3.", "Question": "How many?", "Equation": "( 3.0 + 4.0 )", "Answer": 7.0}] * 2,
    "prosqa": [{"question": "Is Tom a lempus or a yumpus?", "answer": "Tom is a lempus.", "steps": ["Tom is a rompus."]}] * 2,
    "babi": "1 Mary went to the hall.\n2 Tom went to the garden.\n3 Where is Mary?\thall\t1\n",
    "scan": "IN: jump twice OUT: JUMP JUMP\nIN: walk OUT: WALK\n",
}


def _data(rng: random.Random, material: Material, folder: Path) -> Case:
    material.into(folder, "model.pt")
    questions = rng.choice(list(_QUESTIONS)) if rng.random() < 0.25 else None
    rows: Any = _QUESTIONS[questions] if questions else rng.choice((_TEXT_ROWS, rng.choice(_ROWS)))
    suffix = ".txt" if isinstance(rows, str) else rng.choice((".jsonl", ".json", ".csv", ".parquet") if questions else _SUFFIXES)
    name = f"{rng.choice(('data', 'data', 'train', 'dev'))}{suffix}"
    (folder / name).write_bytes(_broken_rows(rng, rows, suffix))
    source, extra = name, []
    if rng.random() < 0.15:
        (folder / "set").mkdir()
        (folder / name).rename(folder / "set" / name)
        (folder / "set" / f"more{rng.choice(_SUFFIXES)}").write_bytes(breaking.json_lines(rng, _TEXT_ROWS))
        source = "set"
    if questions:
        argv = [*_EVALUATE, "--questions", f"{questions}:{source}"]
    else:
        extra = ["--text_column", rng.choice(("text", "prompt", "x", ""))] if rng.random() < 0.15 else []
        extra += ["--streaming"] if rng.random() < 0.2 else []
        argv = [
            *(_TRAIN if rows is not _TEXT_ROWS or "--streaming" in extra or rng.random() < 0.2 else _EVALUATE),
            "--dataset_name",
            source,
            *extra,
        ]
    return Case(f"data, {suffix}", f"{questions or 'text'} in {source}; {argv[0]}", argv, *_result_of(argv))


_SUFFIXES = (".txt", ".jsonl", ".json", ".csv", ".parquet", ".gz")


def _broken_rows(rng: random.Random, rows: Any, suffix: str) -> bytes:
    if isinstance(rows, str):
        return breaking.text(rng, rows)
    if suffix == ".txt":
        return breaking.text(rng, "\n".join(str(row.get("text", row)) for row in rows))
    if suffix == ".jsonl":
        return breaking.json_lines(rng, rows)
    if suffix == ".json":
        return breaking.json_text(rng, rows) if rng.random() < 0.7 else breaking.json_lines(rng, rows)
    if suffix == ".csv":
        return breaking.csv_text(rng, rows)
    return breaking.parquet(rng, rows) if suffix == ".parquet" else breaking.data(rng, b"\x1f\x8b" + json.dumps(rows).encode())


_RECIPE: dict[str, Any] = {
    "about": "what it is for",
    "convert": {"qwen_model": "donor", "L_layers": 1, "prelude_layers": 1, "coda_layers": 1, "H_cycles": 2, "L_cycles": 1,
                "output_path": "out.pt"},
    "train": {"checkpoint": "model.pt", "dataset_name": "text.txt", "seq_len": 16, "max_steps": 1, "batch_size": 2, "output_dir": "out",
              "lr": "3e-5", "cycle_choices": [1, 2], "enable_deep_supervision": True},
    "evaluate": {"checkpoint": "model.pt", "dataset_name": "text.txt", "cycles": [1], "seq_len": 16, "max_windows": 2, "json": True},
    "generate": {"checkpoint": "model.pt", "prompt": "The old", "max_new_tokens": 4, "temperature": 0, "stop": ["x"]},
}  # fmt: skip


def _recipe(rng: random.Random, material: Material, folder: Path) -> Case:
    material.into(folder, "model.pt", "donor", "text.txt")
    job = rng.choice(("convert", "evaluate", "generate", "generate", "train"))
    sections = {name: section for name, section in _RECIPE.items() if name == job or rng.random() < 0.3}
    kept = {name: value for name, value in sections[job].items() if f"--{name}" in _LASTING}
    (folder / "recipe.yaml").write_bytes(breaking.recipe(rng, sections))
    fixed = [word for name, value in kept.items() for word in (f"--{name}", *map(str, value if isinstance(value, list) else [value]))]
    argv = [job, "--config", "recipe.yaml", *fixed]  # which override what is broken there: a job of a million cycles is no fault
    return Case(f"recipe, {job}", "recipe.yaml broken", argv, *_result_of(argv))


def _command_line(rng: random.Random, material: Material, folder: Path) -> Case:
    line, end = rng.choice(_LINES)
    material.into(
        folder, "model.pt", *(["donor"] if line[0] in ("convert", "probe") else ["folder"] if line[0] == "compare" else []), "text.txt"
    )
    argv = [*breaking.words(rng, line, _flags(line[0]), _LASTING), *end]
    return Case(f"command line, {line[0]}", "words changed", argv)


@cache
def _flags(command: str) -> list[str]:
    from recursify.conversion.settings import ConvertSettings, InspectSettings, ProbeSettings
    from recursify.evaluation.settings import CompareSettings, EvaluateSettings
    from recursify.hub.settings import ExportSettings
    from recursify.inference.settings import GenerateSettings
    from recursify.serving.settings import ServeSettings
    from recursify.training.settings import TrainSettings

    classes = (ConvertSettings, InspectSettings, ProbeSettings, CompareSettings, EvaluateSettings, ExportSettings, GenerateSettings,
               ServeSettings, TrainSettings)  # fmt: skip
    settings: Any = next(each for each in classes if each.__name__.lower() == f"{command}settings")
    return [field.name for field in dataclasses.fields(settings) if field.name not in _NOT_DRAWN]


_PROMPTS = ["The old river", "A green ship", "", "What? \\n no", "龙虾 🦐 Größe", "  spaces  "]


def _prompts(rng: random.Random, material: Material, folder: Path) -> Case:
    material.into(folder, "model.pt")
    if rng.random() < 0.5:
        (folder / "prompts.txt").write_bytes(breaking.text(rng, "\n".join(_PROMPTS)))
    else:
        rows = [{"prompt": prompt} for prompt in _PROMPTS if prompt] + [{"messages": [{"role": "user", "content": "Hi"}]}]
        (folder / "prompts.jsonl").write_bytes(breaking.json_lines(rng, rows))
    file = next(folder.glob("prompts.*"))
    argv = [*_GENERATE, "--prompt_file", file.name, "--batch_size", rng.choice(("1", "3"))]
    makes = ("prompts.out.jsonl", "prompts.out.run.json")
    content = file.read_bytes()
    return Case(f"prompts, {file.suffix}", f"{file.name} broken", argv, makes, lambda folder, _: _all_prompts(folder, content, file.suffix))


def _all_prompts(folder: Path, content: bytes, suffix: str) -> str | None:
    """Every prompt has its result, in order, and beside its own words."""
    lines = [line.removesuffix("\r") for line in content.decode("utf-8-sig").split("\n")]
    wanted = [(number, line) for number, line in enumerate(lines) if line.strip()]
    found = [json.loads(line) for line in (folder / "prompts.out.jsonl").read_text(encoding="utf-8").split("\n") if line]
    if [each["index"] for each in found] != [number for number, _ in wanted]:
        return f"results of lines {[each['index'] for each in found]}, of prompts in lines {[number for number, _ in wanted]}"
    if suffix == ".txt" and (wrong := [each for each, (_, line) in zip(found, wanted, strict=True) if each["prompt"] != line]):
        return f"another prompt than in the file: {wrong[0]}"
    return None


DRAWERS: dict[Drawer, int] = {_checkpoint: 30, _data: 20, _recipe: 10, _command_line: 15, _prompts: 8}  # and how often
REQUESTS = 17  # of requests, beside them


# What a success leaves behind


_MAKERS = ("convert", "train", "export")


def _without(argv: list[str], flag: str) -> list[str]:
    """Words without a flag and its value."""
    if flag not in argv:
        return argv
    at = argv.index(flag)
    return argv[:at] + argv[at + 2 :]


def _result_of(argv: list[str]) -> tuple[tuple[str, ...] | None, Callable[[Path, str], str | None]]:
    """What a success of this command makes, and what tells that it is whole. Outputs may have any name."""
    if argv[0] in _MAKERS or "--config" in argv:
        return None, lambda folder, stdout: None
    if "--json" in argv:
        return (), lambda _, stdout: _one_object(stdout)
    return (), lambda folder, stdout: None


def _one_object(stdout: str) -> str | None:
    try:
        found = json.loads(stdout, parse_constant=lambda name: name + 1)  # type: ignore[operator]
    except (ValueError, TypeError):
        return f"no JSON object: {stdout[:_SHOWN]}"
    return None if isinstance(found, dict) and found else f"no JSON object: {stdout[:_SHOWN]}"


def snapshot(folder: Path) -> dict[str, str]:
    """Path -> hash of its contents, of all files and folders inside."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "" for path in folder.rglob("*")
    }


def fault_of(case: Case, ended: Ended, folder: Path, before: dict[str, str]) -> str | None:
    """What is wrong with how a case ended."""
    after = snapshot(folder)
    new = sorted(path for path in set(after) - set(before) if Path(path).name != LOCK)  # a run's lock stays
    if MARKER in new:
        return "code of a file has run"
    if ended.status is None:
        return f"still running after {SECONDS:g} seconds"
    if ended.grown > MEMORY:
        return f"took {ended.grown / 2**20:.0f} MiB"
    if "Traceback" in ended.stderr or ended.status not in (0, 2):
        return f"status {ended.status} with a traceback"
    if changed := [path for path in before if after.get(path) != before[path]]:
        return f"changed its input: {', '.join(changed)}"
    if left_over := [path for path in new if Path(path).name.startswith(".") or path.endswith(".partial")]:
        return f"left behind {', '.join(left_over)}"
    return _fault_of_refusal(ended.stderr, new) if ended.status == 2 else _fault_of_success(case, ended.stdout, folder, new)


def _fault_of_refusal(stderr: str, new: list[str]) -> str | None:
    messages = len(re.findall("^error: ", stderr, re.MULTILINE))
    if messages != 1:
        return f"{messages} messages"
    if new and not re.search(_STOPPED, stderr):
        return f"refused, and wrote {', '.join(new)}"
    return None


def _fault_of_success(case: Case, stdout: str, folder: Path, new: list[str]) -> str | None:
    if case.makes is not None and (other := set(new) ^ set(case.makes)):
        return f"expected to make {', '.join(case.makes) or 'nothing'}, missing or too many: {', '.join(sorted(other))}"
    if case.argv[0] in _MAKERS and not new and not case.kind.startswith("command line"):  # which may ask for help, or a dry run
        return "no output"
    return case.whole(folder, stdout) or next((fault for path in new if (fault := _damaged(folder / path))), None)


def _damaged(path: Path) -> str | None:
    """What is wrong with a file that a command has made, by its suffix."""
    try:
        if path.suffix == ".pt" and not zipfile.is_zipfile(path):
            return f"{path.name} is no zip"
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                file.keys()
        if path.suffix in (".json", ".jsonl"):
            lines = path.read_text(encoding="utf-8").split("\n") if path.suffix == ".jsonl" else [path.read_text(encoding="utf-8")]
            [json.loads(line) for line in lines if line]
    except (ValueError, OSError, SafetensorError) as error:
        return f"{path.name} is damaged: {error}"
    return None


# Running them


def make_material(folder: Path) -> Material:
    """The donor and the texts; `_converted` adds what commands make of them."""
    folder.mkdir()
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 1}
    tiny_donor("qwen2", folder / "donor", **sizes, max_position_embeddings=128)
    tokenizer = make_tiny_tokenizer()
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder / "donor")
    (folder / "text.txt").write_text("\n".join(sentences(0, 60)), encoding="utf-8")
    return Material(folder)


def _warming(folder: Path) -> list[tuple[list[str], Path]]:
    """Good command lines, which make the rest of the material and import what commands need."""
    adapter = [*_TRAIN[:-1], "trained", "--adapter", "--lora_rank", "2"]
    exact = ["--keep_donor", "--L_layers", "1", "--H_cycles", "2", "--L_cycles", "1"]
    lines = [
        ["convert", "--qwen_model", "donor", *exact, "--output_path", "exact.pt"],
        ["train", "--checkpoint", "exact.pt", *adapter[3:]],
    ]
    lines += [[*_CONVERT[:-1], "model.pt"], [*_CONVERT[:-1], "folder"], _GENERATE + _ON_PROMPT, _EVALUATE + _ON_TEXT, _EXPORT]
    return [(line, folder) for line in lines]


def run(until: float, seed: int, first: int, most: int | None) -> Outcome:
    """Run cases from `first` on until a time, `most` of them at most, and one at least."""
    outcome = Outcome(first=first)
    with ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="recursify-stress-")))
        material = make_material(place / "material")
        forks = stack.enter_context(Forks(place / "home", warm=_warming(material.folder)))
        (material.folder / "trained" / "qwen_recursive_adapter_best").rename(material.folder / "adapter")
        server = stack.enter_context(_server(material, forks, place))
        while outcome.cases == 0 or (left(until) and outcome.cases != most):
            rng = draw(seed, outcome.next)
            if rng.randrange(100) < REQUESTS:
                outcome.add(*server.fault_of(rng))
            else:
                outcome.add(*_one(rng, material, place, forks))
            if outcome.cases % _CACHED == 0:
                shutil.rmtree(place / "home" / "datasets", ignore_errors=True)
        outcome.notes = {"most memory of a command, MiB": forks.largest >> 20, "growth of the server, MiB": server.growth >> 20}
    return outcome


def _server(material: Material, forks: Forks, place: Path) -> http_requests.Server:
    """The server, and the text that it must give, by another command."""
    control = http_requests.CONTROL
    argv = [*_GENERATE, "--max_new_tokens", str(control["max_tokens"]), "--prompt", http_requests.PROMPT]
    said = forks.run(argv, material.folder, SECONDS).stdout
    return http_requests.Server(
        material.folder / "model.pt", forks.env, place / "server.log", said.removesuffix("\n").removeprefix(http_requests.PROMPT)
    )


def _one(rng: random.Random, material: Material, place: Path, forks: Forks) -> tuple[str, dict[str, Any] | None]:
    """Draw a case, run it in a folder of its own, and judge it."""
    folder = place / "case"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    fresh = rng.random() < FRESH
    case = rng.choices(list(DRAWERS), list(DRAWERS.values()))[0](rng, material, folder)
    before = snapshot(folder)
    ended = (forks.run_fresh if fresh else forks.run)(case.argv, folder, SECONDS)
    fault = fault_of(case, ended, folder, before)
    kind = f"{case.kind}: {'refused' if ended.status == 2 else 'done'}"
    if fault is None:
        return kind, None
    forks.renew()
    found = {"argv": case.argv, "stdout": ended.stdout[-_SHOWN:], "stderr": ended.stderr[-_SHOWN:]}
    return case.kind, {
        "what": case.what,
        "expected": "status 2, one message and nothing written; or all that was asked",
        "found": fault,
        **found,
    }
