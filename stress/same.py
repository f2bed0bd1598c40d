"""Whether two folders hold the same, bit for bit, but for times in them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from recursify.training.lock import LOCK

_OF_A_RUN = {"seconds", "tokens_per_second", "memory", "saved_at", "output_dir", "resume"}  # in logs and states: differ between equal runs
_CHECKSUMS = "SHA256SUMS"  # of files that hold times; whether they fit their files is checked by a resume


def difference(found: Path, expected: Path) -> str | None:
    """The first thing that is in one of two folders and not in the other, in words; None if there is none. Folders of saves killed as
    they began or ended, with nothing in them or a lock, do not count: the next write deletes them."""
    names = [{path.relative_to(folder).as_posix() for path in folder.rglob("*") if _counts(path)} for folder in (found, expected)]
    if names[0] != names[1]:
        return f"files: {sorted(names[0] - names[1])} too many, {sorted(names[1] - names[0])} missing"
    for name in sorted(names[0]):
        if (where := _differs(found / name, expected / name)) is not None:
            return f"{name}: {where}"
    return None


def _counts(path: Path) -> bool:
    return path.is_file() and path.name not in (LOCK, ".lock", _CHECKSUMS)


def _differs(found: Path, expected: Path) -> str | None:
    if found.read_bytes() == expected.read_bytes():
        return None
    if found.suffix == ".pt":
        return _unlike(_tensors(found), _tensors(expected), "")
    if found.suffix in (".json", ".jsonl"):
        return _unlike(_records(found), _records(expected), "")
    return "other contents"


def _tensors(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True)


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


def _records(path: Path) -> Any:
    text = _text(path)
    try:
        return [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else json.loads(text)
    except ValueError:
        return text


def _unlike(found: Any, expected: Any, where: str) -> str | None:
    """Where two values differ first."""
    if type(found) is not type(expected):
        return where or "another type"
    if isinstance(expected, torch.Tensor):
        return None if found.dtype == expected.dtype and torch.equal(found, expected) else where
    if isinstance(expected, dict):
        keys = [{key for key in value if key not in _OF_A_RUN} for value in (found, expected)]
        pairs = [(found[key], expected[key], f"{where}/{key}") for key in expected if key in keys[1]]
        return where or "other keys" if keys[0] != keys[1] else next(filter(None, (_unlike(*pair) for pair in pairs)), None)
    if isinstance(expected, list | tuple):
        if len(found) != len(expected):
            return f"{where}: {len(found)} instead of {len(expected)} entries"
        return next(filter(None, (_unlike(a, b, f"{where}/{i}") for i, (a, b) in enumerate(zip(found, expected, strict=True)))), None)
    return None if found == expected or found != found else where
