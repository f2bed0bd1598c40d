"""The model and the tokenizer that the tests of the server share. Read only."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.served import chatty_tokenizer, speaking_model


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return chatty_tokenizer()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return speaking_model(tmp_path_factory.mktemp("speaking"))
