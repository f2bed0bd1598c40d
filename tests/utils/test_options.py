"""Settings made from Python: names that are not fields are refused, with the name that was meant."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import pytest

from recursify import FitSettings
from recursify.errors import UserError


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("learning_rate", "FitSettings has no learning_rate; it is lr here"),
        ("per_device_train_batch_size", "FitSettings has no per_device_train_batch_size; it is batch_size here"),
        ("batchsize", "FitSettings has no batchsize; did you mean batch_size?"),
        ("zzz", "FitSettings has no zzz"),
    ],
)
def test_unknown_settings_are_refused(name: str, message: str) -> None:
    with pytest.raises(UserError) as refused:
        FitSettings(**{name: 1})
    assert str(refused.value) == message


def test_settings_can_be_copied() -> None:
    settings = FitSettings(lr=3e-4)
    assert pickle.loads(pickle.dumps(settings)) == copy.deepcopy(settings) == dataclasses.replace(FitSettings(), lr=3e-4) == settings
