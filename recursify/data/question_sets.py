"""Question sets by name, as items; `question_rows.py` tokenizes them.

    load_questions("permutations:difficulty=4-32/4,count=200", "test")       made, to any difficulty
    load_questions("babi:qa2_two-supporting-facts_test.txt", "test")         read from a file
    load_questions("gsm8k:openai/gsm8k/main/test-00000-of-00001.parquet", "test")   from a dataset of the hub: one file of it is fetched

A name is that of a task or a format of `recursify.data.tasks`; what follows the first colon are the options of a task, or the file.
Options are `difficulty` (4, or 4-32, or 4-32/4 for every fourth, or 2+8 for several of these; 1-8 where not given), `count` (items of
each difficulty, 500), `seed` (0), and the task's own: `group`, `unscored` and `offset` of permutations, `nodes` of pointers, `chains` of
chains, `people` of facts. Training and test items of a set that is made are never the same; a file is all of one kind, and which file is
for what is for its user to say.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.utils import EntryNotFoundError, HfHubHTTPError, RepositoryNotFoundError

from ..errors import UserError
from ..utils.http import httpx
from .settings import HELD_OUT_SEED, HELD_OUT_SHARE
from .tasks import FORMATS, GENERATED, Item, generate, read

DIFFICULTIES = "1-8"
COUNT = 500
_WHOLE = ("nodes", "unscored", "offset", "chains", "people")  # options that are numbers
_RANGES = "a number, a range such as 4-32, every fourth of it as 4-32/4, or several of these joined by +"


def is_questions(name: str) -> bool:
    """Whether a name is a question set: a synthetic task, or a format with a file."""
    head, colon, _ = name.partition(":")
    return head in GENERATED or (head in FORMATS and bool(colon))


def file_wanted(name: str) -> str:
    """What to say where a format is named without its file."""
    return (
        f"{name} is read from a file: a local one, {name}:FILE, such as gsm8k:test.jsonl, or one of a dataset on the hub, "
        f"{name}:OWNER/NAME/PATH, such as gsm8k:openai/gsm8k/main/test-00000-of-00001.parquet"
    )


def load_questions(name: str, split: str) -> list[Item]:
    """The items of a question set: by difficulty for synthetic tasks, in file order otherwise.

    Args:
        split: "train" or "test", for synthetic tasks; ignored for files.

    Raises:
        UserError: No such set, task option or file, a file that is not in that format, or a difficulty that the split has no items of.
    """
    head, _, rest = name.partition(":")
    if head in FORMATS:
        if not rest:
            raise UserError(file_wanted(head))
        return read(head, _file(rest))
    if head not in GENERATED:
        raise UserError(f"no question set {head!r}; there are {', '.join(GENERATED)}, and as NAME:FILE {', '.join(FORMATS)}")
    options = _options(name, rest)
    difficulties = _difficulties(name, str(options.pop("difficulty", DIFFICULTIES)))
    count, seed = (_whole(name, key, options.pop(key, default)) for key, default in (("count", COUNT), ("seed", 0)))
    own = {key: _whole(name, key, value) if key in _WHOLE else value for key, value in options.items()}
    return [item for difficulty in difficulties for item in generate(head, difficulty, count, seed, split=split, **own)]


def divide(name: str) -> tuple[list[Item], list[Item]]:
    """Training and validation items: one in twenty, at least one; the last ones of a file, where stories may have several
    questions each, random ones of a synthetic task.

    Raises:
        UserError: As `load_questions`; a set of a single item.
    """
    items = load_questions(name, "train")
    count = max(1, round(HELD_OUT_SHARE * len(items)))
    if count == len(items):
        raise UserError(f"{name}: expected at least 2 questions, one of them to validate on, found {len(items)}")
    if name.partition(":")[0] in GENERATED:
        random.Random(HELD_OUT_SEED).shuffle(items)
    return items[:-count], items[-count:]


def _options(name: str, rest: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for part in rest.split(",") if rest else []:
        key, equals, value = part.partition("=")
        if not (key and equals and value) or key in found:
            raise UserError(f"{name}: expected options such as difficulty=4-32,count=200, each once, found {part!r}")
        found[key] = value
    return found


def _difficulties(name: str, written: str) -> list[int]:
    """Sorted, without duplicates."""
    found: set[int] = set()
    for part in written.split("+"):
        span, slash, step = part.partition("/")
        first, dash, last = span.partition("-")
        numbers = [first, *([last] if dash else []), *([step] if slash else [])]
        if not all(number.isascii() and number.isdigit() for number in numbers) or (slash and (not dash or int(step) < 1)):
            raise UserError(f"{name}: expected as difficulty {_RANGES}, found {part!r}")
        found.update(range(int(first), int(last if dash else first) + 1, int(step) if slash else 1))
    if not found:
        raise UserError(f"{name}: expected as difficulty {_RANGES}, found {written!r}, which holds none")
    return sorted(found)


def _whole(name: str, key: str, value: Any) -> int:
    try:
        return int(value)
    except ValueError as error:
        raise UserError(f"{name}: expected a whole number as {key}, found {value!r}") from error


def _file(written: str) -> Path:
    """A local file, or the local copy of a file in a hub dataset, given as owner/name/path."""
    local, parts = Path(written).expanduser(), written.split("/")
    if local.exists() or len(parts) < 3 or written.startswith((".", "/", "~")):
        return local
    repository, path = "/".join(parts[:2]), "/".join(parts[2:])
    try:
        return Path(hf_hub_download(repository, path, repo_type="dataset"))
    except (RepositoryNotFoundError, EntryNotFoundError) as error:
        raise UserError(f"no file {written}, and the hub has no dataset {repository} with a file {path}") from error
    except (HfHubHTTPError, httpx.HTTPError, OSError) as error:
        raise UserError(f"no file {written}, and {path} of {repository} cannot be fetched from the hub: {error}") from error
