"""Writing text with a model, and looking inside while it writes.

    generate_text     a prompt continued, with the KV cache, handed on piece by piece as it is written
    recursive_steps   what every cycle would have written in place of each token
    render_steps      the same as a table for a terminal

Works for recursive models and, for comparison, for plain ones of transformers. Probabilities are those of the model itself, before
temperature, top_p and top_k. Shape letters: T tokens, D hidden size, V vocabulary. Floor 2.
"""

from __future__ import annotations

import io
import math
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, Literal, TextIO

import torch
from rich.cells import cell_len, set_cell_size
from transformers import GenerationConfig, PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from . import checkpoint
from .device import check_seed, choose_device
from .errors import UserError

# Below this a distribution is its largest entry anyway, and logits divided by less are no longer finite.
_GREEDY_BELOW = 1e-5
_UNFINISHED = "\ufffd"  # what a decoder puts for bytes that are no whole character
# Of the table of cycles, roomiest first: terminal cells at which a token is cut, and whether ranks are shown.
_LAYOUTS = ((16, True), (10, True), (10, False))


@dataclass(kw_only=True)
class GenerateSettings:
    """Write text with a recursive model: one prompt, or one after the other."""

    checkpoint: str
    """A .pt file with its _tokenizer folder beside it, or a folder in Hugging Face layout."""
    prompt: str | None = None
    """Text to continue. Without it: interactive, one prompt after the other."""
    max_new_tokens: int = 100
    """Write at most so many tokens; an end token ends the text earlier."""
    temperature: float = 0.8
    """Randomness of the choice; 0 always takes the likeliest token (greedy)."""
    top_p: float = 1.0
    """Choose among the likeliest tokens that together have this probability; 1.0 is off."""
    top_k: int = 0
    """Choose among this many likeliest tokens; 0 is off."""
    tokenizer_path: str | None = None
    """Folder or hub id of the tokenizer. Default: the one saved with the checkpoint."""
    H_cycles: int | None = None
    """Cycles per token; 0 is one plain pass. Default: the checkpoint's."""
    show_recursive_steps: bool = False
    """After the text, show for each token what every cycle would have said."""
    seed: int | None = None
    """Makes sampling repeatable."""
    device: str | None = None
    """cpu, cuda, cuda:1, mps. Default: cuda where there is one, else mps, else cpu."""

    def validate(self) -> None:
        """Check all that can be checked without the model.

        Raises:
            UserError: A value out of range.
        """
        if self.prompt is not None:
            _check_prompt(self.prompt)
        self.sampling.check()
        check_seed(self.seed)
        choose_device(self.device)

    @property
    def sampling(self) -> Sampling:
        """Those of the flags that shape the text."""
        return Sampling(**{field.name: getattr(self, field.name) for field in fields(Sampling)})


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen, and from which depth. The fields are the flags of the same name."""

    max_new_tokens: int = 100
    temperature: float = 0.8
    top_p: float = 1.0
    top_k: int = 0
    H_cycles: int | None = None

    def check(self) -> None:
        """Raises UserError for a value out of range."""
        if self.max_new_tokens < 1:
            raise UserError(f"--max_new_tokens: expected at least 1, got {self.max_new_tokens}")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UserError(f"--temperature: expected a number of at least 0 (0 is greedy), got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top_p: expected a number above 0 and at most 1 (1 is off), got {self.top_p}")
        if self.top_k < 0:
            raise UserError(f"--top_k: expected at least 0 (0 is off), got {self.top_k}")
        if self.H_cycles is not None and self.H_cycles < 0:
            raise UserError(f"--H_cycles: expected at least 0 (0 is one plain pass), got {self.H_cycles}")

    def as_transformers(self, ends: list[int], pad: int) -> GenerationConfig:
        """The same in transformers' words. A penalty or a `top_k` that a donor's generation_config.json sets is switched off."""
        greedy = self.temperature < _GREEDY_BELOW
        choice = {} if greedy else {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        return GenerationConfig(
            max_new_tokens=self.max_new_tokens,
            do_sample=not greedy,
            num_beams=1,
            repetition_penalty=1.0,
            use_cache=True,
            eos_token_id=ends or None,
            pad_token_id=pad,
            **choice,
        )


@dataclass(frozen=True)
class Generated:
    """One continued prompt.

    Args:
        text: The continuation alone; `prompt + text` is the whole.
        prompt_ids, token_ids: Tokens read and tokens written; the last one written may be an end token, which has no text.
        finish_reason: `stop` at an end token, `length` at max_new_tokens, `interrupted` when the caller said so.
    """

    prompt: str
    text: str
    prompt_ids: list[int]
    token_ids: list[int]
    finish_reason: Literal["stop", "length", "interrupted"]


def run(settings: GenerateSettings) -> None:
    """Continue `settings.prompt` on stdout.

    Raises:
        UserError: No prompt or a setting out of range; a checkpoint or tokenizer that cannot be read.
    """
    if settings.prompt is None:
        raise UserError("--prompt: expected some text to continue, got none")
    model, tokenizer = load(settings)
    write_once(model, tokenizer, settings.prompt, settings, forgiving(sys.stdout), seed=settings.seed)


def load(settings: GenerateSettings) -> tuple[Any, PreTrainedTokenizerBase]:
    """Model, on its device and ready to write, and tokenizer.

    Raises:
        UserError: A setting out of range; a checkpoint or tokenizer that cannot be read; a model that cannot write.
    """
    settings.validate()
    loaded = checkpoint.load(settings.checkpoint, tokenizer_path=settings.tokenizer_path)
    checkpoint.need_head(loaded, settings.checkpoint)
    tokenizer = checkpoint.need_tokenizer(loaded, settings.checkpoint)
    model: Any = loaded.model
    return model.to(choose_device(settings.device)), tokenizer


def generate_text(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    sampling: Sampling | None = None,
    *,
    seed: int | None = None,
    on_text: Callable[[str], object] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> Generated:
    """Continue a prompt.

    Args:
        model: A recursive model, or any causal language model of transformers. Its training mode is put back afterwards.
        sampling: None is the defaults of `Sampling`.
        seed: Makes the choice repeatable and leaves torch's global random state (cpu and cuda) alone; None draws from the global state.
        on_text: Called with each piece of text as soon as it is final; a character whose bytes span tokens comes whole. The pieces
            joined are `Generated.text`.
        should_stop: Asked after each token; True ends the text there.

    Raises:
        UserError: Empty prompt, a value out of range, more tokens than the model has positions, a tokenizer of another model.
    """
    sampling = sampling or Sampling()
    sampling.check()
    depth = _depth(model, sampling.H_cycles)
    ends = end_tokens(model, tokenizer)
    ids = encode_prompt(model, tokenizer, prompt, sampling.max_new_tokens)
    pieces: list[str] = []
    asked = _Asked(should_stop)

    def hand_on(piece: str) -> None:
        pieces.append(piece)
        if on_text is not None:
            on_text(piece)

    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (*ends, 0)[0]
    batch = torch.tensor([ids], device=model.device)
    with _evaluating(model), _seeded(seed, model.device):
        output = model.generate(
            batch,
            attention_mask=torch.ones_like(batch),
            generation_config=sampling.as_transformers(ends, pad),
            streamer=TextPieces(tokenizer, hand_on),
            stopping_criteria=StoppingCriteriaList([asked]),
            **depth,
        )
    token_ids = output[0, len(ids) :].tolist()
    finish: Literal["stop", "length", "interrupted"] = "stop" if token_ids[-1] in ends else "interrupted" if asked.answer else "length"
    return Generated(prompt, "".join(pieces), ids, token_ids, finish)


def encode_prompt(model: Any, tokenizer: PreTrainedTokenizerBase, prompt: str, max_new_tokens: int = 0) -> list[int]:
    """Token ids of a prompt, with the leading special tokens that the tokenizer itself adds, and never an end token behind.

    Raises:
        UserError: Empty prompt, too long for the model, or ids that the model does not have.
    """
    _check_prompt(prompt)
    bare = tokenizer(prompt, add_special_tokens=False, verbose=False).input_ids
    ids = tokenizer(prompt, verbose=False).input_ids
    while len(ids) > len(bare) and ids[-1] == tokenizer.eos_token_id and ids[-len(bare) :] != bare:
        ids.pop()
    if not bare:
        raise UserError(f"--prompt: the tokenizer makes no token of {prompt!r}; expected some text to continue")
    vocabulary = model.get_input_embeddings().num_embeddings
    if max(ids) >= vocabulary:
        raise UserError(
            f"--tokenizer_path: the tokenizer gives token {max(ids)}, the model knows 0 to {vocabulary - 1}: they do not belong together; "
            "name the tokenizer that was saved with the checkpoint"
        )
    _check_length(len(ids), max_new_tokens, getattr(model.config, "max_position_embeddings", None))
    return ids


def end_tokens(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token that ends a text: those of the model's generation config and the tokenizer's own. Chat models have several."""
    of_model = model.generation_config.eos_token_id
    found = [*(of_model if isinstance(of_model, list) else [of_model]), tokenizer.eos_token_id]
    return [int(token) for token in dict.fromkeys(found) if token is not None]


class TextPieces(BaseStreamer):
    """Hands on text while `generate` writes it; every piece is final, and joined they are the whole text.

    transformers' own streamer waits for a space before it shows a word. This one waits only for the rest of a character. It decodes a
    window that starts at the last whole character but one: decoders look at the token before (SentencePiece drops a leading space), and
    a window keeps the work per token constant.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, on_text: Callable[[str], object]):
        self.tokenizer, self.on_text = tokenizer, on_text
        self.window: list[int] = []
        self.done = 0  # tokens of the window whose text is out
        self.prompt_comes = True

    def put(self, value: torch.Tensor) -> None:
        self.window += value.flatten().tolist()
        if self.prompt_comes:  # `generate` puts the prompt first
            self.prompt_comes, self.done = False, len(self.window)
        else:
            self._hand_on(last=False)

    def end(self) -> None:
        self._hand_on(last=True)

    def _hand_on(self, last: bool) -> None:
        text = self._decode(self.window)
        if text.endswith(_UNFINISHED) and not last:
            return
        piece = text[len(self._decode(self.window[: self.done])) :]
        self.window, self.done = self.window[self.done :], len(self.window) - self.done
        if piece:
            self.on_text(piece)

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


@dataclass(frozen=True)
class CycleGuess:
    """What one cycle would have said in place of one token.

    Args:
        cycle: Counted from 1; 0 is the plain pass of `H_cycles = 0`.
        token, probability: The cycle's likeliest token.
        written_rank, written_probability: Where the token that was written stands for this cycle; rank 1 is the likeliest.
    """

    cycle: int
    token: int
    probability: float
    written_rank: int
    written_probability: float


@dataclass(frozen=True)
class TokenSteps:
    """One written token, and every cycle's own idea of it, earliest first."""

    token: int
    cycles: tuple[CycleGuess, ...]


@torch.no_grad()
def recursive_steps(model: Any, ids: Sequence[int], prompt_length: int, H_cycles: int | None = None, chunk: int = 64) -> list[TokenSteps]:
    """What every cycle would have said for each token of `ids` after the prompt.

    One pass without a cache over the whole text, so cycle c is exactly a run at `H_cycles = c`, given the same text before.

    Args:
        prompt_length: How many of `ids` were read and not written; at least 1.
        H_cycles: Depth to look at; None is the model's own.
        chunk: Positions whose logits, `[chunk, V]`, are held at a time.

    Raises:
        UserError: Not a recursive model.
    """
    if not is_recursive(model):
        raise UserError(f"--show_recursive_steps: expected a recursive model, got a {type(model).__name__}, which has no cycles")
    if prompt_length < 1:
        raise ValueError(f"prompt_length: expected at least 1 (nothing stands before the first token), got {prompt_length}")
    batch = torch.tensor([list(ids)], device=model.device)
    written = batch[0, prompt_length:]
    with _evaluating(model):
        base = model.model(batch, use_cache=False, output_cycle_states=True, **_depth(model, H_cycles))
    plain = len(base.halt_logits) == 0
    guesses: list[list[CycleGuess]] = [[] for _ in written]
    for cycle, state in enumerate(base.cycle_states, start=0 if plain else 1):
        before = state[0, prompt_length - 1 : -1]  # the state at t speaks of token t + 1
        for first in range(0, len(written), chunk):
            rows = _guesses(model.lm_head(before[first : first + chunk]).float(), written[first : first + chunk])
            for position, row in enumerate(rows, start=first):
                guesses[position].append(CycleGuess(cycle, *row))
    return [TokenSteps(token, tuple(of_token)) for token, of_token in zip(written.tolist(), guesses, strict=True)]


def _guesses(logits: torch.Tensor, written: torch.Tensor) -> list[tuple[int, float, int, float]]:
    """Per row of `[T, V]` logits: likeliest token, its probability, rank and probability of the written one `[T]`."""
    log_total = logits.logsumexp(dim=-1)
    top, token = logits.max(dim=-1)
    own = logits.gather(-1, written.unsqueeze(-1)).squeeze(-1)
    # the written token is counted as the first of its equals, except behind the very token that is shown as the top
    rank = 1 + (logits > own.unsqueeze(-1)).sum(dim=-1) + ((own == top) & (token != written)).long()
    columns = (token, (top - log_total).exp(), rank, (own - log_total).exp())
    return list(zip(*(column.tolist() for column in columns), strict=True))


def render_steps(steps: Sequence[TokenSteps], tokenizer: PreTrainedTokenizerBase, width: int | None = None, color: bool = False) -> str:
    """A table for a terminal: one row per written token, one column per cycle.

    Args:
        width: Cells of the terminal; None is without end. Where the table is too wide, long tokens are cut first, then ranks are left out,
            and then the cycles go on below.
        color: Use ANSI colours.
    """
    if not steps:
        return ""
    for cells, ranks in _LAYOUTS:
        columns = [_token_column(steps, tokenizer, cells)]
        columns += [_cycle_column([step.cycles[index] for step in steps], tokenizer, cells, ranks) for index in range(len(steps[0].cycles))]
        blocks = _side_by_side(columns, width)
        if len(blocks) == 1:
            break
    lines = []
    for block in blocks:
        lines += ["  ".join(row).rstrip() for row in zip(*block, strict=True)]
        lines.append("")
    lines.append("✓  this cycle's likeliest token is the one written")
    if ranks:
        lines.append("#  otherwise: rank and probability of the one written")
    return "\n".join(_painted(line) for line in lines) if color else "\n".join(lines)


def _side_by_side(columns: list[list[str]], width: int | None) -> list[list[list[str]]]:
    """As many columns beside each other as there is room for, the first one repeated in every block."""
    stub, *others = columns
    blocks: list[list[list[str]]] = []
    room = 0
    for column in others:
        cells = cell_len(column[0]) + 2
        if not blocks or (width is not None and room < cells):
            blocks.append([stub])
            room = (width or 0) - cell_len(stub[0])
        blocks[-1].append(column)
        room -= cells
    return blocks


def _token_column(steps: Sequence[TokenSteps], tokenizer: PreTrainedTokenizerBase, cells: int) -> list[str]:
    digits = len(str(len(steps)))
    rows = [f"{number:>{digits}}  {visible(tokenizer, step.token, cells)}" for number, step in enumerate(steps, start=1)]
    return _column("token", rows, "agree")


def _cycle_column(guesses: list[CycleGuess], tokenizer: PreTrainedTokenizerBase, cells: int, ranks: bool) -> list[str]:
    tokens = [visible(tokenizer, guess.token, cells) for guess in guesses]
    widest = max(cell_len(token) for token in tokens)
    rows = []
    for guess, token in zip(guesses, tokens, strict=True):
        agrees = guess.written_rank == 1
        own = f"{'✓' if agrees else ' '} {set_cell_size(token, widest)} {_percent(guess.probability)}"
        rows.append(own if agrees or not ranks else f"{own}  #{guess.written_rank} {_percent(guess.written_probability).strip()}")
    agreed = sum(guess.written_rank == 1 for guess in guesses)
    title = f"cycle {guesses[0].cycle}" if guesses[0].cycle else "plain pass"
    return _column(f"  {title}", rows, f"  {agreed} of {len(guesses)}")


def _column(title: str, rows: list[str], foot: str) -> list[str]:
    """Title, rows and foot, padded to one width."""
    widest = max(cell_len(row) for row in (title, *rows, foot))
    return [set_cell_size(row, widest) for row in (title, *rows, foot)]


def visible(tokenizer: PreTrainedTokenizerBase, token: int, cells: int = 16) -> str:
    """A token as a word of at most so many terminal cells: white space as signs, bytes that are no whole character in hexadecimal."""
    text = str(tokenizer.decode([token], clean_up_tokenization_spaces=False))
    name = tokenizer.convert_ids_to_tokens(token)
    if not text or _UNFINISHED in text:
        text = f"<{token}>" if name is None else _hexadecimal(str(name))
    elif str(name).startswith("▁") and not text.startswith(" "):  # SentencePiece's space, which its decoder drops at a start
        text = f" {text}"
    for sign, shown in ((" ", "␣"), ("\n", "↵"), ("\t", "⇥"), ("\r", "␍")):
        text = text.replace(sign, shown)
    text = "".join(sign if sign.isprintable() else f"\\u{ord(sign):04x}" for sign in text)
    return text if cell_len(text) <= cells else f"{set_cell_size(text, cells - 1).rstrip()}…"


def _hexadecimal(name: str) -> str:
    """Bytes of a byte-level BPE token, whose name has one letter per byte: printable bytes stand for themselves, others follow U+0100."""
    themselves = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in themselves]
    byte_of = {chr(byte): byte for byte in themselves} | {chr(0x100 + i): byte for i, byte in enumerate(others)}
    if not all(letter in byte_of for letter in name) or name.startswith("<"):
        return name
    return "".join(f"\\x{byte_of[letter]:02x}" if byte_of[letter] > 0x7E else letter for letter in name)


def _percent(probability: float) -> str:
    return " <1%" if probability < 0.005 else f"{probability:4.0%}"


def _painted(line: str) -> str:
    return line.replace("✓", "\x1b[32m✓\x1b[0m")


def write_once(
    model: Any, tokenizer: PreTrainedTokenizerBase, prompt: str, settings: GenerateSettings, out: TextIO, **kwargs: Any
) -> Generated:
    """Write prompt and continuation to `out` as the text comes, then the table of cycles where it is asked for.

    Args:
        kwargs: As in `generate_text`: seed, should_stop.
    """

    def show(text: str) -> None:
        out.write(text)
        out.flush()

    # what is wrong is told before any text comes
    _depth(model, settings.H_cycles)
    encode_prompt(model, tokenizer, prompt, settings.max_new_tokens)
    show(prompt)
    try:
        generated = generate_text(model, tokenizer, prompt, settings.sampling, on_text=show, **kwargs)
    finally:
        show("\n")
    if settings.show_recursive_steps and generated.finish_reason != "interrupted":
        ids = generated.prompt_ids + generated.token_ids
        steps = recursive_steps(model, ids, len(generated.prompt_ids), settings.H_cycles)
        terminal = out.isatty()
        width = shutil.get_terminal_size().columns if terminal else None
        color = terminal and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
        show(f"\n{render_steps(steps, tokenizer, width, color)}\n")
    return generated


def forgiving(stream: TextIO) -> TextIO:
    """The stream, told to put ? for what its encoding cannot say: a terminal without emoji must not end the text."""
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="replace")
    return stream


class _Asked(StoppingCriteria):
    """Ends the text when the caller says so."""

    def __init__(self, should_stop: Callable[[], bool] | None):
        self.should_stop, self.answer = should_stop, False

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.BoolTensor:
        self.answer = self.answer or (self.should_stop is not None and self.should_stop())
        return torch.full((len(input_ids),), self.answer, device=input_ids.device)  # type: ignore[return-value]


def is_recursive(model: Any) -> bool:
    """Whether the model has cycles; false for a plain model of transformers."""
    return hasattr(model.config, "H_cycles")


def _depth(model: Any, H_cycles: int | None) -> dict[str, int]:
    if H_cycles is None:
        return {}
    if not is_recursive(model):
        raise UserError(f"--H_cycles: expected a recursive model, got a {type(model).__name__}, which has no cycles; leave --H_cycles out")
    return {"H_cycles": H_cycles}


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
def _evaluating(model: Any) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@contextmanager
def _seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
