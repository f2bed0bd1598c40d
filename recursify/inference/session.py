"""Shared steps of the commands that generate text: load the model, calibrate early exit, print text and statistics."""

from __future__ import annotations

import logging
import sys
from dataclasses import replace
from typing import Any, TextIO, TypeVar

from transformers import PreTrainedTokenizerBase

from ..checkpoints.loading import load_model
from ..data.calibration import calibration_windows
from ..errors import UserError
from ..utils.device import choose_device, placed
from .chat_prompt import Dialogue
from .early_exit import calibrate
from .generation import Generated, decoding_stats, generate_text, speed_stats
from .prompt import EncodedPrompt, check_ids, encode_prompt, end_tokens
from .settings import GenerateSettings, WriteSettings
from .transcript import Message

logger = logging.getLogger(__name__)

AnySettings = TypeVar("AnySettings", bound="WriteSettings")


# At most this many windows of this many tokens of a calibration file are used.
_WINDOWS = 32
_WINDOW_TOKENS = 128


def run(settings: GenerateSettings) -> None:
    """Continue `settings.prompt` on stdout.

    Raises:
        UserError: No prompt or a setting out of range; a checkpoint or tokenizer that cannot be read.
    """
    if settings.prompt is None:
        raise UserError("--prompt: expected some text to continue, got none")
    model, tokenizer = load(settings)
    settings = calibrated(settings, model, tokenizer)
    write_once(model, tokenizer, settings.prompt or "", settings, sys.stdout, seed=settings.seed)


def load(settings: WriteSettings) -> tuple[Any, PreTrainedTokenizerBase]:
    """Load model, on its device in evaluation mode, and tokenizer.

    Raises:
        UserError: A setting out of range; a checkpoint or tokenizer that cannot be read; a model that cannot generate as asked.
    """
    settings.validate()
    model, tokenizer = load_model(settings.checkpoint, settings.tokenizer_path, revision=settings.revision, donor=settings.donor)
    settings.sampling.generate_kwargs(model)  # for what it refuses
    return placed(model, choose_device(settings.device), settings.dtype), tokenizer


def calibrated(settings: AnySettings, model: Any, tokenizer: PreTrainedTokenizerBase) -> AnySettings:
    """Replace `compute_budget` by the threshold calibrated for it; unchanged without a budget.

    Logs the result.

    Raises:
        UserError: A calibration file that cannot be read, or is too short; a budget that cannot be met.
    """
    if settings.compute_budget is None:
        return settings
    blocks = calibration_windows(settings.calibration_file or "", tokenizer, _WINDOW_TOKENS, _WINDOWS, least=2).to(model.device)
    logger.info("Finding the threshold on the calibration text ...")
    found = calibrate(model, blocks, settings.halt, settings.compute_budget, settings.H_cycles)
    logger.info("%s", found.render())
    return replace(settings, halt_threshold=found.threshold, compute_budget=None, calibration_file=None)


def write_once(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    settings: WriteSettings,
    out: TextIO,
    err: TextIO | None = None,
    **kwargs: Any,
) -> Generated:
    """Stream prompt and completion to `out`, then the table of cycles if asked for.

    Args:
        err: Stream for statistics on early exit or self-speculation; None is stderr.
        kwargs: As in `generate_text`: seed, should_stop.
    """

    def show(text: str) -> None:
        out.write(text)
        out.flush()

    # errors come before any text
    settings.sampling.generate_kwargs(model)
    encoded, ends = encode_as_asked(model, tokenizer, prompt, settings)
    if not ends:  # the text goes on; an answer stands by itself
        show(prompt)
    try:
        generated = generate_text(model, tokenizer, encoded, settings.sampling, on_text=show, ends=ends, **kwargs)
    finally:
        show("\n")
    if not generated.text and generated.finish_reason == "stop":
        print("(the model ended the text at once)", file=err or sys.stderr, flush=True)
    print_stats(model, tokenizer, generated, settings, out, err)
    return generated


def encode_as_asked(
    model: Any, tokenizer: PreTrainedTokenizerBase, prompt: str, settings: WriteSettings, messages: list[Message] | None = None
) -> tuple[EncodedPrompt, tuple[int, ...]]:
    """A prompt as token ids; with `chat`, or given as messages, by the chat template and with the end tokens of an answer.

    Raises:
        UserError: As `encode_prompt`; a tokenizer without a chat template, or one that refuses the messages.
    """
    if messages is None and not getattr(settings, "chat", False):
        return encode_prompt(model, tokenizer, prompt, settings.max_new_tokens), ()
    dialogue, system = Dialogue(tokenizer), getattr(settings, "system", None)
    if not dialogue.has_template:
        raise UserError("--chat: the tokenizer has no chat template; leave it out, or name a tokenizer that has one with --tokenizer_path")
    before: list[Message] = [{"role": "system", "content": system}] if system else []
    ids = dialogue.prompt([*before, *(messages or [{"role": "user", "content": prompt}])])
    check_ids(model, ids, settings.max_new_tokens)
    return EncodedPrompt(prompt, ids), (*dialogue.ends, *end_tokens(model, tokenizer))


def print_stats(
    model: Any, tokenizer: PreTrainedTokenizerBase, generated: Generated, settings: WriteSettings, out: TextIO, err: TextIO | None = None
) -> None:
    """After a text: statistics to `err` and, unless interrupted, the table of cycles to `out` if asked for."""
    speed = speed_stats(generated) if settings.verbose else ""
    for line in filter(None, (decoding_stats(generated), speed)):
        print(line, file=err or sys.stderr, flush=True)
    if settings.show_recursive_steps and generated.finish_reason != "interrupted":
        from .cycle_table import show_steps  # here: nothing else of this file needs rich

        ids = generated.prompt_ids + generated.token_ids
        show_steps(model, tokenizer, ids, len(generated.prompt_ids), settings.sampling, out)
