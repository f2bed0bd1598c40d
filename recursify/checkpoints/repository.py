"""Single files of a folder or a hub repository.

Functions that may ask the hub take `revision` and `token` as keywords, with the meaning that `from_pretrained` gives them: a branch, tag or
commit, and an access token. Without a token, huggingface_hub uses HF_TOKEN or the one that `hf auth login` stored.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig
from transformers.utils import cached_file, has_file

from ..errors import UserError, first_line
from ..utils.files import read_json
from .settings import HUB_ID


def read_config(name: str, **hub: Any) -> dict[str, Any]:
    """The contents of config.json of a folder or hub repository.

    Raises:
        UserError: Neither a folder nor a hub id, no config.json, or a revision of a folder.
    """
    folder = Path(name)
    check_place(name, "config.json and *.safetensors", hub.get("revision"))
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(no_config(folder))
        return read_json(folder / "config.json")
    try:
        fields, _ = PreTrainedConfig.get_config_dict(name, **hub)
    except Exception as error:
        raise UserError(
            f"{name}: no such folder, and the hub has no config.json for it or cannot be reached ({first_line(error)}); "
            "give a folder with config.json and *.safetensors, or check the id, the revision and the network"
        ) from error
    return fields


def no_config(folder: Path) -> str:
    """The message for a folder without config.json: a training's output folder is taken for its best checkpoint."""
    found = sorted(folder.glob("*.pt"), key=lambda file: ("best" not in file.name, -file.stat().st_mtime))
    if found:
        return f"{folder}: a folder without config.json, but with a checkpoint; did you mean {found[0]}?"
    there = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
    return f"{folder}: a folder without config.json (it holds {there}); name the folder that has it"


def check_place(name: str, content: str, revision: str | None = None) -> None:
    """Check that a name is a folder, or has the form of a hub id, before the hub is asked.

    Raises:
        UserError: Neither, or a revision of a folder.
    """
    if os.path.isfile(name):
        raise UserError(f"{name}: expected a hub id or a folder with {content}, got a file")
    if not os.path.isdir(name) and not HUB_ID.fullmatch(name):
        raise UserError(
            f"{name!r}: no such folder, and no hub id, which has an owner, as Qwen/Qwen2-0.5B has; expected a folder with {content}, or "
            "a hub id"
        )
    check_revision(name, revision)


def check_revision(name: str, revision: str | None) -> None:
    """Raise a UserError for a revision of something that is not a hub id: paths have no revisions."""
    if revision is not None and (os.path.exists(name) or not HUB_ID.fullmatch(name)):
        raise UserError(f"--revision: expected a hub id, got {revision!r} for {name}, a path, which has no revisions; leave --revision out")


def split_revision(name: str) -> tuple[str, str | None]:
    """Name and revision of `name@revision`, where a command takes several names; an existing path is never split."""
    if os.path.exists(name):
        return name, None
    name, _, revision = name.partition("@")
    return name, revision or None


def find_file(name: str, file: str, **hub: Any) -> str | None:
    """Path of one file of a folder or hub repository; None where it is missing or the hub does not answer."""
    if os.path.isdir(name):
        path = os.path.join(name, file)
        return path if os.path.isfile(path) else None
    try:
        return cached_file(name, file, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False, **hub)
    except Exception:  # errors of the hub's client and of the network have no common base
        return None


def require_file(name: str, file: str, **hub: Any) -> str:
    """Path of one file of a folder or hub repository.

    Raises:
        UserError: The file is missing, or the hub does not answer.
    """
    if os.path.isdir(name):
        path = os.path.join(name, file)
        if not os.path.isfile(path):
            raise UserError(f"{name}: {file} is not there; download or copy the donor again")
        return path
    try:
        return str(cached_file(name, file, **hub))
    except Exception as error:
        raise UserError(f"{name}: {file} cannot be fetched from the hub ({first_line(error)}); check the id and the network") from error


def file_exists(name: str, file: str, **hub: Any) -> bool:
    """Whether a file exists, without fetching it; False where the hub does not answer."""
    try:
        return has_file(name, file, **hub)
    except Exception:
        return False
