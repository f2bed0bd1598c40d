"""A file of prompts, generated in batches, with resumable results.

    prompts.txt             one prompt per line; or .jsonl, with a "prompt" in each line
    prompts.out.jsonl       a line per prompt, in order: {"index", "prompt", "text", "finish_reason", "tokens"}, with halting "cycles"
    prompts.out.run.json    what the results were made of; a run with other prompts or settings does not add to them

`index` counts the lines of the prompt file from 0; blank lines keep their number and have no result. With halting, `cycles` is the cycle at
which each token was ready.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..errors import UserError
from ..utils.atomic import write_text
from ..utils.encodings import check_characters, read_text
from ..utils.files import parse_json
from .generation import Generated, decoding_stats, generate_batch
from .options import Sampling
from .prompt import EncodedPrompt
from .session import calibrated, encode_as_asked, load
from .settings import GenerateSettings
from .transcript import Message

logger = logging.getLogger(__name__)

FORMAT = "recursify-prompts/1"
_FAULTS_SHOWN = 3  # faulty lines listed in an error; the others are counted


@dataclass(frozen=True)
class Prompt:
    """A prompt and the number of its line, counted from 0. `messages` are given by the chat template; `text` is then the last one."""

    index: int
    text: str
    messages: list[Message] | None = None


def run(settings: GenerateSettings) -> None:
    """Continue every prompt of `settings.prompt_file`, or the remaining ones of an interrupted run.

    Raises:
        UserError: An unreadable file or an invalid line, before anything is generated; an output file of a different run.
    """
    settings.validate()
    prompts = read_prompts(settings.prompt_file or "")
    output = output_path(settings)
    if not output.parent.is_dir():
        raise UserError(f"--output_file: {output.parent} is not a folder that exists; make it first, or name another file")
    model, tokenizer = load(settings)
    settings = calibrated(settings, model, tokenizer)
    encoded, ends = _encode_each(model, tokenizer, prompts, settings)
    results = Results(output, prompts, _run_identity(model, prompts, settings))
    written: list[Generated] = []
    try:
        with tqdm(total=len(prompts), initial=len(results.done), unit="prompt", file=sys.stderr) as bar:
            for batch in results.missing(settings.batch_size):
                texts = [encoded[prompt.index] for prompt in batch]
                written += (batched := generate_batch(model, tokenizer, texts, settings.sampling, seed=_seed(settings, batch), ends=ends))
                bar.update(results.add(batch, batched))
    except KeyboardInterrupt:
        logger.info("Stopped: %d of %d prompts done; the same command resumes from there.", len(results.done), len(prompts))
        raise
    if line := decoding_stats(*written):
        logger.info("%s", line)
    print(f"✓ {len(prompts)} prompts continued, in {output}")


def output_path(settings: GenerateSettings) -> Path:
    """Path of the results: `--output_file`, or beside the prompts."""
    return Path(settings.output_file) if settings.output_file else Path(settings.prompt_file or "").with_suffix(".out.jsonl")


def read_prompts(file: str) -> list[Prompt]:
    """The prompts of a text or `.jsonl` file.

    In a text file a line is taken literally: a backslash followed by n stays two characters. In `.jsonl` JSON escapes apply.

    Raises:
        UserError: Not UTF-8, a line that is not a JSON object with a "prompt", or no prompt at all.
    """
    try:
        content = read_text(Path(file))
    except OSError as error:
        raise UserError(
            f"--prompt_file: {file} cannot be read ({error.strerror}); name a UTF-8 text file with one prompt per line"
        ) from error
    except UserError as error:
        raise UserError(f"--prompt_file: {error}") from error
    lines = [line.removesuffix("\r") for line in content.split("\n")]  # no other character ends a line
    is_json = Path(file).suffix == ".jsonl"
    prompts = [_prompt(file, i, line) if is_json else Prompt(i, line) for i, line in enumerate(lines) if line.strip()]
    if not prompts:
        raise UserError(f"--prompt_file: {file} has no prompt; expected one per line")
    return prompts


def _prompt(file: str, index: int, line: str) -> Prompt:
    try:
        record = parse_json(line)
        if isinstance(prompt := record.get("prompt"), str):
            return Prompt(index, prompt)
        if messages := [{"role": str(each["role"]), "content": each["content"]} for each in record["messages"]]:
            check_characters("".join(each["content"] for each in messages), f"--prompt_file: {file}, line {index + 1}")
            return Prompt(index, messages[-1]["content"], messages)
    except UserError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError):
        pass
    raise UserError(
        f'--prompt_file: {file}, line {index + 1}: expected a JSON object with a text "prompt" or with "messages", got {line[:80]!r}'
    )


def _encode_each(
    model: Any, tokenizer: Any, prompts: Sequence[Prompt], settings: GenerateSettings
) -> tuple[dict[int, EncodedPrompt], tuple[int, ...]]:
    """Tokenize and check every prompt up front, so that an invalid one does not end the run hours later; and the end tokens of answers."""
    faults, encoded = [], {}
    ends: tuple[int, ...] = ()
    for prompt in prompts:
        try:
            encoded[prompt.index], more_ends = encode_as_asked(model, tokenizer, prompt.text, settings, prompt.messages)
            ends = ends or more_ends
        except UserError as error:
            faults.append(f"line {prompt.index + 1}: {error}")
    if faults:
        more = f"\n(and {len(faults) - _FAULTS_SHOWN} more)" if len(faults) > _FAULTS_SHOWN else ""
        raise UserError(f"--prompt_file: {settings.prompt_file}, " + "\n".join(faults[:_FAULTS_SHOWN]) + more)
    return encoded, ends


def _seed(settings: GenerateSettings, batch: Sequence[Prompt]) -> int | None:
    """One seed per batch, so that sampled texts do not depend on where an earlier run stopped."""
    if settings.seed is None:
        return None
    return int.from_bytes(hashlib.sha256(f"{settings.seed}/{batch[0].index}".encode()).digest()[:4])


def _run_identity(model: Any, prompts: Sequence[Prompt], settings: GenerateSettings) -> dict[str, Any]:
    """Everything that the results depend on, in JSON types."""
    sampling: Sampling = settings.sampling
    texts = json.dumps([[prompt.index, prompt.text, *([prompt.messages] if prompt.messages else [])] for prompt in prompts])
    chat = {"chat": True, "system": settings.system} if settings.chat else {}
    return {
        **chat,
        "format": FORMAT,
        "prompts": hashlib.sha256(texts.encode()).hexdigest()[:16],
        "weights": _fingerprint(model),
        **asdict(sampling),
        **asdict(sampling.resolved(model)),
        "stop": list(sampling.stop),
        "seed": settings.seed,
        "batch_size": settings.batch_size,
    }


def _fingerprint(model: Any) -> str:
    """A hash over the first values of every weight: identifies a checkpoint independently of its path."""
    digest = hashlib.sha256()
    for name, weight in model.state_dict().items():
        digest.update(f"{name}{tuple(weight.shape)}{weight.flatten()[:16].tolist()}".encode())
    return digest.hexdigest()[:16]


class Results:
    """The output file; existing results are kept and new ones appended.

    Raises:
        UserError: A file of a different run, or one that holds no results.
    """

    def __init__(self, path: Path, prompts: Sequence[Prompt], made_of: dict[str, Any]):
        self.path, self.prompts = path, prompts
        self.record = path.with_suffix(".run.json")
        self.done: set[int] = set()
        if path.exists():
            self._check_record(made_of)
            self._read()
        else:
            try:
                write_text(self.record, json.dumps(made_of, indent=1) + "\n")
            except OSError as error:
                raise UserError(
                    f"--output_file: {self.record} cannot be written ({error.strerror}); name a file in a folder of your own"
                ) from error

    def missing(self, batch_size: int) -> Iterator[list[Prompt]]:
        """The incomplete batches. The split is fixed, since sampled texts depend on the composition of the batch."""
        for first in range(0, len(self.prompts), batch_size):
            batch = list(self.prompts[first : first + batch_size])
            if any(prompt.index not in self.done for prompt in batch):
                yield batch

    def add(self, batch: Sequence[Prompt], generated: Sequence[Generated]) -> int:
        """Append the missing results; returns their number.

        Raises:
            UserError: They cannot be written; what has been written is kept.
        """
        pairs = [(prompt, one) for prompt, one in zip(batch, generated, strict=True) if prompt.index not in self.done]
        lines = [json.dumps(_entry(prompt, one), ensure_ascii=False) + "\n" for prompt, one in pairs]
        try:
            with self.path.open("a", encoding="utf-8", newline="\n") as file:
                file.write("".join(lines))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise UserError(
                f"--output_file: {self.path} could not be written ({error.strerror}); the results so far are kept. Free some space, then "
                "the same command resumes from there"
            ) from error
        self.done |= {prompt.index for prompt, _ in pairs}
        return len(pairs)

    def _check_record(self, made_of: dict[str, Any]) -> None:
        cure = "name another --output_file, or delete it to start over"
        try:
            before = parse_json(self.record.read_text(encoding="utf-8"))
            if before["format"] != FORMAT:
                raise ValueError
        except (OSError, ValueError, TypeError, KeyError):
            raise UserError(f"--output_file: {self.path} is there, but nothing in {self.record} says how it was made; {cure}") from None
        for name, value in made_of.items():
            if before.get(name) != value:
                what = {"prompts": "other prompts", "weights": "another checkpoint"}.get(name)
                what = what or f"--{name} {before.get(name)}, and this run has --{name} {value}"
                raise UserError(f"--output_file: {self.path} was made with {what}; {cure}")

    def _read(self) -> None:
        """Read existing results; a truncated last line is removed."""
        content = self.path.read_bytes()
        whole = content.rfind(b"\n") + 1
        known = {prompt.index for prompt in self.prompts}
        for number, line in enumerate(content[:whole].splitlines(), start=1):
            try:
                index = parse_json(line)["index"]
                if index not in known:
                    raise ValueError
            except (ValueError, TypeError, KeyError):
                raise UserError(
                    f"--output_file: {self.path}, line {number}: expected a result of these prompts, got {line[:80]!r}"
                ) from None
            self.done.add(index)
        if whole < len(content):
            with self.path.open("r+b") as file:
                file.truncate(whole)


def _entry(prompt: Prompt, one: Generated) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "index": prompt.index,
        "prompt": prompt.text,
        "text": one.text,
        "finish_reason": one.finish_reason,
        "tokens": len(one.token_ids),
    }
    return entry if one.cycles is None else entry | {"cycles": list(one.cycles)}
