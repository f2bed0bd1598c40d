"""The three training approaches as one table: initialisation, trained parts, objective.

    approach     embeddings       looped block          norm and head            trained           objective        generates text
    full         all from the checkpoint                                         everything        next token       yes
    hybrid       donor, frozen    donor, or random      donor, frozen or tuned   loop              next token       yes
    embedding    donor, frozen    random, or donor      none                     loop              next embedding   no

The loop is the looped block and the parameters of the recursion: gains and initial states. Every model is an ordinary checkpoint. A model
trained in embedding space keeps the donor's head, unused; its metadata records the approach, so that no command uses that head.
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
    """What a run minimises. `reader` is the module whose weights states are compared with: the LM head or the embeddings.

    Args:
        reader: `(model) -> module`: its head, or its embeddings.
        loss: `(states, labels, reader, shares, num_items) -> (sum of share * loss, losses)`, for training; the losses, one per state, have
            no gradient.
        token_losses: `(state, labels, reader) -> [B, T - 1]`, for validation.
        token_hits: `(state, labels, reader) -> [B, T - 1]`, 1 where the prediction is correct; validation reports their mean. Where None,
            the loss is in nats and validation reports the perplexity.
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
        trained: `(model, settings) -> modules` whose parameters are trained, except those that the model itself freezes.
        generates: Whether the model can generate text.
    """

    trained: Callable[[Any, Any], Iterable[nn.Module]]
    objective: Objective
    generates: bool


def _everything(model: Any, settings: Any) -> list[nn.Module]:
    return [model]


def _loop(model: Any, settings: Any) -> list[nn.Module]:
    return [*looped_layers(model), model.model.recursion]


def _loop_and_head(model: Any, settings: Any) -> list[nn.Module]:
    if not settings.tune_lm_head:
        return _loop(model, settings)
    if model.lm_head.weight is model.model.embed_tokens.weight:
        raise UserError(
            "--tune_lm_head: the head is tied to the embeddings, which this approach freezes; untie them first (approaches.untied)"
        )
    return [*_loop(model, settings), model.model.norm, model.lm_head]


APPROACHES = {
    "full": Approach(_everything, NEXT_TOKEN, generates=True),
    "hybrid": Approach(_loop_and_head, NEXT_TOKEN, generates=True),
    checkpoint.EMBEDDING: Approach(_loop, NEXT_EMBEDDING, generates=False),
}


def freeze_rest(model: Any, settings: RunSettings) -> None:
    """Freeze every parameter that the approach does not train, or that gets no gradient: DDP fails on trainable parameters without one.

    Raises:
        UserError: A trained and a frozen parameter are tied.
    """
    trained = {id(p) for module in APPROACHES[settings.approach].trained(model, settings) for p in module.parameters()}
    for parameter in model.parameters():
        if id(parameter) not in trained:
            parameter.requires_grad_(False)
    if is_recursive(model):
        recursion, deepest = model.model.recursion, max(settings.cycle_choices, default=model.config.H_cycles)
        recursion.q_head.requires_grad_(settings.halting_weight > 0)
        if settings.backprop == "last" and deepest > 1:  # they have a gradient only if there is one cycle
            for state in (recursion.H_init, recursion.L_init):
                state.requires_grad_(False)


def cast_for_training(model: Any, settings: RunSettings) -> None:
    """Cast to float32, in which small updates are not lost. The frozen donor of an adapter stays in bfloat16 if it is stored so and the run
    computes in it."""
    if not (getattr(model.config, "is_adapter", False) and settings.bf16 and model.dtype == torch.bfloat16):
        model.float()
        return
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def from_donor(settings: DonorSettings, say: Say = lambda _: None) -> checkpoint.Checkpoint:
    """The initial model of a run with these settings, in the donor's dtype; deterministic for a given seed.

    Args:
        say: Called with messages on how the model was initialised.

    Raises:
        UserError: An unusable donor, or flags that do not fit it.
    """
    donor = open_donor(settings.model_name, revision=settings.revision)
    tokenizer = donor_tokenizer(donor, settings.tokenizer_path)
    loop = {field.name: getattr(settings, field.name) for field in fields(LoopSettings)}
    wanted = ConvertSettings(qwen_model=donor.name, **loop)
    check_seq_len(donor, settings.seq_len)
    plan = resolve_plan(donor, wanted)
    torch.manual_seed(settings.seed)
    model: Any = convert_tensors(donor, plan, wanted).model
    start = "randomly initialised" if settings.starts_fresh else f"layers {list(plan.loop)}"
    say(f"{settings.approach} approach: {len(plan.loop)} looped layers ({start}) are trained on the frozen embeddings of {donor.name}")
    if settings.starts_fresh:
        reinitialise(model, looped_layers(model))
    if not APPROACHES[settings.approach].generates:
        reinitialise(model, [model.model.norm])  # all ones: a cosine does not depend on the scale of the state
        say("It predicts embeddings and has no head, so it cannot generate; --approach hybrid trains a model that does")
    if getattr(settings, "tune_lm_head", False) and model.config.tie_word_embeddings:
        model = untied(model)
        size = f"{model.lm_head.weight.numel():,}"
        say(f"--tune_lm_head: the head was tied to the embeddings and is now a separate matrix of {size} parameters")
    notes = {**donor.origin, "seq_len": settings.seq_len, "loop": "fresh" if settings.starts_fresh else "donor"}
    model.config.conversion = conversion_record(None if settings.starts_fresh else plan, notes)
    return checkpoint.Checkpoint(model, tokenizer)


def looped_layers(model: Any) -> list[nn.Module]:
    first = model.config.prelude_layers
    return list(model.model.layers[first : first + model.config.L_layers])


@torch.no_grad()
def reinitialise(model: Any, parts: Iterable[nn.Module]) -> None:
    """Reinitialise parts of a model as the donor's class initialises them."""
    for part in parts:
        for parameter in part.parameters():
            parameter.__dict__.pop("_is_hf_initialized", None)  # set by transformers on loaded parameters, which it skips
        for module in part.modules():
            model.model._init_weights(module)


def untied(model: Any) -> RecursiveLLM:
    """The model with an untied head, initialised with a copy of the embeddings; all other tensors are shared with the original."""
    config = copy.deepcopy(model.config)
    config.tie_word_embeddings = False
    state = {**model.state_dict(), "lm_head.weight": model.lm_head.weight.detach().clone()}
    other = checkpoint.build(config, state, "untied", model.dtype)
    other.generation_config = model.generation_config
    return other
