"""Commands by the thousand: one process imports everything and forks others, which run them, so that a command costs milliseconds.

    with Forks(home) as forks:
        ended = forks.run(["inspect", "--checkpoint", "model.pt"], cwd=folder, seconds=60)

A command runs with limits of memory and time; one that hangs is killed with all that it started, and the next one gets a new fork, which
takes a moment. So does every hundredth, and the next after `renew`: a command that ended badly may leave its process in disorder.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import pkgutil
import resource
import select
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

Line = tuple[list[str], Path]
PROGRAM = "recursify.cli.main:main"
ROOT = Path(__file__).resolve().parents[1]
_COMMANDS = 100  # that a fork runs before the next one takes over
_MORE = 2 * 2**30  # bytes of address space that a command may take beyond what is loaded, so that the machine stays usable


@dataclass(frozen=True)
class Ended:
    """How a command ended.

    Args:
        status: Exit status; the negative number of a signal; None if it was killed for taking too long.
        grown: Bytes of memory at its largest, beyond those before it began.
    """

    status: int | None
    stdout: str
    stderr: str
    seconds: float
    grown: int


class Forks:
    """The process that forks, started on entry.

    Args:
        program: `module:function` that takes the words of a command line.
        home: Folder for Hugging Face's caches; nothing is fetched.
        warm: Command lines and their folders, each run once in a fork to learn what it imports, which is then imported for all.
    """

    def __init__(self, home: Path, program: str = PROGRAM, warm: Sequence[Line] = ()):
        home.mkdir(exist_ok=True)
        self.program, self.home, self._renew = program, home, False
        self.largest = 0  # bytes by which a command has grown
        self._process = subprocess.Popen(
            [sys.executable, "-m", "stress.forks", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
            env=self.env,
        )  # fmt: skip
        for argv, cwd in warm:
            if (ended := self._ask(argv, cwd, 300.0, learn=True)).status != 0:
                raise RuntimeError(f"{' '.join(argv)}: {ended.stderr}")
        self.renew()

    @property
    def env(self) -> dict[str, str]:
        """Of every command: this checkout, one thread, no network."""
        own = {"HF_HOME": str(self.home), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        return {**os.environ, **own, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2", "PYTHONIOENCODING": "utf-8"}

    def renew(self) -> None:
        """Let the next command run in a new fork."""
        self._renew = True

    def run(self, argv: list[str], cwd: Path, seconds: float) -> Ended:
        """Run a command in a folder."""
        return self._ask(argv, cwd, seconds)

    def run_fresh(self, argv: list[str], cwd: Path, seconds: float) -> Ended:
        """Run a command in a Python of its own, as a person does."""
        module, function = self.program.split(":")
        code = f"import sys, {module}; sys.exit({module}.{function}(sys.argv[1:]))"
        began = time.monotonic()
        try:
            done = subprocess.run([sys.executable, "-c", code, *argv], cwd=cwd, env=self.env, stdin=subprocess.DEVNULL, capture_output=True,
                                  timeout=seconds)  # fmt: skip
            status, out, err = done.returncode, done.stdout, done.stderr
        except subprocess.TimeoutExpired as late:
            return Ended(None, _text(late.stdout), _text(late.stderr), seconds, 0)
        return Ended(status, _text(out), _text(err), time.monotonic() - began, 0)

    def _ask(self, argv: list[str], cwd: Path, seconds: float, learn: bool = False) -> Ended:
        process: Any = self._process
        self._renew, renew = False, self._renew
        with _Outputs(self.home) as (out, err):
            ask = {"argv": argv, "cwd": str(cwd), "seconds": seconds, "learn": learn, "renew": renew, "out": str(out), "err": str(err)}
            process.stdin.write(json.dumps(ask) + "\n")
            process.stdin.flush()
            answer = process.stdout.readline()
            if not answer:
                raise RuntimeError(f"the process that forks has ended with {process.wait()}")
            told = json.loads(answer)
            self.largest = max(self.largest, told["grown"])
            return Ended(stdout=_text(out.read_bytes()), stderr=_text(err.read_bytes()), **told)

    def __enter__(self) -> Forks:
        return self

    def __exit__(self, *_: object) -> None:
        process: Any = self._process
        process.stdin.close()
        process.wait(30)
        process.stdout.close()


class _Outputs:
    """Two files that a command writes to, in place of pipes, which it could fill."""

    def __init__(self, folder: Path):
        self._paths = folder / "stdout", folder / "stderr"

    def __enter__(self) -> tuple[Path, Path]:
        return self._paths

    def __exit__(self, *_: object) -> None:
        for path in self._paths:
            path.unlink(missing_ok=True)


def _text(data: bytes | None) -> str:
    return (data or b"").decode("utf-8", "replace")


# In the process that forks


def _serve(program: str) -> None:
    run = pkgutil.resolve_name(program)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what an import prints is no answer
    fork: _Fork | None = None
    for line in sys.stdin:
        ask = json.loads(line)
        if fork is None or ask["renew"] or fork.commands >= _COMMANDS:
            if fork is not None:
                fork.end()
            fork = _Fork(run)
        began = time.monotonic()
        told = fork.told(ask)
        if fork.ended:
            fork = None
        if ask["learn"]:
            _import_all(Path(ask["out"] + ".modules"))
        answers.write(json.dumps({**told, "seconds": time.monotonic() - began}) + "\n")
        answers.flush()
    if fork is not None:
        fork.end()


class _Fork:
    """A process with all that is imported, which runs one command after the other."""

    def __init__(self, run: Any):
        gc.freeze()  # a collection in a fork would copy every page of what is imported
        self.commands, self.ended = 0, False
        asks, self._asks = os.pipe()
        self._answers, answers = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self._asks)
            os.close(self._answers)
            _run_all(run, os.fdopen(asks), os.fdopen(answers, "w"))
        os.close(asks)
        os.close(answers)

    def told(self, ask: dict[str, Any]) -> dict[str, Any]:
        """Status and growth of a command; the status is None where the process was killed because of the time."""
        self.commands += 1
        os.write(self._asks, (json.dumps(ask) + "\n").encode())
        if not select.select([self._answers], [], [], ask["seconds"])[0]:
            self.end()
            return {"status": None, "grown": 0}
        told = os.read(self._answers, 4096)
        if told:
            return json.loads(told)
        return {"status": self._closed() or -signal.SIGKILL, "grown": 0}  # the command has ended the process: never right, even with 0

    def end(self) -> None:
        """Kill the process, and what it started."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._closed()

    def _closed(self) -> int:
        self.ended = True
        os.close(self._asks)
        os.close(self._answers)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def _run_all(run: Any, asks: TextIO, answers: TextIO) -> None:
    status = 1
    try:
        os.setsid()
        _limit_memory()
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for line in asks:
            answers.write(json.dumps(_run_one(run, json.loads(line))))
            answers.flush()
        status = 0
    finally:
        os._exit(status)


def _run_one(run: Any, ask: dict[str, Any]) -> dict[str, int]:
    os.chdir(ask["cwd"])
    for name, number in (("out", 1), ("err", 2)):
        file = os.open(ask[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(file, number)
        os.close(file)
    before = _memory("VmRSS", reset=True)
    status = _status(run, ask["argv"])
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):
            stream.flush()
    if ask["learn"]:
        Path(ask["out"] + ".modules").write_text("\n".join(sys.modules), encoding="utf-8")
    return {"status": status, "grown": max(0, _memory("VmHWM") - before)}


def _status(run: Any, argv: list[str]) -> int:
    """Exit status of a command, as Python has it for its main program."""
    try:
        run(argv)
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _memory(name: str, reset: bool = False) -> int:
    """A figure of this process in bytes: `VmRSS` is its memory now, `VmHWM` the largest since the last reset. 0 elsewhere than on Linux."""
    if sys.platform != "linux":
        return 0
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def _limit_memory() -> None:
    if sys.platform == "linux":
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + _MORE
        resource.setrlimit(resource.RLIMIT_AS, (most, most))


def _import_all(learnt: Path) -> None:
    for name in learnt.read_text(encoding="utf-8").split("\n"):
        if not name.startswith(("__", "transformers_modules")):
            with suppress(BaseException):
                importlib.import_module(name)
    learnt.unlink()


if __name__ == "__main__":
    _serve(sys.argv[1])
