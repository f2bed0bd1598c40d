"""Text generation: equal to transformers' own, streamed by whole characters, and the predictions of each cycle."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import PreTrainedTokenizerFast, StaticCache

from recursify.checkpoints import checkpoint
from recursify.conversion.convert import convert
from recursify.errors import UserError
from recursify.inference.cycle_table import recursive_steps
from recursify.inference.early_exit import applications
from recursify.inference.generation import Generated, decoding_stats, generate_batch, generate_text, speed_stats
from recursify.inference.options import Sampling
from recursify.inference.prefix_cache import PrefixCache
from recursify.inference.prompt import check_ids, encode_prompt, end_tokens
from recursify.inference.session import calibrated, load, run, write_once
from recursify.inference.settings import GenerateSettings
from recursify.utils.device import choose_device
from tests.support.tiny import END_OF_TEXT, make_tiny_tokenizer, tiny_model
from tests.support.tokenizers import sentencepiece_like

GREEDY = Sampling(temperature=0, max_new_tokens=8)
PROMPTS = ["The old lobster", " leading space", "trailing space ", "two\nlines\n", "龙虾和🦞", "/tmp/café"]


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


class Script(nn.Module):
    """A head that predicts given tokens, one per call."""

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


# --- the text


@pytest.mark.parametrize("H_cycles", [None, 0, 1, 5])
@pytest.mark.parametrize("prompt", PROMPTS[:1])
def test_temperature_0_is_transformers_greedy(model: Any, tokenizer: Any, prompt: str, H_cycles: int | None) -> None:
    batch = tokenizer(prompt, return_tensors="pt")
    depth = {} if H_cycles is None else {"H_cycles": H_cycles}
    expected = model.generate(**batch, do_sample=False, max_new_tokens=8, **depth)[0].tolist()
    got = generate_text(model, tokenizer, prompt, Sampling(temperature=0, max_new_tokens=8, H_cycles=H_cycles))
    assert got.prompt_ids + got.token_ids == expected


def test_plain_model_generates(donor: Any, tokenizer: Any) -> None:
    batch = tokenizer("The old lobster", return_tensors="pt")
    expected = donor.generate(**batch, do_sample=False, max_new_tokens=8)[0].tolist()
    got = generate_text(donor, tokenizer, "The old lobster", GREEDY)
    assert got.prompt_ids + got.token_ids == expected
    with pytest.raises(UserError, match="--H_cycles: expected a recursive model, got a Qwen2ForCausalLM"):
        generate_text(donor, tokenizer, "The old lobster", Sampling(H_cycles=2))


@pytest.mark.parametrize("prompt", PROMPTS)
def test_streamed_pieces_join_to_the_text(model: Any, tokenizer: Any, prompt: str) -> None:
    pieces: list[str] = []
    got = generate_text(model, tokenizer, prompt, Sampling(temperature=1.5, max_new_tokens=12), seed=3, on_text=pieces.append)
    assert "".join(pieces) == got.text == tokenizer.decode(got.token_ids, skip_special_tokens=True)
    assert got.prompt_ids == tokenizer(prompt).input_ids
    assert all(pieces)


@pytest.mark.parametrize("text", [" 龙虾 is 🦞!", "👩‍👩‍👧‍👦 family\n", "é", "한국어와 English", "\ufffd kept"])
def test_streaming_never_splits_a_character(tokenizer: Any, text: str) -> None:
    tokens = tokenizer(text).input_ids
    pieces: list[str] = []
    got = generate_text(scripted([*tokens, 0]), tokenizer, "The", Sampling(temperature=0, max_new_tokens=200), on_text=pieces.append)
    assert got.text == text
    assert "".join(pieces) == text
    assert got.finish_reason == "stop"
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)
        assert len(pieces) >= len(text.split())  # as it comes, not at the end


def test_incomplete_final_character_is_flushed(tokenizer: Any) -> None:
    tokens = tokenizer("ab🦞").input_ids[:-1]
    pieces: list[str] = []
    got = generate_text(scripted(tokens), tokenizer, "The", Sampling(temperature=0, max_new_tokens=len(tokens)), on_text=pieces.append)
    assert "".join(pieces) == got.text == tokenizer.decode(tokens)
    assert got.text.startswith("ab") and got.text.endswith("\ufffd")
    assert got.finish_reason == "length"


def test_seed_is_reproducible_and_keeps_the_global_random_state(model: Any, tokenizer: Any) -> None:
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


def test_donor_penalties_are_ignored_and_its_end_tokens_kept(donor: Any, tokenizer: Any) -> None:
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


# a donor's generation_config.json -> its effect on a text of 24 tokens
OF_A_DONOR: dict[str, Any] = {
    "repetition_penalty": 9.0, "encoder_repetition_penalty": 9.0, "no_repeat_ngram_size": 1, "num_beams": 3, "do_sample": True,
    "max_new_tokens": 3,
}  # fmt: skip
OF_A_DONOR_THAT_DRAWS: dict[str, Any] = {
    "repetition_penalty": 9.0, "encoder_repetition_penalty": 9.0, "no_repeat_ngram_size": 1, "temperature": 0.05, "top_k": 1, "top_p": 0.01,
    "min_p": 0.9, "typical_p": 0.01, "epsilon_cutoff": 0.5, "eta_cutoff": 0.5, "do_sample": False,
}  # fmt: skip


@contextmanager
def own_way(model: Any, **fields: Any) -> Iterator[None]:
    """The model with such a generation config."""
    before = model.generation_config
    model.generation_config = type(before)(eos_token_id=0, **fields)
    try:
        yield
    finally:
        model.generation_config = before


@pytest.mark.parametrize("name", OF_A_DONOR)
def test_donor_beam_and_contrastive_settings_are_ignored_in_greedy_decoding(donor: Any, tokenizer: Any, name: str) -> None:
    prompt = tokenizer("The", return_tensors="pt")
    plain = generate_text(donor, tokenizer, "The", replace(GREEDY, max_new_tokens=24))
    assert len(plain.token_ids) == 24 > len(set(plain.token_ids))  # or there is nothing that a penalty could act on
    with own_way(donor, **{name: OF_A_DONOR[name]}), torch.random.fork_rng(devices=[]):
        assert generate_text(donor, tokenizer, "The", replace(GREEDY, max_new_tokens=24)) == plain
        torch.manual_seed(0)
        asked = {} if name == "max_new_tokens" else {"max_new_tokens": 24}
        assert donor.generate(**prompt, **asked)[0].tolist() != plain.prompt_ids + plain.token_ids


@pytest.mark.parametrize("name", OF_A_DONOR_THAT_DRAWS)
def test_donor_sampling_settings_are_ignored(donor: Any, tokenizer: Any, name: str) -> None:
    prompt, sampling = tokenizer("The", return_tensors="pt"), Sampling(temperature=1.0, max_new_tokens=24)
    plain = generate_text(donor, tokenizer, "The", sampling, seed=9)
    assert len(plain.token_ids) == 24 > len(set(plain.token_ids))
    with own_way(donor, **{"do_sample": True, "top_k": 0, name: OF_A_DONOR_THAT_DRAWS[name]}), torch.random.fork_rng(devices=[]):
        assert generate_text(donor, tokenizer, "The", sampling, seed=9) == plain
        torch.manual_seed(9)
        assert donor.generate(**prompt, max_new_tokens=24)[0].tolist() != plain.prompt_ids + plain.token_ids


def test_donor_cache_return_count_and_min_length_settings_are_ignored(donor: Any, tokenizer: Any) -> None:
    plain = generate_text(donor, tokenizer, "The", GREEDY)
    end = plain.token_ids[3]
    for fields in ({"use_cache": False}, {"num_return_sequences": 2, "do_sample": True}, {"min_length": 20}, {"min_new_tokens": 8}):
        with own_way(donor, **fields):
            assert generate_text(donor, tokenizer, "The", GREEDY) == plain
            ended = generate_text(donor, tokenizer, "The", GREEDY, ends=[end])
        assert ended.token_ids == plain.token_ids[: plain.token_ids.index(end) + 1]


# further fields that a published generation_config.json may have
OF_ANY_DONOR: dict[str, Any] = {
    "bad_words_ids": [[token] for token in range(2, 60)], "suppress_tokens": list(range(2, 200)), "forced_bos_token_id": 5,
    "begin_suppress_tokens": list(range(2, 200)), "forced_eos_token_id": 5, "stop_strings": ["e", "a", " "], "max_length": 9,
    "exponential_decay_length_penalty": (1, 50.0), "sequence_bias": [[[5], 90.0]], "guidance_scale": 9.0, "penalty_alpha": 0.9,
    "max_time": 1e-9,
    "prompt_lookup_num_tokens": 2, "cache_implementation": "static", "num_return_sequences": 2, "num_beams": 4, "token_healing": True,
    "watermarking_config": {"bias": 90.0}, "output_scores": True, "no_repeat_ngram_size": 2, "diversity_penalty": 1.0, "top_h": 0.4,
}  # fmt: skip


@pytest.mark.parametrize("name", OF_ANY_DONOR)
@pytest.mark.parametrize("kind", ["model", "donor"])
def test_no_setting_of_the_donor_changes_greedy_text(kind: str, name: str, tokenizer: Any, request: pytest.FixtureRequest) -> None:
    """In every way of generating: one text, a batch, and the answers of an evaluation, which are batches."""
    model = request.getfixturevalue(kind)
    plain = generate_text(model, tokenizer, "The", GREEDY)
    with own_way(model, **{"do_sample": name == "num_return_sequences", name: OF_ANY_DONOR[name]}):
        assert generate_text(model, tokenizer, "The", GREEDY) == plain
        assert generate_batch(model, tokenizer, ["The", "The"], GREEDY) == [plain, plain]
        assert model.generation_config.to_dict().get(name) is not None  # and it is left as it was


def test_exit_cycles_are_reported_if_the_donor_disables_the_cache(model: Any, tokenizer: Any) -> None:
    sampling = replace(GREEDY, halt="entropy", halt_threshold=5.6)
    with own_way(model, use_cache=False):
        got = generate_text(model, tokenizer, "The", sampling)
    assert got == generate_text(model, tokenizer, "The", sampling) and len(got.cycles or ()) == len(got.token_ids)


@pytest.mark.parametrize(
    "choice",
    [{"temperature": 1.0}, {"temperature": 0.3}, {"temperature": 99.0, "top_k": 2}, {"temperature": 99.0, "top_k": 5}, {"top_p": 0.3}],
)
def test_sampling_equals_transformers(donor: Any, tokenizer: Any, choice: dict[str, Any]) -> None:
    full = {"temperature": 0.8, "top_p": 1.0, "top_k": 0} | choice
    got = generate_text(donor, tokenizer, "The", Sampling(**full, max_new_tokens=20), seed=5)
    assert got.token_ids == drawn(donor, tokenizer, **full)
    for name, other in (("temperature", 0.8 if full["temperature"] != 0.8 else 1.0), ("top_k", 0), ("top_p", 1.0)):
        if full[name] != other:
            assert got.token_ids != drawn(donor, tokenizer, **(full | {name: other})), name


def drawn(model: Any, tokenizer: Any, **choice: Any) -> list[int]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        whole = model.generate(**tokenizer("The", return_tensors="pt"), do_sample=True, max_new_tokens=20, **choice)
    return list(whole[0, len(tokenizer("The").input_ids) :].tolist())


def test_dropout_is_off_during_generation(tokenizer: Any) -> None:
    model = tiny_model("llama", num_hidden_layers=2, attention_dropout=0.5)
    plain = generate_text(model, tokenizer, "The old", GREEDY)
    model.train()
    assert generate_text(model, tokenizer, "The old", GREEDY) == plain and model.training


def test_prompt_has_leading_but_no_trailing_special_tokens() -> None:
    tokenizer = sentencepiece_like()
    assert tokenizer("one two").input_ids[-1] == tokenizer.eos_token_id
    ids = encode_prompt(tiny_model("llama", num_hidden_layers=1), tokenizer, "one two").ids
    assert tokenizer.convert_ids_to_tokens(ids) == ["<s>", "▁one", "▁two"]


def test_an_end_token_that_the_user_typed_stays(model: Any, tokenizer: Any) -> None:
    assert encode_prompt(model, tokenizer, f"one{END_OF_TEXT}").ids[-1] == tokenizer.eos_token_id


def test_training_mode_is_restored(model: Any, tokenizer: Any) -> None:
    model.train()
    try:
        generate_text(model, tokenizer, "The", GREEDY)
        recursive_steps(model, [1, 2, 3], 1)
        assert model.training
    finally:
        model.eval()


def test_should_stop_interrupts_generation(model: Any, tokenizer: Any) -> None:
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


# --- where a text ends


def test_a_stop_string_ends_the_text_before_it(tokenizer: Any) -> None:
    tokens = tokenizer(" one castle\nUser: two").input_ids
    pieces: list[str] = []
    sampling = Sampling(temperature=0, max_new_tokens=len(tokens), stop=("river", "\nUser:"))
    got = generate_text(scripted(tokens), tokenizer, "The", sampling, on_text=pieces.append)
    assert got.text == "".join(pieces) == " one castle"
    assert got.finish_reason == "stop"
    assert tokenizer.decode(got.token_ids) == " one castle\nUser:"


def test_partial_stop_string_is_emitted_if_it_does_not_complete(tokenizer: Any) -> None:
    tokens = tokenizer(" one\nUse").input_ids
    sampling = Sampling(temperature=0, max_new_tokens=len(tokens), stop=("\nUser:",))
    got = generate_text(scripted(tokens), tokenizer, "The", sampling)
    assert (got.text, got.finish_reason) == (" one\nUse", "length")


def test_additional_end_tokens(tokenizer: Any) -> None:
    tokens = tokenizer(" one castle two").input_ids
    end = tokenizer(" castle").input_ids[0]
    got = generate_text(scripted(tokens), tokenizer, "The", Sampling(temperature=0, max_new_tokens=len(tokens)), ends=[end])
    assert (got.text, got.finish_reason, got.token_ids[-1]) == (" one", "stop", end)


def test_a_prompt_may_be_tokens(model: Any, tokenizer: Any) -> None:
    ids = tokenizer("The old").input_ids
    by_ids, by_text = (generate_text(model, tokenizer, prompt, GREEDY) for prompt in (ids, "The old"))
    assert by_ids == by_text
    for wrong in ([], [5000]):
        with pytest.raises(UserError):
            generate_text(model, tokenizer, wrong, GREEDY)


# --- several at a time

LONG_AND_SHORT = ["The old lobster follows the river near the castle", "A", "two\nlines\n", "quiet village songs"]


@pytest.mark.parametrize("family", ["recursive", "qwen2", "mistral"])
def test_batched_generation_equals_single_row_generation(model: Any, tokenizer: Any, family: str) -> None:
    writer = model if family == "recursive" else tiny_model(family, num_hidden_layers=2)
    batch = generate_batch(writer, tokenizer, LONG_AND_SHORT, GREEDY)
    assert batch == [generate_text(writer, tokenizer, prompt, GREEDY) for prompt in LONG_AND_SHORT]


@settings(max_examples=20, deadline=None)
@given(
    prompts=st.lists(st.text("ab The龙🦞\n", min_size=1, max_size=20).filter(str.strip), min_size=1, max_size=5),
    H_cycles=st.integers(0, 4),
    stop=st.lists(st.text("abl� ", min_size=1, max_size=2), max_size=2),
)
def test_any_batch_equals_single_row_generation(model: Any, tokenizer: Any, prompts: list[str], H_cycles: int, stop: list[str]) -> None:
    sampling = Sampling(temperature=0, max_new_tokens=6, H_cycles=H_cycles, stop=tuple(stop))
    assert generate_batch(model, tokenizer, prompts, sampling) == [generate_text(model, tokenizer, one, sampling) for one in prompts]


def test_sequences_of_a_batch_end_independently(model: Any, tokenizer: Any) -> None:
    alone = [generate_text(model, tokenizer, prompt, replace(GREEDY, max_new_tokens=16)) for prompt in LONG_AND_SHORT]
    own = model.generation_config
    # an end token for one of them, and stop strings for others
    model.generation_config = type(own)(eos_token_id=alone[0].token_ids[2])
    try:
        stop = tuple(text for text in {one.text[3:5] for one in alone[1:3]} if text)
        sampling = Sampling(temperature=0, max_new_tokens=16, stop=stop)
        batch = generate_batch(model, tokenizer, LONG_AND_SHORT, sampling)
        singles = [generate_text(model, tokenizer, prompt, sampling) for prompt in LONG_AND_SHORT]
    finally:
        model.generation_config = own
    assert batch == singles
    assert len({len(one.token_ids) for one in batch}) > 1
    assert batch[0].token_ids == alone[0].token_ids[: len(batch[0].token_ids)]


def test_batch_is_reproducible_with_a_seed(model: Any, tokenizer: Any) -> None:
    sampling = Sampling(temperature=1.0, max_new_tokens=8)
    before = torch.get_rng_state()
    first, again, other = (generate_batch(model, tokenizer, LONG_AND_SHORT, sampling, seed=seed) for seed in (1, 1, 2))
    assert first == again != other
    assert torch.equal(before, torch.get_rng_state())


def test_an_empty_batch(model: Any, tokenizer: Any) -> None:
    assert generate_batch(model, tokenizer, [], GREEDY) == []


# --- early exit


@pytest.mark.parametrize("halt", ["kl", "entropy"])
def test_exit_cycles_of_generated_tokens(donor_folder: Path, tokenizer: Any, halt: str) -> None:
    model = seeded(donor_folder)
    threshold = {"kl": 0.065, "entropy": 5.6}[halt]
    sampling = Sampling(temperature=0, max_new_tokens=12, halt=halt, halt_threshold=threshold)
    got = generate_text(model, tokenizer, "The old lobster", sampling)
    ids = torch.tensor([got.prompt_ids + got.token_ids])
    with torch.no_grad():
        at = model(ids, use_cache=False, halt=halt, halt_threshold=threshold).halt_cycles[0]
    assert got.cycles == tuple(at[len(got.prompt_ids) - 1 : -1].tolist())
    assert len(set(got.cycles)) > 1  # or this test is vacuous
    assert got.applications == sum(1 + cycle * 4 for cycle in got.cycles)  # a prelude of one layer, a loop of two applied twice
    assert got.plain_applications == 12 * 13
    assert decoding_stats(got).startswith(f"halting: {sum(got.cycles) / 12:.1f} of 3 cycles per token, ")


def test_halting_that_costs_more_than_it_saves_is_reported(model: Any, tokenizer: Any) -> None:
    got = generate_text(model, tokenizer, "The", replace(GREEDY, halt="kl", halt_threshold=0.0))  # never halts, and looks at each cycle
    assert decoding_stats(got) == "halting: 3.0 of 3 cycles per token, 14% more layer applications than without halting"
    assert generate_text(model, tokenizer, "The", GREEDY).token_ids == got.token_ids


def test_exit_cycles_per_row_of_a_batch(model: Any, tokenizer: Any) -> None:
    sampling = Sampling(temperature=0, max_new_tokens=6, halt="entropy", halt_threshold=5.6)
    batch = generate_batch(model, tokenizer, LONG_AND_SHORT, sampling)
    singles = [generate_text(model, tokenizer, prompt, sampling) for prompt in LONG_AND_SHORT]
    assert len({cycle for one in batch for cycle in one.cycles or ()}) > 1  # or this test is vacuous
    assert [replace(one, applications=None) for one in batch] == [replace(one, applications=None) for one in singles]
    # a row that has halted waits for the slowest: what it costs is what was computed
    slowest = [max(cycles) for cycles in zip(*(one.cycles or () for one in batch), strict=True)]
    assert {one.applications for one in batch} == {sum(applications(model.config, slowest, "entropy"))}
    assert sum(slowest) > min(sum(one.cycles or ()) for one in batch)
    everything = generate_batch(model, tokenizer, LONG_AND_SHORT, replace(sampling, halt_threshold=1e9))
    assert {one.applications for one in everything} == {6 * model.config.depth(1)}


@pytest.mark.parametrize("draft_cycles", [0, 1, 2])
def test_self_speculation_is_lossless_and_reports_acceptance(model: Any, tokenizer: Any, draft_cycles: int) -> None:
    plain = generate_text(model, tokenizer, "The old lobster", replace(GREEDY, max_new_tokens=16))
    pieces: list[str] = []
    sampling = Sampling(temperature=0, max_new_tokens=16, draft_cycles=draft_cycles, draft_tokens=3)
    got = generate_text(model, tokenizer, "The old lobster", sampling, on_text=pieces.append)
    assert (got.text, got.token_ids, got.finish_reason) == (plain.text, plain.token_ids, plain.finish_reason)
    assert "".join(pieces) == got.text
    assert got.drafted is not None and got.accepted is not None and 0 <= got.accepted <= got.drafted
    accepted = f"self-speculation: {got.accepted} of {got.drafted} drafted tokens accepted ({got.accepted / got.drafted:.0%})"
    off = f"; {got.undrafted} tokens without drafts, to compare or because drafts were slower" if got.undrafted else ""
    assert decoding_stats(got) == accepted + off


@pytest.mark.parametrize("options", [{}, {"H_cycles": 1}, {"H_cycles": 4}, {"cache_policy": "last"}])
def test_the_text_of_a_static_cache(model: Any, tokenizer: Any, options: dict[str, Any]) -> None:
    sampling = replace(GREEDY, max_new_tokens=8, **options)
    static = replace(sampling, static_cache=True)
    for prompts in (LONG_AND_SHORT[:1], LONG_AND_SHORT):
        texts = [[one.text for one in generate_batch(model, tokenizer, prompts, each)] for each in (sampling, static)]
        assert texts[0] == texts[1]


def test_a_conversation_keeps_a_cache_that_can_grow(model: Any, tokenizer: Any) -> None:
    memory = PrefixCache()
    for prompt in ("The old", "The old lobster sails"):
        generate_text(model, tokenizer, prompt, replace(GREEDY, max_new_tokens=4, static_cache=True), memory=memory)
        assert not isinstance(memory.cache, StaticCache)


def test_self_speculation_in_a_batch_counts_once(model: Any, tokenizer: Any) -> None:
    batch = generate_batch(model, tokenizer, LONG_AND_SHORT, replace(GREEDY, draft_cycles=1))
    assert [one.text for one in batch] == [one.text for one in generate_batch(model, tokenizer, LONG_AND_SHORT, GREEDY)]
    assert [one.drafted for one in batch[1:]] == [0, 0, 0]
    assert f" of {batch[0].drafted} drafted" in decoding_stats(*batch)


def generated_with(cycles: tuple[int, ...], applications: int, plain: int) -> Generated:
    return Generated("", "", [1], [1] * len(cycles), "length", cycles, 4, applications, plain)


def test_statistics_of_several_texts() -> None:
    assert (
        decoding_stats(generated_with((1, 2), 6, 20), generated_with((4, 4, 4), 24, 30))
        == "halting: 3.0 of 4 cycles per token, 40% of layer applications saved"
    )
    assert decoding_stats(generated_with((4,), 10, 10)) == "halting: 4.0 of 4 cycles per token, 0% of layer applications saved"
    assert (
        decoding_stats(generated_with((4,), 15, 10))
        == "halting: 4.0 of 4 cycles per token, 50% more layer applications than without halting"
    )
    drafts = [Generated("", "", [1], [1], "length", drafted=drafted, accepted=accepted) for drafted, accepted in ((8, 4), (2, 2), (0, 0))]
    assert decoding_stats(*drafts) == "self-speculation: 6 of 10 drafted tokens accepted (60%)"
    off = replace(drafts[0], undrafted=3)
    assert decoding_stats(off, *drafts[1:]).endswith("accepted (60%); 3 tokens without drafts, to compare or because drafts were slower")


def test_speed_is_that_of_the_text(model: Any, tokenizer: Any) -> None:
    got = generate_text(model, tokenizer, "The", replace(GREEDY, max_new_tokens=8))
    assert 0 < got.first_token_seconds < got.seconds
    known = Generated("", "", [1], [1] * 11, "length", seconds=2.5, first_token_seconds=0.5)
    assert speed_stats(known) == "speed: 11 tokens, 5.0 tokens per second, the first after 0.50 s"
    assert speed_stats(replace(known, token_ids=[1])) == "speed: 1 token, the first after 0.50 s"


def test_halting_statistics_are_relative_to_the_cycles_of_the_run(model: Any, tokenizer: Any) -> None:
    got = generate_text(model, tokenizer, "The", replace(GREEDY, H_cycles=2, halt="kl", halt_threshold=0.0))
    assert got.of_cycles == 2 and got.plain_applications == len(got.token_ids) * model.config.depth(2)
    assert got.applications == sum(applications(model.config, [2] * len(got.token_ids), "kl"))


def test_self_speculation_alone_counts_its_drafts(model: Any, tokenizer: Any) -> None:
    batch = generate_batch(model, tokenizer, LONG_AND_SHORT, replace(GREEDY, draft_cycles=2))
    assert batch[0].accepted and [one.accepted for one in batch[1:]] == [0, 0, 0]


def test_the_table_is_of_the_text_and_not_of_an_interrupted_one(model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr("recursify.inference.cycle_table.show_steps", lambda model, tokenizer, *rest: asked.append(rest))
    settings = GenerateSettings(checkpoint="x", max_new_tokens=4, temperature=0, H_cycles=2, show_recursive_steps=True)
    out = io.StringIO()
    got = write_once(model, tokenizer, "The old", settings, out)
    assert asked == [(got.prompt_ids + got.token_ids, len(got.prompt_ids), settings.sampling, out)]
    write_once(model, tokenizer, "The old", settings, out, should_stop=lambda: True)
    assert len(asked) == 1


def test_plain_run_has_no_statistics(model: Any, tokenizer: Any) -> None:
    got = generate_text(model, tokenizer, "The", GREEDY)
    assert (got.cycles, got.applications, got.drafted, got.accepted) == (None, None, None, None)
    assert decoding_stats(got) == decoding_stats() == ""


def test_statistics_go_to_stderr(model: Any, tokenizer: Any) -> None:
    out, err = io.StringIO(), io.StringIO()
    settings = GenerateSettings(checkpoint="x", max_new_tokens=4, temperature=0, halt="kl", show_recursive_steps=True)
    write_once(model, tokenizer, "The", settings, out, err)
    assert err.getvalue().startswith("halting: ") and err.getvalue().count("\n") == 1
    assert "halting" not in out.getvalue() and "cycle 1" in out.getvalue()


def test_a_compute_budget_finds_the_threshold(model: Any, tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "like_it.txt"
    text.write_text("The old lobster follows the river near the castle. " * 8, encoding="utf-8")
    settings = GenerateSettings(checkpoint="x", halt="entropy", compute_budget=0.8, calibration_file=str(text))
    found = calibrated(settings, model, tokenizer)
    assert found.halt_threshold is not None and found.compute_budget is None
    found.validate()
    assert f"--halt_threshold {str(found.halt_threshold)[:4]}" in capsys.readouterr().err
    plain = GenerateSettings(checkpoint="x", halt="entropy")
    assert calibrated(plain, model, tokenizer) == plain


@pytest.mark.parametrize(("words", "shape"), [(40, None), (3000, (32, 128))])
def test_calibration_windows(
    model: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: int, shape: tuple[int, int] | None
) -> None:
    """Windows of 128 tokens, 32 at most, from the beginning of the file; a shorter one is one window."""
    asked: list[Any] = []

    def calibrate(model: Any, blocks: torch.Tensor, *rest: Any) -> Any:
        asked.append((blocks, *rest))
        raise UserError("enough")

    monkeypatch.setattr("recursify.inference.session.calibrate", calibrate)
    text = " ".join(f"river {number}" for number in range(words))
    (tmp_path / "like.txt").write_text(text)
    settings = GenerateSettings(checkpoint="x", halt="kl", compute_budget=0.7, H_cycles=2, calibration_file=str(tmp_path / "like.txt"))
    with pytest.raises(UserError, match="enough"):
        calibrated(settings, model, tokenizer)
    [(blocks, *rest)] = asked
    ids = tokenizer(text).input_ids
    assert rest == ["kl", 0.7, 2] and tuple(blocks.shape) == (shape or (len(ids) // min(128, len(ids)), min(128, len(ids))))
    assert blocks.flatten().tolist() == ids[: blocks.numel()]


def test_a_calibration_file_of_one_token(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "one").write_text("a")
    settings = GenerateSettings(checkpoint="x", halt="kl", compute_budget=1.0, calibration_file=str(tmp_path / "one"))
    settings.validate()
    with pytest.raises(UserError, match="has 1 tokens"):
        calibrated(settings, model, tokenizer)


def test_calibration_file_that_is_not_text(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "empty").write_text("")
    for name, message in (("bytes", ": expected UTF-8 text"), ("missing", "cannot be read"), ("empty", "has 0 tokens")):
        settings = GenerateSettings(checkpoint="x", halt="kl", compute_budget=0.8, calibration_file=str(tmp_path / name))
        with pytest.raises(UserError, match=f"--calibration_file: .*{name} ?{message}"):
            calibrated(settings, model, tokenizer)


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
        ({"stop": ("a", "")}, "--stop: expected strings of at least one character, got ''"),
        ({"halt": "kl", "draft_cycles": 1}, "--draft_cycles: expected --halt none with it, got --halt kl; leave out one of the two"),
        ({"halt_threshold": 0.5}, "--halt_threshold: expected --halt q_head, kl or entropy with it, got 0.5 and no --halt"),
        ({"compute_budget": 0.6}, "--compute_budget: expected --halt q_head, kl or entropy with it, got 0.6 and no --halt"),
        ({"compute_budget": 0.0, "halt": "kl"}, "--compute_budget: expected a share above 0 and at most 1, got 0.0"),
        (
            {"compute_budget": 0.6, "halt": "kl", "halt_threshold": 0.1},
            "--compute_budget: finds the threshold itself, got --halt_threshold",
        ),
        ({"compute_budget": 0.6, "halt": "kl"}, "--compute_budget: expected --calibration_file with it"),
        ({"calibration_file": "x.txt"}, "--calibration_file: expected --compute_budget with it, e.g. 0.6, got none"),
        ({"cache_policy": "last", "show_recursive_steps": True}, "--show_recursive_steps: reads the text as --cache_policy full does"),
        ({"seed": -1}, "--seed: "),
        ({"batch_size": 0}, "--batch_size: expected at least 1, got 0"),
        ({"output_file": "x.jsonl"}, "--output_file: expected --prompt_file with it, got x.jsonl and no --prompt_file"),
        ({"prompt_file": "x.txt", "prompt": "a"}, "--prompt_file: expected no --prompt with it, got both"),
        ({"prompt_file": "x.txt", "show_recursive_steps": True}, "--prompt_file: expected no --show_recursive_steps with it, got both"),
        ({"device": "abacus"}, "--device: expected cpu, which this machine has; got 'abacus'"),
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
    assert GenerateSettings(checkpoint="x").sampling == Sampling()
    assert (Sampling().max_new_tokens, Sampling().temperature, Sampling().top_p, Sampling().top_k) == (100, 0.8, 1.0, 0)
    for edge in ({"compute_budget": 1.0, "halt": "kl", "calibration_file": "x"}, {"top_k": 1}, {"max_new_tokens": 1}, {"batch_size": 1}):
        GenerateSettings(checkpoint="x", **edge).validate()
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


def test_exactly_as_many_tokens_as_positions(donor: Any, tokenizer: Any) -> None:
    for prompt in ([1] * 510, "a" * 3):
        room = 512 - (510 if isinstance(prompt, list) else len(tokenizer(prompt).input_ids))
        check_ids(donor, [1] * (512 - room), room)
        with pytest.raises(UserError, match=f"use --max_new_tokens {room} or less"):
            generate_text(donor, tokenizer, prompt, Sampling(max_new_tokens=room + 1))
    assert len(generate_text(donor, tokenizer, [1] * 510, replace(GREEDY, max_new_tokens=2)).token_ids) == 2
    with pytest.raises(UserError, match="shorten the prompt to 511 tokens or less"):
        check_ids(donor, [1] * 512, 1)


def test_last_id_of_the_vocabulary_is_accepted(donor: Any) -> None:
    check_ids(donor, [383])
    with pytest.raises(UserError, match="gives token 384, the model knows 0 to 383"):
        check_ids(donor, [384])


def test_batch_prompts_are_checked(donor: Any, tokenizer: Any) -> None:
    for wrong in (Sampling(temperature=-1.0), Sampling(H_cycles=1), Sampling(max_new_tokens=600)):
        with pytest.raises(UserError):
            generate_batch(donor, tokenizer, ["The"], wrong)


def test_unsupported_settings_are_refused_at_loading(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    checkpoint.save(str(tmp_path / "m.pt"), model, tokenizer)
    with pytest.raises(UserError, match="--draft_cycles: expected fewer than the 3 cycles of the run, got 3"):
        load(GenerateSettings(checkpoint=str(tmp_path / "m.pt"), draft_cycles=3, device="cpu"))


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
def test_errors_precede_output(donor: Any, tokenizer: Any, change: dict[str, Any]) -> None:
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
