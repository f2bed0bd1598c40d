"""Losses against values computed by hand, and the chunked computation against the plain one, with gradients."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.loss.loss_utils import ForCausalLMLoss

from recursify.network import losses as objective
from recursify.network.losses import (
    HALT_MARGIN,
    SCHEDULES,
    Reference,
    counted,
    cycle_shares,
    cycle_weights,
    embedding_losses,
    halting_loss,
    losses_and_divergences,
    nearest_is_next,
    next_embedding_loss,
    next_token_loss,
    perplexity,
    perplexity_text,
    token_losses,
    worsening,
)

B, T, D, V = 3, 9, 8, 50
SHARES = [0.25, 1.0]


def batch(seed: int = 0, cycles: int = 2) -> tuple[list[torch.Tensor], torch.Tensor]:
    """States with gradients, one per cycle, and labels of which some are ignored."""
    torch.manual_seed(seed)
    states = [torch.randn(B, T, D, requires_grad=True) for _ in range(cycles)]
    labels = torch.randint(0, V, (B, T))
    labels[0, :4] = labels[2, 5] = -100
    return states, labels


def plain(states: list[torch.Tensor], labels: torch.Tensor, head: nn.Module) -> torch.Tensor:
    """transformers' own loss of every cycle."""
    return torch.stack([ForCausalLMLoss(head(state), labels, V) for state in states])


def weighted(losses: torch.Tensor) -> torch.Tensor:
    return (losses * torch.tensor(SHARES)).sum()


def gradients(loss: torch.Tensor, states: list[torch.Tensor], head: nn.Module) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, [*states, *(p for p in head.parameters() if p.requires_grad)]))


def test_cycle_weights_by_hand() -> None:
    assert cycle_weights("constant", 0.5, 4) == [0.5, 0.5, 0.5, 1.0]
    assert cycle_weights("linear_decay", 0.5, 4) == [0.125, 0.25, 0.375, 1.0]
    assert cycle_weights("exponential_decay", 0.5, 4) == [0.0625, 0.125, 0.25, 1.0]
    assert cycle_weights("early_decay", 0.5, 4) == [1.0, 0.5, 0.25, 1.0]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_one_cycle_has_weight_one(schedule: str) -> None:
    assert cycle_weights(schedule, 0.5, 1) == [1.0]


def test_invalid_weights_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected one of constant, linear_decay, exponential_decay, early_decay, got 'cosine'"):
        cycle_weights("cosine", 0.5, 3)
    with pytest.raises(ValueError, match="at least 0, got -1"):
        cycle_weights("constant", -1, 3)
    with pytest.raises(ValueError, match="at least 0, got nan"):
        cycle_weights("constant", math.nan, 3)
    with pytest.raises(ValueError, match="at least 1 cycle"):
        cycle_weights("constant", 0.5, 0)


def test_shares_by_hand() -> None:
    """The weights over their sum: 0.25, 0.5 and 1 of 1.75."""
    assert cycle_shares("exponential_decay", 1.0, 3) == pytest.approx([1 / 7, 2 / 7, 4 / 7])
    assert cycle_shares("constant", 0.0, 3) == [0, 0, 1]


def test_next_token_loss_by_hand() -> None:
    """Two tokens and an identity head: the state is the logits."""
    head = nn.Linear(2, 2, bias=False)
    nn.init.eye_(head.weight)
    state = torch.tensor([[[0.0, 0.0], [math.log(3), 0.0], [9.0, 0.0], [5.0, 5.0]]])
    labels = torch.tensor([[1, 0, 0, -100]])
    # position 0 predicts token 0 with 1/2, position 1 with 3/4; the next token of position 2 is ignored, position 3 has none
    expected = [math.log(2), math.log(4 / 3), 0.0]
    assert token_losses(state, labels, head)[0].tolist() == pytest.approx(expected)
    for num_items, by in ((None, 2), (8, 8)):
        total, losses = next_token_loss([state, 0 * state], labels, head, [1.0, 0.5], num_items)
        assert losses.tolist() == pytest.approx([sum(expected) / by, 2 * math.log(2) / by])
        assert total.item() == pytest.approx((sum(expected) + math.log(2)) / by)
    assert counted(labels) == 2


@pytest.mark.parametrize("chunk", [1, 5, 24, 1000])
@pytest.mark.parametrize("bias", [False, True], ids=["on the way", "recomputed"])
def test_chunked_equals_plain(chunk: int, bias: bool) -> None:
    states, labels = batch()
    head = nn.Linear(D, V, bias=bias)
    expected, (total, losses) = plain(states, labels, head), next_token_loss(states, labels, head, SHARES, chunk=chunk)
    torch.testing.assert_close(losses, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(total, weighted(expected), rtol=1e-6, atol=1e-6)
    assert total.requires_grad and not losses.requires_grad
    # the incoming gradient scales all gradients
    for ours, theirs in zip(gradients(3 * total, states, head), gradients(3 * weighted(expected), states, head), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
    with torch.no_grad():
        torch.testing.assert_close(next_token_loss(states, labels, head, SHARES, chunk=chunk)[0], total, rtol=1e-6, atol=1e-6)


class Made(TorchDispatchMode):
    """Addresses of all tensors of a shape that any operation returned."""

    def __init__(self, shape: tuple[int, ...]):
        super().__init__()
        self.shape, self.places = shape, set[int]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        self.places |= {each.data_ptr() for each in tree_leaves(found) if isinstance(each, torch.Tensor) and each.shape == self.shape}
        return found


def test_head_gradient_is_accumulated_over_cycles_in_one_matrix() -> None:
    """The matrix may be the largest tensor of a training step."""
    states, labels = batch(cycles=4)
    head = nn.Linear(D, V, bias=False)
    with Made((V, D)) as made:
        next_token_loss(states, labels, head, [1.0] * 4, chunk=5)[0].backward()
    assert len(made.places - {head.weight.data_ptr()}) == 1


@pytest.mark.parametrize("bias", [False, True], ids=["on the way", "recomputed"])
def test_logits_whose_exponentials_overflow(bias: bool) -> None:
    states, labels = batch()
    head = nn.Linear(D, V, bias=bias)
    with torch.no_grad():
        head.weight.mul_(500)
    assert head(states[0]).exp().isinf().any()
    (total, losses), expected = next_token_loss(states, labels, head, SHARES, chunk=5), plain(states, labels, head)
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-4)
    for ours, theirs in zip(gradients(total, states, head), gradients(weighted(expected), states, head), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_which_heads_use_the_chunked_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, own = [], objective._ChunkedLoss.apply

    def spy(*args: Any) -> torch.Tensor:
        calls.append(args[3:5])
        return own(*args)

    monkeypatch.setattr(objective._ChunkedLoss, "apply", spy)
    states, labels = batch()
    next_token_loss(states, labels, nn.Linear(D, V, bias=False), SHARES, chunk=5)
    with torch.autocast("cpu", torch.bfloat16):
        next_token_loss(states, labels, nn.Linear(D, V, bias=False), SHARES, chunk=5)
    next_token_loss(states, labels, nn.Linear(D, V, bias=False), SHARES, chunk=B * T)  # one chunk per cycle, two in total
    assert calls == [(5, None), (5, torch.bfloat16), (B * T, None)]
    calls.clear()
    next_token_loss(states, labels, nn.Linear(D, V, bias=False), SHARES, chunk=2 * B * T)  # a single chunk
    next_token_loss(states, labels, nn.Linear(D, V, bias=True), SHARES, chunk=5)
    next_token_loss([s.detach().bfloat16() for s in states], labels, nn.Linear(D, V, bias=False).bfloat16(), SHARES, chunk=5)
    with torch.autocast("cpu", torch.bfloat16):
        next_token_loss(states, labels, nn.Linear(D, V, bias=True), SHARES, chunk=5)
    assert not calls


class Elsewhere(torch.Tensor):
    """Stands for a weight that is not a plain tensor: sharded or quantised."""


def watched(head: nn.Linear) -> nn.Linear:
    head.register_forward_pre_hook(lambda module, args: None)
    return head


def held_elsewhere(head: nn.Linear) -> nn.Linear:
    head.weight = nn.Parameter(head.weight.detach().as_subclass(Elsewhere))
    return head


@pytest.mark.parametrize("change", [watched, held_elsewhere, nn.Linear.bfloat16])
def test_other_heads_are_called_as_modules(change: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also under autocast, where states may have another dtype than the head."""
    monkeypatch.setattr(objective._ChunkedLoss, "apply", lambda *args: pytest.fail("its weight was taken from it"))
    states, labels = batch()
    head = change(nn.Linear(D, V, bias=False))
    with torch.autocast("cpu", torch.bfloat16):
        total, losses = next_token_loss(states, labels, head, SHARES, chunk=5)
        expected = plain(states, labels, head)
    torch.testing.assert_close(torch.Tensor(losses), torch.Tensor(expected), rtol=1e-5, atol=1e-5)
    total.backward()
    assert head.weight.grad is not None


@pytest.mark.parametrize("chunk", [5, 1000])
def test_the_loss_of_a_bfloat16_model_is_float32(chunk: int) -> None:
    states, labels = batch(cycles=1)
    state, head = states[0].detach().bfloat16(), nn.Linear(D, V, bias=False).bfloat16()
    found, divergence = losses_and_divergences(state, labels, head, [Reference(-state, head)], chunk)
    ours, theirs = (head(x[:, :-1]).float().log_softmax(-1) for x in (state, -state))
    assert found.dtype == divergence.dtype == torch.float32
    expected = F.nll_loss(ours.transpose(1, 2), labels[:, 1:], reduction="none")
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    kl = (theirs.exp() * (theirs - ours)).sum(-1).masked_fill(labels[:, 1:] == -100, 0.0)
    torch.testing.assert_close(divergence, kl, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("bias", [False, True])
def test_at_most_one_chunk_of_logits_in_memory(bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In forward and backward pass, only the logits of one chunk exist at a time."""
    states, labels = batch()
    head, rows = nn.Linear(D, V, bias=bias), []
    head.register_forward_hook(lambda module, args, output: rows.append(output.numel() // V))
    next_token_loss(states, labels, head, SHARES, chunk=5)[0].backward()
    # a head with hooks is called: twice per chunk, once of these in the backward pass
    assert max(rows) == 5 and sum(rows) == 2 * len(states) * B * (T - 1)


def test_the_chunk_follows_the_vocabulary() -> None:
    assert objective._chunk(151_936, None) == 441
    assert objective._chunk(10**8, None) == 64
    with pytest.raises(ValueError, match="at least 1 token, got 0"):
        objective._chunk(4, 0)


@pytest.mark.parametrize("bias", [False, True], ids=["on the way", "recomputed"])
def test_bfloat16_autocast(bias: bool) -> None:
    """The matrix product is in bfloat16, the loss is not: no rounding to steps of a bfloat16 sum."""
    states, labels = batch()
    head = nn.Linear(D, V, bias=bias)
    with torch.autocast("cpu", torch.bfloat16):
        total, found = next_token_loss(states, labels, head, SHARES, chunk=5)
        expected = plain(states, labels, head)
    assert total.dtype == found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found, plain(states, labels, head), rtol=2e-2, atol=2e-2)
    for ours, theirs in zip(gradients(total, states, head), gradients(weighted(expected), states, head), strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-3)


def test_micro_batches_add_up() -> None:
    """Also with different numbers of tokens."""
    states, labels = batch()
    head = nn.Linear(D, V, bias=False)
    whole, _ = next_token_loss(states, labels, head, SHARES)
    items = counted(labels)
    parts = [next_token_loss([s[i : i + 1] for s in states], labels[i : i + 1], head, SHARES, items)[0] for i in range(B)]
    total = torch.stack(parts).sum()
    torch.testing.assert_close(total, whole)
    for ours, theirs in zip(gradients(total, states, head), gradients(whole, states, head), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_loss_without_counted_tokens_is_zero() -> None:
    states, labels = batch()
    for empty in (torch.full_like(labels, -100), labels[:, :1]):
        cut = [s[:, : empty.shape[1]] for s in states]
        total, losses = next_token_loss(cut, empty, nn.Linear(D, V, bias=False), SHARES)
        assert losses.tolist() == [0.0, 0.0] and total.item() == 0.0
        total.backward()
        assert all(s.grad is not None and torch.equal(s.grad, torch.zeros_like(s)) for s in states)


def test_a_head_under_lora() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lm_head = nn.Linear(D, V, bias=False)

    torch.manual_seed(0)
    peft: Any = get_peft_model(Model(), LoraConfig(target_modules=["lm_head"], init_lora_weights=False))
    head = peft.base_model.model.lm_head
    states, labels = batch()
    (total, found), expected = next_token_loss(states, labels, head, SHARES, chunk=5), plain(states, labels, head)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    for ours, theirs in zip(gradients(total, states, head), gradients(weighted(expected), states, head), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_a_perplexity_that_says_nothing_is_not_shown() -> None:
    assert (perplexity_text(0.0), perplexity_text(math.log(1234.5))) == ("1.00", "1234.50")
    assert {perplexity_text(loss) for loss in (math.log(1.01e6), 800.0, math.inf)} == {"> 1e6, worse than guessing"}
    assert perplexity_text(math.nan) == "nan"


def test_perplexity() -> None:
    assert (perplexity(0.0), perplexity(math.log(7))) == (1.0, pytest.approx(7.0))
    assert perplexity(699.0) == math.exp(699.0) < math.inf
    assert perplexity(710.0) == perplexity(math.inf) == math.inf


# In embedding space


def compass() -> nn.Embedding:
    """Five embeddings in the plane: north, far east, north-east, zero (as padding of a vocabulary), west. Trainable, as a donor's."""
    words = [[0.0, 1.0], [5.0, 0.0], [1.0, 1.0], [0.0, 0.0], [-1.0, 0.0]]
    embeddings = nn.Embedding(5, 2)
    with torch.no_grad():
        embeddings.weight.copy_(torch.tensor(words))
    return embeddings


def test_next_embedding_loss_by_hand() -> None:
    state = torch.tensor([[[0.0, 3.0], [3.0, 0.0], [0.0, 2.0], [9.0, 9.0], [1.0, 0.0], [7.0, 7.0]]])
    labels = torch.tensor([[0, 0, 4, 2, -100, 3]])
    # north for north; east for west; north for north-east; next token ignored; east for the zero embedding, whose cosine is 0
    expected = [0.0, 2.0, 1 - math.sqrt(0.5), 0.0, 1.0]
    assert embedding_losses(state, labels, compass())[0].tolist() == pytest.approx(expected, abs=1e-6)
    total, losses = next_embedding_loss([state, state], labels, compass(), [1.0, 0.5])
    assert losses.tolist() == pytest.approx([sum(expected) / 4] * 2) and total.item() == pytest.approx(1.5 * sum(expected) / 4)
    for found in next_embedding_loss([state], labels, compass(), [1.0], num_items=8):
        assert found.sum().item() == pytest.approx(sum(expected) / 8)
    assert next_embedding_loss([state[:, :1]], labels[:, :1], compass(), [1.0])[0].item() == 0.0


def test_embedding_loss_ignores_norms() -> None:
    states, labels = batch(cycles=1)
    embeddings = nn.Embedding(V, D)
    expected = embedding_losses(states[0], labels, embeddings)
    with torch.no_grad():
        embeddings.weight.mul_(torch.rand(V, 1) + 0.5)
    torch.testing.assert_close(embedding_losses(7 * states[0], labels, embeddings), expected)


def test_embeddings_are_targets_and_get_no_gradient() -> None:
    states, labels = batch(cycles=1)
    embeddings = nn.Embedding(V, D)
    next_embedding_loss(states, labels, embeddings, [1.0])[0].backward()
    gradient = states[0].grad
    assert embeddings.weight.grad is None and gradient is not None
    assert gradient[1, :-1].abs().amax(dim=-1).min() > 0 and gradient[:, -1].abs().max() == 0 and gradient[0, :3].abs().max() == 0


@pytest.mark.parametrize("chunk", [None, 1, 2])
def test_nearest_embedding_by_hand(chunk: int | None) -> None:
    """By cosine: far east is nearest to east, although north-east is closer in Euclidean distance."""
    state = torch.tensor([[[0.1, 1.0], [1.0, 0.2], [1.0, 0.9], [-2.0, 0.1], [0.0, 1.0], [0.0, 0.0], [1.0, 1.0]]])
    labels = torch.tensor([[4, 0, 1, 2, 1, -100, 3]])
    # correct: north, east, north-east; wrong: west for east; ignored; a zero state is not nearest to the zero embedding
    assert nearest_is_next(state, labels, compass(), chunk).tolist() == [[1.0, 1.0, 1.0, 0.0, 0.0, 0.0]]


def test_nearest_embedding_equals_the_plain_search() -> None:
    states, labels = batch(cycles=1)
    embeddings = nn.Embedding(V, D)
    with torch.autocast("cpu", torch.bfloat16):
        found = nearest_is_next(states[0], labels, embeddings, chunk=5)
    every = F.cosine_similarity(states[0][:, :-1, None], embeddings.weight, dim=-1)
    assert torch.equal(found, (every.argmax(-1) == labels[:, 1:]).float())


def test_nearest_embedding_ignores_norms() -> None:
    """Against a plain search, where all norms are below 1 and differ widely."""
    states, labels = batch(cycles=1)
    embeddings = nn.Embedding(V, D)
    with torch.no_grad():
        embeddings.weight.mul_(10 ** (-4 * torch.rand(V, 1) - 1))
    every = F.cosine_similarity(states[0][:, :-1, None], embeddings.weight, dim=-1, eps=1e-12)
    labels[1:, 1:] = every.argmax(-1)[1:]
    labels[2, 5] = -100
    expected = (every.argmax(-1) == labels[:, 1:]).float()
    assert torch.equal(nearest_is_next(states[0], labels, embeddings), expected) and 0 < expected.mean() < 1


def test_nearest_embedding_is_float32_under_autocast() -> None:
    """The embeddings are closer than bfloat16 resolves; each state is one of them."""
    torch.manual_seed(0)
    embeddings = nn.Embedding.from_pretrained(torch.ones(V, D) + 1e-2 * torch.randn(V, D))
    labels = torch.randint(0, V, (B, T))
    state = embeddings(labels.roll(-1, dims=1))
    with torch.autocast("cpu", torch.bfloat16):
        assert nearest_is_next(state, labels, embeddings).all()


def test_embedding_losses_are_computed_in_float32() -> None:
    states, labels = batch(cycles=1)
    embeddings = nn.Embedding(V, D).bfloat16()
    found = embedding_losses(states[0].bfloat16(), labels, embeddings)
    rounded = nn.Embedding.from_pretrained(embeddings.weight.detach().float())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, embedding_losses(states[0].bfloat16().float(), labels, rounded))


# Divergences and halting


def test_divergence_by_hand() -> None:
    """Two tokens and identity heads: the states are the logits."""
    head = nn.Linear(2, 2, bias=False)
    nn.init.eye_(head.weight)
    ours = torch.tensor([[[0.0, 0.0], [math.log(3), 0.0], [0.0, 0.0]]])
    theirs = torch.tensor([[[math.log(3), 0.0], [math.log(3), 0.0], [0.0, 0.0]]])
    labels = torch.tensor([[0, 1, 0]])
    losses, divergence = losses_and_divergences(ours, labels, head, [Reference(theirs, head)])
    # position 0: reference 3/4, 1/4 and model 1/2, 1/2; position 1: equal
    assert divergence[0].tolist() == pytest.approx([0.75 * math.log(1.5) + 0.25 * math.log(0.5), 0.0], abs=1e-6)
    assert losses[0].tolist() == pytest.approx([math.log(2), math.log(4 / 3)])
    # at temperature 2 the odds of the reference are sqrt(3) : 1
    r = math.sqrt(3) / (math.sqrt(3) + 1)
    _, soft = losses_and_divergences(ours, labels, head, [Reference(theirs, head, 2.0)])
    assert soft[0, 0].item() == pytest.approx(4 * (r * math.log(2 * r) + (1 - r) * math.log(2 * (1 - r))))


def test_teacher_gets_no_gradient() -> None:
    (state, other), labels = batch()
    head, theirs = nn.Linear(D, V, bias=False), nn.Linear(D, V, bias=False)
    _, divergence = losses_and_divergences(state, labels, head, [Reference(other, theirs)], chunk=5)
    divergence.sum().backward()
    assert other.grad is None and theirs.weight.grad is None
    assert state.grad is not None and head.weight.grad is not None


def test_worsening_by_hand() -> None:
    now, before = torch.tensor([[2.0, 1.0]], requires_grad=True), torch.tensor([[1.5, 3.0]], requires_grad=True)
    found = worsening(now, before)
    assert found.tolist() == [[0.5, 0.0]]
    found.sum().backward()
    assert now.grad is not None and now.grad.tolist() == [[1.0, 0.0]] and before.grad is None


def test_halting_loss_by_hand() -> None:
    """Three cycles, two counted tokens: the targets, and that the last cycle's logit is ignored."""
    labels = torch.tensor([[5, 5, -100, 5]])
    losses = [torch.tensor([[1.0, 9.0, 1.0]]), torch.tensor([[1.2, 9.0, 1.0]]), torch.tensor([[1.0 - HALT_MARGIN / 2, 9.0, 0.5]])]
    sure = 30.0
    # token 0: cycle 1 is as good as any later one, cycle 2 is not; token 2: the last cycle is better than both
    logits = [torch.tensor([[sure, 0.0, -sure, 7.0]]), torch.tensor([[-sure, 0.0, -sure, 7.0]]), torch.tensor([[1.0, 2.0, 3.0, 4.0]])]
    assert halting_loss(logits, losses, labels).item() == pytest.approx(0.0, abs=1e-6)
    wrong = [torch.zeros(1, 4), -logits[1], logits[2]]
    nats = (HALT_MARGIN + 0.5) * math.log(2) + (0.2 + HALT_MARGIN / 2 + 0.5) * sure  # each weighted by what its decision is worth
    assert halting_loss(wrong, losses, labels).item() == pytest.approx(nats / 2 / 2)
    assert halting_loss(wrong, losses, labels, num_items=8).item() == pytest.approx(nats / 2 / 8)
    assert halting_loss(logits[:1], losses[:1], labels).item() == 0.0


def test_halting_loss_weighs_tokens_by_what_their_decision_is_worth() -> None:
    """A wrong decision about a token that a later cycle improves by 0.5 nats costs ten times that about one that it hardly changes, which
    counts with the margin; one that later cycles make worse counts with how much."""
    labels, wrong = torch.tensor([[5, 5, 5, 5]]), 4.0
    losses = [torch.tensor([[1.0, 1.0, 1.0]]), torch.tensor([[0.5, 0.99, 1.2]])]
    worth, sure = [0.5, HALT_MARGIN, 0.2], [wrong, -wrong, -wrong]
    for token in range(3):
        logits = [-value for value in sure]
        logits[token] = sure[token]
        of_right, of_wrong = math.log1p(math.exp(-wrong)), math.log1p(math.exp(wrong))
        expected = sum(w * (of_wrong if i == token else of_right) for i, w in enumerate(worth)) / 3
        found = halting_loss([torch.tensor([[*logits, 0.0]]), torch.zeros(1, 4)], losses, labels)
        assert found.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("gain_of_later", "target"),
    [
        ((0.0, 0.0), 1), ((0.04, 0.0), 1), ((0.0, 0.04), 1), ((-1.0, -1.0), 1),
        ((0.06, 0.0), 0), ((0.0, 0.06), 0), ((0.06, -1.0), 0), ((-1.0, 0.06), 0),
    ],
)  # fmt: skip
def test_halting_target_has_a_margin_of_0_05_nats(gain_of_later: tuple[float, float], target: int) -> None:
    """For each of the later cycles. The halting logit is large, so the loss of the first cycle is that logit where the target is 0."""
    labels, sure = torch.tensor([[5, 5]]), 40.0
    losses = [torch.tensor([[2.0]]), *(torch.tensor([[2.0 - gain]]) for gain in gain_of_later)]
    logits = [torch.tensor([[sure, 0.0]]), torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 0.0]])]
    first, second = gain_of_later
    of_the_first = (1 - target) * sure * max(abs(max(first, second)), HALT_MARGIN)
    of_the_second = math.log(2) * max(abs(second - first), HALT_MARGIN)
    assert halting_loss(logits, losses, labels).item() == pytest.approx((of_the_first + of_the_second) / 2, rel=1e-4)


def test_improvement_equal_to_the_margin_counts_as_halted() -> None:
    later = torch.tensor([[1.0]])
    losses = [later + HALT_MARGIN, later]
    assert halting_loss([torch.tensor([[40.0, 0.0]])] * 2, losses, torch.tensor([[5, 5]])).item() == pytest.approx(0.0, abs=1e-6)


def test_halting_loss_sends_no_gradient_into_losses() -> None:
    labels = torch.tensor([[5, 5, 5]])
    losses = [torch.rand(1, 2, requires_grad=True) for _ in range(2)]
    logits = [torch.rand(1, 3, requires_grad=True) for _ in range(2)]
    halting_loss(logits, losses, labels).backward()
    assert all(loss.grad is None for loss in losses) and logits[1].grad is None
    assert logits[0].grad is not None and logits[0].grad[0, 2] == 0 and (logits[0].grad[0, :2] != 0).all()


@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
def test_divergences_of_several_references_are_those_of_torch(temperature: float) -> None:
    """References with another width and dtype than the model, in order; 0 where a token is ignored."""
    (state, first, second), labels = batch(cycles=3)
    head = nn.Linear(D, V, bias=False)
    other = nn.Linear(2 * D, V, bias=False).bfloat16()
    wide = torch.cat([first, second], dim=-1).detach()
    references = [Reference(wide, other, temperature), Reference(second, head, 2.0)]
    losses, *found = losses_and_divergences(state, labels, head, references)
    counts = labels[:, 1:] != -100
    torch.testing.assert_close(losses, token_losses(state, labels, head))
    for (logits, t), divergence in zip(((other(wide.bfloat16()).float(), temperature), (head(second), 2.0)), found, strict=True):
        theirs, ours = (torch.distributions.Categorical(logits=x[:, :-1] / t) for x in (logits, head(state)))
        expected = t**2 * torch.distributions.kl_divergence(theirs, ours) * counts
        torch.testing.assert_close(divergence, expected, rtol=1e-4, atol=1e-5)
        assert (divergence[~counts] == 0).all() and (divergence[counts] > 0.01).all()
    assert not torch.allclose(found[0], found[1])
