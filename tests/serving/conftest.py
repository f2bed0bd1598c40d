"""The server needs a newer transformers than the rest of the package."""

from __future__ import annotations

import pytest
import transformers
from packaging.version import Version

from recursify.serving.running import _TRANSFORMERS

HERE = __file__.rpartition("/")[0]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if Version(transformers.__version__) >= Version(_TRANSFORMERS):
        return
    for item in items:
        if str(item.path).startswith(HERE) and "too_old" not in item.name:
            item.add_marker(pytest.mark.skip(reason=f"the server needs transformers {_TRANSFORMERS}"))
