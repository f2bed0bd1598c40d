"""Training losses over the cycles, as pure functions.

The functions do not depend on model, optimizer or data loader. A loss takes states, labels and the head, and returns tensors.

    cycle_shares             weight of each cycle's loss, for the four schedules of deep supervision
    next_token_loss          weighted sum over cycles, with the logits of one chunk of tokens in memory at a time
    next_embedding_loss      the same for a model without a head, which predicts the next token's embedding
    losses_and_divergences   the loss of every token, and its KL divergence from a teacher (distillation)
    read_out                 loss and correctness of some tokens, for evaluation
    worsening                increase of the loss from one cycle to the next (monotonicity regulariser)
    halting_loss             loss of the halting head `q_head`

With w_c the share of cycle c, training minimises, as a mean over counted tokens,

    sum_c w_c (loss_c + a T^2 KL(teacher || c) + b T^2 KL(last || c) + m max(0, loss_c - loss_{c-1})) + h mean_c BCE(q_c, y_c)

Units: token losses and divergences are in nats per counted token; embedding losses are 1 - cosine, 0 to 2, per counted token. Labels are
unshifted, as in transformers: position t is scored against the token at t + 1, and tokens labelled -100 are not counted.

Shape letters: B batch, T tokens, N counted positions, D hidden size, V vocabulary, H cycles.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

IGNORED = -100

# Logits in memory at a time, in elements: 256 MB in float32, 441 tokens of a vocabulary of 151,936.
CHUNK_ELEMENTS = 2**26

# Improvement in nats by a later cycle that makes further cycles worthwhile for a token; smaller ones are noise.
HALT_MARGIN = 0.05

# Minimum norm of embeddings; avoids a division by 0 for the zero rows of a padded vocabulary.
_SHORTEST = 1e-8


def _constant(weight: float, i: int, H: int) -> float:
    return weight


def _linear_decay(weight: float, i: int, H: int) -> float:
    return weight * (i + 1) / H


def _exponential_decay(weight: float, i: int, H: int) -> float:
    return weight * 2**i / 2 ** (H - 1)


def _early_decay(weight: float, i: int, H: int) -> float:
    return weight**i


SCHEDULES: dict[str, Callable[[float, int, int], float]] = {
    "constant": _constant,
    "linear_decay": _linear_decay,
    "exponential_decay": _exponential_decay,
    "early_decay": _early_decay,
}


def cycle_weights(schedule: str, weight: float, H: int) -> list[float]:
    """The weight of each cycle's loss, first cycle first. That of the last cycle is always 1.

    The earlier cycles, i = 0 .. H-2, with w = `weight`:

        constant            w
        linear_decay        w * (i + 1) / H
        exponential_decay   w * 2^i / 2^(H - 1)
        early_decay         w^i

    linear_decay and exponential_decay decrease toward the early cycles, as in the guides. early_decay decreases toward the late ones;
    arXiv 2511.08653 found that best for TRM, where it includes the last cycle.

    Raises:
        ValueError: An unknown schedule, a negative weight, or no cycles.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"deep_supervision_schedule: expected one of {', '.join(SCHEDULES)}, got {schedule!r}")
    if not weight >= 0:
        raise ValueError(f"deep_supervision_weight: expected at least 0, got {weight}")
    if H < 1:
        raise ValueError(f"H_cycles: expected at least 1 cycle to weigh, got {H}")
    return [SCHEDULES[schedule](weight, i, H) for i in range(H - 1)] + [1.0]


def cycle_shares(schedule: str, weight: float, H: int) -> list[float]:
    """`cycle_weights` divided by their sum, so that the total loss is a weighted mean."""
    weights = cycle_weights(schedule, weight, H)
    return [w / sum(weights) for w in weights]


def perplexity(loss: float) -> float:
    """exp of a loss in nats per token; infinity on overflow."""
    return math.inf if loss >= 700 else math.exp(loss)


def perplexity_text(loss: float) -> str:
    """The perplexity of a loss for people, who are not shown one that says nothing: above a million, guessing uniformly is better."""
    value = perplexity(loss)
    return "> 1e6, worse than guessing" if value > 1e6 else f"{value:.2f}"


def counted(labels: Tensor) -> Tensor:
    """Number of counted next tokens in `[B, T]` labels."""
    return (labels[:, 1:] != IGNORED).sum()


def next_token_loss(
    states: Sequence[Tensor],
    labels: Tensor,
    head: Any,
    shares: Sequence[float],
    num_items: Tensor | float | None = None,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The sum over cycles of share * next-token loss and, without gradients, the loss of every cycle, `[H]`. In float32.

    All cycles are processed in one call, so that only one gradient matrix of the size of the head exists, not one per cycle.

    Args:
        states: Inputs of the head, one `[B, T, D]` per cycle.
        labels: `[B, T]` token ids, unshifted.
        head: Maps states to logits; called under autocast where that is enabled.
        shares: Weight of each cycle's loss.
        num_items: Number of counted tokens to divide by; that of this batch where None. With gradient accumulation, pass the number of all
            micro-batches: their losses and gradients then add up to those of one large batch.
        chunk: Tokens whose logits are in memory at a time, in both passes; as many as CHUNK_ELEMENTS allows where None.
    """
    size, low = _chunk(head.out_features, chunk), _autocast(labels.device.type)
    if _use_chunked_loss(states, head, size, low):
        rows, targets = [_positions(state, labels)[0] for state in states], labels[:, 1:].flatten()
        total, sums = _ChunkedLoss.apply(head.weight, targets, shares, size, low, *rows)
    else:
        total, sums = _weighted([token_losses(state, labels, head, chunk).sum() for state in states], shares)
    return _per_item(total, labels, num_items), _per_item(sums, labels, num_items)


def _weighted(sums: Sequence[Tensor], shares: Sequence[float]) -> tuple[Tensor, Tensor]:
    """The weighted sum, and the terms without gradients."""
    return _sum(shares, sums), torch.stack([each.detach() for each in sums])


def _sum(shares: Sequence[float], sums: Sequence[Tensor]) -> Tensor:
    return torch.stack([share * each for share, each in zip(shares, sums, strict=True)]).sum()


@dataclass(frozen=True)
class Reference:
    """Predictions of a teacher. They get no gradient.

    Args:
        state: Inputs of its head, `[B, T, D']`.
        head: Maps states to logits over the same vocabulary.
        temperature: Softmax temperature of both predictions, as in arXiv 1503.02531.
    """

    state: Tensor
    head: Any
    temperature: float = 1.0


def token_losses(state: Tensor, labels: Tensor, head: Any, chunk: int | None = None) -> Tensor:
    """The loss of every token, `[B, T - 1]` in float32: entry t is -log p(token t + 1), 0 where that token is not counted."""
    return losses_and_divergences(state, labels, head, (), chunk)[0]


def losses_and_divergences(
    state: Tensor, labels: Tensor, head: Any, references: Sequence[Reference], chunk: int | None = None
) -> tuple[Tensor, ...]:
    """`token_losses`, and for each reference the divergence of every token, `[B, T - 1]` in float32, 0 where that token is not counted.

    The divergence is forward KL over the vocabulary, T^2 * sum_v r_v (log r_v - log p_v), of the reference's prediction r from the
    model's prediction p, both at temperature T. T^2 makes the size of the gradient independent of T (arXiv 1503.02531). Forward KL was
    the best divergence in Relaxed Recursive Transformers (arXiv 2410.20672).

    Args:
        references: The teachers.
        chunk: As in `next_token_loss`; the logits of every reference are in memory as well.
    """
    x, targets = _positions(state, labels)
    size = _chunk(head.out_features * (1 + len(references)), chunk)
    others = [_positions(reference.state.detach(), labels)[0] for reference in references]
    pieces = zip(x.split(size), targets.split(size), *(other.split(size) for other in others), strict=True)
    if len(x) <= size or not torch.is_grad_enabled():
        rows = [_token_terms(head, references, *piece) for piece in pieces]
    else:
        rows = [checkpoint(_token_terms, head, references, *piece, use_reentrant=False) for piece in pieces]
    return tuple(torch.cat(rows, dim=1).view(1 + len(references), labels.shape[0], -1))


@torch.no_grad()
def read_out(head: Any, state: Tensor, ids: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """For evaluation: the loss in nats of the tokens after N positions, and whether the argmax is correct; each `[N]`, float32.

    Args:
        state: Inputs of the head, `[B, T, D]`.
        ids: `[B, T]`.
        places: `[B, T - 1]`, True where the next token is scored.
    """
    x, targets = state[:, :-1][places], ids[:, 1:][places]
    size = _chunk(head.out_features, None)
    losses, right = [], []
    for piece, target in zip(x.split(size), targets.split(size), strict=True):
        logits, loss = _logits_and_losses(head, piece, target)
        losses.append(loss)
        right.append((logits.argmax(dim=-1) == target).float())
    return torch.cat(losses), torch.cat(right)


def worsening(losses: Tensor, before: Tensor) -> Tensor:
    """max(0, loss_c - loss_{c-1}) of every token, `[B, T - 1]`, in the unit of the losses.

    Args:
        losses, before: Of a cycle and of the previous cycle. The latter gets no gradient, which would increase its loss.
    """
    return torch.relu(losses - before.detach())


def hidden_distances(state: Tensor, target: Tensor, labels: Tensor) -> Tensor:
    """The mean squared error of states from a teacher's, both divided by their root mean square, `[B, T - 1]` in float32: 0 for equal
    directions, 2 for orthogonal ones, 0 where the next token is not counted. (Hidden states of a donor differ in norm by a factor of 1000
    between tokens and layers.)

    Args:
        state, target: `[B, T, D]`; the target gets no gradient.
    """
    own, wanted = (F.rms_norm(each[:, :-1].float(), each.shape[-1:], eps=1e-6) for each in (state, target.detach()))
    return (own - wanted).square().mean(dim=-1).masked_fill(labels[:, 1:] == IGNORED, 0.0)


def halting_loss(
    halt_logits: Sequence[Tensor], losses: Sequence[Tensor], labels: Tensor, num_items: Tensor | float | None = None
) -> Tensor:
    """Binary cross-entropy of the halting head, weighted, a mean over counted tokens and over all cycles but the last.

    The target of cycle c at position t is 1 where no later cycle improves the loss of the token at t + 1 by more than HALT_MARGIN nats.
    The sigmoid of the logit thus estimates the probability that further cycles do not help. (Ouro, arXiv 2510.25741, trains its gate on
    the improvement of the loss. With TRM's target, correctness of the answer, a token that is never correct would never halt.) The last
    cycle has no target. A token's weight in a cycle is what its decision is worth: the nats by which the best later cycle lowers or raises
    its loss, at least HALT_MARGIN. (Uniform weights cost TaH2, arXiv 2609.35748, 3.6 points.)

    Args:
        halt_logits: One `[B, T]` per exit: cycles, of an adapter with the plain pass before them; from detached states.
        losses: One `[B, T - 1]` per exit. They determine the targets and get no gradient.
    """
    total = torch.zeros((), device=labels.device)
    stacked = torch.stack([loss.detach() for loss in losses])
    counts = labels[:, 1:] != IGNORED
    for cycle, logits in enumerate(halt_logits[:-1]):
        lowered = stacked[cycle] - stacked[cycle + 1 :].amin(dim=0)
        target, worth = (lowered <= HALT_MARGIN).float(), lowered.abs().clamp(min=HALT_MARGIN).masked_fill(~counts, 0.0)
        each = F.binary_cross_entropy_with_logits(logits[:, :-1].float(), target, reduction="none")
        total = total + (each * worth).sum()
    return _per_item(total / max(1, len(halt_logits) - 1), labels, num_items)


def next_embedding_loss(
    states: Sequence[Tensor], labels: Tensor, embeddings: nn.Embedding, shares: Sequence[float], num_items: Tensor | float | None = None
) -> tuple[Tensor, Tensor]:
    """The sum over cycles of share * next-embedding loss, and the loss of every cycle. Otherwise as `next_token_loss`."""
    total, sums = _weighted([embedding_losses(state, labels, embeddings).sum() for state in states], shares)
    return _per_item(total, labels, num_items), _per_item(sums, labels, num_items)


def embedding_losses(state: Tensor, labels: Tensor, embeddings: nn.Embedding) -> Tensor:
    """The loss of every token in embedding space, `[B, T - 1]` in float32: entry t is 1 - cos(state t, embedding of token t + 1), 0 where
    that token is not counted.

    Cosine and not squared distance: the norms of embeddings depend on token frequency. The embeddings get no gradient, because they
    would collapse to one vector.
    """
    x, targets = _positions(state, labels)
    wanted = embeddings(targets.clamp(min=0)).detach()
    losses = 1 - F.cosine_similarity(x.float(), wanted.float(), dim=-1)
    return losses.masked_fill(targets == IGNORED, 0.0).view(labels.shape[0], -1)


@torch.no_grad()
def nearest_is_next(state: Tensor, labels: Tensor, embeddings: nn.Embedding, chunk: int | None = None) -> Tensor:
    """`[B, T - 1]` in float32: entry t is 1 where the embedding of token t + 1 is the nearest one to state t by cosine, else 0.

    Args:
        chunk: States compared with the vocabulary at a time; as many as CHUNK_ELEMENTS allows where None.
    """
    x, targets = _positions(state, labels)
    weight = embeddings.weight.float()
    lengths = weight.norm(dim=-1).clamp(min=_SHORTEST)
    with torch.autocast(x.device.type, enabled=False):  # bfloat16 cannot separate near neighbours
        pieces = x.float().split(_chunk(embeddings.num_embeddings, chunk))
        nearest = torch.cat([(piece @ weight.T / lengths).argmax(dim=-1) for piece in pieces])
    return (nearest == targets).float().view(labels.shape[0], -1)


def _per_item(sums: Tensor, labels: Tensor, num_items: Tensor | float | None) -> Tensor:
    total = counted(labels) if num_items is None else torch.as_tensor(num_items, device=labels.device)
    return sums / total.clamp(min=1)


def _positions(state: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The states `[N, D]` and their targets `[N]`."""
    return state[:, :-1].flatten(0, 1), labels[:, 1:].flatten()


def _chunk(vocabulary: int, chunk: int | None) -> int:
    if chunk is None:
        chunk = max(64, CHUNK_ELEMENTS // vocabulary)
    if chunk < 1:
        raise ValueError(f"chunk: expected at least 1 token, got {chunk}")
    return chunk


def _autocast(device: str) -> torch.dtype | None:
    """The dtype of matrix products under autocast; None where that is off."""
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def _use_chunked_loss(states: Sequence[Tensor], head: Any, chunk: int, low: torch.dtype | None) -> bool:
    """Whether to use `_ChunkedLoss`: more than one chunk of logits, gradients are needed, and the head is supported."""
    count = sum(state.shape[0] * (state.shape[1] - 1) for state in states)
    return count > chunk and torch.is_grad_enabled() and _is_plain(head) and all(x.dtype in (torch.float32, low) for x in states)


def _is_plain(head: Any) -> bool:
    """Whether the head is a plain float32 matrix: no bias, LoRA, quantisation or sharding."""
    weight = getattr(head, "weight", None)
    return (
        type(head) is nn.Linear
        and head.bias is None
        and type(weight) in (Tensor, nn.Parameter)
        and weight.dtype == torch.float32
        and not (head._forward_hooks or head._forward_pre_hooks)
    )


class _ChunkedLoss(torch.autograd.Function):
    """The summed loss of N positions at H cycles, a chunk of logits at a time; gradients are computed in the forward pass.

    This takes a quarter fewer matrix products than recomputing the logits in the backward pass, and needs one gradient of the head for all
    cycles, hence the shares. torch's `linear_cross_entropy` (2.13) also computes gradients in the forward pass, but its backward pass
    allocates zeros of the size of the weight for unused outputs, and it accumulates bfloat16 in bfloat16.
    """

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, targets: Tensor, shares: Sequence[float], chunk: int, low: torch.dtype | None, *states: Tensor
    ) -> tuple[Tensor, Tensor]:
        """`weight` `[V, D]`, `targets` `[N]`, each of the states `[N, D]`; `low` is the dtype of matrix products under autocast. Sums are
        float32. Returns the sum of share * loss, and the losses `[H]` without gradient."""
        with torch.autocast(weight.device.type, enabled=False):
            matrix, count = weight.to(low or weight.dtype), min(chunk, len(targets))
            buffer = weight.new_empty(count, len(weight))  # preallocated for all chunks
            products = buffer if low is None else buffer.new_empty(buffer.shape, dtype=low)
            ctx.of_weight, sums = None, weight.new_zeros(len(states))
            ctx.of_states = [torch.empty_like(x) if need else None for x, need in zip(states, ctx.needs_input_grad[5:], strict=True)]
            for cycle, (x, share, of_x) in enumerate(zip(states, shares, ctx.of_states, strict=True)):
                for start in range(0, len(x), chunk):
                    piece, target = x[start : start + chunk].to(matrix.dtype), targets[start : start + chunk]
                    logits = torch.mm(piece, matrix.T, out=products[: len(piece)])
                    sums[cycle] += _loss_and_gradient(logits, target, share, buffer[: len(piece)])
                    if of_x is not None:
                        of_x[start : start + chunk] = logits @ matrix
                    if ctx.needs_input_grad[0]:
                        ctx.of_weight = _added(ctx.of_weight, logits, piece, weight.dtype)
        ctx.mark_non_differentiable(sums)
        return _sum(shares, sums.unbind()), sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor, _: Tensor) -> Any:
        gradients, ctx.of_weight, ctx.of_states = (ctx.of_weight, ctx.of_states), None, None
        of_weight, *of_states = (None if g is None else g.mul_(scale) for g in (gradients[0], *gradients[1]))
        return of_weight, None, None, None, None, *of_states


def _added(so_far: Tensor | None, left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """Add left' right to the sum so far in place; it starts as None, since zeros would be one more matrix of the size of the head."""
    if so_far is None:
        return (left.T @ right).to(dtype)
    return so_far.addmm_(left.T, right) if left.dtype == dtype else so_far.add_(left.T @ right)


def _loss_and_gradient(products: Tensor, targets: Tensor, share: float, buffer: Tensor) -> Tensor:
    """The summed loss of `[n, V]` logits, which are overwritten by the gradient of share * loss.

    Args:
        buffer: `[n, V]` in float32, to work in; the logits themselves where they are float32.
    """
    counts, right = (targets != IGNORED)[:, None], targets.clamp(min=0)[:, None]
    logits = products if products.dtype == torch.float32 else buffer.copy_(products)
    logits -= logits.amax(dim=-1, keepdim=True)
    found = logits.gather(1, right)
    norms = logits.exp_().sum(dim=-1, keepdim=True)
    loss = ((norms.log() - found) * counts).sum()
    weights = share * counts.to(logits.dtype)
    logits *= weights / norms  # the gradient: probabilities, less 1 at the right token
    logits.scatter_add_(1, right, -weights)
    if logits is not products:
        products.copy_(logits)
    return loss


def _logits_and_losses(head: Any, x: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """`[n, V]` logits in float32, and `[n]` losses of the targets; 0 where they are not counted."""
    logits = head(x).float()
    return logits, F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="none")


def _token_terms(head: Any, references: Sequence[Reference], x: Tensor, targets: Tensor, *others: Tensor) -> Tensor:
    """`[1 + references, n]`: loss and divergences of n positions. With several chunks, recomputed in the backward pass."""
    logits, losses = _logits_and_losses(head, x, targets)
    rows = [losses]
    for reference, other in zip(references, others, strict=True):
        with torch.no_grad():
            wanted = F.log_softmax(reference.head(other.to(reference.head.weight.dtype)).float() / reference.temperature, dim=-1)
        found = F.log_softmax(logits / reference.temperature, dim=-1)
        divergence = F.kl_div(found, wanted, reduction="none", log_target=True).sum(dim=-1)
        rows.append((reference.temperature**2 * divergence).masked_fill(targets == IGNORED, 0.0))
    return torch.stack(rows)
