"""The prefix cache of a conversation: the same text, and only new tokens are prefilled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recursify.conversion.convert import convert
from recursify.inference.generation import generate_text
from recursify.inference.options import DecodingOptions, Sampling
from recursify.inference.prefix_cache import PrefixCache
from tests.support.reading import reading
from tests.support.tiny import make_tiny_tokenizer, tiny_model

GREEDY = Sampling(temperature=0, max_new_tokens=6)


def seeded(donor_folder: Path, **shape: int) -> Any:
    """Always the same model: where tokens halt depends on its random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return convert(str(donor_folder), L_layers=2, H_cycles=3, L_cycles=1, prelude_layers=1, gain=0.3, **shape)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tiny_tokenizer()


@pytest.fixture(scope="module")
def model(donor_folder: Path) -> Any:
    return seeded(donor_folder, coda_layers=1)


@pytest.fixture(scope="module")
def sliding() -> Any:
    """A plain model whose layers see six tokens back."""
    return tiny_model("mistral", num_hidden_layers=2)


def turn(model: Any, tokenizer: Any, ids: list[int], sampling: Sampling, memory: PrefixCache) -> list[int]:
    """Continue, check against a run without the cache, and return all tokens."""
    expected = generate_text(model, tokenizer, ids, sampling)
    got = generate_text(model, tokenizer, ids, sampling, memory=memory)
    assert (got.token_ids, got.text, got.cycles) == (expected.token_ids, expected.text, expected.cycles)
    return ids + got.token_ids


class Length:
    """A cache with a length only; from `least` on it cannot be cropped, as with a sliding window."""

    def __init__(self, length: int, least: int = 0):
        self.length, self.least, self.cuts = length, least, 0

    def crop(self, tokens: int) -> None:
        assert tokens < 0
        if self.length > self.least > 0:
            raise RuntimeError("it has slid")
        self.length, self.cuts = self.length + tokens, self.cuts + 1

    def get_seq_length(self) -> int:
        return self.length


@pytest.mark.parametrize(
    ("asked", "shared", "cuts"),
    [
        ([1, 2, 3, 4, 5, 6], 5, 0),  # goes on
        ([1, 2, 3, 4, 5], 4, 1),  # the same: its last token is read again
        ([1, 2, 3], 2, 1),  # a beginning
        ([1, 2, 9, 4, 5, 6, 7], 2, 1),  # parts in the middle
        ([1, 9], 1, 1),
        ([1, 2, 3, 4, 9, 9], 4, 1),  # parts at the last
        ([9, 2, 3, 4, 5, 6], None, 0),  # parts at once
        ([1], None, 0),  # of which nothing can be taken from the cache
    ],
)
def test_recall_returns_the_longest_proper_common_prefix(asked: list[int], shared: int | None, cuts: int) -> None:
    memory, model, options, cache = PrefixCache(), object(), DecodingOptions(), Length(5)
    memory.store(model, [1, 2, 3, 4, 5, 7], options, cache)  # 7 was written and never read
    assert memory.ids == [1, 2, 3, 4, 5]
    found = memory.lookup(model, asked, options)
    assert (None if found is None else found.length, cache.cuts) == (shared, cuts)
    assert memory.cache is None and memory.ids == [] and memory.lookup(model, asked, options) is None, "gone until it is kept again"
    if found is not None:
        memory.store(model, asked, options, found)
        assert memory.ids == asked[:shared]


def test_recall_requires_equal_model_and_options_and_a_croppable_cache() -> None:
    model, ids = object(), [1, 2, 3, 4, 5]
    for other, options in ((object(), DecodingOptions()), (model, DecodingOptions(H_cycles=2)), (model, DecodingOptions(draft_cycles=1))):
        memory = PrefixCache()
        memory.store(model, ids, DecodingOptions(), Length(5))
        assert memory.lookup(other, [*ids, 6], options) is None and memory.cache is None
    memory = PrefixCache()
    memory.store(model, ids, DecodingOptions(), Length(5, least=3))
    assert memory.lookup(model, [1, 2, 3, 9], DecodingOptions()) is None
    memory.store(model, ids, DecodingOptions(), Length(5, least=3))
    assert memory.lookup(model, [*ids, 6], DecodingOptions()).length == 5


def test_a_turn_prefills_only_new_tokens(model: Any, tokenizer: Any) -> None:
    memory = PrefixCache()
    first = tokenizer("The old lobster follows the river").input_ids
    whole = turn(model, tokenizer, first, GREEDY, memory)
    more = tokenizer(" near the castle").input_ids
    with reading(model) as counts:
        generate_text(model, tokenizer, whole + more, GREEDY, memory=memory)
    # the last token of the answer was written, and never read
    assert counts == [1 + len(more), *[1] * (GREEDY.max_new_tokens - 1)]


def test_repeated_prompt_prefills_only_its_last_token(model: Any, tokenizer: Any) -> None:
    memory = PrefixCache()
    ids = tokenizer("The old lobster").input_ids
    turn(model, tokenizer, ids, GREEDY, memory)
    with reading(model) as counts:
        generate_text(model, tokenizer, ids, GREEDY, memory=memory)
    assert counts[0] == 1


@settings(max_examples=15, deadline=None)
@given(turns=st.lists(st.tuples(st.integers(0, 30), st.lists(st.integers(1, 300), min_size=1, max_size=6)), min_size=1, max_size=4))
def test_prefix_cache_does_not_change_greedy_text(model: Any, tokenizer: Any, turns: list[tuple[int, list[int]]]) -> None:
    memory, whole = PrefixCache(), [5, 6, 7]
    for kept, new in turns:
        whole = turn(model, tokenizer, whole[: max(1, kept)] + new, GREEDY, memory)


OTHERS = {"depth": {"H_cycles": 2}, "policy": {"cache_policy": "last"}, "halting": {"halt": "entropy"}, "drafting": {"draft_cycles": 1}}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_other_options_drop_the_cache(model: Any, tokenizer: Any, other: dict[str, Any]) -> None:
    memory = PrefixCache()
    whole = turn(model, tokenizer, tokenizer("The old lobster").input_ids, GREEDY, memory)
    changed = Sampling(temperature=0, max_new_tokens=6, **other)
    expected = generate_text(model, tokenizer, whole, changed)
    with reading(model) as counts:
        got = generate_text(model, tokenizer, whole, changed, memory=memory)
    assert counts[0] >= len(whole) - 1 and got.token_ids == expected.token_ids  # a draft starts at the last token


@pytest.mark.parametrize("options", [{"draft_cycles": 1}, {"draft_cycles": 0}, {"H_cycles": 0}])
def test_prefix_cache_works_with_all_options(model: Any, tokenizer: Any, options: dict[str, Any]) -> None:
    sampling, memory = Sampling(temperature=0, max_new_tokens=6, **options), PrefixCache()
    whole = turn(model, tokenizer, tokenizer("The old lobster").input_ids, sampling, memory)
    whole = turn(model, tokenizer, [*whole, 70, 71, 72], sampling, memory)
    whole = turn(model, tokenizer, [*whole[:-4], 75], sampling, memory)
    with reading(model) as counts:
        generate_text(model, tokenizer, [*whole, 76], sampling, memory=memory)
    assert max(counts) <= 2


def test_prefix_cache_works_with_halting(donor_folder: Path, tokenizer: Any) -> None:
    model = seeded(donor_folder)
    sampling, memory = Sampling(temperature=0, max_new_tokens=12, halt="entropy", halt_threshold=5.6), PrefixCache()
    whole = turn(model, tokenizer, tokenizer("The old lobster").input_ids, sampling, memory)
    assert len(set(memory.cache.cycles_used.flatten().tolist())) > 1  # or this test is vacuous
    whole = turn(model, tokenizer, [*whole, 70, 71, 72], sampling, memory)
    whole = turn(model, tokenizer, [*whole[:-4], 75], sampling, memory)
    with reading(model) as counts:
        generate_text(model, tokenizer, [*whole, 76], sampling, memory=memory)
    assert max(counts) == 2


def test_prefix_cache_works_with_the_last_policy(model: Any, tokenizer: Any) -> None:
    """Tokens of one prefill attend to each other at every cycle, and to earlier ones at their last, so here the turns matter."""
    sampling, memory = Sampling(temperature=0, max_new_tokens=6, cache_policy="last"), PrefixCache()
    whole = turn(model, tokenizer, tokenizer("The old lobster").input_ids, sampling, memory)
    with reading(model) as counts:
        generate_text(model, tokenizer, [*whole, 70, 71], sampling, memory=memory)
    assert counts[0] == 3


def test_another_model_shares_nothing(model: Any, sliding: Any, tokenizer: Any) -> None:
    memory = PrefixCache()
    whole = turn(model, tokenizer, [5, 6, 7], GREEDY, memory)
    turn(sliding, tokenizer, whole, GREEDY, memory)


def test_full_sliding_window_can_extend_but_not_crop(sliding: Any, tokenizer: Any) -> None:
    memory = PrefixCache()
    whole = turn(sliding, tokenizer, [5, 6, 7, 8, 9, 10, 11, 12], GREEDY, memory)
    with reading(sliding) as counts:
        generate_text(sliding, tokenizer, [*whole, 70], GREEDY, memory=memory)
    assert counts[0] == 2
    with reading(sliding) as counts:
        back = [*whole[:-2], 71]
        got = generate_text(sliding, tokenizer, back, GREEDY, memory=memory)
    assert counts[0] == len(back)
    assert got.token_ids == generate_text(sliding, tokenizer, back, GREEDY).token_ids


def test_failed_run_drops_the_cache(model: Any, tokenizer: Any) -> None:
    memory = PrefixCache()
    whole = turn(model, tokenizer, [5, 6, 7], GREEDY, memory)

    def fail(piece: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate_text(model, tokenizer, [*whole, 70], GREEDY, on_text=fail, memory=memory)
    turn(model, tokenizer, [*whole, 71], GREEDY, memory)


def test_stopped_run_keeps_the_cache(model: Any, tokenizer: Any) -> None:
    memory = PrefixCache()
    stops = iter([False, True])
    got = generate_text(model, tokenizer, [5, 6, 7], GREEDY, should_stop=lambda: next(stops), memory=memory)
    with reading(model) as counts:
        generate_text(model, tokenizer, [5, 6, 7, *got.token_ids, 70], GREEDY, memory=memory)
    assert counts[0] == 2


def test_forgetting(model: Any, tokenizer: Any) -> None:
    memory = PrefixCache()
    whole = turn(model, tokenizer, [5, 6, 7], GREEDY, memory)
    memory.forget()
    with reading(model) as counts:
        generate_text(model, tokenizer, whole, GREEDY, memory=memory)
    assert counts[0] == len(whole)


def test_prefix_cache_does_not_touch_the_random_state(model: Any, tokenizer: Any) -> None:
    drawn, memory = Sampling(temperature=1.0, max_new_tokens=6), PrefixCache()
    first = generate_text(model, tokenizer, [5, 6, 7], drawn, seed=1, memory=memory)
    again = [5, 6, 7, *first.token_ids, 70]
    state = torch.get_rng_state()
    with_memory = generate_text(model, tokenizer, again, drawn, seed=2, memory=memory)
    assert with_memory.token_ids == generate_text(model, tokenizer, again, drawn, seed=2).token_ids
    assert torch.equal(state, torch.get_rng_state())
