"""Question sets by name, and their questions as tokens to train on.

    load_questions("permutations:difficulty=4-32/4,count=200", "test")       made, to any difficulty
    load_questions("babi:qa2_two-supporting-facts_test.txt", "test")         read from a file
    load_questions("gsm8k:openai/gsm8k/main/test-00000-of-00001.parquet", "test")   from a data set of the hub: one file of it is fetched
    question_rows(items, tokenizer, seq_len=128)                             rows with `input_ids` and `labels`

A name is that of a task or a format of `recursify.tasks`; what follows the first colon are the options of a task, or the file. Options are
`difficulty` (4, or 4-32, or 4-32/4 for every fourth, or 2+8 for several of these; 1-8 where not given), `count` (items of each difficulty,
500), `seed` (0), and the task's own: `group` of permutations, `nodes` of pointers. Training and test items of a set that is made are never
the same; a file is all of one kind, and which file is for what is for its user to say.

What is trained is the answer, and for state tracking the state at every word: nothing is learnt about the words of a question, which are
random or given. A label stands at the place after the token that is to tell it, as everywhere: position t is scored against label t + 1.

Floor 1. Uses tasks/, objective.py and errors.py.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, List, Value
from huggingface_hub import hf_hub_download
from huggingface_hub.utils import EntryNotFoundError, HfHubHTTPError, RepositoryNotFoundError, httpx

from .errors import UserError
from .objective import IGNORED
from .tasks import FORMATS, GENERATED, Item, as_text, generate, label_ends, prompt, read

DIFFICULTIES = "1-8"
COUNT = 500
HELD_OUT_SHARE = 0.05
HELD_OUT_SEED = 0
_RANGES = "a number, a range such as 4-32, every fourth of it as 4-32/4, or several of these joined by +"


def is_questions(name: str) -> bool:
    """Whether a name is that of a question set: a task's, or a format's with a file."""
    head, colon, _ = name.partition(":")
    return head in GENERATED or (head in FORMATS and bool(colon))


def load_questions(name: str, split: str) -> list[Item]:
    """The items of a set, by difficulty where they are made, in the order of the file where they are read.

    Args:
        split: "train" or "test", for sets that are made; a file is what it is.

    Raises:
        UserError: No such set, task option or file, a file that is not in that format, or a difficulty that the split has no items of.
    """
    head, _, rest = name.partition(":")
    if head in FORMATS:
        if not rest:
            raise UserError(f"{head}: expected a file behind a colon, as {head}:FILE, or {head}:OWNER/NAME/PATH of a data set of the hub")
        return read(head, _file(rest))
    if head not in GENERATED:
        raise UserError(f"no question set {head!r}; there are {', '.join(GENERATED)}, and as NAME:FILE {', '.join(FORMATS)}")
    options = _options(name, rest)
    difficulties = _difficulties(name, str(options.pop("difficulty", DIFFICULTIES)))
    count, seed = (_whole(name, key, options.pop(key, default)) for key, default in (("count", COUNT), ("seed", 0)))
    own = {key: _whole(name, key, value) if key == "nodes" else value for key, value in options.items()}
    return [item for difficulty in difficulties for item in generate(head, difficulty, count, seed, split=split, **own)]


def divide(name: str) -> tuple[list[Item], list[Item]]:
    """Items to train on, and items to validate on: one in twenty, at least one; the last of a file, where stories may have several
    questions each, and any of those that are made.

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
    """Ascending, each once."""
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
    """A local file, or the local copy of one of a data set on the hub, named owner/name/path."""
    local, parts = Path(written).expanduser(), written.split("/")
    if local.exists() or len(parts) < 3 or written.startswith((".", "/", "~")):
        return local
    repository, path = "/".join(parts[:2]), "/".join(parts[2:])
    try:
        return Path(hf_hub_download(repository, path, repo_type="dataset"))
    except (RepositoryNotFoundError, EntryNotFoundError) as error:
        raise UserError(f"no file {written}, and the hub has no data set {repository} with a file {path}") from error
    except (HfHubHTTPError, httpx.HTTPError, OSError) as error:
        raise UserError(f"no file {written}, and {path} of {repository} cannot be fetched from the hub: {error}") from error


# Questions as tokens


def question_rows(items: Sequence[Item], tokenizer: Any, seq_len: int) -> Dataset:
    """Questions with their answers, as many to a row as fit, each with an end-of-text token; the rest of a row is such tokens.

    Train on them with documents separated, or a question sees the ones before it.

    Args:
        tokenizer: One with an end-of-text token that knows the places of its tokens in the text (a fast one).
        seq_len: Tokens per row.

    Returns:
        A table with `input_ids` and `labels`, `seq_len` each: labels are -100 but for answers, their end-of-text token, and states.

    Raises:
        UserError: A tokenizer that cannot, or a question that is longer than a row.
    """
    filler = (tokenizer.eos_token_id, IGNORED)
    rows: list[list[tuple[int, int]]] = [[]]
    known: dict[str, int | None] = {}
    for item in items:
        tokens = _labelled(item, tokenizer, known)
        if len(tokens) > seq_len:
            longest = max(len(_labelled(other, tokenizer, known)) for other in items)
            raise UserError(f"--seq_len: expected at least {longest}, the tokens of the longest question, got {seq_len}")
        if len(rows[-1]) + len(tokens) > seq_len:
            rows.append([])
        rows[-1] += tokens
    filled = [row + [filler] * (seq_len - len(row)) for row in rows if row]
    columns = {"input_ids": [[i for i, _ in row] for row in filled], "labels": [[label for _, label in row] for row in filled]}
    return Dataset.from_dict(columns, features=row_features(seq_len))


def row_features(seq_len: int) -> Features:
    return Features({name: List(Value("int32"), length=seq_len) for name in ("input_ids", "labels")})


def _labelled(item: Item, tokenizer: Any, known: dict[str, int | None]) -> list[tuple[int, int]]:
    """Ids of question, answer and end of text, each with its label."""
    begins = len(prompt(item))
    ids, spans = _tokens(as_text(item), tokenizer)
    labels = [token if end > begins else IGNORED for token, (_, end) in zip(ids, spans, strict=True)]
    for place, target in _states(item, spans, tokenizer, known):
        labels[place + 1] = target
    if ids[-1] != tokenizer.eos_token_id:
        ids, labels = [*ids, tokenizer.eos_token_id], [*labels, tokenizer.eos_token_id]
    else:
        labels[-1] = ids[-1]
    return list(zip(ids, labels, strict=True))


def label_tokens(item: Item, tokenizer: Any) -> tuple[list[int], list[int], list[int]] | None:
    """What it takes to ask a model for every state of one item in a single pass.

    Returns:
        The ids of the prompt; at which of them each state is to be told; the id that tells it. None for an item without labels, or with a
        label that is not one token.
    """
    ids, spans = _tokens(prompt(item), tokenizer)
    states = _states(item, spans, tokenizer, {})
    return (ids, [place for place, _ in states], [target for _, target in states]) if states else None


def _states(item: Item, spans: Sequence[tuple[int, int]], tokenizer: Any, known: dict[str, int | None]) -> list[tuple[int, int]]:
    """Token by which each state is known, and the id that tells it; none where a state is not one token.

    Args:
        known: Ids of states so far, which are few and in many questions; those that are new are put there.
    """
    covering = [next(i for i, (start, end) in enumerate(spans) if start < at <= end) for at in label_ends(item)]
    known |= {label: _one_token(label, tokenizer) for label in set(item.labels) - set(known)}
    targets = [token for label in item.labels if (token := known[label]) is not None]
    return list(zip(covering, targets, strict=True)) if len(targets) == len(item.labels) else []


def _one_token(label: str, tokenizer: Any) -> int | None:
    """The id of a word, with the space before it where the vocabulary has it so."""
    for written in (f" {label}", label):
        ids = tokenizer(written, add_special_tokens=False)["input_ids"]
        if len(ids) == 1:
            return int(ids[0])
    return None


def _tokens(text: str, tokenizer: Any) -> tuple[list[int], list[tuple[int, int]]]:
    """Ids, and which characters of the text each stands for."""
    if tokenizer.eos_token_id is None or not tokenizer.is_fast:
        raise UserError(
            f"tokenizer {tokenizer.name_or_path or type(tokenizer).__name__!r}: questions need one with an eos_token that knows where its "
            "tokens stand in the text (a fast one, with tokenizer.json)"
        )
    found = tokenizer(text, return_offsets_mapping=True, verbose=False)
    return list(found["input_ids"]), [tuple(span) for span in found["offset_mapping"]]
