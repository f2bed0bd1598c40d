"""Writing text: equal to transformers' own, whole characters as they come, and what each cycle would have said."""

from __future__ import annotations

import io
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.cells import cell_len
from tiny import END_OF_TEXT, make_tiny_tokenizer, tiny_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import nn
from transformers import PreTrainedTokenizerFast

from recursify import checkpoint
from recursify.conversion import convert
from recursify.device import choose_device
from recursify.errors import UserError
from recursify.generation import (
    CycleGuess,
    GenerateSettings,
    Sampling,
    TextPieces,
    TokenSteps,
    encode_prompt,
    end_tokens,
    forgiving,
    generate_text,
    load,
    recursive_steps,
    render_steps,
    run,
    visible,
    write_once,
)

GREEDY = Sampling(temperature=0, max_new_tokens=8)
PROMPTS = ["The old lobster", " leading space", "trailing space ", "two\nlines\n", "龙虾和🦞", "/tmp/café"]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tiny_tokenizer()


@pytest.fixture(scope="module")
def model(donor_folder: Path) -> Any:
    """Prelude, loop and coda, and gains that make every cycle say something else."""
    return convert(str(donor_folder), L_layers=2, H_cycles=3, L_cycles=1, prelude_layers=1, coda_layers=1, gain=0.3)


@pytest.fixture(scope="module")
def donor() -> Any:
    return tiny_model("qwen2", num_hidden_layers=2)


class Script(nn.Module):
    """A head that says given tokens, one per call."""

    def __init__(self, tokens: list[int], vocabulary: int):
        super().__init__()
        self.tokens, self.vocabulary = iter(tokens), vocabulary

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(*states.shape[:-1], self.vocabulary)
        logits[..., next(self.tokens)] = 50.0
        return logits


def scripted(tokens: list[int]) -> Any:
    model = tiny_model("qwen2", num_hidden_layers=1)
    model.lm_head = Script(tokens, model.config.vocab_size)
    return model


def sentencepiece_like() -> PreTrainedTokenizerFast:
    """Llama's kind: a space is part of a word, dropped at the start of a text; unknown characters are byte tokens."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁one", "▁two", "▁three"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


# --- the text


@pytest.mark.parametrize("H_cycles", [None, 0, 1, 5])
@pytest.mark.parametrize("prompt", PROMPTS[:1])
def test_temperature_0_is_transformers_greedy(model: Any, tokenizer: Any, prompt: str, H_cycles: int | None) -> None:
    batch = tokenizer(prompt, return_tensors="pt")
    depth = {} if H_cycles is None else {"H_cycles": H_cycles}
    expected = model.generate(**batch, do_sample=False, max_new_tokens=8, **depth)[0].tolist()
    got = generate_text(model, tokenizer, prompt, Sampling(temperature=0, max_new_tokens=8, H_cycles=H_cycles))
    assert got.prompt_ids + got.token_ids == expected


def test_a_plain_model_writes_too(donor: Any, tokenizer: Any) -> None:
    batch = tokenizer("The old lobster", return_tensors="pt")
    expected = donor.generate(**batch, do_sample=False, max_new_tokens=8)[0].tolist()
    got = generate_text(donor, tokenizer, "The old lobster", GREEDY)
    assert got.prompt_ids + got.token_ids == expected
    with pytest.raises(UserError, match="--H_cycles: expected a recursive model, got a Qwen2ForCausalLM"):
        generate_text(donor, tokenizer, "The old lobster", Sampling(H_cycles=2))


@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_pieces_joined_are_the_text(model: Any, tokenizer: Any, prompt: str) -> None:
    pieces: list[str] = []
    got = generate_text(model, tokenizer, prompt, Sampling(temperature=1.5, max_new_tokens=12), seed=3, on_text=pieces.append)
    assert "".join(pieces) == got.text == tokenizer.decode(got.token_ids, skip_special_tokens=True)
    assert got.prompt_ids == tokenizer(prompt).input_ids
    assert all(pieces)


@pytest.mark.parametrize("text", [" 龙虾 is 🦞!", "👩‍👩‍👧‍👦 family\n", "é", "한국어와 English", "\ufffd kept"])
def test_a_character_comes_whole(tokenizer: Any, text: str) -> None:
    tokens = tokenizer(text).input_ids
    pieces: list[str] = []
    got = generate_text(scripted([*tokens, 0]), tokenizer, "The", Sampling(temperature=0, max_new_tokens=200), on_text=pieces.append)
    assert got.text == text
    assert "".join(pieces) == text
    assert got.finish_reason == "stop"
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)
        assert len(pieces) >= len(text.split())  # as it comes, not at the end


def test_nothing_is_lost_when_the_text_ends_within_a_character(tokenizer: Any) -> None:
    tokens = tokenizer("ab🦞").input_ids[:-1]
    pieces: list[str] = []
    got = generate_text(scripted(tokens), tokenizer, "The", Sampling(temperature=0, max_new_tokens=len(tokens)), on_text=pieces.append)
    assert "".join(pieces) == got.text == tokenizer.decode(tokens)
    assert got.text.startswith("ab") and got.text.endswith("\ufffd")
    assert got.finish_reason == "length"


def test_a_space_that_the_decoder_drops_at_a_start_is_kept() -> None:
    tokenizer = sentencepiece_like()
    vocabulary = tokenizer.get_vocab()
    lobster = [vocabulary[f"<0x{byte:02X}>"] for byte in "🦞".encode()]
    words = [vocabulary[word] for word in ("▁one", "▁two", "▁three")]
    pieces: list[str] = []
    streamer = TextPieces(tokenizer, pieces.append)
    streamer.put(torch.tensor([[1, words[0]]]))
    for token in [words[1], *lobster, words[2], 2]:
        streamer.put(torch.tensor([token]))
    streamer.end()
    assert pieces == [" two", "🦞", " three"]


def test_the_seed_repeats_the_text_and_leaves_the_global_state_alone(model: Any, tokenizer: Any) -> None:
    def write(seed: int | None) -> list[int]:
        return generate_text(model, tokenizer, "The", Sampling(max_new_tokens=8, temperature=1.0), seed=seed).token_ids

    before = torch.get_rng_state()
    assert write(1) == write(1) != write(2)
    assert torch.equal(before, torch.get_rng_state())
    write(None)
    assert not torch.equal(before, torch.get_rng_state())


def test_top_k_1_and_a_tiny_top_p_and_a_tiny_temperature_are_greedy(model: Any, tokenizer: Any) -> None:
    greedy = generate_text(model, tokenizer, "The", GREEDY).token_ids
    for choice in (Sampling(temperature=1.0, top_k=1), Sampling(temperature=1.0, top_p=1e-6), Sampling(temperature=1e-30)):
        assert generate_text(model, tokenizer, "The", replace(choice, max_new_tokens=8)).token_ids == greedy


def test_a_penalty_of_the_donor_is_off_and_its_end_tokens_are_kept(donor: Any, tokenizer: Any) -> None:
    plain = generate_text(donor, tokenizer, "The", GREEDY).token_ids
    own = donor.generation_config
    donor.generation_config = type(own)(repetition_penalty=9.0, top_k=1, do_sample=True, eos_token_id=[plain[3], 7])
    try:
        assert end_tokens(donor, tokenizer) == [plain[3], 7, 0]
        got = generate_text(donor, tokenizer, "The", GREEDY)
    finally:
        donor.generation_config = own
    assert got.token_ids == plain[: plain.index(plain[3]) + 1]
    assert got.finish_reason == "stop"


def test_special_tokens_lead_but_never_follow_the_prompt() -> None:
    tokenizer = sentencepiece_like()
    assert tokenizer("one two").input_ids[-1] == tokenizer.eos_token_id
    ids = encode_prompt(tiny_model("llama", num_hidden_layers=1), tokenizer, "one two")
    assert tokenizer.convert_ids_to_tokens(ids) == ["<s>", "▁one", "▁two"]


def test_an_end_token_that_the_user_typed_stays(model: Any, tokenizer: Any) -> None:
    assert encode_prompt(model, tokenizer, f"one{END_OF_TEXT}")[-1] == tokenizer.eos_token_id


def test_training_mode_is_put_back(model: Any, tokenizer: Any) -> None:
    model.train()
    try:
        generate_text(model, tokenizer, "The", GREEDY)
        recursive_steps(model, [1, 2, 3], 1)
        assert model.training
    finally:
        model.eval()


def test_the_caller_can_stop_the_text(model: Any, tokenizer: Any) -> None:
    answers = iter([False, False, True])
    got = generate_text(model, tokenizer, "The", GREEDY, should_stop=lambda: next(answers))
    assert len(got.token_ids) == 3
    assert got.finish_reason == "interrupted"


@pytest.mark.parametrize("temperature", [0, 0.8])
def test_no_warnings(model: Any, tokenizer: Any, temperature: float, capfd: pytest.CaptureFixture[str]) -> None:
    model.generation_config.temperature, model.generation_config.max_length = 0.7, 30
    no_pad = make_tiny_tokenizer()
    no_pad.pad_token = None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            generate_text(model, no_pad, "The", Sampling(temperature=temperature, max_new_tokens=3))
    finally:
        model.generation_config.temperature = model.generation_config.max_length = None
    assert capfd.readouterr() == ("", "")


# --- what every cycle would have said


@pytest.mark.parametrize("chunk", [1, 5, 64])
def test_steps_equal_runs_at_each_depth(model: Any, tokenizer: Any, chunk: int) -> None:
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
            assert guess.written_probability == pytest.approx(float(written), abs=1e-6)
            assert guess.written_rank == 1 + int((probabilities > written).sum())
            differ.add((position, guess.token))
    assert len(differ) > len(steps)  # cycles do disagree, or this test shows nothing


def test_the_last_cycle_wrote_what_it_would_have_said(model: Any, tokenizer: Any) -> None:
    got = generate_text(model, tokenizer, "The", GREEDY)
    steps = recursive_steps(model, got.prompt_ids + got.token_ids, len(got.prompt_ids))
    assert len(steps[0].cycles) == model.config.H_cycles
    assert all(step.cycles[-1].token == step.token and step.cycles[-1].written_rank == 1 for step in steps)


def test_steps_of_a_plain_pass(model: Any, tokenizer: Any) -> None:
    steps = recursive_steps(model, [1, 2, 3, 4], 2, H_cycles=0)
    assert [[guess.cycle for guess in step.cycles] for step in steps] == [[0], [0]]
    assert "plain pass" in render_steps(steps, tokenizer)


def test_steps_need_cycles_and_a_token_before(model: Any, donor: Any) -> None:
    with pytest.raises(UserError, match="--show_recursive_steps: expected a recursive model, got a Qwen2ForCausalLM"):
        recursive_steps(donor, [1, 2], 1)
    with pytest.raises(ValueError, match="prompt_length: expected at least 1"):
        recursive_steps(model, [1, 2], 0)


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
        "✓  this cycle's likeliest token is the one written",
        "#  otherwise: rank and probability of the one written",
    ]
    assert render_steps([], tokenizer) == ""


def test_a_narrow_terminal_cuts_tokens_then_leaves_out_ranks_then_goes_on_below(tokenizer: Any) -> None:
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


# --- settings and errors


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"prompt": ""}, "--prompt is empty: expected some text to continue, got ''; leave --prompt out for the interactive mode"),
        ({"prompt": " \n"}, "--prompt is empty"),
        ({"prompt": "a\udcff"}, "--prompt: expected UTF-8 text, got 'a\\udcff', which has a stray byte at position 1"),
        ({"max_new_tokens": 0}, "--max_new_tokens: expected at least 1, got 0"),
        ({"temperature": -0.1}, "--temperature: expected a number of at least 0 (0 is greedy), got -0.1"),
        ({"temperature": float("nan")}, "--temperature: expected a number of at least 0 (0 is greedy), got nan"),
        ({"top_p": 0.0}, "--top_p: expected a number above 0 and at most 1 (1 is off), got 0.0"),
        ({"top_p": 1.5}, "--top_p: expected a number above 0 and at most 1 (1 is off), got 1.5"),
        ({"top_k": -1}, "--top_k: expected at least 0 (0 is off), got -1"),
        ({"H_cycles": -1}, "--H_cycles: expected at least 0 (0 is one plain pass), got -1"),
        ({"device": "abacus"}, "--device: expected one that this machine has, which are "),
        ({"device": "cuda:99"}, "; got 'cuda:99'"),
        ({"device": "meta"}, "; got 'meta'"),
    ],
)
def test_a_setting_out_of_range_is_refused_before_loading(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        load(GenerateSettings(checkpoint="not/there.pt", **flags))
    assert message in str(error.value)


def test_defaults_are_valid() -> None:
    GenerateSettings(checkpoint="x").validate()
    assert choose_device("cpu") == torch.device("cpu")


def test_more_tokens_than_positions(model: Any, tokenizer: Any) -> None:
    prompt = "a" * 500
    tokens = len(tokenizer(prompt).input_ids)
    with pytest.raises(UserError) as error:
        generate_text(model, tokenizer, prompt, Sampling(max_new_tokens=100))
    assert str(error.value) == (
        f"--max_new_tokens: the prompt has {tokens} tokens and 100 more are asked for, {tokens + 100} in all, "
        f"but the model has 512 positions; use --max_new_tokens {512 - tokens} or less"
    )
    with pytest.raises(UserError, match="shorten the prompt to 511 tokens or less"):
        generate_text(model, tokenizer, "a" * 1000)


def test_a_tokenizer_of_another_model(model: Any, tokenizer: Any) -> None:
    other = make_tiny_tokenizer()
    other.add_tokens([f"<extra{i}>" for i in range(100)])
    with pytest.raises(UserError, match="--tokenizer_path: the tokenizer gives token 419, the model knows 0 to 383"):
        generate_text(model, other, "<extra99>", GREEDY)


def test_load_and_write_once(model: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    checkpoint.save("model.pt", model, None)
    with pytest.raises(UserError, match="--tokenizer_path"):
        load(GenerateSettings(checkpoint="model.pt"))
    tokenizer.save_pretrained("some_tokenizer")
    settings = GenerateSettings(checkpoint="model.pt", tokenizer_path="some_tokenizer", temperature=0, max_new_tokens=5, device="cpu")
    settings.show_recursive_steps, settings.H_cycles = True, 2
    found, words = load(settings)
    out = io.StringIO()
    got = write_once(found, words, "The old", settings, out)
    text, table = out.getvalue().split("\n\ntoken", 1)
    assert text == "The old" + got.text
    assert "cycle 2" in table and "cycle 3" not in table


@pytest.mark.parametrize("change", [{"max_new_tokens": 600}, {"H_cycles": 2}, {"prompt": "\udcff"}])
def test_an_error_comes_before_any_text(donor: Any, tokenizer: Any, change: dict[str, Any]) -> None:
    out = io.StringIO()
    settings = GenerateSettings(checkpoint="x", **{"prompt": "The", **change})
    with pytest.raises(UserError):
        write_once(donor, tokenizer, str(settings.prompt), settings, out)
    assert out.getvalue() == ""


def test_run_writes_to_stdout_and_nothing_else_there(
    model: Any, tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(tmp_path / "model.pt")
    checkpoint.save(path, model, tokenizer)
    capsys.readouterr()
    run(GenerateSettings(checkpoint=path, prompt="The old", temperature=0.9, seed=2, max_new_tokens=6, device="cpu"))
    expected = generate_text(model, tokenizer, "The old", Sampling(temperature=0.9, max_new_tokens=6), seed=2)
    assert capsys.readouterr().out == f"The old{expected.text}\n"
    with pytest.raises(UserError, match="--prompt: expected some text to continue, got none"):
        run(GenerateSettings(checkpoint=path))


def test_a_terminal_without_a_character_does_not_end_the_text() -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    print("🦞", file=forgiving(stream), flush=True)
    assert stream.buffer.getvalue() == b"?\n"
