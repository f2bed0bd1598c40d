"""The types of settings, wherever a value comes from."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recursify.utils.typed import spelt, typed

Choice = Literal["adamw", "muon"]
Dtype = Literal["auto", "bfloat16", "float16"]


@pytest.mark.parametrize(
    ("value", "hint", "expected"),
    [
        (3, int, 3), (np.int64(3), int, 3), (2, float, 2), (np.float32(0.5), float, 0.5), (True, bool, True), ("a", str, "a"),
        (Path("a/b"), str, "a/b"), ([1, 2], tuple[int, ...], (1, 2)), ((1, 2.5), tuple[float, ...], (1, 2.5)), (None, int | None, None),
        (3, int | None, 3), ("muon", Choice, "muon"), ("muon", Choice | None, "muon"), ([], tuple[str, ...], ()),
    ],
)  # fmt: skip
def test_what_fits_is_of_the_type_of_the_field(value: Any, hint: Any, expected: Any) -> None:
    found = typed(value, hint)
    assert found == expected and type(found) is type(expected)
    if isinstance(found, tuple):
        assert [type(item) for item in found] == [type(item) for item in expected]


@pytest.mark.parametrize(
    ("value", "expected"), [("bf16", "bfloat16"), ("FP16", "float16"), ("fp32", None), ("Auto", "auto"), ("int8", None)]
)
def test_choices_have_the_names_of_others_and_may_be_in_capitals(value: str, expected: str | None) -> None:
    for hint in (Dtype, Dtype | None):
        if expected is not None:
            assert typed(value, hint) == spelt(value, hint) == expected
            continue
        for read in (typed, spelt):
            with pytest.raises(TypeError, match="^one of auto, bfloat16, float16$"):
                read(value, hint)


@pytest.mark.parametrize("value", [["muon"], {"a": 1}, True, 1, None])
def test_a_choice_is_text(value: Any) -> None:
    with pytest.raises(TypeError, match="^one of adamw, muon$"):
        typed(value, Choice)


@pytest.mark.parametrize(
    ("value", "hint", "message"),
    [
        (2.5, int, "a whole number"), (3.0, int, "a whole number"), ("3", int, "a whole number"), (True, int, "a whole number"),
        ("1e-3", float, "a number"), (True, float, "a number"), (None, float, "a number"),
        ("no", bool, "true or false"), (0, bool, "true or false"),
        (5, str, "text"), (None, str, "text"), ("1 2", tuple[int, ...], "a list"), ([1, "2"], tuple[int, ...], "a whole number"),
        ("sgd", Choice, "one of adamw, muon"), (2.5, int | None, "a whole number"), ([1.5], tuple[int, ...] | None, "a whole number"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_in_plain_words(value: Any, hint: Any, message: str) -> None:
    with pytest.raises(TypeError, match=f"^{message}$"):
        typed(value, hint)


@given(st.floats(allow_nan=False))
def test_from_text_a_number_may_be_a_string(value: float) -> None:
    """YAML 1.1 reads 1e-5 as a string."""
    assert typed(repr(value), float, text=True) == typed(repr(value), float | None, text=True) == value
    with pytest.raises(TypeError):
        typed(repr(value), float)
    with pytest.raises(TypeError, match="a whole number"):
        typed(repr(value), int, text=True)


def test_from_text_what_is_to_be_text_is_quoted() -> None:
    with pytest.raises(TypeError, match=r"text \(in quotes, where YAML reads it as something else\)"):
        typed(5, str, text=True)
