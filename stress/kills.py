"""Kills: commands that write are killed, lose their disk, and find their checkpoints damaged; then they are repeated or resumed.

A case is a command (`scenarios.py`) that meets one to three faults in a row. What must hold: after every fault nothing broken is under a
final name, and a disk that fails ends the command with status 2 and one message; at the end the command succeeds, and what it wrote equals,
bit for bit, what it wrote when nothing disturbed it.
"""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from recursify.training.saving import resume_points, state_folder
from recursify.utils.checksums import first_damaged
from stress import child
from stress.child import KILLED, Ended, Fault
from stress.part import Outcome, draw, left
from stress.same import difference
from stress.scenarios import SCENARIOS, Scenario, empty, make_inputs

_DISK_FAULTS = (errno.ENOSPC, errno.EROFS, errno.EIO)
_KINDS = {"touch": 5, "moment": 3, "disk": 2, "size": 1}


@dataclass
class Whole:
    """A command that nothing disturbed: what it wrote, its seconds, its touches of the disk, the size of its largest file."""

    out: Path
    seconds: float
    touches: int
    largest: int


@dataclass
class Bench:
    """A folder to work in: inputs, undisturbed results by scenario, and one folder for the case at hand."""

    root: Path
    whole: dict[str, Whole] = field(default_factory=dict)

    @property
    def inputs(self) -> Path:
        return self.root / "inputs"

    def of(self, name: str) -> Whole:
        """The undisturbed run of a scenario, made once."""
        if name not in self.whole:
            scenario, out = SCENARIOS[name], self.root / "whole" / name.replace(" ", "_") / "out"
            prepare(self, scenario, out)
            touches = out.parent / "touches"
            ended = child.run(scenario.argv(self.inputs, out), out.parent, None, scenario.processes, touches)
            assert ended.status == 0, ended.output
            sizes = [path.stat().st_size for path in out.rglob("*") if path.is_file()]
            self.whole[name] = Whole(out, ended.seconds, int(touches.read_text()), max(sizes))
        return self.whole[name]


def run(until: float, seed: int, first: int, most: int | None) -> Outcome:
    """Cases until a `time.monotonic`, at least one and `most` at most."""
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    outcome = Outcome(first)
    _import_all()
    with tempfile.TemporaryDirectory(prefix="stress-") as folder:
        bench = Bench(Path(folder))
        bench.inputs.mkdir()
        _in_a_child(lambda: make_inputs(bench.inputs))
        while most is None or outcome.cases < most:
            if outcome.cases and not left(until):
                break
            name, happened, fault = one(bench, draw(seed, outcome.next))
            for kind in happened:
                outcome.counts[f"faults, {kind}"] += 1
            outcome.add(name, fault)
    return outcome


def one(bench: Bench, rng: random.Random) -> tuple[str, list[str], dict[str, Any] | None]:
    """A case: its scenario, the faults that it met, and what was wrong."""
    name = rng.choice(list(SCENARIOS))
    scenario, whole, happened = SCENARIOS[name], bench.of(name), []
    out = bench.root / "case" / "out"
    prepare(bench, scenario, out)
    argv = scenario.argv(bench.inputs, out) + (["--resume"] if scenario.trains else [])
    for _ in range(rng.randint(1, 3)):
        fault = _draw_fault(rng, whole)
        ended = child.run(argv, out.parent, fault, scenario.processes)
        happened.append(f"{fault.kind}: {_end(ended)}")
        wrong = _after(ended, out, scenario)
        if scenario.trains and wrong is None and len(resume_points(out)) > 1 and rng.random() < 0.3:
            happened.append("bit")
            wrong = _flipped(rng, argv, out, scenario)
        if wrong is not None:
            return name, happened, {"what": f"{name}; {happened}; {fault}", "found": wrong}
    if scenario.trains and scenario.processes == 1 and rng.random() < 0.1:
        happened.append("twice")
        if (wrong := _twice(argv, out)) is not None:
            return name, happened, {"what": f"{name}; {happened}", "found": wrong}
    ended = child.run(argv, out.parent, None, scenario.processes)
    wrong = f"status {ended.status}: {ended.output[-2000:]}" if ended.status else difference(out, whole.out)
    return name, happened, None if wrong is None else {"what": f"{name}; {happened}", "expected": "the undisturbed result", "found": wrong}


def prepare(bench: Bench, scenario: Scenario, out: Path) -> None:
    """An empty folder, or one with earlier results."""
    empty(out)
    for argv in scenario.before(bench.inputs, out):
        ended = child.run(argv, out.parent)
        assert ended.status == 0, ended.output


def _draw_fault(rng: random.Random, whole: Whole) -> Fault:
    (kind,) = rng.choices(list(_KINDS), list(_KINDS.values()))
    if kind == "moment":
        return Fault("moment", rng.uniform(0, 1.1 * whole.seconds))
    if kind == "size":
        return Fault("size", whole.largest ** rng.uniform(0.3, 1.0))
    return Fault("touch" if kind == "touch" else "disk", rng.randrange(max(1, whole.touches)), rng.choice(_DISK_FAULTS))


def _end(ended: Ended) -> str:
    return "killed" if ended.status == KILLED else "over before" if ended.status == 0 else f"status {ended.status}"


def _after(ended: Ended, out: Path, scenario: Scenario) -> str | None:
    """What is wrong after a fault."""
    if "Traceback (most recent call last)" in ended.output:
        return f"a traceback: {ended.output[-2000:]}"
    if ended.status == 2 and sum(line.startswith("error: ") for line in ended.output.splitlines()) != 1:
        return f"expected one message, got: {ended.output[-2000:]}"
    if ended.status not in (0, 2, KILLED):
        return f"status {ended.status}: {ended.output[-2000:]}"
    points = resume_points(out) if scenario.trains else []
    if points and (file := first_damaged(state_folder(points[0]))) is not None:
        return f"the newest checkpoint is damaged: {file.name}"
    return _unreadable(out)


def _unreadable(out: Path) -> str | None:
    """A file under a final name that is not whole. (Results of prompts and logs are written line by line.)"""
    for file in out.rglob("*"):
        if file.suffix in _WHOLE and not any(part.startswith(".") for part in file.relative_to(out).parts):
            try:
                _WHOLE[file.suffix](file)
            except Exception as error:
                return f"{file.name}: {type(error).__name__}: {error}"
    return None


def _whole_page(file: Path) -> None:
    if not file.read_text(encoding="utf-8").rstrip().endswith("</html>"):
        raise ValueError("a page without its end")


def _whole_tensors(file: Path) -> None:
    torch.load(file, map_location="cpu", weights_only=True)


def _whole_weights(file: Path) -> None:
    with safe_open(file, "pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118 - no dict
            tensors.get_tensor(name)


# Suffix -> what raises for a file that is not whole.
_WHOLE: dict[str, Callable[[Path], Any]] = {
    ".pt": _whole_tensors, ".safetensors": _whole_weights, ".html": _whole_page, ".json": lambda file: json.loads(file.read_bytes()),
}  # fmt: skip


def _flipped(rng: random.Random, argv: list[str], out: Path, scenario: Scenario) -> str | None:
    """Flip a bit of the newest checkpoint: a resume has to name it and take the one before."""
    newest, before = resume_points(out)[:2]
    file = rng.choice([newest, *(path for path in sorted(state_folder(newest).iterdir()) if path.stat().st_size)])
    content = bytearray(file.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    file.write_bytes(content)
    ended = child.run(argv, out.parent, None, scenario.processes)
    if ended.status or " is damaged: " not in ended.output or f"Resuming from {before}" not in ended.output:
        return f"a flipped bit in {file.name}, status {ended.status}: {ended.output[-2000:]}"
    return None


def _twice(argv: list[str], out: Path) -> str | None:
    """A second run in the folder of a first one, which stands still."""
    empty(out)
    pid, give_up = child.start(argv, out.parent), time.monotonic() + child.PATIENCE
    while not list(out.glob("checkpoint_step_*.pt")) and time.monotonic() < give_up:
        time.sleep(0.002)
    os.kill(pid, signal.SIGSTOP)
    second = child.run(argv, out.parent)
    child.end(pid)
    if second.status == 2 and "another run is writing" in second.output:
        return None
    return f"a second run was not refused: status {second.status}: {second.output[-2000:]}"


def _in_a_child(do: Any) -> None:
    """So that this process stays one thread, which a fork needs."""
    if not (pid := os.fork()):
        try:
            do()
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def _import_all() -> None:
    """What the commands import, once."""
    import recursify.cli.main
    import recursify.conversion.convert
    import recursify.data.loading
    import recursify.evaluation.compare
    import recursify.hub.export
    import recursify.inference.prompt_file
    import recursify.training.run  # noqa: F401
