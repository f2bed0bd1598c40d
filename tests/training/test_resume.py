"""Runs that are killed, interrupted, or meet a full disk, as real processes: what they leave behind, and going on from it.

A process that imports the training stack takes seconds to begin. So most runs here are children of one server, this same file as a
program (see `serve`), that has imported everything and forks: a child is the command from its flags to its exit status.
"""

from __future__ import annotations

import errno
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))

import filelock
import pytest
import torch
from transformers import TrainerCallback

from recursify import RecursiveLLM
from recursify.checkpoints import checkpoint
from recursify.cli import main as cli
from recursify.conversion.convert import convert
from recursify.errors import UserError
from recursify.training import TrainSettings, fit, lock, saving
from recursify.training.loss_module import LossModule
from recursify.training.saving import BEST, Saver, make_folder, resume_points, state_folder
from recursify.utils import checksums
from tests.support.tiny import make_tiny_tokenizer, sentences, tiny_donor

SEQ_LEN = 32
MACHINE = ("seconds", "tokens_per_second", "memory")  # in a log entry: differ from one run to the next
KILLED = -signal.SIGKILL


# Processes


def serve() -> None:
    """For each line of JSON on stdin: fork a child that calls `do(*args)` with its output in `log`; print its pid, then its status."""
    for line in sys.stdin:
        order = json.loads(line)
        if not (pid := os.fork()):
            log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 1), os.dup2(log, 2), os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            as_a_program(DOINGS[order["do"]], order["args"])
        print("pid", pid, flush=True)
        print("status", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


def as_a_program(do: Callable[..., Any], args: list[Any]) -> NoReturn:
    status: Any = 1
    try:
        do(*args)
        status = 0
    except SystemExit as stop:
        status = stop.code
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(status or 0)


@dataclass
class Life:
    """One process of a run, as it can be watched and ended."""

    pid: int
    log: Path
    _alive: Callable[[], bool]
    _ends: Callable[[], int]
    status: int | None = None

    @property
    def alive(self) -> bool:
        return self.status is None and self._alive()

    def kill(self, number: int = signal.SIGKILL) -> None:
        assert self.pid > 1  # others mean whole groups of processes
        if self.alive:
            os.kill(self.pid, number)

    def wait(self) -> int:
        if self.status is None:
            self.status = self._ends()
        return self.status

    @property
    def output(self) -> str:
        return self.log.read_text()


@dataclass
class Server:
    """Starts lives, one at a time. A test that failed may have left one behind, which is ended first."""

    process: Any
    logs: Path
    lives: list[Life] = field(default_factory=list)

    def start(self, do: str, *args: Any) -> Life:
        for life in self.lives[-1:]:
            life.kill()
            life.wait()
        log = self.logs / f"{len(self.lives) + 1}.log"
        log.touch()
        print(json.dumps({"do": do, "args": args, "log": str(log)}), file=self.process.stdin, flush=True)
        pid = self._number("pid")
        self.lives.append(Life(pid, log, lambda: is_there(pid), lambda: self._number("status")))
        return self.lives[-1]

    def _number(self, name: str) -> int:
        word, number = self.process.stdout.readline().split()
        assert word == name
        return int(number)

    def run(self, do: str, *args: Any) -> Life:
        life = self.start(do, *args)
        life.wait()
        return life


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    process = subprocess.Popen(
        [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment()
    )
    yield Server(process, tmp_path_factory.mktemp("logs"))
    process.kill()
    process.communicate()


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}


def is_there(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def until(condition: Callable[[], Any], life: Life) -> None:
    """Wait closely for what a process does, or for its end."""
    end = time.monotonic() + 300
    while life.alive and not condition():
        if time.monotonic() > end:
            life.kill()
            raise AssertionError(f"waited in vain: {life.output}")
        time.sleep(1e-3)


# What children do


def command(*argv: str) -> None:
    cli.JOBS[argv[0]](argv[1:]) if argv[0] in cli.JOBS else getattr(cli, argv[0])(argv[1:])


def with_files_of(limit: int, do: str, args: list[Any]) -> None:
    """No file can grow beyond so many bytes, as on a disk that fills while it is written."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    DOINGS[do](*args)


def poisoned(step: int, *argv: str) -> None:
    """The loss of a micro-batch is not a number."""
    own, calls = LossModule.forward, []

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        outputs = own(self, *args, **kwargs)
        calls.append(None)
        return outputs | ({"loss": outputs["loss"] * float("nan")} if len(calls) == step else {})

    LossModule.forward = forward  # type: ignore[method-assign]
    command(*argv)


def signalled_in_validation(number: int, *argv: str) -> None:
    own, calls = LossModule.row_sums, []

    def row_sums(*args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGTERM)
        return own(*args, **kwargs)

    LossModule.row_sums = row_sums  # type: ignore[method-assign]
    command(*argv)


def killed_everywhere(folder: str, kind: str) -> None:
    """Copies of a folder 0, 1, 2, ... beside it, each with the save of step 2 killed before another of its touches of the disk."""
    model, tokenizer = constant_model(2.0), make_tiny_tokenizer()
    for count in range(1000):
        copy = Path(folder).with_name(str(count))
        shutil.copytree(folder, copy)
        if not (pid := os.fork()):
            save_until(count, copy, model, tokenizer, kind)
        if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0:
            return
    raise AssertionError("never reached the end")


def save_until(count: int, folder: Path, model: Any, tokenizer: Any, kind: str) -> NoReturn:
    left = [count]

    def watch(event: str, args: tuple[Any, ...]) -> None:
        opens = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
        if opens or event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate"):
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1

    saver = Saver(folder, tokenizer, torch.float32, keep_last=1 if kind == "rotating" else 0)
    sys.addaudithook(watch)
    save_constant(saver, 2, model, 2.0)
    os._exit(0)


def constant_model(value: float) -> RecursiveLLM:
    model = convert_tiny()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)
    return model


def save_constant(saver: Saver, step: int, model: Any, value: float) -> None:
    """A checkpoint whose parts say that they belong together."""

    def write(folder: Path) -> None:
        for name in ("optimizer.pt", saving.STATE):
            (folder / name).write_text(str(value))
        (folder / saving.RUN).write_text(json.dumps({"saved_at": time.time()}))

    saver.save_step(step, model, write)


def convert_tiny() -> Any:
    from recursify.network.configuration_recursive_llm import from_donor
    from tests.support.tiny import tiny_config

    torch.manual_seed(0)
    shape = {"prelude_layers": 1, "L_layers": 1, "coda_layers": 1, "H_cycles": 2, "L_cycles": 1, "gain_init": 0.2, "state_init_std": 0.5}
    return RecursiveLLM(from_donor(tiny_config("qwen2", num_hidden_layers=3), [0, 1, 2], **shape))


DOINGS: dict[str, Callable[..., Any]] = {
    do.__name__: do for do in (command, with_files_of, poisoned, signalled_in_validation, killed_everywhere)
}


# Runs


@pytest.fixture(scope="module")
def corner(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a donor, init.pt (float32) and init_bf16.pt made of it, and text: 16 sequences, 2 for validation."""
    folder = tmp_path_factory.mktemp("resume")
    tiny_donor("qwen2", folder / "donor", num_hidden_layers=3)
    torch.manual_seed(0)
    model = convert(str(folder / "donor"), L_layers=1, keep_donor=True, H_cycles=2, L_cycles=1, gain=0.2)
    for name, dtype in (("init.pt", torch.float32), ("init_bf16.pt", torch.bfloat16)):
        checkpoint.save(folder / name, model, make_tiny_tokenizer(), dtype=dtype)
    tokenizer: Any = make_tiny_tokenizer()
    (folder / "text").mkdir()
    for name, seed, sequences in (("train", 5, 16), ("validation", 6, 2)):
        text = tokenizer.decode(tokenizer(" ".join(sentences(seed, 60))).input_ids[: SEQ_LEN * sequences])
        (folder / "text" / f"{name}.txt").write_text(text)
    return folder


def flags(corner: Path, out: Path, **changes: Any) -> list[str]:
    """The flags of a run of 12 steps in 3 epochs, all of whose steps are logged. True is a bare flag, None is left out."""
    common: dict[str, Any] = {
        "checkpoint": corner / "init.pt", "dataset_name": corner / "text", "output_dir": out, "seq_len": SEQ_LEN, "batch_size": 4,
        "lr": 1e-3, "warmup_steps": 2, "num_epochs": 3, "save_every": 2, "log_every": 1, "generate_every": 0, "device": "cpu",
        "enable_deep_supervision": True,
    }  # fmt: skip
    words = []
    for name, value in (common | changes).items():
        if value is not None:
            words += [f"--{name}", *([] if value is True else map(str, value) if isinstance(value, tuple) else [str(value)])]
    return words


EVERYTHING: dict[str, Any] = {
    "optimizer": "muon", "lr_schedule": "wsd", "ema_decay": 0.9, "eval_every": 3, "cycle_choices": (1, 2, 3), "depth_curriculum": 0.5,
    "backprop": "cycle", "grad_accum_steps": 2, "num_epochs": 5, "keep_last": 2, "self_distill_weight": 0.1,
}  # fmt: skip
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "everything": ("train", EVERYTHING),
    "bfloat16 files": ("train", {"init": "init_bf16.pt", "save_every": 1, "eval_every": 2, "bf16": "True"}),
    "a stream": ("train", {"streaming": True, "max_steps": 10, "save_every": 3, "separate_documents": True, "lr_schedule": "cosine"}),
    "embedding space": ("train_trm", {"checkpoint": None, "L_layers": 1, "H_cycles": 2, "L_cycles": 1, "save_every": 3}),
}


def argv_of(variant: str, corner: Path, out: Path) -> list[str]:
    job, changes = VARIANTS[variant]
    changes = dict(changes)
    if "init" in changes:
        changes["checkpoint"] = corner / changes.pop("init")
    if job != "train":
        changes["model_name"] = corner / "donor"
    return [job, *flags(corner, out, **changes)]


@pytest.fixture(scope="module")
def whole_runs(server: Server, corner: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a variant's run that nobody disturbed, and that kept every state."""
    made: dict[str, Path] = {}

    def get(variant: str) -> Path:
        if variant not in made:
            made[variant] = tmp_path_factory.mktemp("whole")
            life = server.run("command", *argv_of(variant, corner, made[variant]))
            assert life.status == 0, life.output
        return made[variant]

    return get


def log_of(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{name: value for name, value in json.loads(line).items() if name not in MACHINE} for line in lines]


def assert_same(found: Any, expected: Any, where: str) -> None:
    """Of what torch.load gives: bit for bit."""
    assert type(found) is type(expected), where
    if isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype and torch.equal(found, expected), where
    elif isinstance(expected, dict):
        assert list(found) == list(expected), where
        for name, value in expected.items():
            assert_same(found[name], value, f"{where}/{name}")
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected), where
        for i, value in enumerate(expected):
            assert_same(found[i], value, f"{where}/{i}")
    else:
        assert found == expected, where


def assert_same_results(found: Path, expected: Path) -> None:
    """Two folders hold the same: log, checkpoints, and states of the newest but for the times in them."""
    assert log_of(found) == log_of(expected)
    names = {path.name for path in expected.iterdir()}
    assert {path.name for path in found.iterdir() if not is_empty_aside(path)} == names
    files = [Path(BEST), *(path.relative_to(expected) for path in expected.glob("checkpoint_step_*/*.pt*"))]
    files += [path.relative_to(expected) for path in expected.glob("checkpoint_step_*.pt")]
    assert len(files) > 4
    for file in files:
        if file.name.startswith("rng_state"):
            assert (found / file).read_bytes() == (expected / file).read_bytes(), file
        else:
            assert_same(read_pt(found / file), read_pt(expected / file), str(file))


def is_empty_aside(path: Path) -> bool:
    """A save was killed between making its folder and the first file in it."""
    return path.name.startswith(".recursify-") and not list(path.iterdir())


def read_pt(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True)


def newest(folder: Path) -> int:
    """The step of the newest checkpoint, 0 before there is one."""
    points = resume_points(folder)
    return saving.step_of(points[0]) if points else 0


def saves_aside(folder: Path) -> set[Path]:
    return set(folder.glob(".recursify-*"))


# Killed


@pytest.mark.parametrize("variant", VARIANTS)
def test_killed_and_resumed_run_equals_uninterrupted(
    variant: str, server: Server, whole_runs: Callable[[str], Path], corner: Path, tmp_path: Path
) -> None:
    """SIGKILL at random moments, and in the middle of saves; weights, optimizer, averages, random numbers and log are the same bits."""
    whole, rng = whole_runs(variant), random.Random(variant)
    argv, reached, kills = [*argv_of(variant, corner, tmp_path), "--resume"], 0, 0
    for n in range(4 if variant == "everything" else 2):
        life = server.start("command", *argv)
        before = newest(tmp_path)
        if n % 2 == 0:  # in a save: while its folder aside is there
            old = saves_aside(tmp_path)
            skipped = rng.randrange(3)
            for _ in range(skipped + 1):
                until(lambda: saves_aside(tmp_path) - old, life)  # noqa: B023 - called at once
                old |= saves_aside(tmp_path)
            time.sleep(rng.uniform(0, 4e-3))
        else:
            until(lambda: newest(tmp_path) > before, life)  # noqa: B023
            time.sleep(rng.uniform(0, 0.1))
        life.kill()
        kills += life.wait() == KILLED
        assert life.status in (KILLED, 0), life.output
        for point in resume_points(tmp_path):
            assert checkpoint.load(point).tokenizer is not None
        assert newest(tmp_path) >= reached, "a kill took a checkpoint away"
        reached = newest(tmp_path)
    assert kills
    last = server.run("command", *argv)
    assert last.status == 0, last.output
    assert_same_results(tmp_path, whole)


def killed_folders(server: Server, tmp_path: Path, kind: str) -> list[Path]:
    """Step 1 is whole, step 2 of an earlier run lies about, and the save of step 2 was killed at each of its touches of the disk."""
    folder = tmp_path / "start"
    folder.mkdir()
    earlier = Saver(folder, make_tiny_tokenizer(), torch.float32)
    save_constant(earlier, 2, constant_model(9.0), 9.0)
    if kind == "alone":
        earlier.folder.joinpath("checkpoint_step_2.pt").unlink()
        shutil.rmtree(folder / "checkpoint_step_2_state")
        shutil.rmtree(folder / "checkpoint_step_2_tokenizer")
    save_constant(earlier, 1, constant_model(1.0), 1.0)
    (folder / "checkpoint_step_1_tokenizer" / "mine.txt").write_text("of the user")
    life = server.run("killed_everywhere", str(folder), kind)
    assert life.status == 0, life.output
    return sorted((path for path in tmp_path.iterdir() if path.name != "start"), key=lambda path: int(path.name))


@pytest.mark.parametrize("kind", ["alone", "over an earlier run's", "rotating"])
def test_killed_save_leaves_a_complete_newest_checkpoint(kind: str, server: Server, tmp_path: Path) -> None:
    folders = killed_folders(server, tmp_path, kind)
    assert len(folders) > 15
    found = []
    for folder in folders:
        point = resume_points(folder)[0]
        weights = {value.item() for value in next(iter(read_pt(point)["model_state_dict"].values())).unique()}
        parts = {float((state_folder(point) / name).read_text()) for name in ("optimizer.pt", saving.STATE)}
        assert weights == parts and parts <= {1.0, 2.0}, (folder.name, point, weights, parts)
        assert (checkpoint.tokenizer_folder(point) / "tokenizer.json").is_file()
        found.append(parts.pop())
    assert found == sorted(found) and found[0] == 1.0 and found[-1] == 2.0  # the new one from some point on


@pytest.mark.parametrize("kind", ["over an earlier run's", "rotating"])
def test_next_run_removes_leftovers_of_killed_runs(kind: str, server: Server, tmp_path: Path) -> None:
    for folder in killed_folders(server, tmp_path, kind):
        whole = resume_points(folder)
        make_folder(folder)
        assert all(is_empty_aside(path) for path in saves_aside(folder)), list(folder.iterdir())
        assert resume_points(folder) == whole
        for state in folder.glob("*_state"):
            assert state.with_name(state.name.replace("_state", ".pt")).exists()
        if kind == "rotating":  # and the next save all else
            save_constant(Saver(folder, make_tiny_tokenizer(), torch.float32, keep_last=1), 3, constant_model(3.0), 3.0)
            left = {path.name for path in folder.iterdir() if not is_empty_aside(path)}
            assert left == {f"checkpoint_step_3{end}" for end in (".pt", "_tokenizer", "_state")}


def test_temporary_folders_of_other_commands_are_kept(tmp_path: Path) -> None:
    """Convert may be writing beside the run right now: it holds the lock of its folder."""
    theirs, dead, unknown, empty, spent = (tmp_path / f".recursify-{name}" for name in ("theirs", "dead", "unknown", "empty", "spent"))
    for folder in (theirs, dead, unknown, empty, spent):
        folder.mkdir()
    for folder in (theirs, dead, unknown):
        (folder / "init.pt").write_text("")
    (dead / ".lock").touch()
    os.utime(spent, (time.time() - 600,) * 2)
    (tmp_path / "checkpoint_step_7_state").mkdir()
    (tmp_path / "checkpoint_step_old_state").mkdir()
    with filelock.FileLock(theirs / ".lock"):
        make_folder(tmp_path)
        assert {path.name for path in tmp_path.iterdir()} == {theirs.name, unknown.name, empty.name, "checkpoint_step_old_state"}
        assert (theirs / "init.pt").exists()
    make_folder(tmp_path)
    assert not theirs.exists() and unknown.exists()


def test_replaced_tokenizer_is_restored_after_a_kill(tmp_path: Path) -> None:
    """The kill came between the two renames that put a new tokenizer in the place of the old; in the second folder, after them."""
    aside = tmp_path / ".recursify-x"
    for name in (f"{Path(BEST).stem}_tokenizer", "checkpoint_step_4_tokenizer"):
        (aside / f"{name}.old").mkdir(parents=True)
        (aside / f"{name}.old" / "mine.txt").write_text("of the user")
    (aside / ".lock").touch()
    (tmp_path / "checkpoint_step_4_tokenizer").mkdir()
    make_folder(tmp_path)
    assert (tmp_path / f"{Path(BEST).stem}_tokenizer" / "mine.txt").is_file()
    assert (aside / "checkpoint_step_4_tokenizer.old" / "mine.txt").is_file()
    (tmp_path / "checkpoint_step_4_tokenizer" / "mine.txt").write_text("of the user, handed over")
    make_folder(tmp_path)
    assert not aside.exists()


# Rotation


def test_keep_last_deletes_only_old_step_checkpoints(server: Server, corner: Path, tmp_path: Path) -> None:
    put_by = tmp_path / "checkpoint_step_2_good.pt"
    put_by.write_text("a copy that somebody made")
    life = server.run("command", "train", *flags(corner, tmp_path, keep_last=3))
    assert life.status == 0, life.output
    parts = {f"checkpoint_step_{n}{end}" for n in (8, 10, 12) for end in (".pt", "_tokenizer")} | {BEST, BEST.replace(".pt", "_tokenizer")}
    states = {"checkpoint_step_10_state", "checkpoint_step_12_state"}
    files = parts | states | {put_by.name, "metrics.jsonl", lock.LOCK}
    assert {path.name for path in tmp_path.iterdir()} == files
    assert newest(tmp_path) == 12

    older = tmp_path / "checkpoint_step_6.pt"  # what a kill in the last rotation leaves, and only a resume finds: the run is at its end
    shutil.copy(tmp_path / "checkpoint_step_8.pt", older)
    os.utime(older, (0, 0))
    life = server.run("command", "train", *flags(corner, tmp_path, keep_last=3), "--resume")
    assert "already the end of this run" in life.output
    assert {path.name for path in tmp_path.iterdir()} == files


def test_keep_last_survives_a_clock_set_back(tmp_path: Path) -> None:
    saver, model = Saver(tmp_path, make_tiny_tokenizer(), torch.float32, keep_last=2), constant_model(1.0)
    for step in (1, 2):
        save_constant(saver, step, model, 1.0)
        run = state_folder(tmp_path / f"checkpoint_step_{step}.pt") / saving.RUN
        run.write_text(json.dumps({"saved_at": time.time() + 3600}))
    save_constant(saver, 3, model, 1.0)
    assert tmp_path / "checkpoint_step_3.pt" in resume_points(tmp_path)
    assert sorted(path.name for path in tmp_path.glob("*.pt")) == ["checkpoint_step_2.pt", "checkpoint_step_3.pt"]


def test_damaged_state_is_skipped(tmp_path: Path) -> None:
    saver, model = Saver(tmp_path, make_tiny_tokenizer(), torch.float32), constant_model(1.0)
    for step in (1, 2):
        save_constant(saver, step, model, 1.0)
    for damage in ("", "{}", "[]"):
        (tmp_path / "checkpoint_step_2_state" / saving.RUN).write_text(damage)
        assert newest(tmp_path) == 1


def flip_a_bit(file: Path, seed: int) -> None:
    content, rng = bytearray(file.read_bytes()), random.Random(seed)
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    file.write_bytes(content)


def files_of(point: Path) -> list[Path]:
    return sorted([point, *checkpoint.tokenizer_folder(point).iterdir(), *state_folder(point).iterdir()])


def test_a_flipped_bit_anywhere_is_found_and_the_checkpoint_before_taken(tmp_path: Path) -> None:
    saver, model = Saver(tmp_path, make_tiny_tokenizer(), torch.float32), constant_model(1.0)
    for step in (1, 2):
        save_constant(saver, step, model, float(step))
    first, second = (tmp_path / f"checkpoint_step_{step}.pt" for step in (1, 2))
    said: list[str] = []
    assert saving.sound_point(tmp_path, said.append) == second and not said
    assert {file.name for file in files_of(second)} > {"checkpoint_step_2.pt", "tokenizer.json", "optimizer.pt", "run.json", "SHA256SUMS"}
    for number, file in enumerate(files_of(second)):
        for seed in range(3):
            whole = file.read_bytes()
            flip_a_bit(file, 10 * number + seed)
            said.clear()
            assert saving.sound_point(tmp_path, said.append) == first, (file, seed)
            (line,) = said
            named = line.partition(" is damaged")[0]
            assert named in (str(file), str(second)) or file.name == checksums.NAME, line
            file.write_bytes(whole)
    flip_a_bit(second, 0), flip_a_bit(first, 0)
    with pytest.raises(UserError, match=r"--resume: no checkpoint in .* is sound; restore .*checkpoint_step_2.pt from a backup, or give"):
        saving.sound_point(tmp_path, said.append)


def test_sha256sum_reads_the_checksums(tmp_path: Path) -> None:
    save_constant(Saver(tmp_path, make_tiny_tokenizer(), torch.float32), 1, constant_model(1.0), 1.0)
    checked = ["sha256sum", "--check", "--strict", "--quiet", checksums.NAME]
    if shutil.which(checked[0]) is None:
        pytest.skip("no sha256sum here")
    assert subprocess.run(checked, cwd=tmp_path / "checkpoint_step_1_state").returncode == 0
    flip_a_bit(tmp_path / "checkpoint_step_1.pt", 0)
    assert subprocess.run(checked, cwd=tmp_path / "checkpoint_step_1_state", capture_output=True).returncode == 1


def test_a_checkpoint_without_checksums_is_taken(tmp_path: Path) -> None:
    """Earlier versions wrote none."""
    save_constant(Saver(tmp_path, make_tiny_tokenizer(), torch.float32), 1, constant_model(1.0), 1.0)
    (tmp_path / "checkpoint_step_1_state" / checksums.NAME).unlink()
    assert saving.sound_point(tmp_path, print) == tmp_path / "checkpoint_step_1.pt"


def test_resume_from_the_checkpoint_before_a_damaged_one_equals_uninterrupted(
    server: Server, whole_runs: Callable[[str], Path], corner: Path, tmp_path: Path
) -> None:
    whole, out = whole_runs("bfloat16 files"), tmp_path / "out"
    shutil.copytree(whole, out)
    newest_point, before = resume_points(out)
    flip_a_bit(newest_point, 1)
    life = server.run("command", *argv_of("bfloat16 files", corner, out), "--resume")
    assert life.status == 0, life.output
    assert f"{newest_point} is damaged: it is not as it was written" in life.output
    assert f"Resuming from {before}" in life.output
    assert_same_results(out, whole)


# Two runs in one folder


def test_a_second_run_in_a_folder_is_refused_until_the_first_ends_or_is_killed(server: Server, corner: Path, tmp_path: Path) -> None:
    words = argv_of("everything", corner, out := tmp_path / "out")
    life = server.start("command", *words)
    until(lambda: (out / lock.LOCK).exists() and list(out.glob("checkpoint_step_*.pt")), life)
    life.kill(signal.SIGSTOP)
    for more in ([], ["--resume"]):
        with pytest.raises(SystemExit) as ended:
            command(*words, *more)
        assert ended.value.code == 2
    words = rf"--output_dir: another run is writing to {out}; wait until it ends, stop it, or choose another"
    with pytest.raises(UserError, match=words), lock.sole_run(out):
        pass
    life.kill()
    life.wait()
    with lock.sole_run(out):
        pass


# Disks that are full


def started(variant: str, server: Server, corner: Path, folder: Path) -> list[str]:
    """The flags with which a run can go on that was stopped after a checkpoint."""
    argv = argv_of(variant, corner, folder)
    life = server.start("command", *argv)
    until(lambda: newest(folder) >= 3, life)
    life.kill()
    assert life.wait() == KILLED
    return [*argv, "--resume"]


def ends_clearly(life: Life, message: str) -> bool:
    errors = re.findall(r"^error: .*$", life.output, re.MULTILINE)
    return life.status == 2 and "Traceback" not in life.output and len(errors) == 1 and re.search(message, errors[0]) is not None


# What cannot be written any more: the best weights, the optimizer's state, the random numbers
@pytest.mark.parametrize(("variant", "limit"), [("everything", 60_000), ("a stream", 60_000), ("a stream", 6_000)])
def test_full_disk_ends_the_run_and_keeps_the_last_checkpoint(
    variant: str, limit: int, server: Server, whole_runs: Callable[[str], Path], corner: Path, tmp_path: Path
) -> None:
    whole, argv = whole_runs(variant), started(variant, server, corner, tmp_path)
    before, aside = newest(tmp_path), saves_aside(tmp_path)
    stopped = server.run("with_files_of", limit, "command", argv)
    assert ends_clearly(stopped, r"could not be written.*Free some space"), stopped.output
    assert newest(tmp_path) == before and saves_aside(tmp_path) <= aside
    last = server.run("command", *argv)
    assert f"Resuming from {tmp_path / f'checkpoint_step_{before}.pt'}" in last.output
    assert last.status == 0, last.output
    assert_same_results(tmp_path, whole)


@pytest.mark.parametrize("name", ["unlink", "replace"])
def test_a_disk_that_fails_while_old_checkpoints_go_is_one_message(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saver, model = Saver(tmp_path, make_tiny_tokenizer(), torch.float32, keep_last=1), constant_model(1.0)
    save_constant(saver, 1, model, 1.0)
    own = getattr(Path, name)

    def fails(self: Path, *args: Any, **kwargs: Any) -> Any:
        if "checkpoint_step" in str(self):
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(self))
        return own(self, *args, **kwargs)

    with monkeypatch.context() as broken:
        broken.setattr(Path, name, fails)
        with pytest.raises(UserError, match=r"checkpoint_step_2\S+ could not be written.*[Ii]nput/output error"):
            save_constant(saver, 2, model, 2.0)
    assert newest(tmp_path) >= 1


def test_unwritable_metrics_file_ends_the_run(server: Server, whole_runs: Callable[[str], Path], corner: Path, tmp_path: Path) -> None:
    whole, argv, log = whole_runs("a stream"), started("a stream", server, corner, tmp_path), tmp_path / "metrics.jsonl"
    before = newest(tmp_path)
    log.unlink()
    log.symlink_to("/dev/full")
    stopped = server.run("command", *argv)
    assert ends_clearly(stopped, r"metrics.jsonl: could not be written \(No space left on device\).*--resume"), stopped.output
    assert newest(tmp_path) == before
    log.unlink()
    assert server.run("command", *argv).status == 0
    assert_same_results(tmp_path, whole)


# Signals


@pytest.mark.slow
def test_resume_of_the_real_command(server: Server, corner: Path, tmp_path: Path) -> None:
    """Ctrl-C, a kill, SIGTERM; each time the run goes on, and in the end nothing of it shows."""
    names = {"num_epochs": 15, "save_every": 20, "ema_decay": 0.9}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert server.run("command", "train", *flags(corner, whole, **names)).status == 0
    argv = flags(corner, cut, **names)

    first = real([sys.executable, "-m", "recursify", "train", *argv], tmp_path / "first.log")
    until(lambda: lines(cut) > 8, first)
    first.kill(signal.SIGINT)
    step = stops(first, cut)

    second = server.start("command", "train", *argv, "--resume")
    until(lambda: newest(cut) > step, second)
    second.kill()
    assert second.wait() == KILLED and f"Resuming from {cut / f'checkpoint_step_{step}.pt'}" in second.output

    third = server.start("command", "train", *argv, "--resume")
    logged = lines(cut)
    until(lambda: "Resuming" in third.output and lines(cut) > logged, third)
    third.kill(signal.SIGTERM)
    stops(third, cut)

    assert server.run("command", "train", *argv, "--resume").status == 0
    assert log_of(cut) == log_of(whole)
    for name in (BEST, "checkpoint_step_60.pt"):
        assert_same(read_pt(cut / name)["model_state_dict"], read_pt(whole / name)["model_state_dict"], name)


def lines(folder: Path) -> int:
    log = folder / "metrics.jsonl"
    return log.read_bytes().count(b"\n") if log.exists() else 0


def real(words: list[str], log: Path) -> Life:
    with open(log, "w") as file:
        process = subprocess.Popen(words, stdout=file, stderr=file, env=environment(), cwd=log.parent)
    return Life(process.pid, log, lambda: process.poll() is None, process.wait)


def stops(life: Life, folder: Path) -> int:
    """The step at which a signal has stopped a run, with a checkpoint and a word about it."""
    assert life.wait() == 130, life.output
    (step,) = re.findall(r"Interrupted and saved at step (\d+); the same command with --resume continues from there", life.output)
    assert newest(folder) == int(step) and "Traceback" not in life.output
    return int(step)


def test_signal_after_the_last_step_has_no_effect(server: Server, corner: Path, tmp_path: Path) -> None:
    """The run is through, and nobody is told of a checkpoint that was not saved."""
    life = server.run("signalled_in_validation", 1, "train", *flags(corner, tmp_path, num_epochs=1, save_every=0))
    assert life.status == 0 and "Interrupted and saved" not in life.output, life.output
    assert (tmp_path / BEST).is_file()


# Losses that are not numbers


def test_non_finite_loss_stops_before_the_optimizer_step(
    server: Server, whole_runs: Callable[[str], Path], corner: Path, tmp_path: Path
) -> None:
    """In the second micro-batch of step 5; without it the run goes on from the checkpoint before to the same end."""
    whole, argv = whole_runs("everything"), argv_of("everything", corner, tmp_path)
    stopped = server.run("poisoned", 10, *argv)
    data = tmp_path / "nan_step_5_rank_0.pt"
    assert ends_clearly(
        stopped, rf"step 5: expected a finite gradient norm, got nan.*not updated; the batches of the step are in {data}"
    ), stopped.output
    found = read_pt(data)
    assert found["step"] == 5 and found["H_cycles"] in (1, 2, 3) and len(found["cycle_losses"]) > 0
    assert [batch["input_ids"].shape for batch in found["batches"]] == [(4, SEQ_LEN)] * 2
    assert newest(tmp_path) == 4
    data.unlink()
    last = server.run("command", *argv, "--resume")
    assert last.status == 0, last.output
    assert_same_results(tmp_path, whole)


@pytest.mark.parametrize(("optimizer", "log_every", "reported_in"), [("adamw", 10, 4), ("adamw", 1, 3), ("muon", 10, 3)])
def test_non_finite_step_is_not_applied(
    optimizer: str, log_every: int, reported_in: int, corner: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the device skips it, it is reported in the next step; but before anything of it is logged."""
    model, seen = checkpoint.load(corner / "init.pt").model, []
    ids = make_tiny_tokenizer()(" ".join(sentences(1, 40))).input_ids
    blocks = [{"input_ids": ids[i * SEQ_LEN : (i + 1) * SEQ_LEN]} for i in range(20)]
    begun: list[int] = []

    class Watch(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            begun.append(state.global_step + 1)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.append({name: tensor.clone() for name, tensor in model.state_dict().items()})

    own = LossModule.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        outputs = own(self, *args, **kwargs)
        return outputs | ({"loss": outputs["loss"] * torch.inf} if len(seen) == 2 else {})

    monkeypatch.setattr(LossModule, "forward", forward)
    saver, log = Saver(tmp_path, make_tiny_tokenizer(), torch.float32), tmp_path / "metrics.jsonl"
    settings = TrainSettings(
        checkpoint="in memory", seq_len=SEQ_LEN, lr=1e-3, warmup_steps=0, generate_every=0, device="cpu", optimizer=optimizer,  # type: ignore[arg-type]
        log_every=log_every, ema_decay=0.9,
    )  # fmt: skip
    with pytest.raises(
        UserError,
        match=r"step 3: expected a finite gradient norm, got (nan|inf).*The weights were not updated; the batches of the step are in",
    ):
        fit(model, make_tiny_tokenizer(), blocks, blocks[:2], settings, saver=saver, console=False, callbacks=[Watch()])
    assert not torch.equal(seen[0]["lm_head.weight"], seen[1]["lm_head.weight"])
    assert all(torch.equal(tensor, seen[1][name]) for name, tensor in model.state_dict().items())
    assert begun[-1] == reported_in and {json.loads(line)["step"] for line in log.read_text().splitlines()} <= {1, 2}


def test_non_finite_step_is_reported_even_if_its_batch_cannot_be_dumped(server: Server, corner: Path, tmp_path: Path) -> None:
    argv = ["train", *flags(corner, tmp_path, batch_size=16, save_every=0)]
    life = server.run("with_files_of", 3_000, "poisoned", [1, *argv])
    assert ends_clearly(
        life, r"step 1: expected a finite gradient norm, got nan.*; the batches of the step could not be saved .*disk is full"
    ), life.output


if __name__ == "__main__":
    serve()
