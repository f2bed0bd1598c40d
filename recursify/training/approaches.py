"""The three training approaches as one table: initialisation, trained parts, objective.

    approach     embeddings       looped block          norm and head            trained           objective        writes text
    full         the checkpoint's, all of it                                     everything        next token       yes
    hybrid       donor, frozen    donor, or fresh       donor, frozen or tuned   loop              next token       yes
    embedding    donor, frozen    fresh, or donor       none                     loop              next embedding   no

The loop is the looped block and the recursion's own parameters: gains and start states. Every model is an ordinary checkpoint; one that
was trained in embedding space keeps the donor's head, unused, and the note of its approach keeps commands from reading it through that.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoints import checkpoint
from ..checkpoints.donor import donor_tokenizer, open_donor
from ..conversion.convert import check_seq_len, convert_tensors, resolve_plan
from ..conversion.settings import ConvertSettings, LoopSettings, Say
from ..errors import UserError
from ..network.losses import embedding_losses, nearest_is_next, next_embedding_loss, next_token_loss, token_losses
from ..network.modeling_recursive_llm import RecursiveLLM
from ..network.plan import conversion_record
from ..utils.models import is_recursive
from .settings import DonorSettings, RunSettings


@dataclass(frozen=True)
class Objective:
    """What a run minimises.

    Args:
        reader: `(model) -> module` that states are scored with: the LM head, or the embedding table.
        loss: `(states, labels, reader, shares, num_items) -> (sum of share * loss, losses)`, for training; `losses`, one per
            state, are detached.
        token_losses: `(state, labels, reader) -> [B, T - 1]`, for validation.
        token_hits: `(state, labels, reader) -> [B, T - 1]`, 1 where the prediction is right; validation reports the accuracy. None: the
            loss is in nats and validation reports the perplexity.
    """

    reader: Callable[[Any], Any]
    loss: Callable[..., tuple[Tensor, Tensor]]
    token_losses: Callable[..., Tensor]
    token_hits: Callable[..., Tensor] | None = None


NEXT_TOKEN = Objective(lambda model: model.get_output_embeddings(), next_token_loss, token_losses)
NEXT_EMBEDDING = Objective(lambda model: model.get_input_embeddings(), next_embedding_loss, embedding_losses, nearest_is_next)


@dataclass(frozen=True)
class Approach:
    """A row of the table.

    Args:
        trained: `(model, settings) -> modules` whose parameters are trained, except those that are frozen already.
        writes: Whether the model has a usable LM head.
    """

    trained: Callable[[Any, Any], Iterable[nn.Module]]
    objective: Objective
    writes: bool


def _everything(model: Any, settings: Any) -> list[nn.Module]:
    return [model]


def _loop(model: Any, settings: Any) -> list[nn.Module]:
    return [*looped_layers(model), model.model.recursion]


def _loop_and_head(model: Any, settings: Any) -> list[nn.Module]:
    if not settings.tune_lm_head:
        return _loop(model, settings)
    if model.lm_head.weight is model.model.embed_tokens.weight:
        raise UserError("--tune_lm_head: the head is tied to the embeddings, which this approach freezes; separate them first (untied)")
    return [*_loop(model, settings), model.model.norm, model.lm_head]


APPROACHES = {
    "full": Approach(_everything, NEXT_TOKEN, writes=True),
    "hybrid": Approach(_loop_and_head, NEXT_TOKEN, writes=True),
    checkpoint.EMBEDDING: Approach(_loop, NEXT_EMBEDDING, writes=False),
}


def freeze_rest(model: Any, settings: RunSettings) -> None:
    """Freeze every parameter that the approach does not train, and those that get no gradient, which DDP would raise on.

    Raises:
        UserError: A matrix to train is tied to one to freeze.
    """
    trained = {id(p) for module in APPROACHES[settings.approach].trained(model, settings) for p in module.parameters()}
    for parameter in model.parameters():
        if id(parameter) not in trained:
            parameter.requires_grad_(False)
    if is_recursive(model):
        recursion, deepest = model.model.recursion, max(settings.cycle_choices, default=model.config.H_cycles)
        recursion.q_head.requires_grad_(settings.halting_weight > 0)
        for state in (recursion.H_init, recursion.L_init):  # the last of several cycles starts from states without a gradient
            state.requires_grad_(settings.backprop != "last" or deepest == 1)


def from_donor(settings: DonorSettings, say: Say = lambda _: None) -> checkpoint.Checkpoint:
    """Build the initial model of a run from a donor, in the donor's dtype; deterministic in the seed.

    Args:
        say: Receives the log lines.

    Raises:
        UserError: A donor that cannot be used, or flags that do not fit it.
    """
    donor = open_donor(settings.model_name, revision=settings.revision)
    tokenizer = donor_tokenizer(donor, settings.tokenizer_path)
    loop = {field.name: getattr(settings, field.name) for field in fields(LoopSettings)}
    wanted = ConvertSettings(qwen_model=donor.name, **loop)
    check_seq_len(donor, settings.seq_len)
    plan = resolve_plan(donor, wanted)
    torch.manual_seed(settings.seed)
    model: Any = convert_tensors(donor, plan, wanted).model
    start = "fresh" if settings.starts_fresh else f"layers {list(plan.loop)}"
    say(f"{settings.approach} approach: {len(plan.loop)} looped layers ({start}) trained, everything else frozen, from {donor.name}")
    if settings.starts_fresh:
        reinitialise(model, looped_layers(model))
    if not APPROACHES[settings.approach].writes:
        reinitialise(model, [model.model.norm])  # all ones: it rescales the state, and a cosine does not see that
        say("The model predicts embeddings and has no LM head: it cannot generate text. --approach hybrid trains one that can")
    if getattr(settings, "tune_lm_head", False) and model.config.tie_word_embeddings:
        model = untied(model)
        say(
            f"--tune_lm_head: the head was tied to the embeddings; it is a separate matrix now, {model.lm_head.weight.numel():,} parameters"
        )
    notes = {**donor.origin, "seq_len": settings.seq_len, "loop": "fresh" if settings.starts_fresh else "donor"}
    model.config.conversion = conversion_record(None if settings.starts_fresh else plan, notes)
    return checkpoint.Checkpoint(model, tokenizer)


def looped_layers(model: Any) -> list[nn.Module]:
    first = model.config.prelude_layers
    return list(model.model.layers[first : first + model.config.L_layers])


@torch.no_grad()
def reinitialise(model: Any, parts: Iterable[nn.Module]) -> None:
    """Re-initialise modules of a model with the donor class's own initialisation."""
    for part in parts:
        for parameter in part.parameters():
            parameter.__dict__.pop("_is_hf_initialized", None)  # transformers' mark on what was loaded, which it never initialises
        for module in part.modules():
            model.model._init_weights(module)


def untied(model: Any) -> RecursiveLLM:
    """The same model with a separate head, a copy of the embeddings; every other tensor is shared with the original."""
    config = copy.deepcopy(model.config)
    config.tie_word_embeddings = False
    state = {**model.state_dict(), "lm_head.weight": model.lm_head.weight.detach().clone()}
    other = checkpoint.build(config, state, "untied", model.dtype)
    other.generation_config = model.generation_config
    return other
