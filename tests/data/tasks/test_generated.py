"""Generated tasks: every answer against a slow evaluation of its own, difficulty, balance, splits, and the same items on every machine."""

from __future__ import annotations

import hashlib
import itertools
import math
import re
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recursify.data.tasks import GENERATED, Item, as_text, generate, is_right
from recursify.errors import UserError

TASKS: list[tuple[str, int, dict[str, Any]]] = [
    ("permutations", 2, {}),
    ("permutations", 12, {}),
    ("permutations", 12, {"group": "S5"}),
    ("pointers", 1, {}),
    ("pointers", 5, {"nodes": 6}),
    ("pointers", 25, {"nodes": 26}),
    ("addition", 1, {}),
    ("addition", 9, {}),
    ("booleans", 1, {}),
    ("booleans", 6, {}),
]
every_task = pytest.mark.parametrize(("name", "difficulty", "options"), TASKS, ids=lambda value: str(value))


def products(word: str, places: int) -> list[str]:
    """The products of a word's beginnings, composed as permutation matrices and named by counting."""
    swaps = list(itertools.combinations(range(places), 2))
    state, names = [[int(i == j) for j in range(places)] for i in range(places)], []
    for letter in word.split():
        index = ord(letter) - ord("a")
        source = list(range(places))
        if index < len(swaps):
            i, j = swaps[index]
            source[i], source[j] = j, i
        else:
            by = index - len(swaps) + 1
            source = [(place + by) % places for place in range(places)]
        matrix = [[int(column == source[row]) for column in range(places)] for row in range(places)]
        state = [[sum(matrix[i][k] * state[k][j] for k in range(places)) for j in range(places)] for i in range(places)]
        names.append(named(tuple(row.index(1) for row in state)))
    return names


def named(arrangement: tuple[int, ...]) -> str:
    rank = sum(other < arrangement for other in itertools.permutations(range(len(arrangement))))
    if len(arrangement) == 3:
        return "ABCDEF"[rank]
    within, first = rank % 24, arrangement[0] + 1
    return f"{chr(ord('A') + within)}{first}"


def walked(question: str) -> list[str]:
    arrows, _, walk = question.partition(" ; ")
    pairs = [arrow.split(" > ") for arrow in arrows.split(" , ")]
    node, *hops = walk.split()
    visited = []
    for hop in hops:
        assert hop == "next"
        (node,) = [end for start, end in pairs if start == node]
        visited.append(node)
    return visited


def slow_labels(name: str, item: Item, options: dict[str, Any]) -> list[str]:
    """The labels at the last tokens of the question; of tasks without labels, the answer."""
    if name == "permutations":
        return products(item.question, 5 if options.get("group") == "S5" else 3)
    if name == "pointers":
        return walked(item.question)
    if name == "addition":
        return [" ".join(str(eval(item.question.replace(" ", ""))))]
    return [str(eval(item.question))]


@every_task
@pytest.mark.parametrize("split", ["train", "test"])
def test_every_answer(name: str, difficulty: int, options: dict[str, Any], split: str) -> None:
    items = generate(name, difficulty, 60, seed=3, split=split, **options)
    assert len(items) == 60
    for item in items:
        due = slow_labels(name, item, options)
        assert item.answer == due[-1] and item.difficulty == difficulty
        assert item.labels == (tuple(due) if name in ("permutations", "pointers") else ())
        assert is_right(item, f" {item.answer}") and not is_right(item, "")
        assert as_text(item).isascii() and "  " not in item.question


@every_task
def test_items_are_seeded_and_prefix_stable(name: str, difficulty: int, options: dict[str, Any]) -> None:
    many = generate(name, difficulty, 300, seed=7, **options)
    assert generate(name, difficulty, 300, seed=7, **options) == many
    assert generate(name, difficulty, 4, seed=7, **options) == many[:4]
    assert generate(name, difficulty, 300, seed=8, **options) != many


PINNED = {
    "permutations 2 {}": "6f6ee1434c28375b",
    "permutations 12 {}": "2b7861cceb90f3c6",
    "permutations 12 {'group': 'S5'}": "f07ad073afdc13d9",
    "pointers 1 {}": "6001aedbae79fb19",
    "pointers 5 {'nodes': 6}": "45a936ad27338369",
    "pointers 25 {'nodes': 26}": "2caa3a2be35bd31e",
    "addition 1 {}": "84ad0ab5c0e35016",
    "addition 9 {}": "3c119bef2bde4aa3",
    "booleans 1 {}": "e0df7e2301cf3bae",
    "booleans 6 {}": "a485a9778821db57",
}


def digest(name: str, difficulty: int, options: dict[str, Any]) -> str:
    items = [*generate(name, difficulty, 20, 0, **options), *generate(name, difficulty, 20, 1, split="test", **options)]
    return hashlib.sha256("\n".join(f"{item.question} = {item.answer} {' '.join(item.labels)}" for item in items).encode()).hexdigest()[:16]


def test_items_are_stable_across_versions() -> None:
    """Recorded results are only comparable on the same items: a change here invalidates them."""
    found = {f"{name} {difficulty} {options}": digest(name, difficulty, options) for name, difficulty, options in TASKS}
    assert found == PINNED


# Small spaces, whole: what is in them, counted by hand.
SPACES: list[tuple[str, int, dict[str, Any], int]] = [
    ("permutations", 2, {}, 5**2),
    ("permutations", 4, {}, 5**4),
    ("permutations", 2, {"group": "S5"}, 14**2),
    ("addition", 1, {}, 10**2),
    ("booleans", 1, {}, 2 + 4 + 4),
    ("booleans", 2, {}, 10 + 100 + 100),
    # one of 3 starts; mappings one-to-one in which it does not point to itself (2 * 2); 3! orders of the arrows
    ("pointers", 1, {"nodes": 3}, 3 * 4 * 6),
]


@pytest.mark.parametrize(("name", "difficulty", "options", "size"), SPACES, ids=lambda value: str(value))
def test_small_tasks_are_exhausted_before_repeating(name: str, difficulty: int, options: dict[str, Any], size: int) -> None:
    train, test = (
        {item.question for item in generate(name, difficulty, 4 * size, 0, split=split, **options)} for split in ("train", "test")
    )
    assert len(train | test) == size and not train & test
    assert 0.05 < len(test) / size < 0.4
    for split, questions in (("train", train), ("test", test)):
        again = generate(name, difficulty, 2 * len(questions) + 1, 9, split=split, **options)
        counts = Counter(item.question for item in again)
        assert set(counts) == questions and sorted(counts.values())[-2:] == [2, 3]
        first = generate(name, difficulty, len(questions), 9, split=split, **options)
        assert {item.question for item in first} == questions


@settings(max_examples=15, deadline=None)
@given(seeds=st.tuples(st.integers(), st.integers()), task=st.sampled_from(SPACES))
def test_train_and_test_splits_are_disjoint_for_all_seeds(seeds: tuple[int, int], task: tuple[str, int, dict[str, Any], int]) -> None:
    name, difficulty, options, _ = task
    train = {item.question for item in generate(name, difficulty, 60, seeds[0], **options)}
    test = {item.question for item in generate(name, difficulty, 15, seeds[1], split="test", **options)}
    assert not train & test


def test_training_sequences_have_no_test_prefix() -> None:
    """Its labels would tell the answer."""
    beginnings = {item.question[:length] for item in generate("permutations", 9, 3000, 0) for length in range(7, 18)}
    for length in range(4, 10):
        assert not beginnings & {item.question for item in generate("permutations", length, 100, 0, split="test")}


def test_no_mapping_of_a_test_item_is_trained_on() -> None:
    """With other hops, another start or in another order it would be nearly the same question."""

    def mappings(split: str) -> set[frozenset[str]]:
        return {
            frozenset(item.question.partition(" ; ")[0].split(" , "))
            for hops in (1, 2, 3)
            for item in generate("pointers", hops, 400, 0, split=split, nodes=5)
        }

    train, test = mappings("train"), mappings("test")
    assert len(train) + len(test) > 100 and not train & test


def test_swapped_summands_are_in_the_same_split() -> None:
    train, test = (
        {tuple(sorted(item.question.split(" + "))) for item in generate("addition", 1, 90, 0, split=s)} for s in ("train", "test")
    )
    assert len(train) + len(test) == 55 and not train & test


@pytest.mark.parametrize("group", ["S3", "S5"])
def test_moves_and_states_are_uniform(group: str) -> None:
    items = generate("permutations", 8, 6000, 0, group=group)
    letters = Counter(letter for item in items for letter in item.question.split()[4:])
    even = 4 * len(items) / len(letters)
    assert len(letters) == {"S3": 5, "S5": 14}[group] and all(abs(n - even) < 0.1 * even for n in letters.values())
    for position in (-1, -3):
        products = Counter(item.labels[position] for item in items)
        even = len(items) / len(products)
        assert len(products) == {"S3": 6, "S5": 120}[group] and all(abs(n - even) < 5 * math.sqrt(even) for n in products.values())


@pytest.mark.parametrize("hops", [1, 4, 8])
def test_pointers(hops: int) -> None:
    items = generate("pointers", hops, 1500, 0, nodes=16)
    first, before = 0, 0
    for item in items:
        pairs = [arrow.split(" > ") for arrow in item.question.partition(" ; ")[0].split(" , ")]
        start = item.question.partition(" ; ")[2][0]
        assert sorted(a for a, _ in pairs) == sorted(b for _, b in pairs) == list("abcdefghijklmnop")
        assert len({start, *item.labels}) == hops + 1, "a walk that comes back is shorter than it says"
        first += pairs[0][1] == item.answer
        before += dict((b, a) for a, b in pairs)[start] == item.answer
    answers = Counter(item.answer for item in items)
    assert len(answers) == 16 and max(answers.values()) < 1.5 * 1500 / 16
    assert first < 1.5 * 1500 / 16
    assert abs(before / 1500 - 1 / (16 - hops)) < 0.04


@pytest.mark.parametrize("digits", [1, 2, 7])
def test_carries_are_balanced(digits: int) -> None:
    carries: Counter[int] = Counter()
    items = generate("addition", digits, 40 if digits == 1 else 2000, 0)
    for item in items:
        one, other = item.question.replace(" ", "").split("+")
        assert len(one) == len(other) == digits and (digits == 1 or "0" not in (one[0], other[0]))
        carries[sum(int(one[-n:]) + int(other[-n:]) >= 10**n for n in range(1, digits + 1))] += 1
    even = len(items) / (digits + 1)
    assert set(carries) == set(range(digits + 1)) and all(abs(n - even) < 0.3 * even for n in carries.values())


@pytest.mark.parametrize("depth", [2, 5, 9])
def test_booleans(depth: int) -> None:
    items = generate("booleans", depth, 100 if depth == 2 else 800, 0)
    trues: Counter[str] = Counter()
    operations: Counter[str] = Counter()
    for item in items:
        level = 0
        for word in item.question.split():
            level += (word == "(") - (word == ")")
            assert word not in ("True", "False") or level == depth, "a literal that is nearer than the depth says"
        outermost = "not" if item.question.startswith("( not") else outer(item.question)
        operations[outermost] += 1
        trues[outermost] += item.answer == "True"
    assert 0.4 < sum(trues.values()) / len(items) < 0.6
    if depth > 2:
        assert all(0.4 < trues[op] / operations[op] < 0.6 and operations[op] > 200 for op in ("not", "and", "or"))


def outer(expression: str) -> str:
    level = 0
    for word in expression.split():
        level += (word == "(") - (word == ")")
        if level == 1 and word in ("and", "or"):
            return word
    raise AssertionError(expression)


WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("sorting", {}, "no generated task 'sorting'; there are permutations, pointers, addition, booleans, chains, facts"),
    ("addition", {"difficulty": 0}, "addition: expected a difficulty of at least 1, got 0"),
    ("booleans", {"difficulty": 13}, "booleans: expected a difficulty from 1 to 12, got 13"),
    ("pointers", {"count": 0}, "pointers: expected a count of at least 1, got 0"),
    ("booleans", {"split": "valid"}, "booleans: expected the split train or test, got 'valid'"),
    ("permutations", {"group": "S4"}, "permutations: expected the group S3 or S5, got 'S4'"),
    ("pointers", {"nodes": 27}, "pointers: expected 2 to 26 nodes, got 27"),
    ("pointers", {"nodes": 1}, "pointers: expected 2 to 26 nodes, got 1"),
    ("pointers", {"nodes": 3}, "pointers: expected fewer hops than nodes, got 3 hops with 3 nodes"),
    ("permutations", {"nodes": 3}, "permutations: unknown option 'nodes'; it has difficulty, count, seed, group, unscored, offset"),
    ("addition", {"group": "S3"}, "addition: unknown option 'group'; it has difficulty, count, seed"),
]


@pytest.mark.parametrize(("name", "wrong", "message"), WRONG, ids=lambda value: str(value)[:40])
def test_refusals(name: str, wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        generate(name, **({"difficulty": 3, "count": 5, "seed": 0} | wrong))


def test_split_without_items() -> None:
    """Two nodes have one mapping without a walk of length 0."""

    def made(split: str) -> int | str:
        try:
            return len(generate("pointers", 1, 9, 0, split=split, nodes=2))
        except UserError as error:
            return str(error)

    found = {split: made(split) for split in ("train", "test")}
    (empty,) = [split for split, result in found.items() if isinstance(result, str)]
    assert found[empty] == f"pointers: no item of difficulty 1 falls to the split {empty}; expected a higher difficulty"
    assert 9 in found.values()


def test_match_rules_and_maximum_difficulties() -> None:
    assert {name: generate(name, 2, 1, 0)[0].match for name in GENERATED} == {
        "permutations": "words", "pointers": "words", "addition": "digits", "booleans": "words", "chains": "words", "facts": "words",
    }  # fmt: skip
    assert generate("booleans", 12, 1, 0)[0].difficulty == 12 and len(generate("pointers", 1, 1, 0, nodes=26)) == 1


def test_registry_has_every_task() -> None:
    for name, make in GENERATED.items():
        assert make.__name__ == name and generate(name, 2, 3, 0) == make(2, 3, 0)
