"""A folder or a hub repository, and single files of it."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from transformers import (
    PreTrainedConfig,
)
from transformers.utils import cached_file, has_file

from ..errors import UserError, first_line
from ..utils.files import read_json

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def read_config(name: str) -> dict[str, Any]:
    """What config.json of a folder or hub repository says.

    Raises:
        UserError: Neither a folder nor a hub id, or no config.json there.
    """
    folder = Path(name)
    check_place(name, "config.json and *.safetensors")
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            there = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
            raise UserError(f"{name}: the donor folder has no config.json (it holds {there}); name the folder that does")
        return read_json(folder / "config.json")
    try:
        fields, _ = PreTrainedConfig.get_config_dict(name)
    except Exception as error:
        raise UserError(
            f"{name}: no such folder, and the hub has no config.json for it or cannot be reached ({first_line(error)}); "
            "give a folder with config.json and *.safetensors, or check the id and the network"
        ) from error
    return fields


def check_place(name: str, content: str) -> None:
    """What is no folder must at least look like a hub id, before the hub is asked for it."""
    if os.path.isfile(name):
        raise UserError(f"{name}: expected a hub id or a folder with {content}, got a file")
    if not os.path.isdir(name) and not HUB_ID.fullmatch(name):
        raise UserError(f"{name!r}: no such folder; give a folder with {content}, or a hub id such as Qwen/Qwen2-0.5B")


def find_file(name: str, file: str) -> str | None:
    """Path of one file of a folder or a hub repository, None where it has none or the hub does not answer."""
    if os.path.isdir(name):
        path = os.path.join(name, file)
        return path if os.path.isfile(path) else None
    try:
        return cached_file(name, file, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False)
    except Exception:  # of the hub's client or of the network's, with no base in common
        return None


def require_file(name: str, file: str) -> str:
    """As `_find`, for a file without which nothing goes on.

    Raises:
        UserError: It is not there, or the hub does not answer.
    """
    if os.path.isdir(name):
        path = os.path.join(name, file)
        if not os.path.isfile(path):
            raise UserError(f"{name}: {file} is not there; download or copy the donor again")
        return path
    try:
        return str(cached_file(name, file))
    except Exception as error:
        raise UserError(f"{name}: {file} cannot be fetched from the hub ({first_line(error)}); check the id and the network") from error


def file_exists(name: str, file: str) -> bool:
    """Whether a file is there, without fetching it; a hub that does not answer has nothing."""
    try:
        return has_file(name, file)
    except Exception:
        return False
