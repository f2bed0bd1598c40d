"""A model with its objective: batches in, losses out; and the three ways of backpropagating through cycles.

    full    one graph through all cycles; its activations are those of every application
    cycle   the states are detached between cycles and the loss of each cycle is back-propagated before the next one runs: supervising
            every cycle takes about the memory of one (docs/performance.md)
    last    all cycles but the last run without gradients (TRM); only the last is supervised

Shape letters: B batch, T tokens, D hidden size, H cycles.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..network.losses import IGNORED, Reference, counted, cycle_shares, halting_loss, losses_and_divergences, worsening
from ..utils.models import is_recursive
from .approaches import NEXT_TOKEN, Objective
from .settings import RunSettings


@dataclass(frozen=True)
class Supervision:
    """The terms of the loss; names and defaults are those of the flags in `RunSettings`.

    Args:
        every_cycle: Whether every cycle is scored, or only the last.
    """

    every_cycle: bool = False
    weight: float = 0.5
    schedule: str = "linear_decay"
    backprop: str = "full"
    distill: float = 0.0
    temperature: float = 1.0
    self_distill: float = 0.0
    monotone: float = 0.0
    halting: float = 0.0

    @classmethod
    def of(cls, settings: RunSettings) -> Supervision:
        return cls(
            every_cycle=settings.enable_deep_supervision,
            weight=settings.deep_supervision_weight,
            schedule=settings.deep_supervision_schedule,
            backprop=settings.backprop,
            distill=settings.distill_weight,
            temperature=settings.distill_temperature,
            self_distill=settings.self_distill_weight,
            monotone=settings.monotone_weight,
            halting=settings.halting_weight,
        )

    def shares(self, H: int) -> list[float]:
        """The loss weight of each cycle; 0 for a cycle that is not scored."""
        return cycle_shares(self.schedule, self.weight, H) if self.every_cycle else [0.0] * (H - 1) + [1.0]

    @property
    def by_token(self) -> bool:
        """Whether a term needs the loss or distribution of every token rather than the summed loss."""
        return bool(self.distill or self.self_distill or self.monotone or self.halting)


class LossModule(nn.Module):
    """The module that is trained: model and objective in one forward pass, so that DDP and FSDP wrap both.

    It deliberately has no `config`: the Trainer would set `use_cache = False` in it, and saved models would generate without a
    cache.

    Args:
        model: A recursive model, or a plain causal model of transformers, which counts as one cycle.
        deepest: The largest number of cycles trained or evaluated; None is the configuration's H_cycles.
        teacher: A frozen causal model with the same vocabulary, on the same device; not a submodule, so it is neither wrapped
            nor saved nor averaged.
    """

    accepts_loss_kwargs = True
    loss_type = "ForCausalLM"  # tells the Trainer that labels are shifted by the loss, when it counts tokens
    main_input_name = "input_ids"

    def __init__(
        self,
        model: Any,
        supervision: Supervision | None = None,
        objective: Objective = NEXT_TOKEN,
        deepest: int | None = None,
        teacher: Any = None,
    ):
        super().__init__()
        self.model, self.supervision, self.objective = model, supervision or Supervision(), objective
        self.deepest = deepest or (model.config.H_cycles if is_recursive(model) else 1)
        self.teacher = (teacher,)

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        position_ids: Tensor | None = None,
        H_cycles: int | None = None,
        num_items_in_batch: Tensor | float | None = None,
    ) -> dict[str, Any]:
        """The loss and its components.

        Args:
            input_ids, labels: `[B, T]`; labels unshifted, -100 for ignored tokens.
            position_ids: `[B, T]`, restarting at each document if documents must not attend to each other.
            H_cycles: Cycles of this pass; None is the configuration's.
            num_items_in_batch: Number of scored tokens to divide by, over all accumulated batches; None counts those of this batch.

        Returns:
            `loss`; and detached: `cycle_losses` `[deepest]`, `scored` `[deepest]` (1 for scored cycles, else 0), and
            `terms`, a value for each further active term. All are means per scored token.
        """
        H = H_cycles or (self.model.config.H_cycles if is_recursive(self.model) else 1)
        score = BatchLoss(self, labels, num_items_in_batch, H, self._teacher_reference(input_ids, position_ids))
        if not is_recursive(self.model):
            state = self.model.base_model(input_ids, position_ids=position_ids, use_cache=False).last_hidden_state
            return score.outputs(score.cycle(0, state, None))
        base = self.model.base_model
        e, block, read = base.begin_pass(input_ids, position_ids)

        def losses(e: Tensor) -> Iterator[Tensor]:
            return score.cycles(lambda: base.recursion.steps(e, block, H, self.model.config.L_cycles, self.supervision.backprop), read)

        each = self.supervision.backprop == "cycle"
        return score.outputs(backpropagate_each(losses, e, self.model) if each else torch.stack(list(losses(e))).sum())

    @torch.no_grad()
    def row_sums(self, input_ids: Tensor, labels: Tensor, position_ids: Tensor | None = None) -> Tensor:
        """`[B, cycles]`: the summed loss of each sequence at every cycle up to the deepest; one more column with the hits at cycle H_cycles
        if the objective counts them."""
        states = self._states(input_ids, position_ids)
        columns = [self.objective.token_losses(state, labels, self.reader) for state in states]
        if self.objective.token_hits is not None:
            columns.append(self.objective.token_hits(states[self.main_cycle - 1], labels, self.reader))
        return torch.stack([column.sum(dim=1) for column in columns], dim=1)

    def _states(self, input_ids: Tensor, position_ids: Tensor | None) -> list[Tensor]:
        if not is_recursive(self.model):
            return [self.model.base_model(input_ids, position_ids=position_ids, use_cache=False).last_hidden_state]
        base = self.model.base_model
        e, block, read = base.begin_pass(input_ids, position_ids)
        return [read(z_H) for z_H in base.recursion.steps(e, block, self.deepest, self.model.config.L_cycles)]

    @torch.no_grad()
    def _teacher_reference(self, input_ids: Tensor, position_ids: Tensor | None) -> list[Reference]:
        (teacher,) = self.teacher
        if teacher is None:
            return []
        state = teacher.base_model(input_ids, position_ids=position_ids, use_cache=False).last_hidden_state
        return [Reference(state, teacher.get_output_embeddings(), self.supervision.temperature)]

    @property
    def reader(self) -> nn.Module:
        return self.objective.reader(self.model)

    @property
    def main_cycle(self) -> int:
        """The cycle whose output is the model's output, from 1."""
        return self.model.config.H_cycles if is_recursive(self.model) else 1


class BatchLoss:
    """Accumulates the loss of one batch over its cycles."""

    def __init__(self, owner: LossModule, labels: Tensor, num_items: Any, H: int, references: list[Reference]):
        self.owner, self.want, self.objective, self.labels = owner, owner.supervision, owner.objective, labels
        self.items = torch.as_tensor(counted(labels) if num_items is None else num_items, device=labels.device).clamp(min=1)
        self.H, self.shares, self.references = H, self.want.shares(H), references
        self.found = torch.zeros(owner.deepest, device=labels.device)
        self.scored = torch.zeros(owner.deepest, device=labels.device)
        self.terms: dict[str, Tensor] = {}
        self.tokens: list[Tensor] = []  # per-token losses of each scored cycle, if a term needs them
        self.halts: list[Tensor] = []  # inputs of the halting head at each cycle, if it is trained

    def cycles(self, steps: Callable[[], Iterator[Tensor]], read: Callable[[Tensor], Tensor]) -> Iterator[Tensor]:
        """Yields the summands of the loss as early as possible: one per scored cycle, or one for all of them if nothing needs them apart.

        Args:
            steps: Runs the loop from its start at every call and yields the states.
            read: State to output.
        """
        states: Iterator[tuple[Tensor, Tensor | None]] = ((z, read(z) if self._is_scored(c) else None) for c, z in enumerate(steps()))
        last = None
        if self.want.self_distill and self.want.backprop == "full":
            together = list(states)
            states, last = iter(together), together[-1][1]
        elif self.want.self_distill:  # the last cycle is the teacher of all: an extra pass without gradients computes it first
            with torch.no_grad():
                *_, z = steps()
                last = read(z)
        plain: dict[int, Tensor] = {}
        for c, (z, state) in enumerate(states):
            if self.want.halting:
                self.halts.append(z.detach())
            if state is None:
                continue
            if self.want.by_token or self.want.backprop == "cycle":
                yield self.cycle(c, state, last)
            else:
                plain[c] = state
        if plain:
            yield self.together(plain)

    def _is_scored(self, c: int) -> bool:
        return self.want.every_cycle or c == self.H - 1

    def cycle(self, c: int, state: Tensor, last: Tensor | None) -> Tensor:
        """The weighted loss of cycle `c` (from 0)."""
        return self._with_terms(c, state, last) if self.want.by_token else self.together({c: state})

    def together(self, states: dict[int, Tensor]) -> Tensor:
        """The weighted loss of these cycles (from 0), without further terms."""
        shares = [self.shares[c] for c in states]
        total, losses = self.objective.loss(list(states.values()), self.labels, self.owner.reader, shares, self.items)
        for c, loss in zip(states, losses, strict=True):
            self.found[c], self.scored[c] = loss, 1.0
        return total

    def _with_terms(self, c: int, state: Tensor, last: Tensor | None) -> Tensor:
        """The weighted loss of cycle `c`, with its further terms."""
        head, want = self.owner.reader, self.want
        references = list(self.references)
        if last is not None and c < self.H - 1:
            references.append(Reference(last, head, want.temperature))
        tokens, *divergences = losses_and_divergences(state, self.labels, head, references)
        own = total = tokens.sum() / self.items
        weights = [("distill", want.distill)] * len(self.references) + [("self_distill", want.self_distill)]
        for (name, weight), divergence in zip(weights, divergences, strict=False):
            total = total + weight * self._note(name, c, divergence)
        if want.monotone and self.tokens:
            total = total + want.monotone * self._note("monotone", c, worsening(tokens, self.tokens[-1]))
        self.tokens.append(tokens.detach())
        self.found[c], self.scored[c] = own.detach(), 1.0
        return self.shares[c] * total

    def _note(self, name: str, c: int, tokens: Tensor) -> Tensor:
        """The mean of a term over tokens. Its logged value is the mean over cycles, by their loss weights."""
        mean = tokens.sum() / self.items
        self.terms[name] = self.terms.get(name, torch.zeros_like(mean)) + self.shares[c] * mean.detach()
        return mean

    def outputs(self, loss: Tensor) -> dict[str, Any]:
        if self.halts:
            q_head = self.owner.model.base_model.recursion.q_head
            halting = halting_loss([q_head(z) for z in self.halts], self.tokens, self.labels, self.items)
            self.terms["halting"], loss = halting.detach(), loss + self.want.halting * halting
        return {"loss": loss, "cycle_losses": self.found, "scored": self.scored, "terms": self.terms}


def backpropagate_each(losses: Callable[[Tensor], Iterator[Tensor]], e: Tensor, model: nn.Module) -> Tensor:
    """The sum of losses, back-propagating each one before the next is computed; the gradient of the sum is unchanged.

    The gradients are accumulated on the way and returned by the backward pass of the sum: DDP, gradient accumulation and clipping see one
    backward pass with one gradient per parameter.

    Args:
        losses: Maps `e` to the losses one by one; no loss may need the graph of an earlier one.
        e: `[B, T, D]`, the only tensor that connects the losses to the graph before them.
        model: The model that the losses are computed with; its trainable parameters get the gradients.
    """
    leaf = e.detach().requires_grad_(e.requires_grad)
    total = torch.zeros((), device=e.device)
    with _shadow_parameters(model) as shadows:
        for loss in losses(leaf):
            loss.backward()
            total = total + loss.detach()
    torch.clear_autocast_cache()  # which holds copies of the shadows
    originals, leaves = [*shadows, e], [*shadows.values(), leaf]
    return _PrecomputedGrad.apply(total, [each.grad for each in leaves], *originals)


@contextmanager
def _shadow_parameters(model: nn.Module) -> Iterator[dict[nn.Parameter, nn.Parameter]]:
    """Swap the trainable parameters for others that share their storage, so that gradients accumulate without triggering DDP's hooks.

    Yields:
        parameter -> its shadow.
    """
    shadows: dict[nn.Parameter, nn.Parameter] = {}
    places = [
        (module, name, p) for module in model.modules() for name, p in module._parameters.items() if p is not None and p.requires_grad
    ]
    try:
        for module, name, p in places:  # a tied one stands in several places
            module._parameters[name] = shadows.setdefault(p, nn.Parameter(p.detach()))
        yield shadows
    finally:
        for module, name, p in places:
            module._parameters[name] = p


class _PrecomputedGrad(torch.autograd.Function):
    """A value with precomputed gradients."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: list[Tensor | None], *inputs: Tensor) -> Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> Any:
        gradients, ctx.gradients = ctx.gradients, None
        return None, None, *(None if g is None else g.mul_(scale) for g in gradients)


def scored_tokens(labels: Tensor) -> Tensor:
    """`[B]`: number of scored next tokens per row."""
    return (labels[:, 1:] != IGNORED).sum(dim=1)
