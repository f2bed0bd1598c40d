"""What halting saves and costs on a text, and the threshold of a budget."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from recursify.errors import UserError
from recursify.inference.early_exit import applications, calibrate, measure
from tests.support.early_exit import CRITERIA, NEVER, earliest, exits, ids, recursive, splitting, tokens_through


@pytest.mark.parametrize("criterion", CRITERIA)
@torch.no_grad()
def test_applications_equal_the_computed_ones(criterion: str) -> None:
    model = recursive(H_cycles=4)
    layers, x = model.model.layers, ids(1, 20, seed=9)
    rule = {"halt": criterion, "halt_threshold": splitting(model, x, criterion)}
    cycles, computed, past = [], 0, model(x[:, :1], use_cache=True, **rule).past_key_values
    for token in x[:, 1:].split(1, dim=1):
        with tokens_through(*layers) as counts:
            cycles.append(model(token, past_key_values=past, **rule).halt_cycles.item())
        computed += sum(counts)
    assert len(set(cycles)) > 1
    assert sum(applications(model.config, cycles, criterion)) == computed
    assert applications(model.config, [0], criterion) == [0]


def test_applications_by_hand() -> None:
    config = recursive(layers=6, prelude_layers=1, coda_layers=2, H_cycles=4, L_cycles=2).config  # a cycle is 3 times 3 layers
    assert applications(config, [1, 2, 0, 4], "q_head") == [1 + 9 + 2, 1 + 18 + 2, 0, 1 + 36 + 2]
    for criterion in ("kl", "entropy"):  # which read out after every cycle
        assert applications(config, [1, 2, 0, 4], criterion) == [1 + 9 + 2, 1 + 18 + 4, 0, 1 + 36 + 8]


@pytest.mark.parametrize("criterion", CRITERIA)
@torch.no_grad()
def test_measure_equals_the_models_halting(criterion: str) -> None:
    model, blocks = recursive(H_cycles=4), ids(3, 12)
    threshold = splitting(model, blocks, criterion)
    found, full = measure(model, blocks, criterion, threshold), measure(model, blocks, criterion)
    out = model(blocks, labels=blocks, use_cache=False, halt=criterion, halt_threshold=threshold)
    assert exits(out.halt_cycles) > 1 and (found.criterion, found.threshold, full.threshold) == (criterion, threshold, None)
    assert found.loss == pytest.approx(out.loss.item(), abs=1e-5)
    assert found.cycles == {c: int((out.halt_cycles == c).sum()) for c in range(1, 5)}
    cost = applications(model.config, out.halt_cycles.flatten().tolist(), criterion)
    assert found.share == pytest.approx(sum(cost) / (36 * model.config.depth()))
    assert full.loss == pytest.approx(model(blocks, labels=blocks).loss.item(), abs=1e-5)
    assert (full.share, full.cycles) == (1.0, {1: 0, 2: 0, 3: 0, 4: 36})
    shallow = measure(model, blocks, criterion, threshold, H_cycles=2)
    assert set(shallow.cycles) == {1, 2}
    if earliest(model, criterion) < 2:
        assert all(shallow.cycles.values()), "some halt at either"
    spent = sum(applications(model.config, [cycle for cycle, n in shallow.cycles.items() for _ in range(n)], criterion))
    assert shallow.share == pytest.approx(spent / (36 * model.config.depth(2)))
    plain = measure(model, blocks, criterion, H_cycles=2)
    assert plain.loss == pytest.approx(model(blocks, labels=blocks, H_cycles=2).loss.item(), abs=1e-5)
    assert (plain.share, plain.cycles) == (1.0, {1: 0, 2: 36})


@pytest.mark.parametrize(("criterion", "budget"), [("q_head", 0.5), ("q_head", 0.8), ("entropy", 0.6), ("kl", 0.85)])
def test_a_calibrated_threshold_spends_the_budget(criterion: str, budget: float) -> None:
    model, blocks = recursive(H_cycles=4), ids(8, 32)
    found = calibrate(model, blocks, criterion, budget)
    assert budget - 0.02 < found.chosen.share <= budget
    assert measure(model, blocks, criterion, found.threshold) == found.chosen
    assert f"--halt_threshold {found.threshold:.6g}: {found.chosen.share:.0%} of the layer applications" in found.render()


def test_the_whole_budget_never_halts_and_too_small_a_one_is_refused() -> None:
    model, blocks = recursive(H_cycles=4), ids(2, 12)
    assert calibrate(model, blocks, "q_head", 1.0).threshold == NEVER["q_head"]
    least = (2 + 2 * 2 + 2) / model.config.depth()
    with pytest.raises(
        UserError, match=rf"--compute_budget: expected at least {least:.2f}, the compute at the earliest .* by q_head, got 0.1"
    ):
        calibrate(model, blocks, "q_head", 0.1)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_the_range_of_thresholds_has_always_and_never_at_its_ends(criterion: str) -> None:
    """A budget that is exactly what the earliest halting costs is met; of that which never halts, nothing is asked to halt."""
    model, blocks, at = recursive(H_cycles=3), ids(1, 8), earliest(recursive(H_cycles=3), criterion)
    least = applications(model.config, [at], criterion)[0] / model.config.depth()
    cheapest = calibrate(model, blocks, criterion, least)
    assert cheapest.chosen.share == pytest.approx(least) and cheapest.chosen.cycles[at] == 8
    dearest = calibrate(model, blocks, criterion, 10.0)
    assert dearest.threshold == NEVER[criterion] and dearest.chosen.cycles == {1: 0, 2: 0, 3: 8}
    assert dearest.budget == 10.0 and dearest.full.cycles == {1: 0, 2: 0, 3: 8}
    assert dearest.full.share == 1.0 and dearest.full.threshold is None
    with pytest.raises(UserError, match=f"the compute at the earliest possible exit by {criterion}"):
        calibrate(model, blocks, criterion, least - 1e-6)


def test_training_mode_is_unchanged() -> None:
    model: Any = recursive()
    model.train()
    try:
        assert math.isfinite(measure(model, ids(1, 8), "q_head", 0.5).loss)
        assert model.training
    finally:
        model.eval()
