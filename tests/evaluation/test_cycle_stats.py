"""What the cycles do to a text, against counts by hand from whole logits of one window at a time."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from recursify.evaluation.cycle_stats import (
    CycleStats,
    scored_places,
    summarise,
    summarise_halting,
    sums_of_cycles,
    sums_of_halting,
)
from recursify.inference import early_exit
from recursify.network import losses
from recursify.network.losses import read_out
from tests.support.early_exit import CRITERIA, ids, middling, recursive

H, WINDOWS, LENGTH = 4, 5, 12
SCORED = torch.tensor([LENGTH - 1, 4, 4, 4, 4])  # as where windows overlap


@pytest.fixture(scope="module")
def model() -> Any:
    return recursive(H_cycles=H)


@pytest.fixture(scope="module")
def x() -> torch.Tensor:
    return ids(WINDOWS, LENGTH, seed=3)


@torch.no_grad()
def states_of(model: Any, x: torch.Tensor) -> Any:
    return model.model(x, H_cycles=H, output_cycle_states=True, use_cache=False).cycle_states


@torch.no_grad()
def found(model: Any, x: torch.Tensor, scored: torch.Tensor = SCORED) -> dict[str, torch.Tensor]:
    return sums_of_cycles(model.lm_head, states_of(model, x), x, scored_places(x, scored))


@torch.no_grad()
def by_hand(model: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, list[list[torch.Tensor]]]:
    """`[H, windows, T - 1]` losses and right guesses, and states by cycle and window, each from a run at that depth alone."""
    losses, right, states = torch.zeros(H, WINDOWS, LENGTH - 1), torch.zeros(H, WINDOWS, LENGTH - 1, dtype=torch.bool), []
    for cycle in range(H):
        states.append([model.model(row[None], H_cycles=cycle + 1, use_cache=False).last_hidden_state[0] for row in x])
        for window, row in enumerate(x):
            logits = model(row[None], H_cycles=cycle + 1).logits[0, :-1]
            losses[cycle, window] = F.cross_entropy(logits, row[1:], reduction="none")
            right[cycle, window] = logits.argmax(-1) == row[1:]
    return losses, right, states


def last(values: torch.Tensor) -> torch.Tensor:
    """`[windows, T - 1]` summed over the last tokens of each window that are scored."""
    return torch.stack([row[-n:].double().sum() for row, n in zip(values, SCORED.tolist(), strict=True)])


def test_scored_positions(x: torch.Tensor) -> None:
    places = scored_places(x, SCORED)
    assert places.sum(dim=1).tolist() == SCORED.tolist()
    assert places[0].all() and places[1].nonzero().flatten().tolist() == [7, 8, 9, 10]


def test_cycle_sums_equal_runs_at_each_depth(model: Any, x: torch.Tensor) -> None:
    sums, (losses, right, states) = found(model, x), by_hand(model, x)
    for c in range(H):
        assert torch.allclose(sums["nats"][c], last(losses[c]), atol=1e-4)
        assert torch.equal(sums["right"][c], last(right[c]))
    for c in range(H - 1):
        assert torch.equal(sums["corrected"][c], last(~right[c] & right[c + 1]))
        assert torch.equal(sums["broken"][c], last(right[c] & ~right[c + 1]))
        moved = torch.stack([(b - a).norm(dim=-1) / a.norm(dim=-1) for a, b in zip(states[c], states[c + 1], strict=True)])
        assert torch.allclose(sums["distance"][c], last(moved[:, :-1]), atol=1e-4)
    assert torch.equal(sums["first_to_last"], torch.stack([last(~right[0] & right[-1]), last(right[0] & ~right[-1])]))
    assert len({round(value, 4) for value in sums["distance"].mean(dim=1).tolist()}) == H - 1


def test_corrected_and_broken_predictions() -> None:
    """A head that reads two numbers as the logits of two tokens: of six guesses the second and fifth are corrected, the third is broken."""
    head = torch.nn.Linear(2, 2, bias=False)
    head.weight.data = torch.eye(2)
    x = torch.tensor([[0, 1, 1, 1, 0, 0, 0]])

    def state(*guesses: int) -> torch.Tensor:
        return F.one_hot(torch.tensor([[*guesses, 0]]), 2).float() * 3

    states = [state(1, 0, 1, 0, 1, 0), state(1, 1, 0, 0, 1, 0), state(1, 1, 0, 0, 0, 0)]  # against 1 1 1 0 0 0
    with torch.no_grad():
        report = summarise(sums_of_cycles(head, states, x, scored_places(x, torch.tensor([6]))), torch.tensor([6]), 1)
    assert report.right == [4 / 6, 4 / 6, 5 / 6]
    assert [(step.corrected, step.broken) for step in report.steps] == [(1 / 6, 1 / 6), (1 / 6, 0.0)]
    assert (report.corrected, report.broken) == (2 / 6, 1 / 6)
    assert [step.distance for step in report.steps] == pytest.approx([2 / 6 * 2**0.5, 1 / 6 * 2**0.5])


def test_chunk_size_does_not_change_the_sums(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    x = ids(WINDOWS, 40, seed=3)  # more places than the smallest chunk
    places, state = scored_places(x, torch.tensor([39] * WINDOWS)), states_of(model, x)[-1]
    with torch.no_grad():
        whole = read_out(model.lm_head, state, x, places)
        monkeypatch.setattr(losses, "CHUNK_ELEMENTS", 1)
        pieces = read_out(model.lm_head, state, x, places)
    assert len(whole[0]) == 39 * WINDOWS and torch.allclose(whole[0], pieces[0], atol=1e-5) and torch.equal(whole[1], pieces[1])


def test_summary_is_independent_of_batching(model: Any, x: torch.Tensor) -> None:
    whole, parts = found(model, x), [found(model, x[:2], SCORED[:2]), found(model, x[2:], SCORED[2:])]
    together = {name: torch.cat([part[name] for part in parts], dim=1) for name in whole}
    one, two = summarise(whole, SCORED, 1).to_dict(), summarise(together, SCORED, 1).to_dict()
    assert one["losses"] == pytest.approx(two["losses"]) and one["loss_reduction"] == pytest.approx(two["loss_reduction"], abs=1e-6)


def test_figures_are_means_over_tokens_and_errors_those_of_pairs(model: Any, x: torch.Tensor) -> None:
    sums = found(model, x)
    report, tokens = summarise(sums, SCORED, 1), int(SCORED.sum())
    assert report.losses == pytest.approx((sums["nats"].sum(dim=1) / tokens).tolist())
    assert report.right == pytest.approx((sums["right"].sum(dim=1) / tokens).tolist())
    assert report.loss_reduction == pytest.approx(report.losses[0] - report.losses[-1])
    assert sum(step.loss_reduction for step in report.steps) == pytest.approx(report.loss_reduction)
    for c, step in enumerate(report.steps):
        assert (step.before, step.after) == (c + 1, c + 2)
        reduction = (sums["nats"][c] - sums["nats"][c + 1]) - step.loss_reduction * SCORED
        assert step.loss_reduction_error == pytest.approx((5 / 4 * reduction.square().sum()).sqrt().item() / tokens)
        assert step.corrected - step.broken == pytest.approx(report.right[c + 1] - report.right[c])
    assert report.corrected - report.broken == pytest.approx(report.right[-1] - report.right[0])


@pytest.mark.parametrize("criterion", CRITERIA)
def test_halting_sums_equal_early_exit_measure(criterion: str, model: Any, x: torch.Tensor) -> None:
    threshold, everything = middling(model, criterion), torch.tensor([LENGTH - 1] * WINDOWS)
    sums = found(model, x, everything) | sums_of_halting(model, x, scored_places(x, everything), criterion, threshold, H)
    ours = summarise_halting(sums, everything, 1, model.config, criterion, threshold, H)
    wanted, full = early_exit.measure(model, x, criterion, threshold), early_exit.measure(model, x, criterion)
    assert ours.loss == pytest.approx(wanted.loss, abs=1e-5) and ours.extra_loss == pytest.approx(wanted.loss - full.loss, abs=1e-5)
    with torch.no_grad():
        used = model(x, use_cache=False, halt=criterion, halt_threshold=threshold).halt_cycles[:, :-1].flatten()
    assert ours.cycles == pytest.approx({c: (used == c).double().mean().item() for c in range(1, H + 1)})
    assert len([share for share in ours.cycles.values() if share]) > 1
    cost = sum(early_exit.applications(model.config, used.tolist(), criterion)) / len(used)
    assert ours.layer_applications == pytest.approx(cost) and ours.share == pytest.approx(cost / model.config.depth(H))
    assert ours.extra_loss_error is not None and ours.standard_error is not None


def test_halting_counts_scored_tokens_only(model: Any, x: torch.Tensor) -> None:
    threshold = middling(model, "q_head")
    sums = sums_of_halting(model, x, scored_places(x, SCORED), "q_head", threshold, 2)
    assert torch.equal(sums["halted_at"].sum(dim=0), SCORED.double())
    with torch.no_grad():
        out = model(x, H_cycles=2, use_cache=False, halt="q_head", halt_threshold=threshold)
    assert torch.equal(sums["halted_at"][0], last(out.halt_cycles[:, :-1] == 1))


def test_default_threshold_is_reported(model: Any, x: torch.Tensor) -> None:
    sums = found(model, x) | sums_of_halting(model, x, scored_places(x, SCORED), "entropy", None, H)
    assert summarise_halting(sums, SCORED, 1, model.config, "entropy", None, H).threshold == 0.1


def test_one_cycle_has_no_steps(model: Any, x: torch.Tensor) -> None:
    with torch.no_grad():
        sums = sums_of_cycles(model.lm_head, states_of(model, x)[:1], x, scored_places(x, SCORED))
    report = summarise(sums, SCORED, 1)
    assert (report.steps, report.loss_reduction, report.loss_reduction_error, report.lines()) == ([], 0.0, None, [])


def test_table_has_every_step_and_the_total(model: Any, x: torch.Tensor) -> None:
    sums = found(model, x) | sums_of_halting(model, x, scored_places(x, SCORED), "kl", 0.5, H)
    report = summarise(sums, SCORED, 1, summarise_halting(sums, SCORED, 1, model.config, "kl", 0.5, H))
    printed = "\n".join(report.lines())
    for step in report.steps:
        assert (
            f"{step.before} -> {step.after}" in printed and f"{step.loss_reduction:+.4f}" in printed and f"{step.distance:.4f}" in printed
        )
    [whole] = [line for line in report.lines() if "all cycles" in line]
    assert f"1 -> {H}" in whole and f"{report.loss_reduction:+.4f}" in whole
    assert report.halting is not None
    assert f"halting by kl, threshold 0.5, after at most {H} cycles" in printed and f"loss {report.halting.loss:.4f}" in printed
    assert all(f"{cycle}: {share:.1%}" in printed for cycle, share in report.halting.cycles.items())


def test_two_cycles_are_one_line(model: Any, x: torch.Tensor) -> None:
    with torch.no_grad():
        sums = sums_of_cycles(model.lm_head, states_of(model, x)[:2], x, scored_places(x, SCORED))
    printed = summarise(sums, SCORED, 1).lines()
    assert sum("1 -> 2" in line for line in printed) == 1


def test_to_dict_is_complete(model: Any, x: torch.Tensor) -> None:
    sums = found(model, x) | sums_of_halting(model, x, scored_places(x, SCORED), "q_head", None, H)
    report: CycleStats = summarise(sums, SCORED, 1, summarise_halting(sums, SCORED, 1, model.config, "q_head", None, H))
    read = json.loads(json.dumps(report.to_dict()))
    assert read["loss_reduction"] == report.loss_reduction and [step["loss_reduction"] for step in read["steps"]] == [
        step.loss_reduction for step in report.steps
    ]
    assert read["halting"]["cycles"].keys() == {"1", "2", "3", "4"}
    assert summarise(found(model, x), SCORED, 1).to_dict()["halting"] is None


# --- By hand, on states of unequal lengths and windows of unequal numbers of tokens ---------------------------------------------------


def test_state_distance_is_relative() -> None:
    head = torch.nn.Linear(2, 3, bias=False)
    x = torch.tensor([[0, 1, 2], [1, 0, 2]])
    one = torch.tensor([[[3.0, 4.0], [0.0, 0.02], [7.0, 7.0]], [[1.0, 0.0], [0.0, 2.0], [7.0, 7.0]]])
    two = torch.tensor([[[3.0, 14.0], [0.03, 0.02], [9.0, 9.0]], [[1.0, 5.0], [0.0, 3.0], [9.0, 9.0]]])
    with torch.no_grad():
        sums = sums_of_cycles(head, [one, two, two], x, scored_places(x, torch.tensor([2, 1])))
    assert sums["distance"][0].tolist() == pytest.approx([10 / 5 + 0.03 / 0.02, 1 / 2]) and sums["distance"][1].tolist() == [0.0, 0.0]
    assert all(row.dtype == torch.float64 for row in sums.values())


def test_guesses_of_three_cycles_in_two_windows() -> None:
    """A head that predicts the sign of a number; rows are predictions by cycle, of which the last three, or two, are scored."""
    head = torch.nn.Linear(1, 2, bias=False)
    head.weight.data = torch.tensor([[-1.0], [1.0]])
    x = torch.tensor([[0, 1, 1, 1], [0, 1, 0, 1]])
    guesses = [[[1, 0, 0], [0, 0, 0]], [[0, 1, 0], [1, 1, 1]], [[0, 1, 1], [0, 0, 0]]]
    states = [torch.tensor([[*row, 0] for row in rows])[..., None] * 2.0 - 1 for rows in guesses]
    with torch.no_grad():
        sums = sums_of_cycles(head, states, x, scored_places(x, torch.tensor([3, 2])))
    assert sums["right"].tolist() == [[1, 1], [1, 1], [2, 1]]
    assert sums["corrected"].tolist() == [[1, 1], [1, 1]] and sums["broken"].tolist() == [[1, 1], [0, 1]]
    assert sums["first_to_last"].tolist() == [[2, 0], [1, 0]]
    report = summarise(sums, torch.tensor([3, 2]), 1)
    assert report.right == pytest.approx([2 / 5, 2 / 5, 3 / 5]) and (report.corrected, report.broken) == pytest.approx((2 / 5, 1 / 5))
    assert [(step.corrected, step.broken) for step in report.steps] == [pytest.approx((2 / 5, 2 / 5)), pytest.approx((2 / 5, 1 / 5))]


SUMS = {
    "nats": torch.tensor([[9.0, 8.0, 7.0, 3.0, 5.0], [7.0, 8.5, 4.0, 2.0, 4.0], [6.0, 5.0, 5.0, 1.0, 4.5]], dtype=torch.float64),
    "right": torch.tensor([[1.0, 0, 0, 0, 0], [2.0, 1, 0, 1, 0], [3.0, 0, 1, 1, 1]], dtype=torch.float64),
    "corrected": torch.tensor([[1.0, 1, 0, 1, 0], [2.0, 0, 1, 0, 1]], dtype=torch.float64),
    "broken": torch.tensor([[0.0, 0, 0, 0, 0], [1.0, 1, 0, 0, 0]], dtype=torch.float64),
    "distance": torch.tensor([[4.0, 1, 1, 2, 1], [2.0, 0.5, 1, 0, 1]], dtype=torch.float64),
    "first_to_last": torch.tensor([[3.0, 0, 1, 1, 1], [1.0, 0, 0, 0, 0]], dtype=torch.float64),
    "halted_nats": torch.tensor([[8.0, 7.0, 5.0, 2.0, 4.0]], dtype=torch.float64),
    "applications": torch.tensor([[50.0, 20, 30, 20, 10]], dtype=torch.float64),
    "halted_at": torch.tensor([[7.0, 1, 0, 2, 3], [4.0, 3, 4, 2, 1]], dtype=torch.float64),
}
TOKENS = torch.tensor([11, 4, 4, 4, 4])


class Costs:
    """A configuration whose own cycles are others than those measured."""

    H_cycles, first_exit = 5, 1

    def depth(self, H_cycles: int) -> int:
        return 2 + 4 * H_cycles


def error_by_hand(values: torch.Tensor, per_piece: int) -> float:
    parts = [slice(first, first + per_piece) for first in range(0, 5, per_piece)]
    mean, tokens = values.sum().item() / 27, 27
    off = [values[part].sum().item() - mean * TOKENS[part].sum().item() for part in parts]
    return math.sqrt(len(parts) / (len(parts) - 1) * sum(x * x for x in off)) / tokens


@pytest.mark.parametrize("per_piece", [1, 2])
def test_a_summary_by_hand(per_piece: int) -> None:
    report, nats = summarise(SUMS, TOKENS, per_piece), SUMS["nats"]
    assert report.H_cycles == 3 and report.losses == pytest.approx([32 / 27, 25.5 / 27, 21.5 / 27])
    assert report.loss_reduction == pytest.approx(10.5 / 27)
    assert report.loss_reduction_error == pytest.approx(error_by_hand(nats[0] - nats[2], per_piece))
    for c, step in enumerate(report.steps):
        assert (step.before, step.after, step.loss_reduction) == (c + 1, c + 2, pytest.approx(report.losses[c] - report.losses[c + 1]))
        assert step.loss_reduction_error == pytest.approx(error_by_hand(nats[c] - nats[c + 1], per_piece))
    assert [(step.corrected, step.broken, step.distance) for step in report.steps] == [
        pytest.approx((3 / 27, 0.0, 9 / 27)), pytest.approx((4 / 27, 2 / 27, 4.5 / 27)),
    ]  # fmt: skip
    assert (report.corrected, report.broken) == pytest.approx((6 / 27, 1 / 27))


@pytest.mark.parametrize("per_piece", [1, 2])
def test_halting_by_hand_at_fewer_cycles_than_the_deepest(per_piece: int) -> None:
    halted = summarise_halting(SUMS, TOKENS, per_piece, Costs(), "kl", 0.0, 2)
    assert (halted.criterion, halted.threshold, halted.H_cycles) == ("kl", 0.0, 2)  # 0 is a threshold like others
    assert halted.loss == pytest.approx(26 / 27) and halted.extra_loss == pytest.approx(0.5 / 27)
    assert halted.standard_error == pytest.approx(error_by_hand(SUMS["halted_nats"][0], per_piece))
    assert halted.extra_loss_error == pytest.approx(error_by_hand(SUMS["halted_nats"][0] - SUMS["nats"][1], per_piece))
    assert halted.cycles == pytest.approx({1: 13 / 27, 2: 14 / 27})
    assert halted.layer_applications == pytest.approx(130 / 27) and halted.share == pytest.approx(130 / 27 / 10)
    _, figures, spread = halted.lines()
    assert figures == (
        f"  loss 0.9630 (+0.0185 +- {halted.extra_loss_error:.4f} against no halting), 4.8 layer applications per token (48%)"
    )
    assert spread.endswith("1: 48.1%   2: 51.9%")


def test_the_table_by_hand() -> None:
    _, _, first, second, whole, *_ = summarise(SUMS, TOKENS, 1).lines()
    assert first.split()[:4] == ["1", "->", "2", "+0.2407"] and first.split()[5:] == ["11.11%", "0.00%", "0.3333"]
    assert second.split()[:4] == ["2", "->", "3", "+0.1481"] and second.split()[5:] == ["14.81%", "7.41%", "0.1667"]
    assert whole.split()[:4] == ["1", "->", "3", "+0.3889"] and whole.split()[5:] == ["22.22%", "3.70%", "<-", "all", "cycles"]
