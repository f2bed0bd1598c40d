"""A process that has everything imported but the code under test, and forks a child for every run of tests.

It starts pytest in a copy of the tree and stays before collection, where conftest.py is loaded and nothing of the project is. A child
continues from there: it collects and runs the requested tests, on the mutated file.
"""

from __future__ import annotations

import gc
import importlib
import json
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
from coverage import Coverage

TIMEOUT = -1000
MEMORY = 24 * 2**30  # of addresses, most of them never used: what a fault may ask for at most
NOT_COPIED = (".git", ".venv", "__pycache__", ".*_cache", ".hypothesis", ".mutants", "runs", "*.egg-info", "dist", "build")


@dataclass(frozen=True)
class Order:
    """Tests to run within some seconds, and a file's text to run them on; ``warm`` are modules to import.

    With ``measured``, all are run, and the lines of these files that they reach are recorded; else none after the first that fails.
    """

    tests: tuple[str, ...] = ()
    limit: float = 60
    file: str = ""
    text: str = ""
    warm: tuple[str, ...] = ()
    measured: tuple[str, ...] = ()


class Worker:
    """Our end of the process: makes the copy, and gives the exit status of pytest for an order."""

    def __init__(self, root: Path, tests: list[str]):
        self.folder = Path(tempfile.mkdtemp(prefix="mutants-"))
        shutil.copytree(root, self.folder / "tree", ignore=shutil.ignore_patterns(*NOT_COPIED))
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, self.folder, tests))
        self.process.start()
        theirs.close()

    def ask(self, order: Order) -> int:
        try:
            self.pipe.send(order)
            return int(self.pipe.recv())
        except (EOFError, OSError):
            raise RuntimeError(f"the worker ended:\n{self.log()}") from None

    def reach(self) -> dict[str, Any]:
        """What the last order with ``measured`` recorded."""
        return json.loads((self.folder / "reach.json").read_text(encoding="utf-8"))

    def log(self) -> str:
        return (self.folder / "log").read_text(encoding="utf-8", errors="replace")[-5000:]

    def close(self) -> None:
        with suppress(OSError):
            self.pipe.send(None)
        self.process.join(10)
        self.process.terminate()
        shutil.rmtree(self.folder, ignore_errors=True)


def _serve(pipe: Connection, folder: Path, tests: list[str]) -> None:
    tree = folder / "tree"
    os.chdir(tree)
    sys.path.insert(0, str(tree))
    os.environ |= {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}  # before torch is imported; the first also for what tests start
    log = os.open(folder / "log", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    # drawn examples are the same for every mutant, and what one mutant failed on is not kept for the next
    args = ["-n0", "-p", "no:cacheprovider", "--hypothesis-profile=ci", "--rootdir", str(tree), "--basetemp", str(folder / "tmp")]
    pytest.main([*args, *tests], plugins=[_Forking(pipe, folder)])


class _Forking:
    def __init__(self, pipe: Connection, folder: Path):
        self.pipe, self.folder = pipe, folder
        self.ordered: Order | None = None  # set in a child

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection(self, session: pytest.Session) -> None:
        # The fake hub server is a thread, and threads do not live on in a child: each child runs it on the same socket.
        hub = next((plugin._HUB for plugin in session.config.pluginmanager.get_plugins() if hasattr(plugin, "_HUB")), None)
        if hub is not None:
            hub._server.shutdown()
        for count, order in enumerate(iter(self.pipe.recv, None)):
            for name in order.warm:
                with suppress(Exception):
                    importlib.import_module(name)
            if not order.tests:
                self.pipe.send(0)
                continue
            if hub is not None:
                shutil.rmtree(hub.home, ignore_errors=True)  # what earlier mutants left in the caches
            original, path = None, self.folder / "tree" / order.file
            if order.file:
                original = path.read_bytes()
                path.write_text(order.text, encoding="utf-8")
                os.utime(path, (count, count))  # of the same size and second, Python would take the compiled original
            gc.freeze()  # a child that looked through all of it would have to copy it
            if not (pid := os.fork()):
                self._begin(session, order, path, hub)
                return  # to pytest, which goes on to collect
            code = _end(pid, order.limit)
            if original is not None:
                path.write_bytes(original)
            self.pipe.send(code)
        pytest.exit("no more orders")

    def _begin(self, session: pytest.Session, order: Order, path: Path, hub: Any) -> None:
        os.setsid()
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        if hub is not None:
            threading.Thread(target=hub._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        if any(getattr(module, "__file__", None) == str(path) for module in list(sys.modules.values())):
            raise RuntimeError(f"{order.file} is imported before the tests are collected (by conftest.py?): its faults would not act")
        self.ordered, session.config.args = order, list(order.tests)
        session.config.option.maxfail = 0 if order.measured else 1
        self.coverage, self.seconds = None, dict[str, float]()
        if order.measured:
            files = [str(self.folder / "tree" / file) for file in order.measured]
            self.coverage = Coverage(data_file=None, config_file=False, include=files)
            self.coverage.start()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        if self.coverage:
            self.coverage.switch_context(item.nodeid)
        start = time.perf_counter()
        result = yield
        self.seconds[item.nodeid] = time.perf_counter() - start
        return result

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, exitstatus: int) -> None:
        if not self.ordered:
            return
        if self.coverage:
            self.coverage.stop()
            data, tree = self.coverage.get_data(), str(self.folder / "tree")
            lines = {file: data.contexts_by_lineno(f"{tree}/{file}") for file in self.ordered.measured}
            files = {name: getattr(module, "__file__", None) or tree for name, module in sys.modules.items()}
            imports = [name for name, file in files.items() if not file.startswith(tree) and not name.startswith("transformers_modules")]
            found = {"seconds": self.seconds, "lines": lines, "imports": imports}
            (self.folder / "reach.json").write_text(json.dumps(found), encoding="utf-8")
        sys.stdout.flush()
        os._exit(int(exitstatus))


def _end(pid: int, limit: float) -> int:
    """Exit status of a child, which is killed after a number of seconds."""
    end, done = time.monotonic() + limit, 0
    try:
        while time.monotonic() < end:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.01)
        return TIMEOUT
    finally:
        with suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)  # and what it started
        if not done:
            os.waitpid(pid, 0)
