"""The prediction of every cycle for each token, and exit cycles: as values, and as a table for a terminal.

Probabilities are those of the model itself, before temperature, top_p and top_k. Shape letters: T tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TextIO

import torch
from rich.cells import cell_len, set_cell_size
from transformers import PreTrainedTokenizerBase

from ..errors import UserError
from ..utils.models import evaluating, is_recursive
from .options import DecodingOptions, Halt
from .streaming import UNFINISHED

# Layouts from wide to narrow: terminal cells at which a token is cut, and whether ranks are shown.
_LAYOUTS = ((16, True), (10, True), (10, False))


@dataclass(frozen=True)
class CycleGuess:
    """The prediction of one cycle for one token.

    Args:
        cycle: Counted from 1; 0 is the plain pass of `H_cycles = 0`.
        token, probability: The cycle's most likely token.
        token_rank, token_probability: Rank (1 is the most likely) and probability of the token that was generated.
    """

    cycle: int
    token: int
    probability: float
    token_rank: int
    token_probability: float


@dataclass(frozen=True)
class TokenSteps:
    """A generated token and the prediction of every cycle, earliest first.

    Args:
        cycles: The cycles that were computed: none after `halted`.
        halted: The cycle of early exit, if before the last; else None.
    """

    token: int
    cycles: tuple[CycleGuess, ...]
    halted: int | None = None


@torch.no_grad()
def recursive_steps(
    model: Any,
    ids: Sequence[int],
    prompt_length: int,
    H_cycles: int | None = None,
    chunk: int = 64,
    halt: Halt = "none",
    halt_threshold: float | None = None,
) -> list[TokenSteps]:
    """The prediction of every cycle for each token of `ids` after the prompt.

    One forward pass over the whole text without a cache, so cycle c is exactly a run at `H_cycles = c` with the same prefix; with halting,
    tokens exit at the same cycles as during generation.

    Args:
        prompt_length: Number of prompt tokens in `ids`; at least 1.
        H_cycles: Depth; None is the model's own.
        chunk: Number of positions whose logits, `[chunk, V]`, are in memory at a time.
        halt, halt_threshold: As in the run that generated the text; cycles after the exit of a token are omitted.

    Raises:
        UserError: Not a recursive model, or a halting criterion that it does not support.
    """
    if not is_recursive(model):
        raise UserError(f"--show_recursive_steps: expected a recursive model, got a {type(model).__name__}, which has no cycles")
    if prompt_length < 1:
        raise ValueError(f"prompt_length: expected at least 1 (nothing stands before the first token), got {prompt_length}")
    options = DecodingOptions(H_cycles=H_cycles, halt=halt, halt_threshold=halt_threshold)
    batch = torch.tensor([list(ids)], device=model.device)
    written = batch[0, prompt_length:]
    if not len(written):
        return []
    options.generate_kwargs(model)  # for what it refuses
    deepest, rule = options.cycles(model), options.rule(model)
    with evaluating(model):
        base = model.model(batch, H_cycles=deepest, use_cache=False, output_cycle_states=True, halt_rule=rule)
    # the state at t predicts token t + 1
    ready = [deepest] * len(written) if rule is None else base.halt_cycles[0, prompt_length - 1 : -1].tolist()
    guesses: list[list[CycleGuess]] = [[] for _ in written]
    for cycle, state in enumerate(base.cycle_states, start=min(1, deepest)):
        before = state[0, prompt_length - 1 : -1]
        for first in range(0, len(written), chunk):
            rows = _guesses(model.lm_head(before[first : first + chunk]), written[first : first + chunk])
            for position, row in enumerate(rows, start=first):
                if cycle <= max(1, ready[position]):  # a token that exits before the first cycle keeps its readout in all of them
                    guesses[position].append(CycleGuess(min(cycle, ready[position]), *row))
    halted = [at if at < deepest else None for at in ready]
    return [TokenSteps(*step) for step in zip(written.tolist(), map(tuple, guesses), halted, strict=True)]


def _guesses(logits: torch.Tensor, written: torch.Tensor) -> list[tuple[int, float, int, float]]:
    """Per row of `[T, V]` logits: most likely token, its probability, rank and probability of the generated token, each `[T]`."""
    logits = logits.float()
    log_total = logits.logsumexp(dim=-1)
    top, token = logits.max(dim=-1)
    own = logits.gather(-1, written.unsqueeze(-1)).squeeze(-1)
    # on ties the generated token ranks first, except behind the token shown as the most likely
    rank = 1 + (logits > own.unsqueeze(-1)).sum(dim=-1) + ((own == top) & (token != written)).long()
    columns = (token, (top - log_total).exp(), rank, (own - log_total).exp())
    return list(zip(*(column.tolist() for column in columns), strict=True))


def render_steps(steps: Sequence[TokenSteps], tokenizer: PreTrainedTokenizerBase, width: int | None = None, color: bool = False) -> str:
    """A table for a terminal: one row per generated token, one column per cycle.

    Args:
        width: Cells of the terminal; None is unlimited. If the table is too wide, first long tokens are cut, then ranks are left out,
            and then the cycles continue in a block below.
        color: Use ANSI colours.
    """
    if not steps:
        return ""
    deepest = max(len(step.cycles) for step in steps)
    for cells, ranks in _LAYOUTS:
        columns = [_token_column(steps, tokenizer, cells)]
        columns += [_cycle_column(steps, index, tokenizer, cells, ranks) for index in range(deepest)]
        blocks = _side_by_side(columns, width)
        if len(blocks) == 1:
            break
    lines = []
    for block in blocks:
        lines += ["  ".join(row).rstrip() for row in zip(*block, strict=True)]
        lines.append("")
    lines.append("✓  the top-1 prediction of this cycle is the generated token")
    if ranks:
        lines.append("#  otherwise: rank and probability of the one written")
    if any(step.halted is not None for step in steps):
        lines.append("■  the token halted here; · is a cycle that was not computed for it")
    return "\n".join(_colored(line) for line in lines) if color else "\n".join(lines)


def show_steps(
    model: Any, tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], prompt_length: int, options: DecodingOptions, out: TextIO
) -> None:
    """Write the table of a text to `out`: as wide as the terminal, in colour if it supports colour."""
    steps = recursive_steps(model, ids, prompt_length, options.H_cycles, halt=options.halt, halt_threshold=options.halt_threshold)
    terminal = out.isatty()
    width = shutil.get_terminal_size().columns if terminal else None
    color = terminal and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    out.write(f"\n{render_steps(steps, tokenizer, width, color)}\n")
    out.flush()


def _side_by_side(columns: list[list[str]], width: int | None) -> list[list[list[str]]]:
    """Lay columns side by side in blocks of the given width, repeating the first column in every block."""
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


def _cycle_column(steps: Sequence[TokenSteps], index: int, tokenizer: PreTrainedTokenizerBase, cells: int, ranks: bool) -> list[str]:
    """The column of the cycle at `index`."""
    computed = [step.cycles[index] for step in steps if index < len(step.cycles)]
    widest = max(cell_len(visible(tokenizer, guess.token, cells)) for guess in computed)
    stops = any(step.halted is not None for step in steps)  # room for the early-exit mark, in every column alike
    rows = []
    for step in steps:
        if index >= len(step.cycles):
            rows.append("  ·")
            continue
        guess, halts = step.cycles[index], step.halted is not None and index == len(step.cycles) - 1
        agrees = guess.token_rank == 1
        own = f"{'✓' if agrees else ' '} {set_cell_size(visible(tokenizer, guess.token, cells), widest)} {_percent(guess.probability)}"
        own += (" ■" if halts else "  ") if stops else ""
        rows.append(own if agrees or not ranks else f"{own}  #{guess.token_rank} {_percent(guess.token_probability).strip()}")
    agreed = sum(guess.token_rank == 1 for guess in computed)
    cycle = max(guess.cycle for guess in computed)
    title = f"cycle {cycle}" if cycle else "plain pass"
    return _column(f"  {title}", rows, f"  {agreed} of {len(computed)}")


def _column(title: str, rows: list[str], foot: str) -> list[str]:
    """Title, rows and foot, padded to one width."""
    widest = max(cell_len(row) for row in (title, *rows, foot))
    return [set_cell_size(row, widest) for row in (title, *rows, foot)]


def visible(tokenizer: PreTrainedTokenizerBase, token: int, cells: int = 16) -> str:
    """A token in at most `cells` terminal cells: white space as symbols, incomplete UTF-8 in hexadecimal."""
    text = str(tokenizer.decode([token], clean_up_tokenization_spaces=False))
    name = tokenizer.convert_ids_to_tokens(token)
    if not text or UNFINISHED in text:
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


def _colored(line: str) -> str:
    return line.replace("✓", "\x1b[32m✓\x1b[0m").replace("■", "\x1b[33m■\x1b[0m")
