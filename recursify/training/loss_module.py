"""A model with its objective: batches in, losses out; and the three modes of backpropagation through the cycles.

    full    one graph through all cycles, with the activations of every layer application
    cycle   states are detached between cycles, and the loss of each cycle is backpropagated before the next cycle runs: deep supervision
            at about the memory of one cycle (docs/performance.md)
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

from ..network.losses import IGNORED, Reference, counted, cycle_shares, halting_loss, hidden_distances, losses_and_divergences, worsening
from ..utils.models import is_recursive
from .approaches import NEXT_TOKEN, Objective
from .settings import RunSettings


@dataclass(frozen=True)
class Supervision:
    """Terms and weights of the loss. Names and defaults follow the flags in `RunSettings`.

    Args:
        every_cycle: Whether every cycle is scored, or the last one only.
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
    match_hidden: float = 0.0

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
            match_hidden=settings.match_hidden_weight,
        )

    def shares(self, H: int) -> list[float]:
        """The normalised loss weight of each cycle; 0 for a cycle that is not scored."""
        return cycle_shares(self.schedule, self.weight, H) if self.every_cycle else [0.0] * (H - 1) + [1.0]

    @property
    def by_token(self) -> bool:
        """Whether a term needs the losses, logits or states of each token rather than the summed loss of a cycle."""
        return bool(self.distill or self.self_distill or self.monotone or self.halting or self.match_hidden)


class LossModule(nn.Module):
    """Model and loss in one module, which is what training wraps (DDP, FSDP): its forward pass returns the loss.

    It has no `config` on purpose: the Trainer would set `use_cache = False` in it, and every saved model would generate without a KV
    cache.

    Args:
        model: A recursive model, or a plain causal model of transformers, whose forward pass counts as its only cycle.
        deepest: The largest number of cycles that is trained or evaluated; H_cycles of the configuration where None.
        teacher: A frozen causal model with the same vocabulary, on the same device. It is not a submodule, so it is not wrapped, saved or
            averaged.
    """

    accepts_loss_kwargs = True
    loss_type = "ForCausalLM"  # the Trainer then counts tokens of labels that the loss shifts
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
        self.teacher = (teacher,)  # a tuple: nn.Module would register it as a submodule

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        position_ids: Tensor | None = None,
        H_cycles: int | None = None,
        num_items_in_batch: Tensor | float | None = None,
        cycle_labels: Tensor | None = None,
    ) -> dict[str, Any]:
        """The loss of a batch, and its parts for the log.

        Args:
            input_ids, labels: `[B, T]`; labels unshifted, -100 for ignored tokens.
            position_ids: `[B, T]`, restarting at each document of a packed sequence (block-diagonal mask).
            H_cycles: Cycles of this pass; those of the configuration where None.
            num_items_in_batch: Number of scored tokens to divide by: that of all accumulated batches. That of this batch where None.
            cycle_labels: `[B, C, T]`: labels of each cycle, the last also of all later ones; `labels` for all where None.

        Returns:
            `loss`, with gradients; detached, `cycle_losses` `[deepest]`, `scored` `[deepest]` (1 for scored cycles, else 0; with labels of
            its own, the share of tokens that a cycle is scored on), and `terms`, the value of each additional loss term; all per scored
            token.
        """
        H = H_cycles or (self.model.config.H_cycles if is_recursive(self.model) else 1)
        references, hidden = self._read_teacher(input_ids, position_ids, H)
        batch_loss = BatchLoss(self, labels, num_items_in_batch, H, references, hidden, cycle_labels)
        if not is_recursive(self.model):
            state = self.model.base_model(input_ids, position_ids=position_ids, use_cache=False).last_hidden_state
            return batch_loss.outputs(batch_loss.cycle_loss(0, state, state, None))
        base = self.model.base_model
        e, block, read = base.begin_pass(input_ids, position_ids)

        plain = self.model.config.is_adapter and self.supervision.halting > 0

        def losses(e: Tensor) -> Iterator[Tensor]:
            def steps() -> Iterator[Tensor]:
                return base.recursion.steps(e, block, H, self.model.config.L_cycles, self.supervision.backprop, plain=plain)

            return batch_loss.losses(steps, read, plain)

        per_cycle = self.supervision.backprop == "cycle"
        return batch_loss.outputs(backpropagate_each(losses, e, self.model) if per_cycle else torch.stack(list(losses(e))).sum())

    @torch.no_grad()
    def row_sums(self, input_ids: Tensor, labels: Tensor, position_ids: Tensor | None = None, cycle_labels: Tensor | None = None) -> Tensor:
        """`[B, cycles]`: the summed loss of each sequence at every cycle up to `deepest`; if the objective has `token_hits`, one more
        column with the number of correct predictions at `main_cycle`. What is measured are the final labels, whatever cycles learn."""
        states = self._states(input_ids, position_ids)
        columns = [self.objective.token_losses(state, labels, self.reader) for state in states]
        if self.objective.token_hits is not None:
            columns.append(self.objective.token_hits(states[self.main_cycle - 1], labels, self.reader))
        return torch.stack([column.sum(dim=1) for column in columns], dim=1)

    @torch.no_grad()
    def plain_sums(self, input_ids: Tensor, labels: Tensor, position_ids: Tensor | None = None) -> Tensor:
        """`[B, 1]`: the summed loss of each sequence at 0 cycles: without the recursion, as the donor."""
        state = self.model.base_model(input_ids, position_ids=position_ids, use_cache=False, H_cycles=0).last_hidden_state
        return self.objective.token_losses(state, labels, self.reader).sum(dim=1, keepdim=True)

    def _states(self, input_ids: Tensor, position_ids: Tensor | None) -> list[Tensor]:
        if not is_recursive(self.model):
            return [self.model.base_model(input_ids, position_ids=position_ids, use_cache=False).last_hidden_state]
        base = self.model.base_model
        e, block, read = base.begin_pass(input_ids, position_ids)
        return [read(z_H) for z_H in base.recursion.steps(e, block, self.deepest, self.model.config.L_cycles)]

    @torch.no_grad()
    def _read_teacher(self, input_ids: Tensor, position_ids: Tensor | None, H: int) -> tuple[list[Reference], list[Tensor]]:
        """The teacher's predictions, and the hidden state that each of H cycles aims at; each empty where no term needs it."""
        (teacher,) = self.teacher
        if teacher is None:
            return [], []
        depths = matched_depths(self.model.config, len(teacher.base_model.layers), H) if self.supervision.match_hidden else []
        with _outputs_of(teacher.base_model.layers, {depth - 1 for depth in depths}) as hidden:
            state = teacher.base_model(input_ids, position_ids=position_ids, use_cache=False).last_hidden_state
        references = [Reference(state, teacher.get_output_embeddings(), self.supervision.temperature)] if self.supervision.distill else []
        return references, [hidden[depth - 1] for depth in depths]

    @property
    def reader(self) -> nn.Module:
        return self.objective.reader(self.model)

    @property
    def main_cycle(self) -> int:
        """The cycle whose output is the model's prediction, from 1."""
        return self.model.config.H_cycles if is_recursive(self.model) else 1


def matched_depths(config: Any, layers: int, H: int) -> list[int]:
    """The number of the teacher's layers, at least 1, whose output each of H cycles aims at: evenly spaced, the last at the end of those
    that neither prelude nor coda hold.

    Args:
        layers: Of the teacher.
    """
    first, last = config.prelude_layers, layers - config.coda_layers
    return [max(1, round(first + c * (last - first) / H)) for c in range(1, H + 1)]


@contextmanager
def _outputs_of(layers: Any, wanted: set[int]) -> Iterator[dict[int, Tensor]]:
    """Inside, the outputs of these layers are kept, by index."""
    found: dict[int, Tensor] = {}

    def keep(n: int) -> Callable[..., None]:
        return lambda layer, args, output: found.__setitem__(n, output[0] if isinstance(output, tuple) else output)

    handles = [layers[n].register_forward_hook(keep(n)) for n in wanted]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


class BatchLoss:
    """The loss of one batch, computed cycle by cycle. Cycles are counted from 0."""

    def __init__(
        self,
        loss_module: LossModule,
        labels: Tensor,
        num_items: Any,
        H: int,
        references: list[Reference],
        hidden: list[Tensor],
        cycle_labels: Tensor | None = None,
    ):
        self.loss_module, self.supervision, self.objective = loss_module, loss_module.supervision, loss_module.objective
        self.labels, self.cycle_labels = labels, cycle_labels
        self.items = torch.as_tensor(counted(labels) if num_items is None else num_items, device=labels.device).clamp(min=1)
        self.H, self.shares, self.references, self.hidden = H, self.supervision.shares(H), references, hidden
        self.cycle_losses = torch.zeros(loss_module.deepest, device=labels.device)
        self.scored = torch.zeros(loss_module.deepest, device=labels.device)
        self.terms: dict[str, Tensor] = {}
        self.token_losses: list[Tensor] = []  # of each cycle, if a loss term needs them
        self.plain_losses: list[Tensor] = []  # of the plain pass, if the halting head can exit there
        self.halting_states: list[Tensor] = []  # input of the halting head at each cycle, if it is trained

    def losses(self, steps: Callable[[], Iterator[Tensor]], read: Callable[[Tensor], Tensor], plain: bool = False) -> Iterator[Tensor]:
        """The summands of the loss: one per scored cycle where it must be available before the next cycle runs, else one for all.

        Args:
            steps: Runs the cycles from the first and yields z_H after each cycle.
            read: From z_H to the state that is scored (coda and final norm).
            plain: Whether the state of the plain pass comes first: an exit of the halting head, which is not scored.
        """
        run = steps()
        if plain:
            self._exit_before_the_cycles(next(run), read)
        states: Iterator[tuple[Tensor, Tensor | None]] = ((z, read(z) if self._is_scored(c) else None) for c, z in enumerate(run))
        last = None
        if self.supervision.self_distill and self.supervision.backprop == "full":
            all_states = list(states)
            states, last = iter(all_states), all_states[-1][1]
        elif self.supervision.self_distill:  # the last cycle is the teacher and is needed first: an additional pass without gradients
            with torch.no_grad():
                *_, z = steps()
                last = read(z)
        deferred: dict[int, Tensor] = {}
        for c, (z, state) in enumerate(states):
            if self.supervision.halting:
                self.halting_states.append(z.detach())
            if state is None:
                continue
            if self.supervision.by_token or self.supervision.backprop == "cycle" or self.cycle_labels is not None:
                yield self.cycle_loss(c, z, state, last)
            else:
                deferred[c] = state
        if deferred:
            yield self._objective_loss(deferred)

    @torch.no_grad()
    def _exit_before_the_cycles(self, z: Tensor, read: Callable[[Tensor], Tensor]) -> None:
        """Record state and token losses of the plain pass, from which the halting head learns where no cycle is needed."""
        self.halting_states.append(z.detach())
        self.plain_losses.append(losses_and_divergences(read(z), self.labels, self.loss_module.reader, [])[0])

    def _labels_of(self, c: int) -> Tensor:
        return self.labels if self.cycle_labels is None else self.cycle_labels[:, min(c, self.cycle_labels.shape[1] - 1)]

    def _keep(self, c: int, loss: Tensor) -> None:
        """Record the loss of a cycle, per token of `labels`, and the share of these that it is scored on."""
        share = 1.0 if self.cycle_labels is None else counted(self._labels_of(c)) / counted(self.labels).clamp(min=1)
        self.cycle_losses[c], self.scored[c] = loss.detach(), share

    def _is_scored(self, c: int) -> bool:
        return self.supervision.every_cycle or c == self.H - 1

    def cycle_loss(self, c: int, z: Tensor, state: Tensor, last: Tensor | None) -> Tensor:
        """The weighted loss of cycle `c`.

        Args:
            z, state: z_H of the cycle, and the state that is scored.
            last: The state of the last cycle, for self-distillation.
        """
        return self._loss_with_terms(c, z, state, last) if self.supervision.by_token else self._objective_loss({c: state})

    def _objective_loss(self, states: dict[int, Tensor]) -> Tensor:
        """The weighted loss of these cycles, which have the same labels, without further terms."""
        shares, labels = [self.shares[c] for c in states], self._labels_of(next(iter(states)))
        total, losses = self.objective.loss(list(states.values()), labels, self.loss_module.reader, shares, self.items)
        for c, loss in zip(states, losses, strict=True):
            self._keep(c, loss)
        return total

    def _loss_with_terms(self, c: int, z: Tensor, state: Tensor, last: Tensor | None) -> Tensor:
        head, supervision = self.loss_module.reader, self.supervision
        references = list(self.references)
        if last is not None and c < self.H - 1:
            references.append(Reference(last, head, supervision.temperature))
        tokens, *divergences = losses_and_divergences(state, self._labels_of(c), head, references)
        own = total = tokens.sum() / self.items
        weights = [("distill", supervision.distill)] * len(self.references) + [("self_distill", supervision.self_distill)]
        for (name, weight), divergence in zip(weights, divergences, strict=False):
            total = total + weight * self._record(name, c, divergence)
        if self.hidden:
            total = total + supervision.match_hidden * self._record("match_hidden", c, hidden_distances(z, self.hidden[c], self.labels))
        if supervision.monotone and self.token_losses:
            total = total + supervision.monotone * self._record("monotone", c, worsening(tokens, self.token_losses[-1]))
        self.token_losses.append(tokens.detach())
        self._keep(c, own)
        return self.shares[c] * total

    def _record(self, name: str, c: int, tokens: Tensor) -> Tensor:
        """The mean of a term over tokens. Its mean over cycles, weighted by their shares, is added up for the log."""
        mean = tokens.sum() / self.items
        self.terms[name] = self.terms.get(name, torch.zeros_like(mean)) + self.shares[c] * mean.detach()
        return mean

    def outputs(self, loss: Tensor) -> dict[str, Any]:
        if self.halting_states:
            q_head = self.loss_module.model.base_model.recursion.q_head
            halting = halting_loss(
                [q_head(z) for z in self.halting_states], [*self.plain_losses, *self.token_losses], self.labels, self.items
            )
            self.terms["halting"], loss = halting.detach(), loss + self.supervision.halting * halting
        return {"loss": loss, "cycle_losses": self.cycle_losses, "scored": self.scored, "terms": self.terms}


def backpropagate_each(losses: Callable[[Tensor], Iterator[Tensor]], e: Tensor, model: nn.Module) -> Tensor:
    """The sum of losses, each of which is backpropagated before the next one is computed.

    The gradients accumulate in shadow parameters and are returned by the backward pass of the sum: DDP, gradient accumulation and
    clipping see one backward pass with one gradient per parameter.

    Args:
        losses: From `e` to the losses, one by one; no loss may depend on the graph of an earlier one.
        e: `[B, T, D]`, the input that all losses share, with its graph.
        model: The model that computes the losses; its trainable parameters get the gradients.
    """
    leaf = e.detach().requires_grad_(e.requires_grad)
    total = torch.zeros((), device=e.device)
    with _shadow_parameters(model) as shadows:
        for loss in losses(leaf):
            loss.backward()
            total = total + loss.detach()
    torch.clear_autocast_cache()  # it holds copies of the shadow parameters
    originals, leaves = [*shadows, e], [*shadows.values(), leaf]
    return _PrecomputedGrad.apply(total, [leaf.grad for leaf in leaves], *originals)


@contextmanager
def _shadow_parameters(model: nn.Module) -> Iterator[dict[nn.Parameter, nn.Parameter]]:
    """Replaces the trainable parameters of a model by shadow parameters that share their storage, so that gradients accumulate, in place,
    without triggering the hooks of DDP. Yields parameter -> shadow parameter."""
    shadows: dict[nn.Parameter, nn.Parameter] = {}
    places = [
        (module, name, p) for module in model.modules() for name, p in module._parameters.items() if p is not None and p.requires_grad
    ]
    try:
        for module, name, p in places:  # a tied parameter has several places
            module._parameters[name] = shadows.setdefault(p, nn.Parameter(p.detach()))
        yield shadows
    finally:
        for module, name, p in places:
            module._parameters[name] = p


class _PrecomputedGrad(torch.autograd.Function):
    """A value whose gradients have already been computed."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: list[Tensor | None], *inputs: Tensor) -> Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> Any:
        gradients, ctx.gradients = ctx.gradients, None
        return None, None, *(None if g is None else g.mul_(scale) for g in gradients)


def scored_tokens(labels: Tensor) -> Tensor:
    """`[B]`: number of scored positions of each sequence."""
    return (labels[:, 1:] != IGNORED).sum(dim=1)
