"""Items as text, the positions of their labels, their tokenization, and which answers count as right."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from recursify.data.tasks import Item, as_text, generate, is_right, label_ends, prompt
from tests.support.tiny import make_qwen_tokenizer, make_tiny_tokenizer

GSM = Item("How many clips?", "72", 2, "number", "48 / 2 = 24\n48 + 24 = 72")


def tokenizer_of(which: str) -> Any:
    return make_tiny_tokenizer() if which == "tiny" else make_qwen_tokenizer()


def items_of_all_tasks() -> list[Item]:
    made = [generate(name, 4, 5, 0, split="test") for name in ("permutations", "pointers", "addition", "booleans")]
    return [item for items in [*made, generate("permutations", 4, 5, 0, group="S5")] for item in items]


def test_as_text() -> None:
    assert prompt(GSM) == "Question: How many clips?\nAnswer:"
    assert as_text(GSM) == "Question: How many clips?\nAnswer: 72"
    assert as_text(GSM, with_steps=True) == "Question: How many clips?\nAnswer: 48 / 2 = 24\n48 + 24 = 72\n#### 72"
    plain = Item("Where?", "kitchen", 1)
    assert as_text(plain, with_steps=True) == as_text(plain)


@pytest.mark.parametrize("item", [GSM, *items_of_all_tasks()[::3]], ids=lambda item: item.question[:20])
def test_text_is_prompt_plus_correct_answer(item: Item) -> None:
    for steps in (False, True):
        text = as_text(item, with_steps=steps)
        assert text.startswith(prompt(item)) and is_right(item, text.removeprefix(prompt(item)))


def test_label_positions() -> None:
    word = Item("a b a", "C", 3, labels=("A", "B", "C"))
    assert [prompt(word)[:end] for end in label_ends(word)] == ["Question: a", "Question: a b", "Question: a b a"]
    walk = generate("pointers", 3, 1, 0)[0]
    ends = label_ends(walk)
    assert len(ends) == len(walk.labels) == 3 and all(prompt(walk)[:end].endswith(" next") for end in ends)
    assert prompt(walk)[ends[0] : ends[-1]] == " next next" and prompt(walk)[ends[-1] :] == "\nAnswer:"
    assert label_ends(GSM) == []


@pytest.mark.parametrize("which", ["tiny", "qwen"])
def test_tokens(which: str) -> None:
    """Ids of a prompt begin those of the text; no token spans two symbols, or the position of a label."""
    tokenizer = tokenizer_of(which)
    for item in items_of_all_tasks():
        text = as_text(item)
        encoded = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
        ids = tokenizer(prompt(item), add_special_tokens=False).input_ids
        assert encoded.input_ids[: len(ids)] == ids and len(encoded.input_ids) > len(ids)
        assert all(len(text[start:end].split()) <= 1 for start, end in encoded.offset_mapping)
        assert set(label_ends(item)) <= {end for _, end in encoded.offset_mapping}


def test_symbols_are_single_tokens_of_qwen2() -> None:
    """As far as its vocabulary is known here: `tiny.QWEN_WORDS`, and digits, each of which stands alone."""
    tokenizer = tokenizer_of("qwen")
    for item in items_of_all_tasks():
        for symbol in {*item.question.split(), *item.labels}:
            tokens = [token for token in tokenizer.tokenize(f" {symbol}") if token != "Ġ"]  # a space before a digit is a token of its own
            assert len(tokens) == (2 if len(symbol) == 2 and symbol[1].isdigit() else 1)


WORDS = [
    ("kitchen", "kitchen"),
    ("kitchen", " Kitchen.\n"),
    ("kitchen", "\n\n  kitchen. Mary is there."),
    ("kitchen", "kitchen\nMary went back."),
    ("kitchen", '"kitchen"\r\nMary'),
    ("kitchen", "I think.\n#### kitchen"),
    ("kitchen", "kitchen\n\nQuestion: Where is Mary?\nAnswer: garden"),
    ("kitchen", "kitchen\n\nQuestion: Where is Mary?\nAnswer: #### garden"),
    ("s,w", "s, w"),
    ("Tom is a lempus.", "tom  is a lempus"),
    ("St. Louis", "St. Louis. It lies by a river."),
    ("I_JUMP I_RUN", "I_JUMP  I_RUN"),
    ("kitchen", "kitchen! Mary is there."),
    ("kitchen", "kitchen? Yes"),
    ("kitchen", "kitchen.\tMary is there."),
    ("kitchen", "`kitchen`"),
    ("kitchen", "'kitchen';"),
    ("kitchen", "kitchen:"),
    ("kitchen", "KITCHEN!?"),
    ("kitchen", "#### kitchen\n#### garden"),
    ("s , w", "S,W"),
]
NOT_WORDS = [
    ("kitchen", ""),
    ("kitchen", "####"),
    ("kitchen", "garden"),
    ("kitchen", "kitchens"),
    ("kitchen", "the kitchen"),
    ("kitchen", "garden. kitchen"),
    ("kitchen", "garden\nkitchen"),
    ("kitchen", "kitchen #### garden"),
    ("s,w", "w,s"),
    ("St. Louis", "St. Paul"),
    ("I_JUMP I_RUN", "I_JUMP"),
    ("I_JUMP", "I_JUMP I_RUN"),
    ("kitchen", "kitchen.garden"),
    ("kitchen", "a kitchen. garden"),
    ("a b", "ab"),
    ("kitchen", "(kitchen)"),
]
NUMBERS = [
    ("72", "72"),
    ("72", " $72.00\n"),
    ("1,080", "1080"),
    ("1080", "$1,080."),
    ("72", "48 and 24 more are 72 clips."),
    ("72", "48/2=24\n48+24=72"),
    ("72", "24\n#### 72 of 100"),
    ("72", "72\nQuestion: How many are 3?\nAnswer: 3"),
    ("72", "72\n\nThat took 3 minutes."),
    ("72", "72\n \t\nThat took 3 minutes."),
    ("72", "72\r\n\r\nThat took 3 minutes."),
    ("72", "\n\n72\n\n3"),
    ("72", "24 #### 72 #### 30"),
    ("72", "72 ٣"),
    ("3", "a[8]-3"),
    ("3", "x-3"),
    ("-0", "0"),
    ("1234", "1,234,5"[:5]),
    ("3", "5-3"),
    ("3", "(8)-3"),
    ("-3", "it is -3"),
    ("-3", "-$3"),
    ("-3", "$-3"),
    ("0.5", ".50"),
    ("109,200,000", "109200000"),
    ("12345678901234567890123456789012345", "12345678901234567890123456789012345.0"),
    ("-12345678901234567890123456789012345", "-12345678901234567890123456789012345"),
]
NOT_NUMBERS = [
    ("72", ""),
    ("72", "seventy-two"),
    ("72", "72\n#### none"),
    ("72", "72 of 100"),
    ("72", "72 #### 24"),
    ("72", "7 2"),
    ("72", "-72"),
    ("72", "72.5"),
    ("1080", "1,0,80"),
    ("12345", "1,2345"),
    ("1", "1,2345"),
    ("None", "none"),
    ("-12345678901234567890123456789012345", "-12345678901234567890123456789012346"),
]
DIGITS = [("1 3 2", "1 3 2"), ("1 3 2", "132"), ("1 3 2", " 132.\n5"), ("1 0 8 0", "1,080"), ("1 3 2", "1 3 2\n\nQuestion: 1 + 1")]
NOT_DIGITS = [("1 3 2", ""), ("1 3 2", "1 3"), ("1 3 2", "0 1 3 2"), ("1 3 2", "1 3 2 0"), ("1 3 2", "85 + 47 = 132")]


@pytest.mark.parametrize(
    ("match", "answer", "text", "right"),
    [
        *(("words", *pair, True) for pair in WORDS),
        *(("words", *pair, False) for pair in NOT_WORDS),
        *(("number", *pair, True) for pair in NUMBERS),
        *(("number", *pair, False) for pair in NOT_NUMBERS),
        *(("digits", *pair, True) for pair in DIGITS),
        *(("digits", *pair, False) for pair in NOT_DIGITS),
    ],
)
def test_correct_answers(match: Any, answer: str, text: str, right: bool) -> None:
    assert is_right(Item("?", answer, 1, match), text) is right


words = st.lists(st.text("abcXYZ_19", min_size=1, max_size=5), min_size=1, max_size=6).map(" ".join)
numbers = st.one_of(st.integers(), st.decimals(allow_nan=False, allow_infinity=False, places=3))
endings = st.sampled_from(["", "\n", ".", ".\nMore 7.", "\n\nQuestion: 5\nAnswer: 6", "\n\n8"])


@given(answer=words, ending=endings)
def test_own_answer_is_right_whatever_follows(answer: str, ending: str) -> None:
    for before in (" ", "\n", "Steps. 4\n#### "):
        assert is_right(Item("?", answer, 1), before + answer + ending)


@given(answer=words, other=words, ending=endings)
def test_another_answer_is_wrong(answer: str, other: str, ending: str) -> None:
    assume(answer.casefold() != other.casefold())
    assert not is_right(Item("?", answer, 1), other + ending)


@given(answer=numbers, other=numbers, ending=st.sampled_from(["", ".", " apples", "\n\n8", "\nQuestion: 5"]))
def test_numbers_are_compared_by_value(answer: Decimal, other: Decimal, ending: str) -> None:
    item = Item("?", f"{answer:f}", 1, "number")
    for written in (f"{answer:f}", f"{answer:,f}", f"so it is ${answer:,f}", f"5 of 6\n#### {answer:f}"):
        assert is_right(item, written + ending)
    assert is_right(item, f"{other:f}{ending}") is (answer == other)


@given(total=st.integers(min_value=0), other=st.integers(min_value=0))
def test_digits_are_compared_without_spaces(total: int, other: int) -> None:
    item = Item("?", " ".join(str(total)), 3, "digits")
    assert is_right(item, str(total)) and is_right(item, " ".join(str(total))) and is_right(item, f"{total:,}.")
    assert is_right(item, " ".join(str(other))) is (total == other)
