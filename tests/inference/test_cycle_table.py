"""Predictions of every cycle: equal to runs at each depth, and a table that fits a terminal."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.cells import cell_len
from transformers import PreTrainedTokenizerFast

from recursify.conversion.convert import convert
from recursify.errors import UserError
from recursify.inference.cycle_table import CycleGuess, TokenSteps, _guesses, recursive_steps, render_steps, visible
from recursify.inference.generation import generate_text
from recursify.inference.options import Sampling
from recursify.inference.session import write_once
from recursify.inference.settings import GenerateSettings
from tests.support.tiny import END_OF_TEXT, make_tiny_tokenizer, tiny_model
from tests.support.tokenizers import sentencepiece_like

GREEDY = Sampling(temperature=0, max_new_tokens=8)


def seeded(donor_folder: Path, **shape: int) -> Any:
    """Always the same model: where tokens halt depends on its random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return convert(str(donor_folder), L_layers=2, H_cycles=3, L_cycles=1, prelude_layers=1, gain=0.3, **shape)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tiny_tokenizer()


@pytest.fixture(scope="module")
def model(donor_folder: Path) -> Any:
    """Prelude, loop and coda, and gains that make the cycles differ."""
    return seeded(donor_folder, coda_layers=1)


@pytest.fixture(scope="module")
def donor() -> Any:
    return tiny_model("qwen2", num_hidden_layers=2)


@pytest.mark.parametrize("chunk", [1, 5, 64])
def test_cycle_predictions_equal_runs_at_each_depth(model: Any, tokenizer: Any, chunk: int) -> None:
    got = generate_text(model, tokenizer, "The old lobster", Sampling(temperature=1.0, max_new_tokens=9), seed=1)
    ids, start = got.prompt_ids + got.token_ids, len(got.prompt_ids)
    steps = recursive_steps(model, ids, start, H_cycles=4, chunk=chunk)
    assert [step.token for step in steps] == got.token_ids
    differ = set()
    for cycle in range(1, 5):
        with torch.no_grad():
            logits = model(torch.tensor([ids]), H_cycles=cycle, use_cache=False).logits[0, start - 1 : -1]
        for position, step in enumerate(steps):
            guess, probabilities = step.cycles[cycle - 1], logits[position].softmax(dim=-1)
            written = probabilities[step.token]
            assert guess.cycle == cycle
            assert guess.token == int(logits[position].argmax())
            assert guess.probability == pytest.approx(float(probabilities.max()), abs=1e-6)
            assert guess.token_probability == pytest.approx(float(written), abs=1e-6)
            assert guess.token_rank == 1 + int((probabilities > written).sum())
            differ.add((position, guess.token))
    assert len(differ) > len(steps)  # cycles disagree, or this test is vacuous


def test_last_cycle_prediction_is_the_greedy_token(model: Any, tokenizer: Any) -> None:
    got = generate_text(model, tokenizer, "The", GREEDY)
    steps = recursive_steps(model, got.prompt_ids + got.token_ids, len(got.prompt_ids))
    assert len(steps[0].cycles) == model.config.H_cycles
    assert all(step.cycles[-1].token == step.token and step.cycles[-1].token_rank == 1 for step in steps)


def test_steps_of_a_plain_pass(model: Any, tokenizer: Any) -> None:
    steps = recursive_steps(model, [1, 2, 3, 4], 2, H_cycles=0)
    assert [[guess.cycle for guess in step.cycles] for step in steps] == [[0], [0]]
    assert "plain pass" in render_steps(steps, tokenizer)


def test_steps_need_cycles_and_a_token_before(model: Any, donor: Any) -> None:
    with pytest.raises(UserError, match="--show_recursive_steps: expected a recursive model, got a Qwen2ForCausalLM"):
        recursive_steps(donor, [1, 2], 1)
    with pytest.raises(ValueError, match="prompt_length: expected at least 1"):
        recursive_steps(model, [1, 2], 0)


def test_ranks_of_tied_tokens() -> None:
    logits = torch.tensor([[2.0, 2.0, 1.0, 1.0, 0.0]]).repeat(5, 1)
    found = _guesses(logits, torch.arange(5))
    assert [token for token, *_ in found] == [0] * 5
    assert [rank for _, _, rank, _ in found] == [1, 2, 3, 3, 5]
    p = logits[0].softmax(-1)
    assert [probability for *_, probability in found] == pytest.approx(p.tolist())
    assert [probability for _, probability, _, _ in found] == pytest.approx([p[0].item()] * 5)


def test_recursive_steps_has_no_side_effects_and_accepts_an_empty_completion(model: Any) -> None:
    model.train()
    try:
        assert len(recursive_steps(model, [1, 2, 3], 1)) == 2 and recursive_steps(model, [1, 2, 3], 3) == []
        assert model.training
    finally:
        model.eval()


def test_steps_of_a_run_that_q_head_halts(donor_folder: Path) -> None:
    model, ids = seeded(donor_folder, coda_layers=1), list(range(1, 16))
    head = model.base_model.recursion.q_head
    with torch.no_grad():
        head.bias.fill_(1e-3)
        early = model(torch.tensor([ids]), use_cache=False, output_cycle_logits=True).halt_logits[0][0, 4:-1].sigmoid()
    threshold = early.unique().quantile(0.45).item()
    steps = recursive_steps(model, ids, 5, halt="q_head", halt_threshold=threshold)
    with torch.no_grad():
        used = model(torch.tensor([ids]), use_cache=False, halt="q_head", halt_threshold=threshold).halt_cycles[0, 4:-1].tolist()
    assert len(set(used)) > 1 and [len(step.cycles) for step in steps] == used
    assert [step.halted for step in steps] == [cycle if cycle < 3 else None for cycle in used]


def two_steps(tokenizer: Any) -> list[TokenSteps]:
    space_the, castle, line = (tokenizer(text).input_ids[0] for text in (" the", " castle", "\n"))
    return [
        TokenSteps(space_the, (CycleGuess(1, castle, 0.41, 3, 0.12), CycleGuess(2, space_the, 0.996, 1, 0.996))),
        TokenSteps(line, (CycleGuess(1, line, 0.25, 1, 0.25), CycleGuess(2, castle, 0.5, 120, 0.001))),
    ]


def test_the_table(tokenizer: Any) -> None:
    assert render_steps(two_steps(tokenizer), tokenizer).splitlines() == [
        "token      cycle 1                 cycle 2",
        "1  ␣the    ␣castle  41%  #3 12%  ✓ ␣the    100%",
        "2  ↵     ✓ ↵        25%            ␣castle  50%  #120 <1%",
        "agree      1 of 2                  1 of 2",
        "",
        "✓  the top-1 prediction of this cycle is the generated token",
        "#  otherwise: rank and probability of the one written",
    ]
    assert render_steps([], tokenizer) == ""


@pytest.mark.parametrize("halt", ["kl", "entropy"])
def test_steps_of_a_run_that_halts(model: Any, tokenizer: Any, halt: Any) -> None:
    threshold = {"kl": 0.065, "entropy": 5.6}[halt]
    got = generate_text(model, tokenizer, "The old", Sampling(temperature=0, max_new_tokens=12, halt=halt, halt_threshold=threshold))
    ids, start = got.prompt_ids + got.token_ids, len(got.prompt_ids)
    steps = recursive_steps(model, ids, start, halt=halt, halt_threshold=threshold, chunk=5)
    assert got.cycles is not None
    assert [step.halted or 3 for step in steps] == list(got.cycles)
    assert [len(step.cycles) for step in steps] == list(got.cycles)
    assert all(step.cycles[-1].token == step.token for step in steps)  # greedy: its prediction when it halted was generated
    assert {step.halted for step in steps} >= {None} and len({step.halted for step in steps}) > 1


def test_the_table_marks_where_tokens_halted(tokenizer: Any) -> None:
    first, second = two_steps(tokenizer)
    steps = [replace(first, cycles=first.cycles[:1], halted=1), second]
    assert render_steps(steps, tokenizer).splitlines() == [
        "token      cycle 1                   cycle 2",
        "1  ␣the    ␣castle  41% ■  #3 12%    ·",
        "2  ↵     ✓ ↵        25%              ␣castle  50%    #120 <1%",
        "agree      1 of 2                    0 of 1",
        "",
        "✓  the top-1 prediction of this cycle is the generated token",
        "#  otherwise: rank and probability of the one written",
        "■  the token halted here; · is a cycle that was not computed for it",
    ]
    assert "\x1b[33m■\x1b[0m" in render_steps(steps, tokenizer, color=True)


def test_the_table_of_tokens_that_all_halted_early(tokenizer: Any) -> None:
    steps = [replace(step, cycles=step.cycles[:1], halted=1) for step in two_steps(tokenizer)]
    lines = render_steps(steps, tokenizer).splitlines()
    assert "cycle 2" not in lines[0] and lines[1].count("■") == lines[2].count("■") == 1


def test_layouts_of_the_table_by_width(tokenizer: Any) -> None:
    steps = two_steps(tokenizer)
    long_one = replace(steps[0], token=0)  # <|endoftext|>, 13 cells
    roomy, cut, ranks, below = (render_steps([long_one, steps[1]], tokenizer, width).splitlines() for width in (66, 64, 50, 35))
    assert "<|endoftext|>" in roomy[1] and "#3 12%" in roomy[1]
    assert "<|endofte…" in cut[1] and "#3 12%" in cut[1]
    assert "cycle 2" in ranks[0] and "#" not in "".join(ranks)
    assert "cycle 2" not in below[0] and "cycle 2" in below[5] and below[1].split()[:2] == below[6].split()[:2]
    for lines, width in ((roomy, 66), (cut, 64), (ranks, 50), (below, 35)):
        assert all(cell_len(line) <= width for line in lines if not line.startswith(("✓", "#")))


def test_colour_only_where_asked(tokenizer: Any) -> None:
    assert "\x1b" not in render_steps(two_steps(tokenizer), tokenizer)
    assert "\x1b[32m✓\x1b[0m" in render_steps(two_steps(tokenizer), tokenizer, color=True)


@pytest.mark.parametrize(
    ("environment", "painted"), [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False), ({"NO_COLOR": ""}, True)]
)
def test_a_terminal_has_colour_and_a_width(
    model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], painted: bool
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.delenv("NO_COLOR", raising=False)
    for name, value in {"TERM": "xterm", "COLUMNS": "60", **environment}.items():
        monkeypatch.setenv(name, value)
    settings = GenerateSettings(checkpoint="x", max_new_tokens=3, temperature=0, show_recursive_steps=True)
    terminal = Terminal()
    write_once(model, tokenizer, "The", settings, terminal)
    assert ("\x1b[32m" in terminal.getvalue()) == painted


def test_tokens_are_visible(tokenizer: Any) -> None:
    lobster = tokenizer("🦞").input_ids
    shown = [visible(tokenizer, token) for token in lobster]
    assert "".join(shown) == "".join(f"\\x{byte:02x}" for byte in "🦞".encode())
    assert [visible(tokenizer, tokenizer(text).input_ids[0]) for text in ("\t", "\r", "\x1b", "a")] == ["⇥", "␍", "\\u001b", "a"]
    assert visible(tokenizer, 0) == END_OF_TEXT
    assert visible(tokenizer, 383) == "<383>"  # the model's vocabulary is padded beyond the tokenizer's


def test_tokens_of_sentencepiece_are_visible() -> None:
    tokenizer = sentencepiece_like()
    assert [visible(tokenizer, tokenizer.get_vocab()[name]) for name in ("▁one", "<0xF0>", "<s>")] == ["␣one", "<0xF0>", "<s>"]
