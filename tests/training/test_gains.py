"""The start gain: the largest that costs next to nothing on held-out text, and when the sweep runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from recursify.errors import UserError
from recursify.network.modeling_recursive_llm import AnchoredInjection
from recursify.training import fit
from recursify.training import gains as gains_module
from recursify.training.gains import (
    CALIBRATION_TOKENS,
    CANDIDATES,
    MAX_COST,
    HeldOutLoss,
    all_zero,
    calibrate,
    injections,
    set_gains,
    sweep_length,
)
from recursify.training.loss_module import LossModule
from tests.support.runs import SEQ_LEN, blocks, recursive, run, settings
from tests.support.tiny import make_tiny_tokenizer


def gains(model: Any) -> set[float]:
    every = [module for module in model.modules() if isinstance(module, AnchoredInjection)]
    return {round(value, 6) for module in every for part in module.gains(torch.float32) for value in part.tolist()}


def test_setting_gains() -> None:
    model = recursive(gain_init=0.0)
    assert all_zero(model) and gains(model) == {0.0}
    set_gains(model, 0.15)
    assert not all_zero(model) and gains(model) == {0.15}
    bare = recursive(injection="sum_norm", gain_init=0.0)
    assert injections(bare) == [] and not all_zero(bare)


def test_one_non_zero_gain_skips_the_calibration() -> None:
    for index in range(4):
        model = recursive(gain_init=0.0)
        theta = [p for module in injections(model) for p in module.parameters()][index]
        with torch.no_grad():
            theta[-1] = 0.01
        assert not all_zero(model)


def test_sweep_properties() -> None:
    """The help of --start_gain and the guides say so."""
    assert (*CANDIDATES, MAX_COST, CALIBRATION_TOKENS) == (0.45, 0.2, 0.1, 0.05, 0.02, 8192)


def test_cost_is_relative_to_gain_0_and_the_bound_is_inclusive() -> None:
    """Also of a model that has other gains when the sweep begins."""
    model = recursive(gain_init=0.3)
    table = {0.0: 0.0, 0.3: -5.0, 0.45: 1.0, 0.2: MAX_COST * 1.001, 0.1: MAX_COST, 0.05: 0.0}

    def loss() -> float:
        (gain,) = gains(model)
        return table[gain]

    assert calibrate(model, loss) == (0.1, [(0.45, 1.0), (0.2, MAX_COST * 1.001), (0.1, MAX_COST)])
    assert calibrate(model, loss, (0.2, 0.05)) == (0.05, [(0.2, MAX_COST * 1.001), (0.05, 0.0)])


@pytest.mark.parametrize(("slope", "chosen", "tried"), [(0.0, 0.45, 1), (0.14, 0.1, 3), (9.0, 0.05, 4), (-1.0, 0.45, 1)])
def test_largest_gain_within_the_bound_is_chosen(slope: float, chosen: float, tried: int) -> None:
    """A loss that rises with the gain: 3 + slope * gain; at 0.14 a gain of 0.1 costs 0.014 and one of 0.2 costs 0.028."""
    model = recursive(gain_init=0.0)
    gain, sweep = calibrate(model, lambda: 3.0 + slope * max(gains(model)))
    assert gain == chosen and gains(model) == {chosen}
    assert [g for g, _ in sweep] == list(CANDIDATES[:tried])
    assert [cost for _, cost in sweep] == pytest.approx([slope * g for g in CANDIDATES[:tried]], abs=1e-6)


def start_of(model: Any, capsys: pytest.CaptureFixture[str], **changes: Any) -> tuple[set[float], str]:
    """The initial gains of a run, and its output."""
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
    found, printed = start_of(model, capsys)
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
    assert f"Start gain {gain:g}" in printed and "--start_gain" in printed and held.shape == (5, SEQ_LEN)


@pytest.mark.parametrize(
    ("sweep", "why"),
    [
        ([(0.45, 1.0), (0.2, MAX_COST)], "the largest that raises the validation loss by at most 0.02 nats"),
        ([(0.2, MAX_COST * 1.001)], "the smallest: all raise the validation loss by more than 0.02 nats"),
    ],
)
def test_calibration_is_logged(
    sweep: list[tuple[float, float]], why: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gains_module, "calibrate", lambda model, loss: (sweep[-1][0], sweep))
    _, printed = start_of(recursive(gain_init=0.0), capsys)
    tried = ", ".join(f"{gain:g}: {cost:+.4f}" for gain, cost in sweep)
    printed = " ".join(printed.split())
    assert f"Start gain 0.2, {why}" in printed and f"(tried: {tried}); with a larger one the loop learns more: --start_gain" in printed


def test_trained_gains_are_kept(capsys: pytest.CaptureFixture[str]) -> None:
    found, printed = start_of(recursive(gain_init=0.3), capsys)
    assert found == {0.3} and "gain" not in printed


def test_start_gain_flag_is_used(capsys: pytest.CaptureFixture[str]) -> None:
    for init, named in ((0.0, 0.1), (0.3, 0.0), (0.3, -0.2)):
        found, printed = start_of(recursive(gain_init=init), capsys, start_gain=named)
        assert found == {named} and "gain" not in printed


class Rows(list[Any]):
    """A table that records the rows that are read."""

    asked: list[int]

    def __getitem__(self, index: Any) -> Any:
        self.asked = [*getattr(self, "asked", []), index]
        return super().__getitem__(index)


@pytest.mark.parametrize(("tokens", "rows"), [(8192, 5), (3 * SEQ_LEN, 3), (3 * SEQ_LEN - 1, 2), (1, 1)])
def test_sweep_uses_a_fixed_number_of_held_out_tokens(tokens: int, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """And measures their loss as a mean over counted tokens, at the depth that the model is read at, whatever the batches."""
    monkeypatch.setattr(gains_module, "CALIBRATION_TOKENS", tokens)
    seen: list[float] = []

    def calibrated(model: Any, loss: Any) -> Any:
        assert not model.training
        seen.append(loss())
        return 0.2, [(0.2, 0.0)]

    monkeypatch.setattr(gains_module, "calibrate", calibrated)
    held = Rows(blocks(5, seed=2))
    for row in held:
        row["labels"] = list(row["input_ids"])
    for row, unseen in zip(held, (9, 2, 12, 0, 4), strict=True):
        row["labels"][:unseen] = [-100] * unseen
    model, reference = recursive(gain_init=0.0), recursive(gain_init=0.0)
    changes: dict[str, Any] = {"batch_size": 2, "max_steps": 1, "lr": 1e-12, "gain_lr": 1e-12, "cycle_choices": (1, 4)}
    fit(model.train(), make_tiny_tokenizer(), blocks(4), held, settings(**changes), console=False)
    assert held.asked[:rows] == list(range(rows)) and gains(model) == {0.2}
    ids, labels = (torch.tensor([row[name] for row in list(held)[:rows]]) for name in ("input_ids", "labels"))
    assert seen == [pytest.approx(reference(ids, labels=labels, H_cycles=3).loss.item(), rel=1e-5)]


def test_a_candidate_that_costs_far_too_much_is_given_up_early(monkeypatch: pytest.MonkeyPatch) -> None:
    """After some tokens, and only then; its cost so far is reported."""
    monkeypatch.setattr(gains_module, "CERTAIN_TOKENS", 2 * (SEQ_LEN - 1))
    model, batches = recursive(gain_init=0.0), [{"input_ids": ids, "labels": ids} for ids in torch.arange(6 * SEQ_LEN).view(6, 1, -1) % 90]
    seen: list[int] = []
    loss = HeldOutLoss(LossModule(model), batches, torch.device("cpu"), lambda: seen.append(1))
    baseline = loss()
    assert len(seen) == 6

    def shifted(cost: float) -> tuple[float, int]:
        monkeypatch.setattr(loss, "scorer", lambda **given: {"loss": LossModule(model)(**given)["loss"] + cost * (SEQ_LEN - 1)})
        seen.clear()
        return loss() - baseline, len(seen)

    assert shifted(3.0) == (pytest.approx(3.0, rel=1e-4), 2)
    assert shifted(0.19) == (pytest.approx(0.19, rel=1e-3), 6)
    assert shifted(-3.0) == (pytest.approx(-3.0, rel=1e-4), 6)


def test_the_sweep_runs_in_the_type_of_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    enabled: list[bool] = []

    def calibrated(model: Any, loss: Any) -> Any:
        enabled.append(torch.is_autocast_enabled("cpu"))
        return 0.2, [(0.2, 0.0)]

    monkeypatch.setattr(gains_module, "calibrate", calibrated)
    for bf16 in (False, True):
        run(recursive(gain_init=0.0), max_steps=1, bf16=bf16)
    assert enabled == [False, True]


@pytest.mark.parametrize(
    ("init", "changes", "swept"), [(0.0, {}, 4), (0.0, {"start_gain": 0.1}, 0), (0.3, {}, 0), (0.0, {"seq_len": 10**5}, 1)]
)
def test_length_of_the_sweep(init: float, changes: dict[str, Any], swept: int) -> None:
    assert sweep_length(recursive(gain_init=init), blocks(4), settings(**changes)) == swept
    assert sweep_length(recursive(gain_init=0.0, injection="sum_norm"), blocks(4), settings()) == 0


def test_bad_gains() -> None:
    with pytest.raises(UserError, match=r"--start_gain: expected a number between -0.45 and 0.45, got 0.5"):
        run(recursive(), start_gain=0.5)
    with pytest.raises(UserError, match=r"--start_gain: the loop of this model has no gains \(injection 'sum_norm'\)"):
        run(recursive(injection="sum_norm"), start_gain=0.1)
