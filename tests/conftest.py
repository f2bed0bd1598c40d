"""What all tests share. Importing this file points every Hugging Face client at the stand-in hub, before any is imported.

``HF_ENDPOINT`` and the cache folders are read once, at the import of ``huggingface_hub``, ``datasets`` and ``transformers``. So the
server starts here, at import, and its environment is set for the rest of the process: no test can reach the real hub, or the
user's caches. Subprocesses inherit it through ``os.environ``.
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.hub_stand_in import HubStandIn

_EARLY = {"huggingface_hub", "datasets", "transformers"} & set(sys.modules)
if _EARLY:
    raise RuntimeError(f"{sorted(_EARLY)} imported before tests/conftest.py: they would talk to the real hub (a pytest plugin, -p?)")

_HOME = Path(tempfile.mkdtemp(prefix="recursify-hub-"))
_HUB = HubStandIn(_HOME / "hf_home")
os.environ |= _HUB.env()
# Tiny models spend more time waiting for a second thread than it saves; the suite runs in as many processes as there are cores instead.
os.environ["OMP_NUM_THREADS"] = "1"
# Programs that tests start import this checkout, and what tests share.
os.environ["PYTHONPATH"] = str(Path(__file__).resolve().parents[1])


def pytest_unconfigure() -> None:
    _HUB.close()
    shutil.rmtree(_HOME, ignore_errors=True)


@pytest.fixture(autouse=True)
def shown_messages() -> None:
    """What the package logs goes to stderr, as in every command, and to pytest's `caplog`."""
    from recursify.utils.log import log_to_stderr  # here: the faults of `make mutants` act on what is imported after the collection

    log_to_stderr()
    logging.getLogger("recursify").propagate = True


@pytest.fixture(scope="session")
def donor_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen2 of 24 layers with its tokenizer, as files. Read only."""
    from tests.support import tiny

    folder = tmp_path_factory.mktemp("donor")
    tiny.tiny_donor("qwen2", folder)
    return folder


@pytest.fixture(scope="session")
def full_hub(donor_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> HubStandIn:
    """The stand-in with ``Qwen/Qwen2-0.5B`` (the tiny donor) and ``Salesforce/wikitext`` on it; tests take ``hub``."""
    from tests.support import tiny

    _HUB.add_model("Qwen/Qwen2-0.5B", donor_folder)
    _HUB.add_dataset("Salesforce/wikitext", tiny.tiny_wikitext(tmp_path_factory.mktemp("wikitext")))
    return _HUB


@pytest.fixture
def hub(full_hub: HubStandIn) -> Iterator[HubStandIn]:
    """The filled stand-in hub with an empty list of requests. What a test adds is taken off again after it."""
    repos, tokens = dict(full_hub.repos), dict(full_hub.tokens)
    full_hub.clear()
    yield full_hub
    full_hub.repos, full_hub.tokens, full_hub.down = repos, tokens, False
