"""Reference chains and fact chains: every answer and every hop against a reader of the question, splits, distractors, words."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from recursify.data.tasks import Item, generate, is_right
from recursify.data.tasks.in_words import PEOPLE, PLACES, WORDS
from recursify.errors import UserError

QWEN = Path(__file__).parents[4] / "shared" / "data" / "qwen2_tokenizer"


def followed(question: str) -> list[str]:
    *statements, asked = question.split(" ; ")
    stands_for = dict(statement.split(" = ") for statement in statements)
    assert len(stands_for) == len(statements), "a name is set twice"
    name, visited = asked.removesuffix(" ?"), []
    while name in stands_for:
        name = stands_for[name]
        visited.append(name)
    return visited


def related(question: str) -> list[str]:
    told = {(a, relation): b for a, relation, b in re.findall(r"(\w+)'s (\w+) is (\w+)\.", question)}
    homes = dict(re.findall(r"(\w+) lives in (\w+)\.", question))
    *relations, name = re.fullmatch(r".* Where does (.*) live\?", question)[1].replace("the ", "").split(" of ")  # type: ignore[index]
    visited = []
    for relation in reversed(relations):
        name = told[name, relation]
        visited.append(name)
    return [*visited, homes[name]]


READERS = {"chains": followed, "facts": related}


@given(st.sampled_from(["chains", "facts"]), st.integers(1, 6), st.integers(0, 10**6), st.sampled_from(["train", "test"]))
@settings(max_examples=60, deadline=None)
def test_every_answer_and_every_hop(name: str, difficulty: int, seed: int, split: str) -> None:
    for item in generate(name, difficulty, 5, seed, split=split):
        reached = READERS[name](item.question)
        assert tuple(reached) == item.reached and len(reached) == difficulty == len(set(reached))
        assert item.answer == reached[-1] and is_right(item, f" {item.answer}\n")
        assert not is_right(item, " nobody\n")


@pytest.mark.parametrize(("name", "options"), [("chains", {"chains": 4}), ("facts", {"people": 9})])
def test_no_item_of_one_split_is_in_the_other(name: str, options: dict[str, int]) -> None:
    train, test = (generate(name, 3, 300, 1, split=split, **options) for split in ("train", "test"))
    assert len({item.question for item in train}) == 300

    def ways(items: list[Item]) -> set[tuple[str, ...]]:
        return {item.reached for item in items}

    assert not ways(train) & ways(test)
    assert train == generate(name, 3, 300, 1, **options) and train[:10] == generate(name, 3, 10, 1, **options)


def test_chains_are_of_one_length_and_every_name_is_set_after_what_it_stands_for() -> None:
    places = Counter()
    for item in generate("chains", 5, 200, 0, chains=4):
        *statements, asked = item.question.split(" ; ")
        assert len(statements) == 4 * 5
        known = set()
        for statement in statements:
            name, other = statement.split(" = ")
            known.add(name)
            assert other not in {each.split(" = ")[0] for each in statements} or other in known
        last = next(place for place, each in enumerate(statements) if each.startswith(asked.removesuffix("?")))
        places[last] += 1
    assert len(places) > 8  # where the chain ends in the text says nothing


def test_other_people_have_the_same_relations() -> None:
    for item in generate("facts", 4, 50, 0, people=7):
        told = Counter(re.findall(r"'s (\w+) is", item.question))
        assert sorted(told.values()) == [7, 7] and len(re.findall("lives in", item.question)) == 7


def test_words_are_one_token_of_the_real_vocabulary() -> None:
    if not QWEN.is_dir():
        pytest.skip("needs the tokenizer of Qwen2, which is not here")
    tokenizer = AutoTokenizer.from_pretrained(QWEN)
    words = [*WORDS, *PEOPLE, *PLACES]
    assert len(set(words)) == len(words) > 400
    assert [word for word in words if len(tokenizer(f" {word}").input_ids) != 1] == []


@pytest.mark.parametrize(
    ("name", "difficulty", "options", "message"),
    [
        ("chains", 3, {"chains": 0}, "chains: expected 1 to 75 chains of 3 hops, since there are 302 words, got 0"),
        ("chains", 100, {"chains": 3}, "chains: expected 1 to 2 chains of 100 hops"),
        ("facts", 3, {"people": 99}, "facts: expected 1 to 40 people, got 99"),
        ("facts", 7, {}, "facts: expected at most as many hops as people, got 7 hops with 6 people"),
        ("chains", 0, {}, "chains: expected a difficulty of at least 1, got 0"),
    ],
)
def test_bad_arguments(name: str, difficulty: int, options: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        generate(name, difficulty, 3, 0, **options)
