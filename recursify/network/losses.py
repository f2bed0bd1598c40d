"""What training minimises: losses over the cycles, as pure functions.

Nothing here knows the model, the optimizer or the data loader. A loss takes the states that a model returned, the labels that a batch
brought and the head that reads states, and gives back numbers; so each one can be checked on five tokens.

    cycle_shares             how much each cycle's loss counts, for the four schedules
    next_token_loss          of the cycles by their shares, never holding the logits of more than a chunk of tokens
    next_embedding_loss      the same for a model without a head, which predicts the next token's embedding
    losses_and_divergences   the loss of every token, and how far its prediction is from that of a teacher (distillation)
    read_out                 the loss of some tokens and whether the guess was right: what every measurement on a text goes through
    worsening                what a cycle makes worse than the cycle before it (monotone term)
    halting_loss             how well `q_head` says which cycles later ones do not improve on

With w_c the share of cycle c, a run minimises, as a mean over counted tokens,

    sum_c w_c (loss_c + a T^2 KL(donor || c) + b T^2 KL(last || c) + m max(0, loss_c - loss_{c-1})) + h mean_c BCE(q_c, y_c)

Units: losses of tokens and divergences are in nats per counted token, losses of embeddings are 1 - cosine, 0 to 2, per counted token.
Labels come unshifted, as Hugging Face passes them: position t is scored against the token at t + 1, and -100 marks tokens that do not
count.

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

# Logits held at once, in elements: 256 MB in float32, 441 tokens of a vocabulary of 151,936.
CHUNK_ELEMENTS = 2**26

# By so many nats a later cycle must do better at a token to be worth going on for: less is noise.
HALT_MARGIN = 0.05

# Embeddings shorter than this, such as the zeros of a padded vocabulary, are like nothing.
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
    """The weight of each cycle's loss, first cycle first. The last is always 1: it is the one that is read out.

    The cycles before it, i = 0 .. H-2, with w = `weight`:

        constant            w
        linear_decay        w * (i + 1) / H
        exponential_decay   w * 2^i / 2^(H - 1)
        early_decay         w^i

    The first two that decay, decay toward the early cycles, as the authors of the guides defined them. `early_decay` decays toward the
    late ones; arXiv 2511.08653 found that best for TRM, where the last cycle follows the rule, too.

    Raises:
        ValueError: An unknown schedule, a negative weight, or no cycle at all.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"deep_supervision_schedule: expected one of {', '.join(SCHEDULES)}, got {schedule!r}")
    if not weight >= 0:
        raise ValueError(f"deep_supervision_weight: expected at least 0, got {weight}")
    if H < 1:
        raise ValueError(f"H_cycles: expected at least 1 cycle to weigh, got {H}")
    return [SCHEDULES[schedule](weight, i, H) for i in range(H - 1)] + [1.0]


def cycle_shares(schedule: str, weight: float, H: int) -> list[float]:
    """The weights of `cycle_weights` over their sum: the total loss is a mean, so equal losses give that loss, whatever the weights."""
    weights = cycle_weights(schedule, weight, H)
    return [w / sum(weights) for w in weights]


def perplexity(loss: float) -> float:
    """exp of a loss in nats per token; infinite where a float cannot hold it."""
    return math.exp(loss) if loss < 700 else math.inf


def counted(labels: Tensor) -> Tensor:
    """How many positions of `[B, T]` labels have a next token that counts."""
    return (labels[:, 1:] != IGNORED).sum()


def next_token_loss(
    states: Sequence[Tensor],
    labels: Tensor,
    head: Any,
    shares: Sequence[float],
    num_items: Tensor | float | None = None,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The sum over cycles of share * next-token loss; and, without gradients, the loss of every cycle, `[H]`. In float32.

    All cycles at once and with their shares, so that what they do to the head is one matrix of its size and not one for each.

    Args:
        states: What the head reads, one `[B, T, D]` per cycle.
        labels: `[B, T]` token ids, unshifted.
        head: State to logits; called under autocast where that is on.
        shares: How much the loss of each cycle counts.
        num_items: Counted tokens to divide by; those of this batch where None. Accumulated micro-batches divide by the count of all
            of them: then their losses and gradients add up to those of the one large batch, however the tokens are spread.
        chunk: Tokens whose logits exist at a time, forward and backward; None picks as many as CHUNK_ELEMENTS allows.
    """
    size, low = _chunk(head.out_features, chunk), _autocast(labels.device.type)
    if _finds_gradients(states, head, size, low):
        rows, targets = [_positions(state, labels)[0] for state in states], labels[:, 1:].flatten()
        total, sums = _ChunkedLoss.apply(head.weight, targets, shares, size, low, *rows)
    else:
        total, sums = _weighted([token_losses(state, labels, head, chunk).sum() for state in states], shares)
    return _per_item(total, labels, num_items), _per_item(sums, labels, num_items)


def _weighted(sums: Sequence[Tensor], shares: Sequence[float]) -> tuple[Tensor, Tensor]:
    """What is minimised, and without gradients what there is to say of it."""
    return _sum(shares, sums), torch.stack([each.detach() for each in sums])


def _sum(shares: Sequence[float], sums: Sequence[Tensor]) -> Tensor:
    return torch.stack([share * each for share, each in zip(shares, sums, strict=True)]).sum()


@dataclass(frozen=True)
class Reference:
    """A prediction to stay near to, fixed: nothing here gets a gradient from it.

    Args:
        state: What its head reads, `[B, T, D']`.
        head: State to logits over the same vocabulary.
        temperature: Both predictions are softened by it, as in arXiv 1503.02531.
    """

    state: Tensor
    head: Any
    temperature: float = 1.0


def token_losses(state: Tensor, labels: Tensor, head: Any, chunk: int | None = None) -> Tensor:
    """The loss of every token, `[B, T - 1]` in float32: entry t is -log p(token t + 1), 0 where that token does not count."""
    return losses_and_divergences(state, labels, head, (), chunk)[0]


def losses_and_divergences(
    state: Tensor, labels: Tensor, head: Any, references: Sequence[Reference], chunk: int | None = None
) -> tuple[Tensor, ...]:
    """`token_losses`, and for each reference the divergence of every token, `[B, T - 1]` in float32, 0 where that token does not count.

    The divergence is forward KL over the vocabulary, T^2 * sum_v r_v (log r_v - log p_v), with r the reference's prediction and p ours,
    both at temperature T: it asks to cover what the reference finds likely. T^2 keeps the gradient's size independent of T (arXiv
    1503.02531). Forward KL did best of the divergences in Relaxed Recursive Transformers (arXiv 2410.20672).

    Args:
        chunk: As in `next_token_loss`; the logits of the references are held one more time each.
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
    """For measuring: the loss in nats of the tokens after N places, and whether the likeliest token is the right one; each `[N]`, float32.

    Args:
        state: What the head reads, `[B, T, D]`.
        ids: `[B, T]`.
        places: `[B, T - 1]`, True where the token after it is to be scored.
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
        losses, before: Of a cycle and of the one before it, which is a bar to clear and gets no gradient: it would learn to be worse.
    """
    return torch.relu(losses - before.detach())


def halting_loss(
    halt_logits: Sequence[Tensor], losses: Sequence[Tensor], labels: Tensor, num_items: Tensor | float | None = None
) -> Tensor:
    """Binary cross-entropy of the halting head, a mean over counted tokens and over all cycles but the last, in nats.

    The target of cycle c at position t is 1 where going on would not have helped: where loss_c <= min of the later cycles' losses of the
    token at t + 1, plus HALT_MARGIN nats. So the sigmoid of the logit is the chance that no later cycle does noticeably better. (Ouro,
    arXiv 2510.25741, trains its gate on the improvement of the loss; TRM's target, "the answer is right", would never let a token halt
    that no number of cycles gets right.) The last cycle has no later one, and no target.

    Args:
        halt_logits: One `[B, T]` per cycle, from detached states.
        losses: One `[B, T - 1]` per cycle; they give targets and get no gradient.
    """
    total = torch.zeros((), device=labels.device)
    stacked = torch.stack([loss.detach() for loss in losses])
    counts = labels[:, 1:] != IGNORED
    for cycle, logits in enumerate(halt_logits[:-1]):
        target = (stacked[cycle] <= stacked[cycle + 1 :].amin(dim=0) + HALT_MARGIN).float()
        each = F.binary_cross_entropy_with_logits(logits[:, :-1].float(), target, reduction="none")
        total = total + each.masked_fill(~counts, 0.0).sum()
    return _per_item(total / max(1, len(halt_logits) - 1), labels, num_items)


def next_embedding_loss(
    states: Sequence[Tensor], labels: Tensor, embeddings: nn.Embedding, shares: Sequence[float], num_items: Tensor | float | None = None
) -> tuple[Tensor, Tensor]:
    """The sum over cycles of share * next-embedding loss, and the loss of every cycle; in all as `next_token_loss`."""
    total, sums = _weighted([embedding_losses(state, labels, embeddings).sum() for state in states], shares)
    return _per_item(total, labels, num_items), _per_item(sums, labels, num_items)


def embedding_losses(state: Tensor, labels: Tensor, embeddings: nn.Embedding) -> Tensor:
    """The loss of every token in embedding space, `[B, T - 1]` in float32: entry t is 1 - cos(state t, embedding of token t + 1), 0 where
    that token does not count.

    A cosine, because what is asked of the state is to point at the right word: embeddings differ in length by how frequent a token is, and
    a squared distance would be spent on that. The embeddings are a target, never trained: they would all become equal.
    """
    x, targets = _positions(state, labels)
    wanted = embeddings(targets.clamp(min=0)).detach()
    losses = 1 - F.cosine_similarity(x.float(), wanted.float(), dim=-1)
    return losses.masked_fill(targets == IGNORED, 0.0).view(labels.shape[0], -1)


@torch.no_grad()
def nearest_is_next(state: Tensor, labels: Tensor, embeddings: nn.Embedding, chunk: int | None = None) -> Tensor:
    """`[B, T - 1]` in float32: entry t is 1 where, of all embeddings, that of token t + 1 has the largest cosine with state t, else 0.

    Args:
        chunk: States that are compared with the whole vocabulary at a time; None picks as many as CHUNK_ELEMENTS allows.
    """
    x, targets = _positions(state, labels)
    weight = embeddings.weight.float()
    lengths = weight.norm(dim=-1).clamp(min=_SHORTEST)
    with torch.autocast(x.device.type, enabled=False):  # near neighbours are closer together than bfloat16 can tell
        pieces = x.float().split(_chunk(embeddings.num_embeddings, chunk))
        nearest = torch.cat([(piece @ weight.T / lengths).argmax(dim=-1) for piece in pieces])
    return (nearest == targets).float().view(labels.shape[0], -1)


def _per_item(sums: Tensor, labels: Tensor, num_items: Tensor | float | None) -> Tensor:
    total = counted(labels) if num_items is None else torch.as_tensor(num_items, device=labels.device)
    return sums / total.clamp(min=1)


def _positions(state: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The states `[N, D]` that predict something and what they predict, `[N]`."""
    return state[:, :-1].flatten(0, 1), labels[:, 1:].flatten()


def _chunk(vocabulary: int, chunk: int | None) -> int:
    if chunk is None:
        chunk = max(64, CHUNK_ELEMENTS // vocabulary)
    if chunk < 1:
        raise ValueError(f"chunk: expected at least 1 token, got {chunk}")
    return chunk


def _autocast(device: str) -> torch.dtype | None:
    """The type of matrix products under autocast, where that is on."""
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def _finds_gradients(states: Sequence[Tensor], head: Any, chunk: int, low: torch.dtype | None) -> bool:
    """Whether there is something to gain from it, more than a chunk of logits, and the head is one that we know how to."""
    count = sum(state.shape[0] * (state.shape[1] - 1) for state in states)
    return count > chunk and torch.is_grad_enabled() and _is_plain(head) and all(x.dtype in (torch.float32, low) for x in states)


def _is_plain(head: Any) -> bool:
    """Whether the head is a bare float32 matrix: not one with a bias or LoRA, quantised, or sharded over devices."""
    weight = getattr(head, "weight", None)
    return (
        type(head) is nn.Linear
        and head.bias is None
        and type(weight) in (Tensor, nn.Parameter)
        and weight.dtype == torch.float32
        and not (head._forward_hooks or head._forward_pre_hooks)
    )


class _ChunkedLoss(torch.autograd.Function):
    """The summed loss of N positions at H cycles, its gradients found on the way forward, a chunk of logits at a time.

    A quarter fewer matrix products than computing the logits again on the way back, and one gradient of the head for all cycles: that
    is why the shares are known here. torch's own `linear_cross_entropy` does the former, but on the way back makes zeros as large as the
    weight for outputs that nobody uses (torch 2.13), and sums bfloat16 in bfloat16.
    """

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, targets: Tensor, shares: Sequence[float], chunk: int, low: torch.dtype | None, *states: Tensor
    ) -> tuple[Tensor, Tensor]:
        """`weight` `[V, D]`, `targets` `[N]`, each of the states `[N, D]`; `low` is the type of matrix products under autocast. Sums are
        float32. Gives the sum of share * loss, and the losses `[H]`, which have no gradient."""
        with torch.autocast(weight.device.type, enabled=False):
            matrix, count = weight.to(low or weight.dtype), min(chunk, len(targets))
            room = weight.new_empty(count, len(weight))  # the only matrices of their size, for all chunks
            products = room if low is None else room.new_empty(room.shape, dtype=low)
            ctx.of_weight, sums = None, weight.new_zeros(len(states))
            ctx.of_states = [torch.empty_like(x) if need else None for x, need in zip(states, ctx.needs_input_grad[5:], strict=True)]
            for cycle, (x, share, of_x) in enumerate(zip(states, shares, ctx.of_states, strict=True)):
                for start in range(0, len(x), chunk):
                    piece, target = x[start : start + chunk].to(matrix.dtype), targets[start : start + chunk]
                    logits = torch.mm(piece, matrix.T, out=products[: len(piece)])
                    sums[cycle] += _loss_and_gradient(logits, target, share, room[: len(piece)])
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
    """The sum so far, in its place, plus left' right, which is in `dtype`. No zeros that are only added to: there is no larger matrix."""
    if so_far is None:
        return (left.T @ right).to(dtype)
    return so_far.addmm_(left.T, right) if left.dtype == dtype else so_far.add_(left.T @ right)


def _loss_and_gradient(products: Tensor, targets: Tensor, share: float, room: Tensor) -> Tensor:
    """The summed loss of `[n, V]` logits, in whose place the gradient of share * loss is left.

    Args:
        room: `[n, V]` in float32, to work in: the logits' own memory where they are float32.
    """
    counts, right = (targets != IGNORED)[:, None], targets.clamp(min=0)[:, None]
    logits = products if products.dtype == torch.float32 else room.copy_(products)
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
    """`[n, V]` logits in float32, and `[n]` losses of the targets; 0 where they do not count."""
    logits = head(x).float()
    return logits, F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="none")


def _token_terms(head: Any, references: Sequence[Reference], x: Tensor, targets: Tensor, *others: Tensor) -> Tensor:
    """`[1 + references, n]`: loss and divergences of n positions. Recomputed in the backward pass where there are several chunks."""
    logits, losses = _logits_and_losses(head, x, targets)
    rows = [losses]
    for reference, other in zip(references, others, strict=True):
        with torch.no_grad():
            wanted = F.log_softmax(reference.head(other.to(reference.head.weight.dtype)).float() / reference.temperature, dim=-1)
        found = F.log_softmax(logits / reference.temperature, dim=-1)
        divergence = F.kl_div(found, wanted, reduction="none", log_target=True).sum(dim=-1)
        rows.append((reference.temperature**2 * divergence).masked_fill(targets == IGNORED, 0.0))
    return torch.stack(rows)
