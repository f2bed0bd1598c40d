"""Small corpora for tests of reading, and the expected errors."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from recursify.data.documents import Documents, load_documents
from recursify.data.settings import DataSettings
from recursify.errors import UserError


def load(name: object, **settings: Any) -> Documents:
    return load_documents(DataSettings(dataset_name=str(name), **settings))


def texts(documents: Dataset) -> list[str]:
    assert documents.column_names == ["text"]
    return list(documents["text"])


def table(*rows: str) -> Dataset:
    return Dataset.from_dict({"text": list(rows)})


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def says(*parts: str) -> Any:
    """A ``UserError`` whose message has all these parts, in order."""
    return pytest.raises(UserError, match="(?s)" + ".*".join(map(re.escape, parts)))
