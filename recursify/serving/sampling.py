"""Sampling in a batch with penalties, temperature, top_k, top_p and seed per request.

transformers' batch manager samples all of a batch or none of it, from one random state, so that what one client gets would depend on
who else is there. Here the manager always takes the largest score, and this puts noise on the scores of those who sample: the largest of
logit + Gumbel noise is a draw from softmax(logits). The noise is a function of the text's seed, its number among the request's texts,
the position, and the token, and of nothing else. V is the vocabulary size.

Penalties change the logits before temperature, top_k and top_p, in this order, and those of greedy sequences as well.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LogitsProcessorList
from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessorList

from ..inference.options import GREEDY_BELOW


@dataclass(frozen=True)
class Choice:
    """Sampling parameters of one sequence.

    Args:
        temperature: 0 is greedy.
        top_p: In (0, 1]; 1 is off.
        seed: Any integer.
        index: Index of the choice within its request: choices differ although they share the seed.
        top_k: Only the k most likely tokens are drawn from; 0 is off.
        presence_penalty: Subtracted from the logits of tokens generated before; 0 is off.
        frequency_penalty: Subtracted once for each time that a token was generated before; 0 is off.
        repetition_penalty: Above 0. Logits of tokens in the prompt or generated before are divided by it if positive, else multiplied;
            1 is off.
        logprobs: How many of the most likely tokens to log at each position, at least 0; None logs nothing.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    index: int = 0
    top_k: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logprobs: int | None = None

    @property
    def greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW

    @property
    def has_penalty(self) -> bool:
        return bool(self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1)

    def key(self, position: int) -> int:
        """A signed 64-bit key of this sequence and position."""
        identity = f"{self.seed}/{self.index}/{position}".encode()
        return int.from_bytes(hashlib.blake2b(identity, digest_size=8).digest(), "little", signed=True)


@dataclass(frozen=True)
class Logged:
    """Log-probabilities at one position: of the token there, and of the most likely ones as (token, log-probability), largest first."""

    logprob: float
    top: tuple[tuple[int, float], ...]


class History:
    """The tokens of a sequence so far, as its penalties need them.

    Args:
        prompt: Token ids, all below `vocabulary`.
    """

    def __init__(self, prompt: list[int], vocabulary: int, device: torch.device):
        self.seen = torch.zeros(vocabulary, dtype=torch.bool, device=device)  # in the prompt or generated
        self.counts = torch.zeros(vocabulary, device=device)  # how often generated
        self.length = 0  # generated tokens that are counted
        self.seen[torch.tensor(prompt, dtype=torch.long, device=device)] = True

    def extend(self, generated: list[int]) -> None:
        """Count what is new in all the tokens generated so far."""
        new = torch.tensor(generated[self.length :], dtype=torch.long, device=self.counts.device)
        self.seen[new] = True
        self.counts.index_add_(0, new, torch.ones_like(new, dtype=self.counts.dtype))
        self.length = len(generated)

    def penalise(self, logits: torch.Tensor, choice: Choice) -> torch.Tensor:
        """Logits `[V]` with the penalties of `choice`: first for repetition, as in transformers, then OpenAI's two."""
        repeated = torch.where(logits > 0, logits / choice.repetition_penalty, logits * choice.repetition_penalty)
        logits = torch.where(self.seen, repeated, logits)
        return logits - choice.frequency_penalty * self.counts - choice.presence_penalty * (self.counts > 0)


class PerRequestSampling(ContinuousBatchingLogitsProcessorList):
    """Replaces the manager's logits processors; each request passes `choice=Choice(...)`.

    Keeps the parameters of the current batch in Python, so the manager must not run asynchronously or replay a CUDA graph.
    """

    def __init__(self) -> None:
        super().__init__(LogitsProcessorList())
        self.do_processing = True
        self.supported_keys = {"choice": Choice}
        self.rows: list[tuple[Choice, Any]] = []  # parameters and the manager's state of each sequence
        self.histories: dict[str, History] = {}
        self.logprobs: dict[str, tuple[int, torch.Tensor]] = {}  # of this step: how many to log, and those of all tokens `[V]`

    def prepare_tensor_args(self, requests_in_batch: list[Any], arg_storage: torch.Tensor) -> torch.Tensor:
        """Record which sequences get a token in this step."""
        states = [request.state for request in requests_in_batch if request.has_new_token]
        self.rows = [(state.logit_processor_kwargs["choice"], state) for state in states]
        return arg_storage

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, logits_processor_args: torch.Tensor) -> torch.Tensor:
        """Logits `[rows, V]`, possibly with padding rows, to scores whose argmax is the sampled token."""
        self._log(scores)
        self._penalise(scores)
        drawn = [row for row, (choice, _) in enumerate(self.rows) if not choice.greedy]
        if drawn:
            choices = [self.rows[row] for row in drawn]
            keys = [choice.key(state.position_offset) for choice, state in choices]
            scores[drawn] = choose(scores[drawn], [choice for choice, _ in choices], keys)
        return scores

    def logged(self, request_id: str, token: int) -> Logged | None:
        """Log-probabilities of the step that has just given a sequence this token; None if it wants none."""
        if request_id not in self.logprobs:
            return None
        count, row = self.logprobs[request_id]
        top = row.topk(min(count, len(row)))
        return Logged(row[token].item(), tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True)))

    def _log(self, logits: torch.Tensor) -> None:
        """Keep the log-probabilities of the model, which penalties, temperature, top_k and top_p do not change."""
        self.logprobs = {
            state.request_id: (choice.logprobs, logits[row].float().log_softmax(-1))
            for row, (choice, state) in enumerate(self.rows)
            if choice.logprobs is not None
        }

    def _penalise(self, scores: torch.Tensor) -> None:
        """Put the penalties on the scores, in place; histories of sequences that are not in this step are dropped."""
        kept = {}
        for row, (choice, state) in enumerate(self.rows):
            if choice.has_penalty:
                history = self.histories.get(state.request_id) or History(state.initial_tokens, scores.shape[-1], scores.device)
                history.extend(state.generated_tokens)
                scores[row] = history.penalise(scores[row], choice)
                kept[state.request_id] = history
        self.histories = kept


def choose(logits: torch.Tensor, choices: list[Choice], keys: list[int]) -> torch.Tensor:
    """Logits `[n, V]` in float32 to scores `[n, V]` whose argmax is a sample (Gumbel-max), per row with its parameters and 64-bit key."""
    temperature = torch.tensor([choice.temperature for choice in choices], device=logits.device)
    scores = logits / temperature[:, None]
    if any(choice.top_k for choice in choices):
        scores = _most_likely(scores, [choice.top_k for choice in choices])
    top_p = torch.tensor([choice.top_p for choice in choices], device=logits.device)
    if any(choice.top_p < 1 for choice in choices):
        scores = _nucleus(scores, top_p)
    return scores + gumbel(torch.tensor(keys, device=logits.device), logits.shape[-1])


def _most_likely(scores: torch.Tensor, top_k: list[int]) -> torch.Tensor:
    """Mask tokens below the k-th largest score of their row, with a k for each row and 0 for none; ties with it stay."""
    vocabulary = scores.shape[-1]
    last = torch.tensor([min(k or vocabulary, vocabulary) - 1 for k in top_k], device=scores.device)
    least = scores.sort(dim=-1, descending=True).values.gather(-1, last[:, None])
    return scores.masked_fill(scores < least, -torch.inf)


def _nucleus(scores: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """Mask tokens outside the nucleus of mass `top_p` `[n]`; the most likely token always stays."""
    ordered, order = scores.sort(dim=-1, descending=True)
    probabilities = ordered.softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities
    beyond = (before >= top_p[:, None]) & (top_p[:, None] < 1)
    beyond[:, 0] = False
    return scores.masked_fill(torch.zeros_like(beyond).scatter(-1, order, beyond), -torch.inf)


def gumbel(keys: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """Gumbel noise `[n, V]` in float32, a pure function of int64 keys `[n]`.

    Counter-based random bits (SplitMix64) in integer arithmetic: equal on every device and in every batch.
    """
    x = keys[:, None] + _GOLDEN * torch.arange(1, vocabulary + 1, device=keys.device)
    x = (x ^ _shifted(x, 30)) * _MIX[0]
    x = (x ^ _shifted(x, 27)) * _MIX[1]
    x = x ^ _shifted(x, 31)
    uniform = (_shifted(x, 32).float() + 0.5) * 2.0**-32
    return -torch.log(-torch.log1p(-uniform))


def _shifted(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical right shift of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_MIX = _signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB)
