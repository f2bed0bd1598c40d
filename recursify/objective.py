"""What training minimises: losses over the cycles, as pure functions.

Nothing here knows the model, the optimizer or the data loader. A loss takes the states that a model returned, the labels that a batch
brought and the head that reads states, and gives back numbers; so each one can be checked on five tokens.

    cycle_weights        how much each cycle's loss counts, for the four schedules
    next_token_losses        one loss per cycle, never holding the logits of more than a chunk of tokens
    next_embedding_losses    the same for a model without a head, which predicts the next token's embedding
    deep_supervision         their weighted mean

Units: losses of tokens are in nats per counted token, losses of embeddings are 1 - cosine, 0 to 2, per counted token. Labels come
unshifted, as Hugging Face passes them: position t is scored against the token at t + 1, and -100 marks tokens that do not count.

Shape letters: B batch, T tokens, N counted positions, D hidden size, V vocabulary, H cycles. Floor 1. Imports torch only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

IGNORED = -100

# Logits held at once, in elements: 256 MB in float32, 441 tokens of a vocabulary of 151,936.
CHUNK_ELEMENTS = 2**26

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


def deep_supervision(losses: Tensor, weights: Sequence[float]) -> Tensor:
    """The weighted mean of the cycles' losses `[H]`: sum(w_c * loss_c) / sum(w_c). Equal losses give that loss, whatever the weights.

    Raises:
        ValueError: If there is not exactly one weight per cycle.
    """
    if len(weights) != len(losses):
        raise ValueError(f"need one weight per cycle: got {len(losses)} losses and {len(weights)} weights")
    w = torch.tensor(weights, dtype=losses.dtype, device=losses.device)
    return (w * losses).sum() / w.sum()


def counted(labels: Tensor) -> Tensor:
    """How many positions of `[B, T]` labels have a next token that counts."""
    return (labels[:, 1:] != IGNORED).sum()


def next_token_losses(
    states: Sequence[Tensor], labels: Tensor, head: nn.Module, num_items: Tensor | float | None = None, chunk: int | None = None
) -> Tensor:
    """The next-token loss of every cycle, `[H]` in float32.

    Args:
        states: What the head reads, one `[B, T, D]` per cycle.
        labels: `[B, T]` token ids, unshifted.
        head: State to logits; called under autocast where that is on.
        num_items: Counted tokens to divide by; those of this batch where None. Accumulated micro-batches divide by the count of all
            of them: then their losses and gradients add up to those of the one large batch, however the tokens are spread.
        chunk: Tokens whose logits exist at a time, forward and backward; None picks as many as CHUNK_ELEMENTS allows.
    """
    return _per_item(torch.stack([_summed_loss(state, labels, head, chunk) for state in states]), labels, num_items)


def token_losses(state: Tensor, labels: Tensor, head: Any, chunk: int | None = None) -> Tensor:
    """The loss of every token, `[B, T - 1]` in float32: entry t is -log p(token t + 1), 0 where that token does not count."""
    x, targets = _positions(state, labels)
    return torch.cat(_chunk_losses(x, targets, head, _chunk(head.out_features, chunk))).view(labels.shape[0], -1)


def next_embedding_losses(
    states: Sequence[Tensor], labels: Tensor, embeddings: nn.Embedding, num_items: Tensor | float | None = None
) -> Tensor:
    """The next-embedding loss of every cycle, `[H]` in float32; arguments as `next_token_losses`."""
    return _per_item(torch.stack([embedding_losses(state, labels, embeddings).sum() for state in states]), labels, num_items)


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


def _summed_loss(state: Tensor, labels: Tensor, head: Any, chunk: int | None) -> Tensor:
    x, targets = _positions(state, labels)
    chunk = _chunk(head.out_features, chunk)
    if len(x) > chunk and torch.is_grad_enabled() and _plain_float32(x, head):
        # Chunked by torch, which computes the gradients on the way forward: a quarter fewer matrix products than recomputing logits.
        options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=chunk)  # its automatic chunk is many times slower on a CPU
        return F.linear_cross_entropy(x, head.weight, targets, reduction="sum", ignore_index=IGNORED, options=options)
    return torch.cat(_chunk_losses(x, targets, head, chunk)).sum()


def _plain_float32(x: Tensor, head: Any) -> bool:
    """Whether torch's own chunked loss serves: a bare float32 matrix, and no autocast.

    Not in bfloat16: there it returns the sum over all tokens in bfloat16, in steps of 64 nats for a thousand tokens. Not for a head that
    is more than its weight (a bias, LoRA, quantised, sharded over devices).
    """
    weight = getattr(head, "weight", None)
    return (
        type(head) is nn.Linear
        and head.bias is None
        and type(weight) in (Tensor, nn.Parameter)
        and x.dtype == weight.dtype == torch.float32
        and not torch.is_autocast_enabled(x.device.type)
        and not (head._forward_hooks or head._forward_pre_hooks)
    )


def _chunk_losses(x: Tensor, targets: Tensor, head: Any, chunk: int) -> list[Tensor]:
    """The losses of each chunk's positions. Where there are several, each computes its logits again in the backward pass."""
    pieces = zip(x.split(chunk), targets.split(chunk), strict=True)
    if len(x) <= chunk or not torch.is_grad_enabled():
        return [_cross_entropy(head, *piece) for piece in pieces]
    return [checkpoint(_cross_entropy, head, *piece, use_reentrant=False) for piece in pieces]


def _cross_entropy(head: Any, x: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(head(x).float(), targets, ignore_index=IGNORED, reduction="none")
