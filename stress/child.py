"""Commands as children of this process, which has imported everything: a fork is a command from its flags to its exit status.

A child can be told to die, or to lose its disk, at one of its touches of the disk. Python announces each (`sys.addaudithook`), so no
moment of a save is too short to be hit.
"""

from __future__ import annotations

import errno
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

KILLED = -signal.SIGKILL
PATIENCE = 120.0  # seconds for a command of a second or two, on a machine that does other things, too
_TOUCHES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate")


@dataclass(frozen=True)
class Fault:
    """What happens to a command.

    Args:
        kind: `moment`: kill -9 after `at` seconds; `touch`: kill -9 before touch `at` of the disk; `disk`: from touch `at` on it fails with
            `code`; `size`: no file grows beyond `at` bytes, as on a disk that is full.
    """

    kind: Literal["moment", "touch", "disk", "size"]
    at: float
    code: int = errno.ENOSPC


@dataclass(frozen=True)
class Ended:
    """How a command ended: its exit status (of several processes, that of the first), what it wrote, its seconds."""

    status: int
    output: str
    seconds: float


def run(argv: Sequence[str], beside: Path, fault: Fault | None = None, processes: int = 1, touches: Path | None = None) -> Ended:
    """Run a command to its end.

    Args:
        beside: The folder in which touches of the disk count.
        processes: Of one training; the first one meets the fault, and the others are killed after it, as a launcher does.
        touches: Where to write how often it touched the disk.
    """
    began, port = time.monotonic(), _free_port() if processes > 1 else None
    reader, writer = os.pipe()  # a limit on files is none on it
    os.set_blocking(reader, False)
    pids = []
    for rank in range(processes):
        if not (pid := os.fork()):
            launched = {} if port is None else _launched(rank, processes, port)
            heard = writer if rank == 0 else os.open(os.devnull, os.O_WRONLY)  # others complain when the first is killed
            _be(argv, beside, heard, fault if rank == 0 else None, launched, touches if rank == 0 else None)
        pids.append(pid)
    os.close(writer)
    moment = began + fault.at if fault is not None and fault.kind == "moment" else None
    output: list[bytes] = []
    status = _wait(pids[0], moment, lambda: output.append(_read(reader)))
    for pid in pids[1:]:
        if status:
            os.kill(pid, signal.SIGKILL)
        _wait(pid, None, lambda: output.append(_read(reader)))
    output.append(_read(reader))
    os.close(reader)
    return Ended(status, b"".join(output).decode("utf-8", "replace"), time.monotonic() - began)


def start(argv: Sequence[str], beside: Path) -> int:
    """Start a command that nobody listens to, and give its process id; `end` ends it."""
    if not (pid := os.fork()):
        _be(argv, beside, os.open(os.devnull, os.O_WRONLY), None, {}, None)
    return pid


def end(pid: int) -> int:
    """Kill -9, and the exit status."""
    os.kill(pid, signal.SIGKILL)
    return _wait(pid, None, lambda: None)


def _wait(pid: int, kill_at: float | None, meanwhile: Callable[[], object]) -> int:
    give_up = time.monotonic() + PATIENCE
    while True:
        meanwhile()
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        now = time.monotonic()
        if now > give_up or (kill_at is not None and now >= kill_at):
            os.kill(pid, signal.SIGKILL)
            kill_at = None
        time.sleep(0.002)


def _read(reader: int) -> bytes:
    """All that has been written."""
    found = b""
    try:
        while part := os.read(reader, 2**16):
            found += part
    except BlockingIOError:
        pass
    return found


def _launched(rank: int, processes: int, port: int) -> dict[str, str]:
    """The environment that torchrun gives."""
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_WORLD_SIZE": str(processes)}
    return where | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}


def _free_port() -> int:
    import socket

    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def _be(argv: Sequence[str], beside: Path, writer: int, fault: Fault | None, launched: dict[str, str], touches: Path | None) -> NoReturn:
    """In the child: run the command, never return."""
    status: Any = 1
    try:
        os.dup2(writer, 1), os.dup2(writer, 2), os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115 - those of this process may be on files
        os.environ.update(launched)
        count = _watch(fault, beside)
        if fault is not None and fault.kind == "size":
            resource.setrlimit(resource.RLIMIT_FSIZE, (max(1, int(fault.at)), resource.RLIM_INFINITY))
        from recursify.cli.main import main

        main(list(argv))
        status = 0
        if touches is not None:
            written = str(count())
            touches.write_text(written)
    except SystemExit as stop:
        status = stop.code
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        try:
            sys.stdout.flush(), sys.stderr.flush()
        finally:
            os._exit(status if isinstance(status, int) else 0 if status is None else 1)


def _watch(fault: Fault | None, folder: Path) -> Callable[[], int]:
    """Count touches of what is in a folder, and do what the fault says; how many there were so far."""
    beside, seen = str(folder.resolve()), [0]
    strikes = fault is not None and fault.kind in ("touch", "disk")

    def on(event: str, args: tuple[Any, ...]) -> None:
        writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
        if not (writes or event in _TOUCHES) or not os.path.abspath(os.fsdecode(args[0]) if _is_path(args[0]) else "").startswith(beside):
            return
        seen[0] += 1
        if strikes and fault is not None and seen[0] > fault.at:
            if fault.kind == "touch":
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError(fault.code, os.strerror(fault.code), args[0])

    sys.addaudithook(on)
    return lambda: seen[0]


def _is_path(value: Any) -> bool:
    return isinstance(value, str | bytes | os.PathLike)
