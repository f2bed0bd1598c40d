"""Groups and schedules by hand and by property; optimizers against torch's own, and after a save; the average of weights."""

from __future__ import annotations

import io
import math
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler
from transformers.trainer_utils import SchedulerType

from recursify import RecursiveLLM
from recursify.errors import UserError
from recursify.network.configuration_recursive_llm import from_donor
from recursify.training import TrainSettings
from recursify.training.optimizers import EMA, MuonAdamW, build_optimizer, learning_rate_factor, parameter_groups, warmup_of
from recursify.utils.typed import NEAREST
from tests.support.tiny import make_tiny_tokenizer, sentences, tiny_config, tiny_donor

SCHEDULES = ("linear", "cosine", "wsd")
OPTIMIZERS = ("adamw", "muon", "adamw_8bit")


def recursive(family: str = "qwen2", seed: int = 0, **donor: Any) -> Any:
    """Three random layers, the middle one looped, with gains and states that matter."""
    torch.manual_seed(seed)
    shape = {"prelude_layers": 1, "L_layers": 1, "coda_layers": 1, "H_cycles": 2, "L_cycles": 1, "gain_init": 0.2, "state_init_std": 0.5}
    return RecursiveLLM(from_donor(tiny_config(family, num_hidden_layers=3, **donor), [0, 1, 2], **shape))


def settings(**changes: Any) -> TrainSettings:
    return TrainSettings(**({"checkpoint": "in memory", "lr": 1e-3, "weight_decay": 0.1, "device": "cpu"} | changes))


def batch() -> torch.Tensor:
    ids = make_tiny_tokenizer()(" ".join(sentences(1, 16))).input_ids
    return torch.tensor(ids[: 4 * 16]).view(4, 16)


def backward(model: Any) -> float:
    loss = model(batch(), labels=batch()).loss
    loss.backward()
    return loss.item()


def names_of(model: Any, group: dict[str, Any]) -> set[str]:
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)] for p in group["params"]}


def weights_of(model: Any) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def same(found: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.fixture
def eager() -> Iterator[None]:
    """Without compiling: torchao's step takes a quarter of a minute for each shape of parameter."""
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


# Groups


def test_parameter_groups() -> None:
    model = recursive()
    matrices, vectors, own = parameter_groups(model, settings(lr=1e-4))
    assert (matrices["lr"], matrices["weight_decay"]) == (1e-4, 0.1)
    assert (vectors["lr"], vectors["weight_decay"]) == (1e-4, 0.0)
    assert (own["lr"], own["weight_decay"]) == (pytest.approx(1e-3), 0.0)
    assert all(p.ndim == 2 for p in matrices["params"]) and all(p.ndim == 1 for p in vectors["params"])
    assert len(own["params"]) == 6  # two gains for each injection, two states; q_head is frozen
    trained = [id(p) for p in model.parameters() if p.requires_grad]
    assert sorted(id(p) for group in (matrices, vectors, own) for p in group["params"]) == sorted(trained)
    assert parameter_groups(model, settings(gain_lr=0.5))[2]["lr"] == 0.5
    assert parameter_groups(tiny_donor(num_hidden_layers=1), settings())[2]["params"] == []


def test_halting_head_is_in_the_recursion_parameter_group() -> None:
    """Its weight is a matrix of one row, and still has neither decay nor Muon."""
    model = recursive()
    model.model.recursion.q_head.requires_grad_(True)
    assert "model.recursion.q_head.weight" in names_of(model, parameter_groups(model, settings())[2])
    assert "model.recursion.q_head.weight" in names_of(model, build_optimizer(model, settings(optimizer="muon")).param_groups[3])


# Schedules


def factors(schedule: str, warmup: int, total: int, decay_share: float = 0.2, steps: int | None = None) -> list[float]:
    return [learning_rate_factor(schedule, step, warmup, total, decay_share) for step in range(total + 1 if steps is None else steps)]


def test_linear_by_hand() -> None:
    assert factors("linear", 3, 7) == [0.25, 0.5, 0.75, 1.0, 0.75, 0.5, 0.25, 0.0]
    assert factors("linear", 0, 2) == [1.0, 0.5, 0.0]


def test_cosine_by_hand() -> None:
    slope = [1.0, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2, 0.0]
    assert factors("cosine", 0, 4) == pytest.approx(slope, abs=1e-15)
    assert factors("cosine", 3, 7) == pytest.approx([0.25, 0.5, 0.75, *slope], abs=1e-15)


def test_wsd_by_hand() -> None:
    assert factors("wsd", 1, 10, 0.4) == [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]
    assert factors("wsd", 0, 6, 0.25) == pytest.approx([1.0, 1.0, 1.0, 1.0, 1.0, 1 / 1.5, 0.0])
    assert factors("wsd", 0, 3, 0.0) == [1.0, 1.0, 1.0, 0.0]


runs = st.integers(1, 10**6).flatmap(lambda total: st.tuples(st.integers(0, total - 1), st.just(total)))
shares = st.floats(0, 1)


@given(st.sampled_from(SCHEDULES), runs, shares, st.floats(0, 1, exclude_max=True))
def test_learning_rate_is_positive_until_it_ends_at_zero(schedule: str, run: tuple[int, int], share: float, where: float) -> None:
    warmup, total = run
    step = int(where * total)
    here, then = (learning_rate_factor(schedule, s, warmup, total, share) for s in (step, step + 1))
    assert 0 < here <= 1
    assert here < then if step < warmup else here >= then
    assert learning_rate_factor(schedule, warmup, warmup, total, share) == 1
    assert learning_rate_factor(schedule, total, warmup, total, share) == 0
    assert learning_rate_factor(schedule, total + 7, warmup, total, share) == 0


@given(st.sampled_from(SCHEDULES), runs, st.integers(0, 10**6))
def test_schedules_share_their_warmup(schedule: str, run: tuple[int, int], step: int) -> None:
    warmup, total = run
    if step < warmup:
        assert learning_rate_factor(schedule, step, warmup, total, 0.2) == (step + 1) / (warmup + 1)


@pytest.mark.parametrize("theirs", ["linear", "cosine", "constant_with_warmup"])
def test_schedules_are_those_of_transformers_after_the_warmup(theirs: str) -> None:
    """constant_with_warmup is what its refusal says: wsd with decay_share 0."""
    total, warmup = 50, 10
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    factor = get_scheduler(theirs, optimizer, warmup, total).lr_lambdas[0]
    ours = "wsd" if theirs in NEAREST else theirs
    for step in range(warmup, total):
        assert learning_rate_factor(ours, step, warmup, total, 0.0) == pytest.approx(factor(step))


def test_every_schedule_of_transformers_is_taken_or_answered() -> None:
    for theirs in SchedulerType:
        if theirs.value in (*SCHEDULES, "warmup_stable_decay"):
            assert settings(lr_schedule=theirs.value).lr_schedule in SCHEDULES
        else:
            with pytest.raises(UserError, match=rf"nearest to {theirs.value}: ({'|'.join(SCHEDULES)}), .*got '{theirs.value}'$"):
                settings(lr_schedule=theirs.value)


@given(runs, shares, st.integers(0, 10**6))
def test_wsd_is_linear_or_flat(run: tuple[int, int], share: float, step: int) -> None:
    """It falls at the same rate per step all through its last part, and lies at 1 before."""
    warmup, total = run
    found = learning_rate_factor("wsd", step, warmup, total, share)
    fall = share * total
    if step >= warmup and fall >= total - warmup:  # all that follows the warm-up
        assert found == learning_rate_factor("linear", step, warmup, total, share)
    elif warmup <= step <= total - max(1.0, fall):
        assert found == pytest.approx(1)
    elif warmup <= step < total:
        assert found == pytest.approx((total - step) / fall)


@given(runs, st.floats(0, 1, exclude_max=True))
def test_cosine_is_symmetric_about_its_middle(run: tuple[int, int], where: float) -> None:
    warmup, total = run
    after = int(where * (total - warmup))
    both = [learning_rate_factor("cosine", step, warmup, total, 0.2) for step in (warmup + after, total - after)]
    assert sum(both) == pytest.approx(1)


def test_warmup_of() -> None:
    assert [warmup_of(settings(warmup_steps=100), total) for total in (1000, 200, 199, 5)] == [100, 100, 19, 0]


@given(st.integers(0, 10**6), st.integers(1, 10**6))
def test_warmup_never_exceeds_half_of_the_run(warmup_steps: int, total: int) -> None:
    assert 0 <= warmup_of(settings(warmup_steps=warmup_steps), total) <= total / 2


# Which optimizer, and for what


def test_adamw_equals_transformers_adamw() -> None:
    """With the Trainer's own one, existing runs stay what they are."""
    from transformers import Trainer, TrainingArguments

    model = recursive()
    theirs, kwargs = Trainer.get_optimizer_cls_and_kwargs(TrainingArguments(output_dir=".", use_cpu=True), model)
    optimizer = build_optimizer(model, settings())
    assert type(optimizer) is theirs
    expected = theirs(parameter_groups(model, settings()), **kwargs)
    groups = [[{k: v for k, v in group.items() if k != "params"} for group in o.param_groups] for o in (optimizer, expected)]
    assert groups[0] == groups[1]


@pytest.mark.parametrize(("family", "tied"), [("qwen2", True), ("llama", False)])
def test_muon_gets_the_matrices_of_the_layers(family: str, tied: bool) -> None:
    model = recursive(family)
    groups = build_optimizer(model, settings(optimizer="muon")).param_groups
    assert [group["method"] for group in groups] == ["muon", "adamw", "adamw", "adamw"]
    projections = {f"{part}_proj.weight" for part in ("q", "k", "v", "o", "gate", "up", "down")}
    named = names_of(model, groups[0])
    assert {name.rsplit(".", 2)[-2] + ".weight" for name in named} == projections and len(named) == 3 * len(projections)
    ends = {"model.embed_tokens.weight"} if tied else {"model.embed_tokens.weight", "lm_head.weight"}
    assert names_of(model, groups[1]) == ends
    assert sorted(id(p) for g in groups for p in g["params"]) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [(1e-3, 0.1), (1e-3, 0.1), (1e-3, 0.0), (1e-2, 0.0)]


def test_muon_leaves_stacks_of_matrices_to_adamw() -> None:
    """As the experts of one layer are kept: one parameter of three dimensions."""
    model = tiny_donor(num_hidden_layers=1)
    model.model.experts = nn.Linear(1, 1)
    model.model.experts.weight = nn.Parameter(torch.zeros(2, 3, 4))
    groups = build_optimizer(model, settings(optimizer="muon")).param_groups
    assert names_of(model, groups[1]) == {"model.embed_tokens.weight", "model.experts.weight"}


def test_muon_steps_as_torch_does() -> None:
    """On the same gradients, each of torch's two optimizers by hand."""
    model, twin = recursive(), recursive()
    optimizer = build_optimizer(model, settings(optimizer="muon"))
    assert isinstance(optimizer, MuonAdamW)
    inside = [p for name, p in twin.named_parameters() if "_proj.weight" in name]
    embedding = twin.model.embed_tokens.weight
    own = [p for p in twin.model.recursion.parameters() if p.requires_grad]
    known = {id(p) for p in (*inside, embedding, *own)}
    others = [p for p in twin.parameters() if p.requires_grad and id(p) not in known]
    muon = torch.optim.Muon(inside, lr=1e-3, weight_decay=0.1, momentum=0.95, nesterov=True, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(
        [{"params": [embedding], "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0},
         {"params": own, "lr": 1e-2, "weight_decay": 0.0}], lr=1e-3, betas=(0.9, 0.999), eps=1e-8, fused=True,
    )  # fmt: skip
    start = weights_of(model)
    for _ in range(3):
        backward(model)
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            q.grad = None if p.grad is None else p.grad.clone()
        optimizer.step()
        optimizer.zero_grad()
        muon.step()
        adamw.step()
    assert same(weights_of(model), weights_of(twin))
    moved = [not torch.equal(a, p) for a, p in zip(start, model.parameters(), strict=True) if p.requires_grad]
    assert all(moved)


def test_muon_without_matrices_to_train() -> None:
    """As where only norms, embeddings or the recursion are trained."""
    model = recursive()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("recursion.inject" in name)
    optimizer = build_optimizer(model, settings(optimizer="muon"))
    scheduler = LambdaLR(optimizer, lambda step: 1.0)
    assert scheduler.get_last_lr()[0] == 1e-3
    before = backward(model)
    optimizer.load_state_dict(optimizer.state_dict())
    for _ in range(5):
        optimizer.step()
        optimizer.zero_grad()
        after = backward(model)
    assert after < before


def test_muon_takes_a_closure() -> None:
    model = recursive()
    optimizer = build_optimizer(model, settings(optimizer="muon"))
    calls: list[float] = []

    def closure() -> float:
        optimizer.zero_grad()
        calls.append(backward(model))
        return calls[-1]

    with torch.no_grad():  # as where the loss is computed within a step of some other loop
        assert optimizer.step(closure) == calls[0] and len(calls) == 1
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_8bit_without_torchao_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    with pytest.raises(UserError, match=r"--optimizer adamw_8bit: .*pip install torchao.*--optimizer adamw"):
        build_optimizer(recursive(), settings(optimizer="adamw_8bit"))


def test_8bit_keeps_large_moments_in_8_bits(eager: None) -> None:
    model = recursive(hidden_size=64)
    optimizer = build_optimizer(model, settings(optimizer="adamw_8bit"))
    backward(model)
    optimizer.step()
    moments = {name: optimizer.state[p]["exp_avg"] for name, p in model.named_parameters() if p.requires_grad}
    quantised = {name for name, moment in moments.items() if getattr(moment, "codes", moment).dtype == torch.uint8}
    assert quantised == {name for name, moment in moments.items() if moment.numel() >= 4096} != set()
    assert all(moments[name].codes.numel() == moments[name].numel() for name in quantised)  # 8 bits each, not 4


def test_8bit_steps_as_adamw_does(eager: None) -> None:
    """Exactly but for rounding where moments are small tensors; nearly where they are kept in 8 bits."""
    model, twin = recursive(hidden_size=64), recursive(hidden_size=64)
    wanted = settings(optimizer="adamw_8bit", lr=1e-3, gain_lr=0.03, weight_decay=0.5)
    optimizer, plain = build_optimizer(model, wanted), build_optimizer(twin, settings(lr=1e-3, gain_lr=0.03, weight_decay=0.5))
    assert [float(group["lr"]) for group in optimizer.param_groups] == pytest.approx([1e-3, 1e-3, 0.03])
    start = weights_of(model)
    for _ in range(3):
        backward(model)
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            q.grad = None if p.grad is None else p.grad.clone()
        optimizer.step()
        optimizer.zero_grad()
        plain.step()
    for before, found, expected in zip(start, model.parameters(), twin.parameters(), strict=True):
        if not found.requires_grad:
            continue
        assert (found - before).abs().max() > 1e-3
        if found.numel() < 4096:
            torch.testing.assert_close(found - before, expected - before, rtol=1e-3, atol=1e-6)
        else:
            assert (found - expected).norm() < 0.3 * (expected - before).norm()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weight_decay_applies_to_matrices_only(name: str, eager: None) -> None:
    """Without gradients a step shrinks each by its rate times its decay, and leaves norms, biases and the recursion's own as they are."""
    model = recursive()
    model.model.recursion.q_head.requires_grad_(True)
    optimizer = build_optimizer(model, settings(optimizer=name, lr=1e-2, weight_decay=0.5, gain_lr=0.3))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    shrunk = set()
    for parameter_name, parameter in model.named_parameters():
        if not torch.equal(parameter, before[parameter_name]):
            torch.testing.assert_close(parameter.detach(), before[parameter_name] * (1 - 1e-2 * 0.5))
            shrunk.add(parameter_name)
    own = {name for name, p in model.named_parameters() if "recursion" in name}
    assert shrunk == {name for name, p in model.named_parameters() if p.ndim == 2} - own and len(own) == 8


# On the whole


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_each_optimizer_learns(name: str, eager: None) -> None:
    model = recursive()
    optimizer = build_optimizer(model, settings(optimizer=name, lr=3e-3))
    losses = []
    for _ in range(20):
        losses.append(backward(model))
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.8 * losses[0]


@pytest.fixture
def accelerator() -> Iterator[Callable[[], Accelerator]]:
    """Makes a fresh one for each run; what accelerate keeps for the process is forgotten afterwards."""

    def fresh() -> Accelerator:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        return Accelerator(cpu=True)

    yield fresh
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_resumed_equals_uninterrupted(name: str, eager: None, accelerator: Callable[[], Accelerator]) -> None:
    """Bit for bit, under accelerate and a schedule, through a file that is read without unpickling code."""

    def begin(model: Any) -> tuple[Any, Any]:
        optimizer = accelerator().prepare(build_optimizer(model, settings(optimizer=name)))
        return optimizer, LambdaLR(optimizer.optimizer, lambda step: learning_rate_factor("cosine", step, 2, 11, 0.2))

    def go_on(model: Any, optimizer: Any, scheduler: Any, steps: int) -> None:
        for _ in range(steps):
            backward(model)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()

    whole = recursive(hidden_size=64)
    go_on(whole, *begin(whole), steps=10)

    first = recursive(hidden_size=64)
    optimizer, scheduler = begin(first)
    go_on(first, optimizer, scheduler, steps=5)
    file = io.BytesIO()
    torch.save([first.state_dict(), optimizer.state_dict(), scheduler.state_dict()], file)
    file.seek(0)
    model_state, optimizer_state, scheduler_state = torch.load(file, weights_only=True)

    second = recursive(hidden_size=64, seed=1)
    second.load_state_dict(model_state)
    optimizer, scheduler = begin(second)
    optimizer.load_state_dict(optimizer_state)
    scheduler.load_state_dict(scheduler_state)
    go_on(second, optimizer, scheduler, steps=5)
    assert same(weights_of(second), weights_of(whole))
    assert not same(weights_of(second), weights_of(first))


def test_optimizer_steps_from_its_loaded_state() -> None:
    """Loading puts new groups and states into the optimizer; the two within must not keep the old ones."""
    model = recursive()
    optimizer = build_optimizer(model, settings(optimizer="muon"))
    backward(model)
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    matrix, vector = optimizer.param_groups[0]["params"][0], optimizer.param_groups[2]["params"][0]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    before = weights_of(model)
    momentum, step = optimizer.state[matrix]["momentum_buffer"].clone(), optimizer.state[vector]["step"].clone()
    optimizer.step()
    assert same(weights_of(model), before)
    assert not torch.equal(optimizer.state[matrix]["momentum_buffer"], momentum)
    assert optimizer.state[vector]["step"] == step + 1


# The average of the weights


def test_ema_by_hand() -> None:
    """The decays are 1/10, 2/11, 3/12, ... up to the one asked for."""
    parameter = nn.Parameter(torch.tensor([1.0, -2.0]))
    ema = EMA([parameter], 0.2)
    expected = parameter.detach().clone()
    for n, decay in enumerate([0.1, 2 / 11, 0.2, 0.2]):
        with torch.no_grad():
            parameter.copy_(torch.tensor([n + 2.0, n - 5.0]))
        ema.update()
        expected = decay * expected + (1 - decay) * parameter.detach()
        torch.testing.assert_close(ema.averages[0], expected)


def test_ema_weight_of_the_initial_value_vanishes() -> None:
    parameter = nn.Parameter(torch.ones(1))
    ema = EMA([parameter], 0.9999)
    with torch.no_grad():
        parameter.zero_()
    for n in range(1, 21):
        ema.update()
        assert ema.averages[0].item() == pytest.approx(1 / math.comb(n + 9, 9), rel=1e-4)


@given(st.lists(st.floats(-100, 100), min_size=1, max_size=30), st.floats(0.01, 0.999))
def test_ema_is_a_convex_combination(values: list[float], decay: float) -> None:
    parameter = nn.Parameter(torch.tensor([values[0]]))
    ema = EMA([parameter], decay)
    for value in values:
        with torch.no_grad():
            parameter.fill_(value)
        ema.update()
    slack = 1e-3
    assert min(values) - slack <= ema.averages[0].item() <= max(values) + slack


def test_swapped_restores_the_weights_exactly() -> None:
    model = recursive()
    ema = EMA(model.parameters(), 0.9)
    optimizer = build_optimizer(model, settings())
    for _ in range(3):
        backward(model)
        optimizer.step()
        optimizer.zero_grad()
        ema.update()
    own, storages = weights_of(model), [p.data_ptr() for p in model.parameters()]
    with torch.no_grad():
        loss = model(batch(), labels=batch()).loss
        with ema.swapped():
            inside = weights_of(model)
            assert [p.data_ptr() for p in model.parameters()] == storages
            assert model(batch(), labels=batch()).loss != loss
        assert same(weights_of(model), own)
        assert model(batch(), labels=batch()).loss == loss
    trained = [i for i, p in enumerate(model.parameters()) if p.requires_grad]
    assert same([inside[i] for i in trained], ema.averages)
    assert not any(torch.equal(inside[i], own[i]) for i in trained)
    assert backward(model) == loss  # gradients still flow


def test_swapped_restores_the_weights_after_an_exception() -> None:
    model = recursive()
    ema = EMA(model.parameters(), 0.9)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    own = weights_of(model)
    with pytest.raises(RuntimeError, match="in the middle"), ema.swapped():
        assert not same(weights_of(model), own)
        raise RuntimeError("in the middle")
    assert same(weights_of(model), own)


def test_ema_of_bfloat16_is_float32() -> None:
    """Steps too small for bfloat16 still move the average, and the weights come back exactly."""
    parameter = nn.Parameter(torch.tensor([1.0], dtype=torch.bfloat16))
    ema = EMA([parameter], 0.999)
    with torch.no_grad():
        parameter.fill_(1.0078125)  # the next bfloat16
    ema.update()
    assert ema.averages[0].dtype == torch.float32
    assert ema.averages[0].item() == pytest.approx(1 + 0.9 * 0.0078125, abs=1e-6)
    with ema.swapped():
        assert parameter.dtype == torch.bfloat16
    assert parameter.item() == 1.0078125


def test_ema_leaves_frozen_weights_out() -> None:
    model = recursive()
    model.model.embed_tokens.requires_grad_(False)
    assert len(EMA(model.parameters(), 0.9).averages) == sum(p.requires_grad for p in model.parameters())


def test_ema_resumes_from_its_state_dict() -> None:
    def steps(ema: EMA, parameter: nn.Parameter, numbers: range) -> None:
        for n in numbers:
            with torch.no_grad():
                parameter.fill_(math.sin(n))
            ema.update()

    one = nn.Parameter(torch.ones(3))
    whole = EMA([one], 0.3)
    steps(whole, one, range(6))

    two = nn.Parameter(torch.ones(3))
    first = EMA([two], 0.3)
    steps(first, two, range(3))
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = EMA([two], 0.3)
    second.load_state_dict(torch.load(file, weights_only=True))
    steps(second, two, range(3, 6))
    assert torch.equal(second.averages[0], whole.averages[0])
    with pytest.raises(ValueError):
        EMA([one, two], 0.3).load_state_dict(second.state_dict())
