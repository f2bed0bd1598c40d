"""Writing text with a model: prompts continued, with the KV cache, handed on piece by piece as they are written.

    generate_text     one prompt; with a `Memory`, only what is new of it is read
    generate_batch    several at a time

Works for recursive models and, for comparison, for plain ones of transformers. Floor 2.
"""

from __future__ import annotations

import io
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TextIO, TypeVar

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase, StoppingCriteriaList

from ..checkpoints import checkpoint
from ..errors import UserError
from ..utils.device import check_seed, choose_device
from .early_exit import applications, calibrate
from .options import CachePolicy, Effort, Halt, evaluating
from .prefix_cache import Memory
from .streaming import Finish, Row, Rows

AnySettings = TypeVar("AnySettings", bound="WriteSettings")
# Below this a distribution is its largest entry anyway, and logits divided by less are no longer finite.
GREEDY_BELOW = 1e-5
# What changes nothing, in transformers' words.
_NO_PENALTY: dict[str, Any] = {"repetition_penalty": 1.0, "encoder_repetition_penalty": 1.0, "no_repeat_ngram_size": 0}
_NO_CUTOFF: dict[str, Any] = {"typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0}
_WHERE_A_DONOR_HAS_IT: dict[str, Any] = {"min_length": 0, "min_new_tokens": 0, "min_p": 0.0}  # else they cost time, or a warning
# Of a calibration file, at most so many windows of so many tokens are read.
_WINDOWS, _WINDOW_TOKENS = 32, 128


@dataclass(kw_only=True)
class WriteSettings:
    """What all ways of writing text share."""

    checkpoint: str
    """A .pt file with its _tokenizer folder beside it, or a folder in Hugging Face layout."""
    max_new_tokens: int = 100
    """Write at most so many tokens; an end token ends the text earlier."""
    temperature: float = 0.8
    """Randomness of the choice; 0 always takes the likeliest token (greedy)."""
    top_p: float = 1.0
    """Choose among the likeliest tokens that together have this probability; 1.0 is off."""
    top_k: int = 0
    """Choose among this many likeliest tokens; 0 is off."""
    stop: tuple[str, ...] = ()
    """End the text before the first of these strings, e.g. --stop "Question:" "###"."""
    tokenizer_path: str | None = None
    """Folder or hub id of the tokenizer. Default: the one saved with the checkpoint."""
    H_cycles: int | None = None
    """Cycles per token; 0 is one plain pass. Default: the checkpoint's."""
    cache_policy: CachePolicy = "full"
    """What is kept of earlier tokens: full, one slot per application of a layer; last, one per layer, as few as a plain model has."""
    halt: Halt = "none"
    """Let each token stop at the cycle at which it is ready: as q_head has learnt, when a cycle changes little (kl), or when the next token
    is certain (entropy)."""
    halt_threshold: float | None = None
    """Ready means: q_head above this (default 0.5), kl below it (5e-4 nats), entropy below it (0.1 nats)."""
    compute_budget: float | None = None
    """Find the halt_threshold that spends this share of the layer applications, e.g. 0.6, on the text of calibration_file."""
    calibration_file: str | None = None
    """Text like what the model will write, for compute_budget."""
    draft_cycles: int | None = None
    """Draft with so many cycles and check several drafts at a time at full depth: the same text, sooner. 0 drafts with a plain pass."""
    draft_tokens: int = 16
    """Draft at most so many tokens at a time; how many follows from how often drafts have been right."""
    show_recursive_steps: bool = False
    """After the text, show for each token what every cycle would have said."""
    seed: int | None = None
    """Makes sampling repeatable."""
    device: str | None = None
    """cpu, cuda, cuda:1, mps. Default: cuda where there is one, else mps, else cpu."""

    def validate(self) -> None:
        """Check all that can be checked without the model.

        Raises:
            UserError: A value out of range, or two that exclude each other.
        """
        self.sampling.check()
        self._check_budget()
        if self.show_recursive_steps and self.cache_policy != "full":
            raise UserError(
                f"--show_recursive_steps: reads the text as --cache_policy full does, got --cache_policy {self.cache_policy}; "
                "leave out one of the two"
            )
        check_seed(self.seed)
        choose_device(self.device)

    def _check_budget(self) -> None:
        budget = self.compute_budget
        if budget is None:
            if self.calibration_file is not None:
                raise UserError("--calibration_file: expected --compute_budget with it, e.g. 0.6, got none")
            return
        if not 0 < budget <= 1:
            raise UserError(f"--compute_budget: expected a share above 0 and at most 1, got {budget}")
        if self.halt == "none":
            raise UserError(f"--compute_budget: expected --halt q_head, kl or entropy with it, got {budget} and no --halt")
        if self.halt_threshold is not None:
            raise UserError("--compute_budget: finds the threshold itself, got --halt_threshold with it; leave out one of the two")
        if self.calibration_file is None:
            raise UserError("--compute_budget: expected --calibration_file with it, a text like what the model will write, got none")

    @property
    def sampling(self) -> Sampling:
        """Those of the flags that shape the text."""
        return Sampling(**{field.name: getattr(self, field.name) for field in fields(Sampling)})


@dataclass(kw_only=True)
class GenerateSettings(WriteSettings):
    """Write text with a recursive model: one prompt, one after the other, or a file of them."""

    prompt: str | None = None
    """Text to continue. Without it, and without prompt_file: interactive, one prompt after the other."""
    prompt_file: str | None = None
    """Continue every line of this file: text, or .jsonl with a "prompt" in each line. What is finished is kept: run again to go on."""
    output_file: str | None = None
    """Where the results of prompt_file go, a JSON object per line. Default: its name with .out.jsonl."""
    batch_size: int = 8
    """Prompts of prompt_file that are continued at a time."""

    def validate(self) -> None:
        """As `WriteSettings.validate`."""
        if self.prompt is not None:
            _check_prompt(self.prompt)
        if self.batch_size < 1:
            raise UserError(f"--batch_size: expected at least 1, got {self.batch_size}")
        if self.output_file is not None and self.prompt_file is None:
            raise UserError(f"--output_file: expected --prompt_file with it, got {self.output_file} and no --prompt_file")
        for name in ("prompt", "show_recursive_steps") if self.prompt_file is not None else ():
            if getattr(self, name):
                raise UserError(f"--prompt_file: expected no --{name} with it, got both; leave out one of the two")
        super().validate()


@dataclass(frozen=True, kw_only=True)
class Sampling(Effort):
    """How the next token is chosen, from which depth, and where the text ends. The fields are the flags of the same name."""

    max_new_tokens: int = 100
    temperature: float = 0.8
    top_p: float = 1.0
    top_k: int = 0
    stop: tuple[str, ...] = ()

    def check(self) -> None:
        """Raises UserError for a value out of range, or two that exclude each other."""
        if self.max_new_tokens < 1:
            raise UserError(f"--max_new_tokens: expected at least 1, got {self.max_new_tokens}")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UserError(f"--temperature: expected a number of at least 0 (0 is greedy), got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top_p: expected a number above 0 and at most 1 (1 is off), got {self.top_p}")
        if self.top_k < 0:
            raise UserError(f"--top_k: expected at least 0 (0 is off), got {self.top_k}")
        if "" in self.stop:
            raise UserError("--stop: expected some text before which to end, got ''")
        super().check()

    def as_transformers(self, ends: Sequence[int], pad: int) -> GenerationConfig:
        """The same in transformers' words. Penalties, cutoffs and several texts that a donor's generation_config.json sets are switched
        off: what is None here would be taken from there."""
        greedy = self.temperature < GREEDY_BELOW
        choice = {} if greedy else {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k, **_NO_CUTOFF}
        return GenerationConfig(
            max_new_tokens=self.max_new_tokens,
            do_sample=not greedy,
            num_beams=1,
            num_return_sequences=1,
            use_cache=True,
            eos_token_id=list(ends) or None,
            pad_token_id=pad,
            return_dict_in_generate=True,
            **_NO_PENALTY,
            **choice,
        )


@dataclass(frozen=True)
class Generated:
    """One continued prompt.

    Args:
        text: The continuation alone; `prompt + text` is the whole.
        prompt_ids, token_ids: Tokens read and tokens written. The last one written may be an end token, which has no text; a stop
            string has tokens, but is not in the text.
        finish_reason: `stop` at an end token or before a stop string, `length` at max_new_tokens, `interrupted` when the caller said so.
        cycles: With halting, for each token written the cycle at which it was ready; else None.
        of_cycles: The cycles of a run that does not halt; 0 for a model without.
        applications, plain_applications: With halting, the layers applied for the tokens written, and what full depth would have applied.
        drafted, accepted: With self-speculation, tokens drafted and found right. The rows of a batch draft together: what they did is told
            with the first, and the others have 0.
    """

    prompt: str
    text: str
    prompt_ids: list[int]
    token_ids: list[int]
    finish_reason: Finish
    cycles: tuple[int, ...] | None = None
    of_cycles: int = 0
    applications: int | None = None
    plain_applications: int | None = None
    drafted: int | None = None
    accepted: int | None = None


def run(settings: GenerateSettings) -> None:
    """Continue `settings.prompt` on stdout.

    Raises:
        UserError: No prompt or a setting out of range; a checkpoint or tokenizer that cannot be read.
    """
    if settings.prompt is None:
        raise UserError("--prompt: expected some text to continue, got none")
    model, tokenizer = load(settings)
    settings = calibrated(settings, model, tokenizer)
    write_once(model, tokenizer, settings.prompt or "", settings, forgiving(sys.stdout), seed=settings.seed)


def load(settings: WriteSettings) -> tuple[Any, PreTrainedTokenizerBase]:
    """Model, on its device and ready to write, and tokenizer.

    Raises:
        UserError: A setting out of range; a checkpoint or tokenizer that cannot be read; a model that cannot write, or not as asked.
    """
    settings.validate()
    loaded = checkpoint.load(settings.checkpoint, tokenizer_path=settings.tokenizer_path)
    checkpoint.need_head(loaded, settings.checkpoint)
    tokenizer = checkpoint.need_tokenizer(loaded, settings.checkpoint)
    model: Any = loaded.model
    settings.sampling.arguments(model)
    return model.to(choose_device(settings.device)), tokenizer


def calibrated(settings: AnySettings, model: Any, tokenizer: PreTrainedTokenizerBase) -> AnySettings:
    """The settings with the threshold that a compute budget means on the calibration text; unchanged where no budget is set.

    What is found is told on stderr.

    Raises:
        UserError: A calibration file that cannot be read, or is too short; a budget that cannot be met.
    """
    if settings.compute_budget is None:
        return settings
    blocks = _calibration_blocks(settings.calibration_file or "", tokenizer).to(model.device)
    print("Finding the threshold on the calibration text ...", file=sys.stderr, flush=True)
    found = calibrate(model, blocks, settings.halt, settings.compute_budget, settings.H_cycles)
    print(found.render(), file=sys.stderr, flush=True)
    return replace(settings, halt_threshold=found.threshold, compute_budget=None, calibration_file=None)


def _calibration_blocks(file: str, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """`[blocks, tokens]`."""
    try:
        text = Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--calibration_file: {file} cannot be read as text ({error}); name a UTF-8 text file") from error
    ids = tokenizer(text[: _WINDOWS * _WINDOW_TOKENS * 16], verbose=False)["input_ids"]
    if len(ids) < 2:
        raise UserError(f"--calibration_file: {file} has {len(ids)} tokens; expected a text of some sentences")
    size = min(_WINDOW_TOKENS, len(ids))
    count = min(len(ids) // size, _WINDOWS)
    return torch.tensor(ids[: count * size]).view(count, size)


def generate_text(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | Sequence[int],
    sampling: Sampling | None = None,
    *,
    seed: int | None = None,
    on_text: Callable[[str], object] | None = None,
    should_stop: Callable[[], bool] | None = None,
    memory: Memory | None = None,
    ends: Sequence[int] = (),
) -> Generated:
    """Continue a prompt.

    Args:
        model: A recursive model, or any causal language model of transformers. Its training mode is put back afterwards.
        prompt: Text, or the token ids of it, which are taken as they are.
        sampling: None is the defaults of `Sampling`.
        seed: Makes the choice repeatable and leaves torch's global random state (cpu and cuda) alone; None draws from the global state.
        on_text: Called with each piece of text as soon as it is final; a character whose bytes span tokens comes whole. The pieces
            joined are `Generated.text`.
        should_stop: Asked after each token; True ends the text there.
        memory: Of the conversation of which the prompt is the whole so far. Greedy text is the same with and without; see `Memory`.
        ends: Tokens that end the text, beside those of the model and the tokenizer.

    Raises:
        UserError: Empty prompt, a value out of range, more tokens than the model has positions, a tokenizer of another model.
    """
    sampling = sampling or Sampling()
    sampling.check()
    sampling.arguments(model)
    if isinstance(prompt, str):
        ids = encode_prompt(model, tokenizer, prompt, sampling.max_new_tokens)
    else:
        ids, prompt = list(prompt), str(tokenizer.decode(list(prompt)))
        check_ids(model, ids, sampling.max_new_tokens)
    row = Row(tokenizer, ids, {*end_tokens(model, tokenizer), *ends}, sampling.stop, on_text)
    cache = None if memory is None else memory.recall(model, ids, sampling.settled(model))
    output = _write(model, tokenizer, [row], sampling, seed, should_stop, cache)
    if memory is not None:
        memory.keep(model, output.sequences[0].tolist(), sampling.settled(model), output.past_key_values)
    return _results(model, [prompt], [row], sampling, output)[0]


def generate_batch(
    model: Any, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], sampling: Sampling | None = None, *, seed: int | None = None
) -> list[Generated]:
    """Continue several prompts at a time, each as `generate_text` would: greedy, the texts are the same.

    Args:
        seed: As in `generate_text`. Drawn texts depend on which prompts are written together.

    Raises:
        UserError: As `generate_text`.
    """
    sampling = sampling or Sampling()
    sampling.check()
    sampling.arguments(model)
    ends = {*end_tokens(model, tokenizer)}
    rows = [Row(tokenizer, encode_prompt(model, tokenizer, prompt, sampling.max_new_tokens), ends, sampling.stop) for prompt in prompts]
    return _results(model, prompts, rows, sampling, _write(model, tokenizer, rows, sampling, seed)) if rows else []


def _write(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    sampling: Sampling,
    seed: int | None,
    should_stop: Callable[[], bool] | None = None,
    cache: Any = None,
) -> Any:
    """Fill the rows; returns what `generate` does. Prompts are padded on the left, so that all end in the same column."""
    ends = sorted(rows[0].ends)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (*ends, 0)[0]
    width = max(len(row.prompt_ids) for row in rows)
    missing = [width - len(row.prompt_ids) for row in rows]
    batch = torch.tensor([[pad] * gap + row.prompt_ids for gap, row in zip(missing, rows, strict=True)], device=model.device)
    mask = torch.tensor([[0] * gap + [1] * (width - gap) for gap in missing], device=model.device)
    criterion = Rows(rows, width, should_stop)
    config = sampling.as_transformers(ends, pad)
    for name, off in _WHERE_A_DONOR_HAS_IT.items():
        if getattr(model.generation_config, name, None) is not None:
            setattr(config, name, off)
    with evaluating(model), _seeded(seed, model.device):
        output = model.generate(
            batch,
            attention_mask=mask,
            generation_config=config,
            stopping_criteria=StoppingCriteriaList([criterion]),
            **({} if cache is None else {"past_key_values": cache}),
            **sampling.arguments(model),
        )
    criterion.close("length")
    return output


def _results(model: Any, prompts: Sequence[str], rows: Sequence[Row], sampling: Sampling, output: Any) -> list[Generated]:
    results = []
    width = max(len(row.prompt_ids) for row in rows)
    for index, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
        spent: dict[str, Any] = {}
        if sampling.halt != "none":
            # the token at t was ready when the one before it had been thought through
            used = output.past_key_values.cycles_used[:, width - 1 : width - 1 + len(row.token_ids)]
            # a batch goes on until its last row has halted
            spent = _spent_on(model, used[index].tolist(), used.max(dim=0).values.tolist(), sampling)
        if sampling.draft_cycles is not None:
            spent |= {"drafted": int(output.drafted) if index == 0 else 0, "accepted": int(output.accepted) if index == 0 else 0}
        results.append(Generated(prompt, row.text, row.prompt_ids, row.token_ids, row.finish or "length", **spent))
    return results


def _spent_on(model: Any, cycles: list[int], computed: list[int], sampling: Sampling) -> dict[str, Any]:
    of = sampling.cycles(model)
    plain = len(cycles) * model.config.depth(of)
    cost = sum(applications(model.config, computed, sampling.halt))
    return {"cycles": tuple(cycles), "of_cycles": of, "applications": cost, "plain_applications": plain}


def spent(*generated: Generated) -> str:
    """What halting or self-speculation did for these texts together, in a line; empty where neither was on."""
    cycles = [cycle for one in generated for cycle in one.cycles or ()]
    if cycles:
        cost, plain = (sum(getattr(one, name) or 0 for one in generated) for name in ("applications", "plain_applications"))
        saved = f"{1 - cost / plain:.0%} of layer applications saved"
        if cost > plain:  # with a coda, looking whether to halt costs more than a run that does not look
            saved = f"{cost / plain - 1:.0%} more layer applications than without halting"
        return f"halting: {sum(cycles) / len(cycles):.1f} of {generated[0].of_cycles} cycles per token, {saved}"
    drafted, accepted = (sum(getattr(one, name) or 0 for one in generated) for name in ("drafted", "accepted"))
    return f"self-speculation: {accepted} of {drafted} drafted tokens accepted ({accepted / drafted:.0%})" if drafted else ""


def encode_prompt(model: Any, tokenizer: PreTrainedTokenizerBase, prompt: str, max_new_tokens: int = 0) -> list[int]:
    """`prompt_ids` of a prompt that the model can continue.

    Raises:
        UserError: As `prompt_ids` and `check_ids`.
    """
    ids = prompt_ids(tokenizer, prompt)
    check_ids(model, ids, max_new_tokens)
    return ids


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Token ids of a prompt, with the leading special tokens that the tokenizer itself adds, and never an end token behind.

    Raises:
        UserError: Empty prompt, or no UTF-8.
    """
    _check_prompt(prompt)
    bare = tokenizer(prompt, add_special_tokens=False, verbose=False).input_ids
    ids = list(tokenizer(prompt, verbose=False).input_ids)
    while len(ids) > len(bare) and ids[-1] == tokenizer.eos_token_id and ids[-len(bare) :] != bare:
        ids.pop()
    if not bare:
        raise UserError(f"--prompt: the tokenizer makes no token of {prompt!r}; expected some text to continue")
    return ids


def check_ids(model: Any, ids: Sequence[int], max_new_tokens: int = 0) -> None:
    """Check that a model can read a prompt and write so many tokens after it.

    Raises:
        UserError: No ids, too many for the model, or ids that it does not have.
    """
    if not ids:
        raise UserError("--prompt: expected some tokens to continue, got none")
    vocabulary = model.get_input_embeddings().num_embeddings
    if max(ids) >= vocabulary:
        raise UserError(
            f"--tokenizer_path: the tokenizer gives token {max(ids)}, the model knows 0 to {vocabulary - 1}: they do not belong together; "
            "name the tokenizer that was saved with the checkpoint"
        )
    _check_length(len(ids), max_new_tokens, getattr(model.config, "max_position_embeddings", None))


def end_tokens(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token that ends a text: those of the model's generation config and the tokenizer's own. Chat models have several."""
    of_model = model.generation_config.eos_token_id
    found = [*(of_model if isinstance(of_model, list) else [of_model]), tokenizer.eos_token_id]
    return [int(token) for token in dict.fromkeys(found) if token is not None]


def write_once(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    settings: WriteSettings,
    out: TextIO,
    err: TextIO | None = None,
    **kwargs: Any,
) -> Generated:
    """Write prompt and continuation to `out` as the text comes, then the table of cycles where it is asked for.

    Args:
        err: Gets a line on what halting or self-speculation did; None is stderr.
        kwargs: As in `generate_text`: seed, should_stop.
    """

    def show(text: str) -> None:
        out.write(text)
        out.flush()

    # what is wrong is told before any text comes
    settings.sampling.arguments(model)
    encode_prompt(model, tokenizer, prompt, settings.max_new_tokens)
    show(prompt)
    try:
        generated = generate_text(model, tokenizer, prompt, settings.sampling, on_text=show, **kwargs)
    finally:
        show("\n")
    tell_after(model, tokenizer, generated, settings, out, err)
    return generated


def tell_after(
    model: Any, tokenizer: PreTrainedTokenizerBase, generated: Generated, settings: WriteSettings, out: TextIO, err: TextIO | None = None
) -> None:
    """What follows a text: a line on what it cost to `err`, and, unless it was interrupted, the table of cycles to `out` if asked for."""
    if line := spent(generated):
        print(line, file=err or sys.stderr, flush=True)
    if settings.show_recursive_steps and generated.finish_reason != "interrupted":
        from .cycle_table import show_steps  # here: nothing else of this file needs rich

        ids = generated.prompt_ids + generated.token_ids
        show_steps(model, tokenizer, ids, len(generated.prompt_ids), settings.sampling, out)


def forgiving(stream: TextIO) -> TextIO:
    """The stream, told to put ? for what its encoding cannot say: a terminal without emoji must not end the text."""
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="replace")
    return stream


def _check_prompt(prompt: str) -> None:
    if not prompt.strip():
        raise UserError(f"--prompt is empty: expected some text to continue, got {prompt!r}; leave --prompt out for the interactive mode")
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"--prompt: expected UTF-8 text, got {prompt!r}, which has a stray byte at position {error.start}") from error


def _check_length(prompt: int, new: int, positions: int | None) -> None:
    if positions is None or prompt + new <= positions:
        return
    room = positions - prompt
    cure = f"use --max_new_tokens {room} or less" if room > 0 else f"shorten the prompt to {positions - 1} tokens or less"
    raise UserError(
        f"--max_new_tokens: the prompt has {prompt} tokens and {new} more are asked for, {prompt + new} in all, but the model has "
        f"{positions} positions; {cure}"
    )


@contextmanager
def _seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
