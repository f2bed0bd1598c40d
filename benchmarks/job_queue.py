"""A queue of jobs for a limited time on a machine: the most valuable first, each in a process of its own, its result saved at once.

A job is a function; its process is forked from this one, which has imported everything and has never touched the GPU, so that a job starts
at once. It leads a process group of its own, which is killed as a whole at the job's limit, so that a hang costs no other job its time.
What it has found so far is in a file after every table; the result is this and how the job ended, and is renamed into place at the end.

Units: seconds.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch

from recursify.utils.atomic import write_text

from .record import provenance

LEAST_LIMIT = 60.0  # below it a limit would be about a slow start, not about a hang
TAIL = 4_000  # characters of output that are kept of a job that failed
_LOOK = 0.02
_FIELDS = {"job", "status", "size", "device", "code", "commit", "machine", "seconds", "limit", "data", "tail"}

Keep = Callable[[Any], None]


@dataclass(frozen=True)
class Place:
    """Where and how jobs run.

    Args:
        size: "cuda"; "quick" for a rehearsal, toy sizes on a CPU.
        results: Folder of the results.
        donor: Folder of a pretrained donor, for the jobs that need one.
    """

    size: str
    results: Path
    donor: Path | None = None


def always(place: Place) -> str | None:
    """No obstacle."""
    return None


def nothing_wrong(data: Any, place: Place) -> str:
    """No complaint."""
    return ""


def unknown(job: Job) -> float | None:
    """No time that a job has taken before."""
    return None


@dataclass(frozen=True)
class Job:
    """One thing to do.

    Args:
        work: Gives what it has found, in JSON types, and passes what it has so far to `keep` as often as there is more.
        estimate: Seconds on one GPU; a guess until a result says how long it took.
        rehearsal: Seconds at toy size on two cores.
        obstacle: Why it cannot run in a place; None if it can.
        verdict: What is wrong with what it has found, such as checks that failed; empty if nothing.
        after: The name of an earlier job that has to be over before this one is begun.
    """

    name: str
    work: Callable[[Place, Keep], Any]
    estimate: float
    rehearsal: float
    obstacle: Callable[[Place], str | None] = always
    verdict: Callable[[Any, Place], str] = nothing_wrong
    after: str = ""

    def file(self, folder: Path) -> Path:
        return folder / f"{re.sub(r'[^A-Za-z0-9._]+', '-', self.name)}.json"

    def declared(self, place: Place) -> float:
        return self.rehearsal if place.size == "quick" else self.estimate


@dataclass(frozen=True)
class Source:
    """What a result is of: results of other code or another device do not count."""

    device: str
    code: str
    commit: str | None


@dataclass(frozen=True)
class Ended:
    """Outcome of a job.

    Args:
        status: "ok", "failed" and "timeout" have run, "skipped" was there, "passed over" could not run or did not fit.
        why: Why it did not end well, or did not run; of one that ran through, what is wrong with what it found.
    """

    job: str
    status: str
    seconds: float = 0.0
    why: str = ""

    @property
    def bad(self) -> bool:
        return self.status in ("failed", "timeout") or (self.status == "ok" and bool(self.why))


@dataclass(frozen=True)
class Queue:
    """Runs what fits, in order.

    Args:
        until: When everything has to be over, on the clock of `time.time`.
        measured: Seconds that a job has taken before, if that is known.
        lanes: Number of jobs at once, for rehearsals; measurements run alone.
    """

    place: Place
    source: Source
    until: float
    measured: Callable[[Job], float | None] = unknown
    say: Callable[[str], Any] = print
    lanes: int = 1

    def run(self, jobs: Sequence[Job]) -> list[Ended]:
        """Outcomes, in order."""
        self.place.results.mkdir(parents=True, exist_ok=True)
        if self.lanes == 1:
            return [self._turn(job) for job in jobs]
        begun: dict[str, Future[Ended]] = {}
        with ThreadPoolExecutor(self.lanes) as pool:
            for job in jobs:
                begun[job.name] = pool.submit(self._turn, job, begun.get(job.after))
            return [one.result() for one in begun.values()]

    def _turn(self, job: Job, before: Future[Ended] | None = None) -> Ended:
        if before is not None:
            before.result()
        ended = self._settle(job)
        self.say(f"{time.strftime('%H:%M:%S')} {_line(ended)}")
        return ended

    def _settle(self, job: Job) -> Ended:
        there = read_result(job.file(self.place.results))
        if isinstance(there, str):
            self.say(f"{job.name}: {there}; it runs again")
        elif there is not None and is_complete(there, self.place, self.source):
            return Ended(job.name, "skipped", why=f"there already, of {there['seconds']:.0f} s")
        if (why := job.obstacle(self.place)) is not None:
            return Ended(job.name, "passed over", why=why)
        left, needs = self.until - time.time(), _estimate(job, self.place, there, self.measured)
        if needs > left:
            return Ended(job.name, "passed over", why=f"needs about {needs:.0f} s, and {max(0.0, left):.0f} s are left")
        self.say(f"{time.strftime('%H:%M:%S')} {job.name}: about {needs:.0f} s, {left:.0f} s are left")
        return run_one(job, self.place, self.source, min(left, max(LEAST_LIMIT, 2 * needs)))


def _estimate(job: Job, place: Place, there: dict[str, Any] | str | None, measured: Callable[[Job], float | None]) -> float:
    """Seconds that a job will take: what it took at the same size, whatever the code was then; one that was stopped takes longer."""
    if isinstance(there, dict) and there["size"] == place.size and there["status"] in ("ok", "timeout"):
        return float(there["seconds"])
    return measured(job) or job.declared(place)


def is_complete(result: dict[str, Any], place: Place, source: Source) -> bool:
    """Whether a result is one of this code on this device."""
    return (result["status"], result["size"], result["device"], result["code"]) == ("ok", place.size, source.device, source.code)


def read_result(file: Path) -> dict[str, Any] | str | None:
    """A result; None if there is none; what is wrong with it if it is none."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        return f"{file} is no result: cut short, or not JSON ({error})"
    if not isinstance(found, dict) or not found.keys() >= _FIELDS:
        return f"{file} is no result: it lacks {', '.join(sorted(_FIELDS - set(found))) if isinstance(found, dict) else 'all fields'}"
    return found


# A process


def run_one(job: Job, place: Place, source: Source, limit: float) -> Ended:
    """Run a job in a process of its own with a time limit, and write its result."""
    file = job.file(place.results)
    found, log = file.with_suffix(".partial"), file.with_suffix(".log")
    found.unlink(missing_ok=True)
    began = time.monotonic()
    exit_code = in_process(lambda: _do(job, place, found), log, limit)
    seconds = time.monotonic() - began
    left = _found(found)
    status = "timeout" if exit_code is None else "ok" if exit_code == 0 and left is not None and left["complete"] else "failed"
    text = log.read_text(encoding="utf-8", errors="replace")
    result = {
        "job": job.name, "status": status, "size": place.size, "device": source.device, "code": source.code, "commit": source.commit,
        "machine": left and left["machine"], "seconds": round(seconds, 1), "limit": round(limit, 1), "data": left and left["data"],
        "tail": "" if status == "ok" else text[-TAIL:],
    }  # fmt: skip
    write_text(file, json.dumps(result, indent=1, allow_nan=False) + "\n")
    found.unlink(missing_ok=True)
    if status == "ok":
        return Ended(job.name, status, seconds, job.verdict(result["data"], place))
    return Ended(job.name, status, seconds, f"stopped after {limit:.0f} s" if status == "timeout" else _last_line(text, exit_code))


def _do(job: Job, place: Place, found: Path) -> None:
    """In the job's process: its work, what it has found, and where."""
    machine = provenance(torch.device("cuda" if place.size == "cuda" else "cpu"))

    def put(data: Any, complete: bool) -> None:
        write_text(found, json.dumps({"complete": complete, "machine": machine, "data": data}, allow_nan=False))

    put(job.work(place, lambda data: put(data, False)), True)


def _found(file: Path) -> dict[str, Any] | None:
    """The result file of a job; None if missing or incomplete."""
    try:
        left = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return left if isinstance(left, dict) else None


def _last_line(text: str, exit_code: int | None) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    ended = f"killed by signal {-exit_code}" if exit_code is not None and exit_code < 0 else f"exit status {exit_code}"
    return f"{ended}: {lines[-1][:300]}" if lines else ended


def in_process(work: Callable[[], Any], log: Path, limit: float) -> int | None:
    """The exit status of a forked process that does this, less than 0 for a signal; None if it was killed at the limit. Nothing that it has
    started outlives it."""
    sys.stdout.flush(), sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        _as_process(work, log)
    until = time.monotonic() + limit
    try:
        # The group is killed before its leader is waited for: until then no other process can have its number.
        while (over := os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)) is None and time.monotonic() < until:
            time.sleep(_LOOK)
    finally:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)  # it may not have become a leader yet
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return None if over is None else status


def _as_process(work: Callable[[], Any], log: Path) -> NoReturn:
    status = 1
    try:
        os.setsid()
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0), os.dup2(output, 1), os.dup2(output, 2)
        # a parent that has replaced these, such as a test, does not get the output of the job
        sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, errors="replace") for number in (1, 2))
        work()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(status)


# The summary


def _line(one: Ended) -> str:
    took = f", {one.seconds:.1f} s" if one.seconds else ""
    return f"{one.job}: {one.status}{took}{f' ({one.why})' if one.why else ''}"


def summary(ended: Sequence[Ended]) -> str:
    """What ran, failed, was there already, and did not run."""
    parts = []
    for title, statuses in (
        ("ran", ("ok",)),
        ("failed", ("failed", "timeout")),
        ("skipped", ("skipped",)),
        ("passed over", ("passed over",)),
    ):
        those = [one for one in ended if one.status in statuses]
        parts += [f"{title}: {len(those)}", *(f"  {_line(one)}" for one in those)]
    return "\n".join(parts)
