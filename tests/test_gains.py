"""The start gain: the largest that costs next to nothing on held-out text, and when it is looked for at all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_training import SEQ_LEN, blocks, recursive, run

from recursify.errors import UserError
from recursify.training.gains import CANDIDATES, MAX_COST, all_zero, calibrate, injections, set_gains


def gains(model: Any) -> set[float]:
    return {round(value, 6) for module in injections(model) for part in module.gains(torch.float32) for value in part.tolist()}


def test_setting_gains() -> None:
    model = recursive(gain_init=0.0)
    assert all_zero(model) and gains(model) == {0.0}
    set_gains(model, 0.15)
    assert not all_zero(model) and gains(model) == {0.15}
    bare = recursive(injection="sum_norm", gain_init=0.0)
    assert injections(bare) == [] and not all_zero(bare)


@pytest.mark.parametrize(("slope", "chosen", "tried"), [(0.0, 0.45, 1), (0.14, 0.1, 3), (9.0, 0.05, 4), (-1.0, 0.45, 1)])
def test_the_largest_that_costs_at_most_the_bound(slope: float, chosen: float, tried: int) -> None:
    """A loss that rises with the gain: 3 + slope * gain; at 0.14 a gain of 0.1 costs 0.014 and one of 0.2 costs 0.028."""
    model = recursive(gain_init=0.0)
    gain, sweep = calibrate(model, lambda: 3.0 + slope * max(gains(model)))
    assert gain == chosen and gains(model) == {chosen}
    assert [g for g, _ in sweep] == list(CANDIDATES[:tried])
    assert [cost for _, cost in sweep] == pytest.approx([slope * g for g in CANDIDATES[:tried]], abs=1e-6)


def start_of(model: Any, capsys: pytest.CaptureFixture[str], **changes: Any) -> tuple[set[float], str]:
    """The gains that a run begins with, and what it said."""
    run(model, lr=1e-12, gain_lr=1e-12, max_steps=1, **changes)
    return gains(model), capsys.readouterr().err


def knowing() -> Any:
    """A model that has learnt something at gain 0, and so has something to lose."""
    model = recursive(gain_init=0.0)
    run(model, train_blocks=blocks(24), num_epochs=4, lr=5e-3, start_gain=0.0, gain_lr=1e-12)
    set_gains(model, 0.0)
    return model


def test_a_converted_model_is_calibrated(capsys: pytest.CaptureFixture[str]) -> None:
    """And the choice is right: re-measured at the chosen gain and at the next larger one."""
    model, reference = knowing(), knowing()
    found, said = start_of(model, capsys)
    held = torch.tensor([row["input_ids"] for row in blocks(5, seed=2)])

    def cost(gain: float) -> float:
        losses = []
        for value in (0.0, gain):
            set_gains(reference, value)
            with torch.no_grad():
                losses.append(reference(held, labels=held).loss.item())
        return losses[1] - losses[0]

    (gain,) = found
    assert gain in CANDIDATES and gain < CANDIDATES[0]
    assert gain == CANDIDATES[-1] or cost(gain) <= MAX_COST
    assert cost(CANDIDATES[CANDIDATES.index(gain) - 1]) > MAX_COST
    assert f"starts from gain {gain:g}" in said and "--start_gain" in said and held.shape == (5, SEQ_LEN)


def test_learnt_gains_are_left_alone(capsys: pytest.CaptureFixture[str]) -> None:
    found, said = start_of(recursive(gain_init=0.3), capsys)
    assert found == {0.3} and "gain" not in said


def test_a_named_gain_is_taken(capsys: pytest.CaptureFixture[str]) -> None:
    for init in (0.0, 0.3):
        found, said = start_of(recursive(gain_init=init), capsys, start_gain=0.1)
        assert found == {0.1} and "gain" not in said


def test_bad_gains() -> None:
    with pytest.raises(UserError, match=r"--start_gain: expected a number between -0.45 and 0.45, got 0.5"):
        run(recursive(), start_gain=0.5)
    with pytest.raises(UserError, match=r"--start_gain: the loop of this model has no gains \(injection 'sum_norm'\)"):
        run(recursive(injection="sum_norm"), start_gain=0.1)
