"""The objective on a model: which parameters each cycle's loss reaches, in the three modes of --backprop, against plain autograd."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from recursify.network.losses import HALT_MARGIN, Reference, cycle_shares, cycle_weights, losses_and_divergences
from recursify.training import loss_module as module
from recursify.training.approaches import NEXT_EMBEDDING, freeze_rest
from recursify.training.cost import pass_flops
from recursify.training.fitting import checkpoint_layers
from recursify.training.loss_module import LossModule, Supervision, backpropagate_each, scored_tokens
from recursify.training.settings import TrainSettings
from tests.support.runs import blocks, logged, recursive, run, settings
from tests.support.tiny import tiny_donor, tiny_model

EVERY = Supervision(every_cycle=True, weight=0.5, schedule="constant")


def batch(rows: int = 3) -> torch.Tensor:
    return torch.tensor([row["input_ids"] for row in blocks(rows)])


def gradients(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of every parameter that is trained; a missing one is an error, as it is under DDP."""
    model.zero_grad()
    loss.backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    missing = [name for name, p in trained.items() if p.grad is None]
    assert not missing
    return {name: p.grad.clone() for name, p in trained.items()}  # type: ignore[union-attr]


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], rtol: float = 1e-4, atol: float = 1e-6) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


def by_hand(model: Any, ids: torch.Tensor, shares: list[float], detach: Callable[[int], bool] = lambda cycle: False) -> torch.Tensor:
    """The cycles written out, with transformers' own loss; `detach(c)` cuts the graph before cycle c."""
    base, config = model.model, model.config
    e, block, read = base.begin_pass(ids)
    recursion = base.recursion
    z_L, z_H, n, total = e + recursion.L_init, e + recursion.H_init, 0, torch.zeros(())
    for cycle in range(config.H_cycles):
        if detach(cycle):
            z_L, z_H = z_L.detach(), z_H.detach()
        gains_L, gains_H = recursion.inject_L.gains(e.dtype), recursion.inject_H.gains(e.dtype)
        for _ in range(config.L_cycles):
            z_L, n = block(e + gains_L[0] * (z_L - e) + gains_L[1] * (z_H - e), n), n + 1
        z_H, n = block(e + gains_H[0] * (z_H - e) + gains_H[1] * (z_L - e), n), n + 1
        logits = model.lm_head(read(z_H))
        total = total + shares[cycle] * F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    return total


def as_trained(model: Any, **changes: Any) -> Any:
    """Frozen as a run with these settings freezes it."""
    freeze_rest(model, TrainSettings(checkpoint="in memory", **changes))
    return model


def test_deep_supervision_reaches_every_cycle() -> None:
    """The loss of each cycle alone has a gradient at the loop and at what feeds it, and the logged losses are those of the model."""
    model, ids = recursive(), batch()
    expected = [model(ids, labels=ids, H_cycles=H).loss.item() for H in (1, 2, 3)]
    outputs = LossModule(model, EVERY)(ids, ids)
    assert outputs["cycle_losses"].tolist() == pytest.approx(expected, rel=1e-6) and outputs["scored"].tolist() == [1.0] * 3
    shares = cycle_shares("constant", 0.5, 3)
    assert outputs["loss"].item() == pytest.approx(sum(s * loss for s, loss in zip(shares, expected, strict=True)), rel=1e-6)
    for H in (1, 2, 3):
        found = gradients(model, LossModule(model)(ids, ids, H_cycles=H)["loss"])
        parts = [name for name in found if "layers.1" in name or "inject_H" in name or "H_init" in name]
        assert len(parts) > 10 and all(found[name].abs().max() > 0 for name in parts)


def test_without_deep_supervision_only_the_last_cycle_counts() -> None:
    model, ids = recursive(), batch()
    outputs = LossModule(model)(ids, ids)
    assert outputs["cycle_losses"].tolist() == pytest.approx([0, 0, model(ids, labels=ids).loss.item()], rel=1e-6)
    assert outputs["scored"].tolist() == [0, 0, 1] and outputs["loss"].item() == outputs["cycle_losses"][2].item()
    shallow = LossModule(model)(ids, ids, H_cycles=2)
    assert shallow["scored"].tolist() == [0, 1, 0]
    assert shallow["loss"].item() == pytest.approx(model(ids, labels=ids, H_cycles=2).loss.item(), rel=1e-6)


@pytest.mark.parametrize("L_cycles", [0, 1, 2])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_full_is_plain_autograd(L_cycles: int, checkpointed: bool) -> None:
    model, ids = recursive(L_cycles=L_cycles).train(), batch()
    expected = gradients(model, by_hand(model, ids, cycle_shares("constant", 0.5, 3)))
    if checkpointed:
        checkpoint_layers(model)
    assert_same(gradients(model, LossModule(model, EVERY)(ids, ids)["loss"]), expected)


@pytest.mark.parametrize("L_cycles", [0, 1, 2])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_cycle_is_autograd_on_the_detached_graph(L_cycles: int, checkpointed: bool) -> None:
    """Also where the prelude learns from every cycle, and the tied embeddings from both ends."""
    model, ids = recursive(L_cycles=L_cycles).train(), batch()
    expected = gradients(model, by_hand(model, ids, cycle_shares("constant", 0.5, 3), detach=lambda cycle: cycle > 0))
    if checkpointed:
        checkpoint_layers(model)
    supervision = Supervision(every_cycle=True, schedule="constant", backprop="cycle")
    found = gradients(model, LossModule(model, supervision)(ids, ids)["loss"])
    assert_same(found, expected)
    full = gradients(model, LossModule(model, EVERY)(ids, ids)["loss"])
    assert not torch.allclose(found["model.recursion.H_init"], full["model.recursion.H_init"], rtol=1e-3)


@pytest.mark.parametrize("L_cycles", [0, 1, 2])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_last_is_autograd_on_the_last_cycle(L_cycles: int, checkpointed: bool) -> None:
    model, ids = as_trained(recursive(L_cycles=L_cycles), backprop="last").train(), batch()
    expected = gradients(model, by_hand(model, ids, [0.0, 0.0, 1.0], detach=lambda cycle: True))
    if checkpointed:
        checkpoint_layers(model)
    found = gradients(model, LossModule(model, Supervision(backprop="last"))(ids, ids)["loss"])
    assert_same(found, expected)
    assert not any(name.endswith("_init") for name in found)


def test_autocast_keeps_no_copies_of_weights_that_are_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """It remembers a copy of each weight in its own type until the context ends, which may be that of a whole run."""
    stood_in, made = module._shadow_parameters, list[Any]()

    @contextmanager
    def watched(model: Any) -> Iterator[Any]:
        with stood_in(model) as found:
            made.extend(weakref.ref(parameter) for parameter in found.values())
            yield found

    monkeypatch.setattr(module, "_shadow_parameters", watched)
    with torch.autocast("cpu", torch.bfloat16):
        LossModule(recursive(), replace(EVERY, backprop="cycle"))(batch(), batch())["loss"].backward()
        gc.collect()
        assert len(made) > 20 and not any(parameter() is not None for parameter in made)


def test_plain_model_counts_as_one_cycle() -> None:
    assert LossModule(tiny_model("qwen2")).main_cycle == 1 and LossModule(recursive(H_cycles=2)).main_cycle == 2


@pytest.mark.parametrize("backprop", ["cycle", "last"])
def test_gradients_under_bfloat16_autocast(backprop: str) -> None:
    """Weights are cast once and the copy is kept: one that was made without gradients, or whose graph is gone, must not be used."""
    supervision = Supervision(every_cycle=backprop == "cycle", schedule="constant", backprop=backprop, self_distill=0.0)
    model, ids = as_trained(recursive(), backprop=backprop, enable_deep_supervision=backprop == "cycle"), batch()
    expected = gradients(model, LossModule(model, supervision)(ids, ids)["loss"])
    with torch.autocast("cpu", torch.bfloat16):
        loss = LossModule(model, supervision)(ids, ids)["loss"]
    found = gradients(model, loss)
    for name, gradient in expected.items():
        assert F.cosine_similarity(found[name].flatten(), gradient.flatten(), dim=0) > 0.95, name


def test_self_distillation_is_equal_for_full_and_cycle_backprop() -> None:
    """Under autocast, too, where the pass without gradients comes first."""
    ids = batch()
    terms = {"every_cycle": True, "schedule": "constant", "self_distill": 0.7, "temperature": 2.0, "monotone": 0.3}
    model = recursive()
    full, cycle = (LossModule(model, Supervision(backprop=way, **terms))(ids, ids) for way in ("full", "cycle"))  # type: ignore[arg-type]
    assert cycle["loss"].item() == pytest.approx(full["loss"].item(), rel=1e-6)
    assert {name: value.item() for name, value in cycle["terms"].items()} == pytest.approx(
        {name: value.item() for name, value in full["terms"].items()}, rel=1e-5
    )
    with torch.autocast("cpu", torch.bfloat16):
        loss = LossModule(model, Supervision(backprop="cycle", **terms))(ids, ids)["loss"]  # type: ignore[arg-type]
    assert all(gradient.abs().max() > 0 for gradient in gradients(model, loss).values())


def test_every_term_by_hand() -> None:
    """The whole objective written out from the logits of each cycle."""
    model, teacher, ids = recursive(), tiny_donor("qwen2", num_hidden_layers=2).eval(), batch()
    model.model.recursion.q_head.requires_grad_(True)
    want = Supervision(
        every_cycle=True, schedule="linear_decay", weight=0.5, distill=0.4, temperature=2.0, self_distill=0.3, monotone=0.2, halting=0.1
    )
    found = LossModule(model, want, teacher=teacher)(ids, ids)

    outputs = model(ids, output_cycle_logits=True)
    logits = [row[:, :-1].log_softmax(-1) for row in outputs.cycle_logits]
    losses = [F.nll_loss(row.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(3, -1) for row in logits]

    def divergence(other: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        r, p = (other / 2).log_softmax(-1), (own / 2).log_softmax(-1)
        return 4 * (r.exp() * (r - p)).sum(-1).mean()

    donor, shares = teacher(ids).logits[:, :-1], [0.5 / 3, 1 / 3, 1.0]
    total = torch.zeros(())
    for c, share in enumerate(share / sum(shares) for share in shares):
        own = outputs.cycle_logits[c][:, :-1]
        part = losses[c].mean() + 0.4 * divergence(donor, own)
        if c < 2:
            part = part + 0.3 * divergence(outputs.cycle_logits[-1][:, :-1], own)
        if c > 0:
            part = part + 0.2 * torch.relu(losses[c] - losses[c - 1]).mean()
        total = total + share * part
    bars = [torch.minimum(losses[1], losses[2]) + HALT_MARGIN, losses[2] + HALT_MARGIN]
    halting = [weighted_halting(outputs.halt_logits[c][:, :-1], losses[c], bars[c] - HALT_MARGIN) for c in range(2)]
    assert found["terms"]["halting"].item() == pytest.approx(sum(halting) / 2, rel=1e-5)
    assert found["loss"].item() == pytest.approx(total.item() + 0.1 * sum(halting) / 2, rel=1e-5)
    assert set(found["terms"]) == {"distill", "self_distill", "monotone", "halting"}
    found["loss"].backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert model.model.recursion.q_head.weight.grad.abs().max() > 0


def test_supervision_takes_every_term_from_its_flag() -> None:
    """Each in its place: no two have the same value, none its default."""
    flags = settings(
        enable_deep_supervision=True, deep_supervision_weight=0.9, deep_supervision_schedule="early_decay", backprop="cycle",
        distill_weight=0.4, distill_temperature=3.0, self_distill_weight=0.3, monotone_weight=0.2, halting_weight=0.1,
    )  # fmt: skip
    assert Supervision.of(flags) == Supervision(
        every_cycle=True, weight=0.9, schedule="early_decay", backprop="cycle", distill=0.4, temperature=3.0, self_distill=0.3,
        monotone=0.2, halting=0.1,
    )  # fmt: skip
    assert Supervision.of(TrainSettings(checkpoint="x")) == Supervision()
    assert Supervision().shares(3) == [0.0, 0.0, 1.0] and not Supervision().by_token
    assert Supervision(every_cycle=True).shares(4) == cycle_shares("linear_decay", 0.5, 4) != cycle_shares("linear_decay", 1.0, 4)


def naive(
    model: Any, teacher: Any, ids: torch.Tensor, labels: torch.Tensor, want: TrainSettings, H: int = 3
) -> tuple[list[float], dict[str, float], float]:
    """The objective of the settings from whole logits, with torch's own divergences: the loss of every cycle, the terms, and their sum."""
    with torch.no_grad():
        outputs = model(ids, H_cycles=H, output_cycle_logits=True)
        donor = teacher(ids).logits
    counts = labels[:, 1:] != -100
    weights = (
        cycle_weights(want.deep_supervision_schedule, want.deep_supervision_weight, H) if want.enable_deep_supervision else [0.0, 0.0, 1.0]
    )
    shares = [weight / sum(weights) for weight in weights]
    losses = [F.cross_entropy(row[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none") for row in outputs.cycle_logits]

    def divergence(reference: torch.Tensor, own: torch.Tensor) -> float:
        T = want.distill_temperature
        r, p = (torch.distributions.Categorical(logits=x[:, :-1] / T) for x in (reference, own))
        return T**2 * torch.distributions.kl_divergence(r, p)[counts].mean().item()

    logits, last = outputs.cycle_logits, outputs.cycle_logits[-1]
    cycles = [loss[counts].mean().item() for loss in losses]
    halting = [
        weighted_halting(
            outputs.halt_logits[c][:, :-1][counts], losses[c][counts], torch.stack(losses[c + 1 :]).amin(0)[counts]
        )
        for c in range(H - 1)
    ]  # fmt: skip
    found = {
        "distill": (want.distill_weight, [divergence(donor, own) for own in logits]),
        "self_distill": (want.self_distill_weight, [divergence(last, own) for own in logits[:-1]] + [0.0]),
        "monotone": (
            want.monotone_weight,
            [0.0] + [(b - a).clamp(min=0)[counts].mean().item() for a, b in pairwise(losses)],
        ),
    }
    terms = {name: sum(s * each for s, each in zip(shares, values, strict=True)) for name, (w, values) in found.items() if w}
    total = sum(s * loss for s, loss in zip(shares, cycles, strict=True)) + sum(found[name][0] * value for name, value in terms.items())
    if want.halting_weight:
        terms["halting"] = sum(halting) / (H - 1)
        total += want.halting_weight * terms["halting"]
    return cycles, terms, total


def unequal(rows: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids, and labels of which some do not count."""
    ids = batch(rows)
    labels = ids.clone()
    labels[0, 3:9] = labels[-1, 12:] = -100
    return ids, labels


def weighted_halting(logits: torch.Tensor, now: torch.Tensor, later: torch.Tensor) -> float:
    """The halting loss of a cycle, from the token losses of this and of the best later one."""
    each = F.binary_cross_entropy_with_logits(logits, (now <= later + 0.05).float(), reduction="none")
    return (each * (now - later).abs().clamp(min=0.05)).mean().item()


def about_to_halt(model: Any) -> Any:
    """With an undecided halting head that differs between tokens."""
    with torch.no_grad():
        model.model.recursion.q_head.weight.normal_(std=0.3, generator=torch.Generator().manual_seed(0))
        model.model.recursion.q_head.bias.fill_(0.2)
    model.model.recursion.q_head.requires_grad_(True)
    return model


EACH_TERM: dict[str, dict[str, Any]] = {
    "none": {},
    "distill": {"distill_weight": 0.4},
    "self_distill": {"self_distill_weight": 0.3},
    "monotone": {"monotone_weight": 0.2},
    "halting": {"halting_weight": 0.1},
    "all": {"distill_weight": 0.4, "self_distill_weight": 0.3, "monotone_weight": 0.2, "halting_weight": 0.1},
}


@pytest.mark.parametrize("backprop", ["full", "cycle"])
@pytest.mark.parametrize("terms", EACH_TERM)
def test_each_term_alone_and_all_together(terms: str, backprop: str) -> None:
    """By the flags; what is minimised, and what is logged of each: a mean over counted tokens and, by shares, cycles."""
    model, teacher, (ids, labels) = about_to_halt(recursive()), tiny_donor("qwen2", num_hidden_layers=2), unequal()
    want = settings(
        enable_deep_supervision=True, deep_supervision_schedule="early_decay", deep_supervision_weight=0.6, distill_temperature=2.0,
        backprop=backprop, **EACH_TERM[terms],
    )  # fmt: skip
    loss_module = LossModule(model, Supervision.of(want), teacher=teacher if want.distill_weight else None)
    found = loss_module(ids, labels)
    cycles, expected, total = naive(model, teacher, ids, labels, want)
    asked = {"all": set(EACH_TERM) - {"all", "none"}, "none": set[str]()}.get(terms, {terms})
    assert set(expected) == asked and all(value > 1e-3 for value in expected.values())
    assert {name: value.item() for name, value in found["terms"].items()} == pytest.approx(expected, rel=1e-4)
    assert found["cycle_losses"].tolist() == pytest.approx(cycles, rel=1e-5) and found["scored"].tolist() == [1, 1, 1]
    assert found["loss"].item() == pytest.approx(total, rel=1e-5)
    # of a batch that is one of several, everything is divided by the tokens of all of them
    part, share = loss_module(ids, labels, num_items_in_batch=1000), (labels[:, 1:] != -100).sum().item() / 1000
    for key in ("loss", "cycle_losses"):
        torch.testing.assert_close(part[key], found[key] * share, rtol=1e-5, atol=1e-6)
    assert {name: value.item() for name, value in part["terms"].items()} == pytest.approx(
        {n: v * share for n, v in expected.items()}, rel=1e-4
    )
    # at another depth the last cycle is another one
    shallow = loss_module(ids, labels, H_cycles=2)
    cycles, expected, total = naive(model, teacher, ids, labels, want, H=2)
    assert shallow["cycle_losses"].tolist() == pytest.approx([*cycles, 0.0], rel=1e-5) and shallow["scored"].tolist() == [1, 1, 0]
    assert shallow["loss"].item() == pytest.approx(total, rel=1e-5)
    assert {name: value.item() for name, value in shallow["terms"].items()} == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("backprop", ["full", "cycle"])
def test_each_cycle_is_drawn_to_the_hidden_state_of_the_teacher_at_its_depth(backprop: str) -> None:
    model, (ids, labels) = recursive(), unequal()
    teacher = tiny_donor("qwen2", num_hidden_layers=8, hidden_size=model.config.hidden_size)
    want = settings(
        enable_deep_supervision=True, deep_supervision_schedule="early_decay", deep_supervision_weight=0.6, match_hidden_weight=0.3,
        backprop=backprop,
    )  # fmt: skip
    loss_module = LossModule(model, Supervision.of(want), teacher=teacher)
    found = loss_module(ids, labels)
    found["loss"].backward()
    assert model.model.recursion.inject_H.theta_A.grad.abs().max() > 0
    assert not any(layer._forward_hooks for layer in teacher.model.layers)

    with torch.no_grad():
        hidden = teacher(ids, output_hidden_states=True).hidden_states  # entry n: after n layers
        base = model.model
        e, block, _ = base.begin_pass(ids, None)
        states = list(base.recursion.steps(e, block, 3, 1))
    # prelude and coda are one layer each: the cycles aim at 1/3, 2/3 and all of the 6 layers between
    assert module.matched_depths(model.config, 8, 3) == [3, 5, 7] and module.matched_depths(model.config, 8, 2) == [4, 7]
    counts = labels[:, 1:] != -100
    expected = 0.0
    for share, z, depth in zip(cycle_shares("early_decay", 0.6, 3), states, (3, 5, 7), strict=True):
        a, b = (x / x.square().mean(-1, keepdim=True).sqrt() for x in (z, hidden[depth]))
        expected += share * (a - b).square().mean(-1)[:, :-1][counts].mean().item()
    assert found["terms"]["match_hidden"].item() == pytest.approx(expected, rel=1e-4) and expected > 0.1
    plain = LossModule(model, Supervision.of(replace(want, match_hidden_weight=0.0)))(ids, labels)
    assert found["loss"].item() == pytest.approx(plain["loss"].item() + 0.3 * expected, rel=1e-4)
    torch.testing.assert_close(found["cycle_losses"], plain["cycle_losses"])


def test_matching_lowers_the_distance() -> None:
    teacher = tiny_donor("qwen2", num_hidden_layers=6, hidden_size=recursive().config.hidden_size)
    flags: dict[str, Any] = {"enable_deep_supervision": True, "match_hidden_weight": 1.0, "num_epochs": 10, "lr": 3e-3}
    distances = logged(run(recursive(), teacher=teacher, **flags), "loss_match_hidden")
    assert distances[-1] < 0.8 * distances[0]


def test_distillation_of_the_last_cycle_alone() -> None:
    model, teacher, (ids, labels) = recursive(), tiny_donor("qwen2", num_hidden_layers=2), unequal()
    want = settings(distill_weight=0.7, distill_temperature=3.0)
    found = LossModule(model, Supervision.of(want), teacher=teacher)(ids, labels)
    cycles, expected, total = naive(model, teacher, ids, labels, want)
    assert found["loss"].item() == pytest.approx(total, rel=1e-5) and found["cycle_losses"].tolist() == pytest.approx(
        [0, 0, cycles[2]], rel=1e-5
    )
    assert found["terms"]["distill"].item() == pytest.approx(expected["distill"], rel=1e-4) and found["scored"].tolist() == [0, 0, 1]


def test_run_optimises_and_logs_the_terms_of_its_flags() -> None:
    """The first entry of the log against the objective written out for the model as it was; in one batch, and in unequal micro-batches."""
    teacher, (ids, labels) = tiny_donor("qwen2", num_hidden_layers=2), unequal(6)
    flags: dict[str, Any] = {
        "enable_deep_supervision": True, "deep_supervision_schedule": "early_decay", "deep_supervision_weight": 0.6,
        "distill_temperature": 2.0, **EACH_TERM["all"],
    }  # fmt: skip
    cycles, terms, total = naive(about_to_halt(recursive()), teacher, ids, labels, settings(**flags))
    rows = [{"input_ids": i, "labels": j} for i, j in zip(ids.tolist(), labels.tolist(), strict=True)]
    for changes in ({"batch_size": 6}, {"batch_size": 4, "grad_accum_steps": 2}):
        result = run(about_to_halt(recursive()), rows, teacher=teacher.train(), max_steps=1, **flags, **changes)
        first = result.history[0]
        assert first["loss"] == pytest.approx(total, rel=1e-5)
        assert [first[f"loss_cycle_{c}"] for c in (1, 2, 3)] == pytest.approx(cycles, rel=1e-5)
        assert {name: first[f"loss_{name}"] for name in terms} == pytest.approx(terms, rel=1e-4)
        assert first["flops"] == pass_flops(recursive().config, settings(**flags), ids.numel(), 3, teacher.config)
        assert logged(result, "train_loss") == [pytest.approx(cycles[2], rel=1e-5)]
        assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())


def test_batch_without_scored_tokens_has_zero_loss() -> None:
    """With all terms on, and not the quotient of 0 and 0."""
    model, teacher, ids = about_to_halt(recursive()), tiny_donor("qwen2", num_hidden_layers=1), batch()
    want = settings(enable_deep_supervision=True, **EACH_TERM["all"])
    for supervision in (Supervision.of(want), EVERY):
        found = LossModule(model, supervision, teacher=teacher)(ids, torch.full_like(ids, -100))
        assert found["loss"].item() == 0 and found["cycle_losses"].tolist() == [0, 0, 0]
        assert all(value.item() == 0 for value in found["terms"].values())


def test_hits_are_counted_at_H_cycles() -> None:
    """Not at the deepest that is measured, nor at the first."""
    model, ids = recursive(), batch()
    states = [model.model(ids, H_cycles=H, use_cache=False).last_hidden_state for H in range(1, 6)]
    with torch.no_grad():  # each cycle's states point at one word of their own
        for word, state in zip(range(370, 375), states, strict=True):
            model.model.embed_tokens.weight[word] = 5 * state.detach()[0, word - 370]
    states = [model.model(ids, H_cycles=H, use_cache=False).last_hidden_state for H in range(1, 6)]
    weight = model.model.embed_tokens.weight
    nearest = [F.cosine_similarity(state[:, :-1, None], weight, dim=-1).argmax(-1) for state in states]
    labels = ids.clone()
    labels[0, 1:], labels[1, 1:8] = nearest[2][0], nearest[2][1, :7]
    hits = [(each == labels[:, 1:]).sum(1).tolist() for each in nearest]
    found = LossModule(model, objective=NEXT_EMBEDDING, deepest=5).row_sums(ids, labels)
    assert found.shape == (3, 6) and found[:, 5].tolist() == hits[2] and len({tuple(each) for each in (hits[0], hits[2], hits[4])}) == 3


@pytest.mark.parametrize("kind", ["recursive", "plain"])
def test_position_ids_reach_teacher_and_plain_models(kind: str) -> None:
    """Two packed documents, separated by their position ids, score as each of them does alone: against the donor, too."""
    model, teacher, ids = (
        recursive() if kind == "recursive" else tiny_donor("qwen2", num_hidden_layers=3),
        tiny_donor("qwen2", num_hidden_layers=2),
        batch(1),
    )
    positions = torch.cat([torch.arange(6), torch.arange(10)])[None]
    labels = ids.clone()
    labels[:, 6] = -100
    loss_module = LossModule(model, Supervision(distill=1.0), teacher=teacher)
    packed, mixed = loss_module(ids, labels, positions), loss_module(ids, labels)
    alone = [loss_module(part, part, num_items_in_batch=14) for part in (ids[:, :6], ids[:, 6:])]
    for found in ((packed["loss"], packed["terms"]["distill"], packed["cycle_losses"][-1]),):
        expected = [sum(each) for each in zip(*((a["loss"], a["terms"]["distill"], a["cycle_losses"][-1]) for a in alone), strict=True)]
        torch.testing.assert_close(list(found), expected, rtol=1e-4, atol=1e-5)
    assert packed["terms"]["distill"].item() != pytest.approx(mixed["terms"]["distill"].item(), rel=1e-3)
    rows = [loss_module.row_sums(part, part) for part in (ids[:, :6], ids[:, 6:])]
    torch.testing.assert_close(loss_module.row_sums(ids, labels, positions), sum(rows), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backprop", ["full", "cycle"])
def test_halting_term_has_gradients_for_the_halting_head_only(backprop: str) -> None:
    ids, plain, halting = batch(), recursive(), recursive()
    halting.model.recursion.q_head.requires_grad_(True)
    way = Supervision(every_cycle=True, schedule="constant", backprop=backprop)
    expected = gradients(plain, LossModule(plain, way)(ids, ids)["loss"])
    found = gradients(halting, LossModule(halting, replace(way, halting=1.0))(ids, ids)["loss"])
    heads = {name for name in found if "q_head" in name}
    assert len(heads) == 2 and all(found.pop(name).abs().max() > 0 for name in heads)
    assert_same(found, expected)


def test_teacher_is_not_a_submodule() -> None:
    model, teacher = recursive(), tiny_donor("qwen2", num_hidden_layers=2)
    loss_module = LossModule(model, Supervision(distill=1.0), teacher=teacher)
    assert not any("teacher" in name for name in loss_module.state_dict())
    assert {id(p) for p in loss_module.parameters()} == {id(p) for p in model.parameters()}


def test_distilling_from_itself_has_zero_loss() -> None:
    model, ids = recursive(), batch()
    loss = LossModule(model, Supervision(distill=1.0, temperature=3.0), teacher=model)(ids, ids)
    assert loss["terms"]["distill"].item() == pytest.approx(0.0, abs=1e-5)


def test_cycle_backprop_graphs_are_independent() -> None:
    """What is kept between the losses is the gradients alone; afterwards the model has its own parameters again, also after an error."""
    x, order = torch.randn(4, requires_grad=True), []
    model = torch.nn.Module()
    model.w, model.frozen = torch.nn.Parameter(torch.randn(4)), torch.nn.Parameter(torch.randn(4), requires_grad=False)
    w, frozen = model.w, model.frozen

    def losses(e: torch.Tensor) -> Any:
        for i in range(3):
            assert model.w is not w and model.w.data_ptr() == w.data_ptr() and model.frozen is frozen
            loss = (i + 1) * (e * model.w).pow(2).sum()
            loss.register_hook(lambda g, i=i: order.append(f"backward {i}"))
            order.append(f"forward {i}")
            yield loss

    total = backpropagate_each(losses, 2 * x, model)
    assert order == ["forward 0", "backward 0", "forward 1", "backward 1", "forward 2", "backward 2"]
    assert model.w is w and w.grad is None
    (3 * total).backward()
    expected_x, expected_w = torch.autograd.grad(3 * 6 * (2 * x * w).pow(2).sum(), [x, w])
    torch.testing.assert_close(x.grad, expected_x)
    torch.testing.assert_close(w.grad, expected_w)

    def broken(e: torch.Tensor) -> Any:
        yield (e * model.w).sum()
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        backpropagate_each(broken, x, model)
    assert model.w is w


def test_frozen_prelude_gets_no_gradient_and_keeps_no_activations() -> None:
    model, ids = recursive(freeze_embeddings=True), batch()
    model.model.layers[0].requires_grad_(False)
    found = gradients(model, LossModule(model, Supervision(every_cycle=True, backprop="cycle"))(ids, ids)["loss"])
    assert not any("layers.0" in name for name in found)


def test_position_ids_reach_the_model() -> None:
    """Two packed documents, separated by their position ids: the losses of the second are those that it has alone."""
    model, ids = recursive(), batch(1)
    positions = torch.cat([torch.arange(6), torch.arange(10)])[None]
    labels = ids.clone()
    labels[:, 6] = -100
    packed = LossModule(model).row_sums(ids, labels, positions)
    alone = sum(LossModule(model).row_sums(part, part) for part in (ids[:, :6], ids[:, 6:]))
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-5)
    loss = LossModule(model)(ids, labels, positions)["cycle_losses"][2] * 14
    torch.testing.assert_close(loss, packed[0, 2], rtol=1e-5, atol=1e-5)


def test_chunked_divergence_equals_unchunked() -> None:
    """Chunked and whole, with gradients."""
    torch.manual_seed(0)
    head, other = torch.nn.Linear(8, 30, bias=False), torch.nn.Linear(5, 30, bias=False)
    state, reference, labels = torch.randn(2, 7, 8, requires_grad=True), torch.randn(2, 7, 5), torch.randint(0, 30, (2, 7))
    labels[0, 3] = -100
    results = []
    for chunk in (3, 1000):
        rows = losses_and_divergences(state, labels, head, [Reference(reference, other, 1.5)], chunk)
        loss = sum(row.sum() for row in rows)
        results.append((*rows, *torch.autograd.grad(loss, [state, head.weight])))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert results[0][1][0, 2] == 0 and (results[0][1] >= -1e-6).all()


def test_first_label_and_ignored_labels_are_not_scored() -> None:
    """All but the first of a row, which has no context. The second is predicted by the first."""
    labels = torch.tensor([[5, 6, 7, 8], [5, -100, -100, 8], [5, 6, -100, -100], [5, -100, -100, -100]])
    assert scored_tokens(labels).tolist() == [3, 1, 1, 0]
