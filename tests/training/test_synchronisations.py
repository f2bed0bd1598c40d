"""No step of a training makes the host wait for the device, but where transformers does: counted by operations, since a CPU never waits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from benchmarks.synchronisations import ARRIVED, Steps, counted
from tests.support.runs import blocks, recursive, run
from tests.support.tiny import tiny_donor

EVERY: dict[str, Any] = {"enable_deep_supervision": True}
TERMS: dict[str, Any] = EVERY | {"self_distill_weight": 0.1, "monotone_weight": 0.1, "halting_weight": 0.1}
WAYS: dict[str, dict[str, Any]] = {
    "last cycle scored": {},
    "backprop last": {"backprop": "last"},
    "backprop full": EVERY,
    "backprop cycle": EVERY | {"backprop": "cycle"},
    "all terms": TERMS,
    "all terms, backprop cycle": TERMS | {"backprop": "cycle"},
    "distillation": {"distill_weight": 0.5},
    "averaged weights": {"ema_decay": 0.9},
    "muon": {"optimizer": "muon"},
    "no clipping": {"max_grad_norm": 0.0},
    "accumulation": {"grad_accum_steps": 2},
    "gradient checkpointing": EVERY | {"gradient_checkpointing": True},
    "bfloat16": EVERY | {"bf16": True},
    "depths": EVERY | {"cycle_choices": (1, 2, 3)},
    "separate documents": {"separate_documents": True},
}
# transformers looks whether positions restart, once a forward pass, wherever it is given positions; its own models give them to themselves.
PACKED = "transformers/masking_utils.py find_packed_sequence_indices: item"
THEIRS = {"distillation": [PACKED], "separate documents": [PACKED]}


def waits_per_step(steps: int = 6, **flags: Any) -> list[Counter[str]]:
    teacher = {"teacher": tiny_donor("qwen2", seed=8, num_hidden_layers=2)} if "distill_weight" in flags else {}
    with counted(torch.device("cpu")) as waits:
        watch = Steps(waits)
        rows = blocks(2 * steps * flags.get("grad_accum_steps", 1))
        run(recursive(), rows, batch_size=2, log_every=100, callbacks=[watch], **teacher, **flags)
    return watch.between()


@pytest.mark.parametrize("way", WAYS)
def test_no_step_waits(way: str) -> None:
    expected = Counter([ARRIVED, *THEIRS.get(way, [])])
    assert waits_per_step(**WAYS[way]) == [expected] * 3


def test_the_norm_of_a_step_is_read_in_the_next() -> None:
    """With the default optimizer. Muon cannot skip a step on the device, so there the host waits before it updates the weights."""
    pending: dict[str, list[bool]] = {"adamw": [], "muon": []}
    for name, seen in pending.items():

        class Look(TrainerCallback):
            def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, seen: list[bool] = seen, **kwargs: Any) -> None:
                seen.append(len(waits) > 0 and waits[ARRIVED] < state.global_step + 1)

        with counted(torch.device("cpu")) as waits:
            run(recursive(), blocks(6), batch_size=2, log_every=100, optimizer=name, callbacks=[Look()])
    assert pending == {"adamw": [True] * 3, "muon": [False] * 3}


@pytest.mark.parametrize(
    ("what", "call"),
    [
        ("item", lambda x: x[0].item()),
        ("item", lambda x: bool(x[0] > 0)),
        ("item", lambda x: float(x.sum())),
        ("item", lambda x: range(int(x[0]))),
        ("nonzero", lambda x: x.nonzero()),
        ("nonzero", lambda x: x[x > 0]),
        ("nonzero", lambda x: x.index_put_((x > 0,), torch.ones(1))),
        ("masked_select", lambda x: x.masked_select(x > 0)),
        ("equal", lambda x: torch.equal(x, x)),
        ("cpu", lambda x: x.cpu()),
        ("numpy", lambda x: x.numpy()),
        ("tolist", lambda x: x.tolist()),
        ("tensor", lambda x: torch.tensor(1.0, device=x.device)),
        ("as_tensor", lambda x: torch.as_tensor(1.0, device=x.device)),
    ],
)
def test_what_waits_is_counted(what: str, call: Callable[[torch.Tensor], object]) -> None:
    with counted(torch.device("cpu")) as waits:
        call(torch.ones(3))
    assert waits == {f"training/test_synchronisations.py <lambda>: {what}": 1}


def test_what_does_not_wait_is_not_counted() -> None:
    x = torch.ones(3, requires_grad=True)
    with counted(torch.device("cpu")) as waits:
        y = torch.where(x > 0, x, x.detach()[[0, 1, 2]]).clamp(min=torch.zeros(()))
        y[0] = 1.0
        (y.masked_fill(y > 1, 0.0).sum() * torch.full((), 2.0, device=x.device)).backward()
        torch.as_tensor(y, device=x.device)
    assert not waits
