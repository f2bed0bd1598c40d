"""The command line: parse the settings of a command, run it, turn bad input into one message and exit status 2.

Every flag is a field of the settings class of its command (`words.py`). `--config FILE` reads them from a recipe (`recipe.py`); flags on
the command line override it. The scripts of the guides call the functions of this file; `recursify COMMAND` calls `main`. Until the flags
are read and checked, nothing imports torch or transformers, which takes seconds: `--help` and errors in flags come at once.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import itertools
import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_args

from ..errors import UserError, short
from .recipe import JOB_SECTIONS, read_approach, read_section

if TYPE_CHECKING:
    from ..evaluation.settings import MeasureSettings
    from ..training.settings import RunSettings

Settings = TypeVar("Settings")
Argv = Sequence[str] | None
INTERRUPTED = 130  # the shell's status of a program that Ctrl-C ended


def convert(argv: Argv = None) -> None:
    """Convert a pretrained model into a recursive one."""
    from ..conversion.settings import ConvertSettings

    def job(settings: ConvertSettings) -> None:
        from ..conversion.convert import run

        report = run(settings, say=_to_stderr if settings.json else print)
        if settings.json:
            _print_json(report)

    _command("convert", ConvertSettings, job, argv)


def train(argv: Argv = None) -> None:
    """Fine-tune a recursive model, or only the loop (--approach)."""
    from ..training.settings import TrainSettings

    _command("train", TrainSettings, _fit, argv)


def train_trm(argv: Argv = None) -> None:
    """Train a recursive block in a donor's embedding space."""
    from ..training.settings import EmbeddingSettings

    _command("train_trm", EmbeddingSettings, _fit, argv)


def train_trm_hybrid(argv: Argv = None) -> None:
    """Train recursive layers between a donor's embeddings and its head."""
    from ..training.settings import HybridSettings

    _command("train_trm_hybrid", HybridSettings, _fit, argv)


def _fit(settings: RunSettings) -> None:
    from ..training.run import train

    fitted = train(settings).fit
    if fitted is not None and fitted.interrupted:
        sys.exit(INTERRUPTED)  # saved and resumable, but what follows in a script must not take it for finished


def generate(argv: Argv = None) -> None:
    """Generate text from --prompt, from each line of --prompt_file, or interactively."""
    from ..inference.settings import GenerateSettings

    def job(settings: GenerateSettings) -> None:
        from ..inference import interactive, prompt_file, session

        if settings.prompt_file is not None:
            prompt_file.run(settings)
        elif settings.prompt is not None:
            session.run(settings)
        else:
            interactive.run(settings)

    _command("generate", GenerateSettings, job, argv)


def chat(argv: Argv = None) -> None:
    """Chat with a model at the terminal."""
    from ..inference.settings import ChatSettings

    def job(settings: ChatSettings) -> None:
        from ..inference.chat import run

        run(settings)

    _command("chat", ChatSettings, job, argv)


def serve(argv: Argv = None) -> None:
    """Serve a model over HTTP with an OpenAI-compatible API."""
    from ..serving.settings import ServeSettings

    def job(settings: ServeSettings) -> None:
        from ..serving.running import EngineStopped, run

        try:
            run(settings)
        except EngineStopped as error:
            _to_stderr(f"error: {error}")
            sys.exit(1)  # neither bad input nor a normal end: whoever looks after the process starts it again

    _command("serve", ServeSettings, job, argv)


def evaluate(argv: Argv = None) -> None:
    """Measure loss and accuracy at every depth, and what each cycle contributes."""
    from ..evaluation.settings import EvaluateSettings

    def job(settings: EvaluateSettings) -> None:
        from ..evaluation.evaluate import run

        _print_measured(run(settings), settings)

    _command("evaluate", EvaluateSettings, job, argv)


def compare(argv: Argv = None) -> None:
    """Measure several models on the same items, with paired significance tests."""
    from ..evaluation.settings import CompareSettings

    def job(settings: CompareSettings) -> None:
        from ..evaluation.compare import run

        _print_measured(run(settings), settings)

    _command("compare", CompareSettings, job, argv)


def probe(argv: Argv = None) -> None:
    """Measure where in a base model a loop costs least, before any training."""
    from ..conversion.settings import ProbeSettings

    def job(settings: ProbeSettings) -> None:
        from ..conversion import probe_page
        from ..conversion.probe import run

        report = run(settings)
        _print_json(report) if settings.json else print(report.render())
        if settings.report is not None:
            _to_stderr(f"✓ Page in {probe_page.write(report, settings.report)}")

    _command("probe", ProbeSettings, job, argv)


def inspect(argv: Argv = None) -> None:
    """Show plan, parameters by part, and cost per token of a model."""
    from ..conversion.settings import InspectSettings

    def job(settings: InspectSettings) -> None:
        from ..conversion.inspection import run

        report = run(settings)
        _print_json(report) if settings.json else print(report.render())

    _command("inspect", InspectSettings, job, argv)


def export(argv: Argv = None) -> None:
    """Write a folder for the Hugging Face hub, or the layers as a plain model; with --push, upload it."""
    from ..hub.settings import ExportSettings

    def job(settings: ExportSettings) -> None:
        from ..hub.export import run

        run(settings)

    _command("export", ExportSettings, job, argv)


def demo(argv: Argv = None) -> None:
    """Run the end-to-end demo on the bundled base models."""
    from ..demo.settings import DemoSettings

    def job(settings: DemoSettings) -> None:
        from ..demo.run import run

        run(settings)

    _command("demo", DemoSettings, job, argv)


JOBS: dict[str, Callable[[Argv], None]] = {
    job.__name__: job for job in (convert, train, generate, chat, serve, evaluate, compare, probe, inspect, export, demo)
}


def main(argv: Argv = None) -> None:
    """`recursify COMMAND [flags]`."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["help"]:
        words = [*words[1:], "--help"]
    if not words or words[0] in ("-h", "--help"):
        print(_overview())
    elif words[0] == "--version":
        from .. import __version__

        print(__version__)
    elif words[0] in JOBS:
        JOBS[words[0]](words[1:])
    else:
        near = difflib.get_close_matches(words[0], JOBS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(JOBS)}"
        _fail(f"recursify: unknown command {words[0]!r}; {hint}")


def _overview() -> str:
    jobs = "\n".join(f"  {name:<10} {job.__doc__}" for name, job in JOBS.items())
    return (
        f"Turn a pretrained language model into a recursive reasoner.\n\nusage: recursify COMMAND [flags]\n\n{jobs}\n\n"
        "recursify COMMAND --help lists the flags of a command."
    )


def parse(job: str, settings_class: type[Settings], argv: Argv = None) -> Settings:
    """Flags as settings, over those of the recipe that `--config` names.

    Args:
        settings_class: Of `train`, that of its default approach; `--approach`, or the recipe, may choose another.
        argv: None when a script of the guides was called by its own name; its flags are then in `sys.argv`.

    Raises:
        UserError: As `read_section` and `words.read`.
        SystemExit: Help was asked for, and is printed.
    """
    from . import flags, words

    given = list(sys.argv[1:] if argv is None else argv)
    prog = Path(sys.argv[0]).name if argv is None else f"recursify {job}"
    extra: dict[str, tuple[Any, Any]] = {}
    values: dict[str, Any] = {}
    if job in JOB_SECTIONS:
        file = _value_of("--config", given)
        extra = {"config": (None, flags.CONFIG)}
        if job == "train":
            chosen: Any = _of_approach(given, file) or settings_class
            settings_class = chosen
            extra |= {"approach": (chosen.approach, flags.APPROACH)}
        if file is not None:
            values = read_section(file, job, settings_class)
    if words.asks_for_help(given):
        flags.show_help(settings_class, job, prog, values, extra)
    values |= words.read(settings_class, given, job, prog, values, {name: get_args(hint)[0] for name, (_, hint) in extra.items()})
    return settings_class(**values)


def _of_approach(words: Sequence[str], file: str | None) -> Any:
    """The settings of the approach of training that the words name, else the recipe; None if neither does."""
    from ..training.settings import EmbeddingSettings, HybridSettings, TrainSettings

    approach = _value_of("--approach", words)
    if approach is None and file is not None:
        approach = read_approach(file)
    if approach is None:
        return None
    known = {found.approach: found for found in (TrainSettings, HybridSettings, EmbeddingSettings)}
    if approach not in known:
        raise UserError(f"--approach: expected one of {', '.join(known)}, got {approach!r}")
    given = _value_of("--checkpoint", words)
    if given is not None and "checkpoint" not in known[approach].__dataclass_fields__:
        raise UserError(f"--checkpoint: not used by this approach, which starts from a donor: name one with --model_name; got {given}")
    return known[approach]


def _value_of(flag: str, words: Sequence[str]) -> str | None:
    """What the last such flag says; a missing value is left to the parser of all flags."""
    value = None
    for word, following in itertools.pairwise([*words, None]):
        if word == flag:
            value = following
        elif word is not None and word.startswith(f"{flag}="):
            value = word.removeprefix(f"{flag}=")
    return value


def _command(name: str, settings_class: type[Settings], job: Callable[[Settings], Any], argv: Argv) -> None:
    """Parse flags into settings and run the job, with what it imports; bad input ends with status 2 and one message."""
    from ..utils.log import log_to_stderr
    from ..utils.streams import replace_unencodable

    for stream in (sys.stdout, sys.stderr):
        replace_unencodable(stream)
    log_to_stderr()
    try:
        settings = parse(name, settings_class, argv)
        if hasattr(settings, "validate"):
            settings.validate()
        from transformers.utils import logging as transformers_logging

        from .. import _registered  # noqa: F401

        transformers_logging.disable_progress_bar()  # bars of milliseconds; the jobs show their own where one has to wait
        job(settings)
    except UserError as error:
        if os.environ.get("RECURSIFY_DEBUG") == "1":
            raise
        _fail(str(error))
    except BrokenPipeError:  # the reader of our output has gone, as in `recursify inspect X | head`
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        _fail(f"{short(error.filename)}: expected the name of a file or folder, got one longer than this system allows; shorten it")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)


def _fail(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def _print_measured(report: Any, settings: MeasureSettings) -> None:
    """Figures and page, from one of several processes."""
    from ..evaluation import page as evaluation_page
    from ..utils import distributed

    if not distributed.is_first():
        return
    _print_json(report) if settings.json else print(report.render())
    if settings.report is not None:
        _to_stderr(f"✓ Page in {evaluation_page.write(report.to_dict(), settings.report)}")


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr)


def _print_json(report: Any) -> None:
    print(json.dumps(_strict(report.to_dict()), default=str, allow_nan=False))


def _strict(value: Any) -> Any:
    """JSON has no infinity and no "not a number": they become the strings that Python's float and most others read."""
    if isinstance(value, dict):
        return {key: _strict(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(part) for part in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
