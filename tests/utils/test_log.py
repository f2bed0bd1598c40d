"""Where the package's messages go: nowhere by themselves from Python, to the stderr of the moment for a command."""

from __future__ import annotations

import io
import logging
import subprocess
import sys
from collections.abc import Iterator

import pytest

from recursify.utils.log import _HANDLER, log_to_stderr


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    logger = logging.getLogger("recursify")
    handlers, level, propagate = list(logger.handlers), logger.level, logger.propagate
    yield
    logger.handlers, logger.propagate = handlers, propagate
    logger.setLevel(level)


def test_a_message_goes_to_the_stderr_of_the_moment_once(monkeypatch: pytest.MonkeyPatch) -> None:
    log_to_stderr()
    log_to_stderr()
    for _ in range(2):
        stream = io.StringIO()
        monkeypatch.setattr(sys, "stderr", stream)
        logging.getLogger("recursify.training.run").info("%d steps", 3)
        logging.getLogger("recursify.data").debug("details")
        assert stream.getvalue() == "3 steps\n"
    assert logging.getLogger("recursify").handlers.count(_HANDLER) == 1


def test_the_level_can_be_set(capsys: pytest.CaptureFixture[str]) -> None:
    log_to_stderr(logging.WARNING)
    logging.getLogger("recursify.data").info("progress")
    logging.getLogger("recursify.data").warning("a broken row")
    assert capsys.readouterr().err == "a broken row\n"


def test_importing_the_package_shows_and_changes_nothing() -> None:
    program = (
        "import logging, recursify, recursify.training; logger = logging.getLogger('recursify'); logger.info('progress'); "
        "print(logger.level, logger.propagate, logging.getLogger().handlers)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "0 True []\n" and "progress" not in done.stderr
