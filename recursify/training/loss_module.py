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
    """What a loss is made of; the words and defaults are those of the flags in `RunSettings`.

    Args:
        every_cycle: Whether every cycle is scored, or the last alone.
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
        """The share of each cycle in the loss; 0 for a cycle that is not scored."""
        return cycle_shares(self.schedule, self.weight, H) if self.every_cycle else [0.0] * (H - 1) + [1.0]

    @property
    def by_token(self) -> bool:
        """Whether a term needs more of a cycle than its summed loss."""
        return bool(self.distill or self.self_distill or self.monotone or self.halting)


class LossModule(nn.Module):
    """The one module that training sees, so that whatever wraps a model for it (DDP, FSDP) wraps the pass to the loss.

    It has no `config` on purpose: the Trainer would write `use_cache = False` into it, and every saved model would generate without a
    cache.

    Args:
        model: A recursive model, or a plain causal model of transformers, whose only "cycle" is its own pass.
        deepest: The deepest pass that is asked for or measured; the configuration's H_cycles where None.
        teacher: A frozen causal model with the same vocabulary, on the same device; not a part of this module, so it is neither wrapped
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
        """What is minimised, and what there is to say of it.

        Args:
            input_ids, labels: `[B, T]`; labels unshifted, -100 where a token does not count.
            position_ids: `[B, T]`, restarting where a document begins that sees nothing of the one before it.
            H_cycles: Cycles of this pass; the configuration's where None.
            num_items_in_batch: Counted tokens to divide by: those of all batches that are accumulated. Those of this batch where None.

        Returns:
            `loss`, with its gradients; detached, `cycle_losses` `[deepest]`, `scored` `[deepest]` (1 for cycles that were, else 0), and
            `terms`, a value for each further term that is on; all per counted token.
        """
        H = H_cycles or (self.model.config.H_cycles if is_recursive(self.model) else 1)
        score = Score(self, labels, num_items_in_batch, H, self._donors_view(input_ids, position_ids))
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
        """`[B, cycles]`: the summed loss of each sequence at every cycle up to the deepest; where hits are counted, one more column with
        those at the cycle that the model is read out at."""
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
    def _donors_view(self, input_ids: Tensor, position_ids: Tensor | None) -> list[Reference]:
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
        """The cycle that the model is read out at, from 1."""
        return self.model.config.H_cycles if is_recursive(self.model) else 1


class Score:
    """One batch, cycle by cycle."""

    def __init__(self, owner: LossModule, labels: Tensor, num_items: Any, H: int, references: list[Reference]):
        self.owner, self.want, self.objective, self.labels = owner, owner.supervision, owner.objective, labels
        self.items = torch.as_tensor(counted(labels) if num_items is None else num_items, device=labels.device).clamp(min=1)
        self.H, self.shares, self.references = H, self.want.shares(H), references
        self.found = torch.zeros(owner.deepest, device=labels.device)
        self.scored = torch.zeros(owner.deepest, device=labels.device)
        self.terms: dict[str, Tensor] = {}
        self.tokens: list[Tensor] = []  # the loss of every token at each cycle, where a term asks for it
        self.halts: list[Tensor] = []  # what the halting head reads at each cycle, where it is trained

    def cycles(self, steps: Callable[[], Iterator[Tensor]], read: Callable[[Tensor], Tensor]) -> Iterator[Tensor]:
        """What adds up to the loss, as soon as it is known: the share of each scored cycle, or of all of them where nothing is gained by
        less. `steps` runs the loop anew each time it is called."""
        states: Iterator[tuple[Tensor, Tensor | None]] = ((z, read(z) if self._is_scored(c) else None) for c, z in enumerate(steps()))
        last = None
        if self.want.self_distill and self.want.backprop == "full":
            together = list(states)
            states, last = iter(together), together[-1][1]
        elif self.want.self_distill:  # what teaches comes last, and is needed first: once more, without gradients
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
        """The share of cycle `c`, from 0, in the loss."""
        return self._with_terms(c, state, last) if self.want.by_token else self.together({c: state})

    def together(self, states: dict[int, Tensor]) -> Tensor:
        """The share of these cycles, from 0, in a loss without further terms."""
        shares = [self.shares[c] for c in states]
        total, losses = self.objective.loss(list(states.values()), self.labels, self.owner.reader, shares, self.items)
        for c, loss in zip(states, losses, strict=True):
            self.found[c], self.scored[c] = loss, 1.0
        return total

    def _with_terms(self, c: int, state: Tensor, last: Tensor | None) -> Tensor:
        """The share of cycle `c` in a loss with further terms."""
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
        """The mean of a term over tokens; what is logged of it is the mean over cycles, by their shares."""
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
    """The sum of losses, each of which has been back-propagated before the next one was computed; its gradient is theirs.

    The gradients are added up on the way and handed on in the backward pass of the sum: whoever waits for gradients (DDP, accumulation,
    clipping) sees one backward pass with one gradient for each parameter.

    Args:
        losses: From `e` to the losses, one by one; no loss may need the graph of one before it.
        e: `[B, T, D]`, what the losses and the graph before them have in common.
        model: What the losses are computed with; those of its parameters that are trained get the gradients.
    """
    leaf = e.detach().requires_grad_(e.requires_grad)
    total = torch.zeros((), device=e.device)
    with _shadow_parameters(model) as stand_ins:
        for loss in losses(leaf):
            loss.backward()
            total = total + loss.detach()
    torch.clear_autocast_cache()  # which holds copies of the stand-ins
    originals, leaves = [*stand_ins, e], [*stand_ins.values(), leaf]
    return _PrecomputedGrad.apply(total, [each.grad for each in leaves], *originals)


@contextmanager
def _shadow_parameters(model: nn.Module) -> Iterator[dict[nn.Parameter, nn.Parameter]]:
    """Inside, the trained parameters of a model are others over the same numbers, so that gradients add up, in place, where nobody waits
    for them. Gives parameter -> stand-in."""
    stand_ins: dict[nn.Parameter, nn.Parameter] = {}
    places = [
        (module, name, p) for module in model.modules() for name, p in module._parameters.items() if p is not None and p.requires_grad
    ]
    try:
        for module, name, p in places:  # a tied one stands in several places
            module._parameters[name] = stand_ins.setdefault(p, nn.Parameter(p.detach()))
        yield stand_ins
    finally:
        for module, name, p in places:
            module._parameters[name] = p


class _PrecomputedGrad(torch.autograd.Function):
    """A value whose gradients are known already."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: list[Tensor | None], *inputs: Tensor) -> Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> Any:
        gradients, ctx.gradients = ctx.gradients, None
        return None, None, *(None if g is None else g.mul_(scale) for g in gradients)


def scored_tokens(labels: Tensor) -> Tensor:
    """`[B]`: positions of each row whose next token counts."""
    return (labels[:, 1:] != IGNORED).sum(dim=1)
