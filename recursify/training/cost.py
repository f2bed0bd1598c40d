"""Cost of training, computed from configurations: parameters, FLOPs, bytes of memory.

    parameters_by_part   number of parameters
    step_flops           matrix products of one forward and backward pass, with every application of the loop
    memory_by_part       bytes on one device during training
    estimate             all of these for a run with given settings, as a TrainingCost

FLOPs are counted as in PaLM (arXiv 2204.02311, appendix B): a matrix times one token costs 2 operations per weight, and 4 more in the
backward pass, 2 for the gradient of the input and 2 for that of the weight; attention costs 4 * Q * T forward and 8 * Q * T backward per
token and layer, with Q = heads * head_dim, over all T positions although half of them are masked. Recomputation counts again. Norms,
activations, rotary embeddings, look-ups and the optimizer are not counted.

Units: FLOPs, bytes, tokens. Shape letters: T sequence length, D hidden size, V vocabulary, H cycles, L steps of z_L in a cycle.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig

from ..network.configuration_recursive_llm import RecursiveLLMConfig, applications
from ..network.losses import CHUNK_ELEMENTS
from ..network.size import Shape, parameters_by_part, shape_of
from . import quantize

LOOP = frozenset({"L_level", "recursion"})
READOUT = frozenset({"norm", "lm_head"})

# Bytes of optimizer state per trained parameter; Muon keeps one momentum for the matrices of layers, and AdamW's two for the rest.
STATE_BYTES = {"adamw": 8, "adamw_8bit": 2, "muon": 8}
MUON_BYTES = 4

# Per element of a chunk of logits: the logits, their float32 copy, the log-probabilities, and the gradients of these; and the part that is
# kept for the backward pass if all logits fit in one chunk.
_LOGIT_BYTES, _KEPT_LOGIT_BYTES = 16, 8
GB, MB = 1e9, 1e6


def trained_parts(config: PreTrainedConfig, settings: Any) -> frozenset[str]:
    """The parts that a run with these settings trains.

    Args:
        settings: A `RunSettings`: its `approach`, and `tune_lm_head` where it has one.
    """
    if settings.approach != "full":
        return LOOP | READOUT if getattr(settings, "tune_lm_head", False) else LOOP
    return everything(config)


def everything(config: Any) -> frozenset[str]:
    """All parts that the configuration does not freeze; a head tied to frozen embeddings is frozen, too."""
    parts = frozenset(shape_of(config).parameters)
    if getattr(config, "is_adapter", False):
        return frozenset({"recursion"})
    if not getattr(config, "freeze_embeddings", False):
        return parts
    return parts - ({"embeddings", "lm_head"} if config.tie_word_embeddings else {"embeddings"})


def step_flops(
    config: PreTrainedConfig,
    tokens: int,
    seq_len: int,
    *,
    H_cycles: int | None = None,
    L_cycles: int | None = None,
    supervised: int = 1,
    backprop: str = "full",
    gradient_checkpointing: bool = False,
    trained: Collection[str] | None = None,
    reads_logits: bool = True,
    recomputes_logits: bool = False,
    self_distills: bool = False,
    teacher_config: PreTrainedConfig | None = None,
    reads_teacher_logits: bool = True,
) -> float:
    """Floating-point operations of one forward and backward pass over `tokens` tokens in sequences of `seq_len`.

    Embeddings and prelude are applied once, the looped block H * (L + 1) times, coda and head once per supervised cycle. A frozen part
    costs its forward pass, and the gradient of its input if a part before it is trained.

    Args:
        config: Of a recursive model, or of a plain donor, which is one pass through its layers.
        H_cycles, L_cycles: Those of the configuration where None.
        supervised: Number of cycles with a loss.
        backprop: "full" backpropagates through all cycles, "cycle" through the supervised ones, "last" through the last one only.
        gradient_checkpointing: The forward pass of layers with a gradient is recomputed, except for their last product.
        trained: Parts that get a gradient; `everything` where None.
        reads_logits: Whether the loss uses the head; False for training in embedding space.
        recomputes_logits: Whether the forward pass of the head is recomputed as well (see `recomputes_logits`).
        self_distills: Self-distillation from the last cycle: the head once more at each earlier cycle; with "cycle" an additional pass
            through the loop first.
        teacher_config: The teacher of knowledge distillation: one forward pass, and its head once per supervised cycle.
        reads_teacher_logits: Whether its head is read.
    """
    shape = shape_of(config)
    trained = everything(config) if trained is None else trained
    passes = _pass_counts(config, shape, H_cycles, L_cycles, supervised, backprop)
    needs_grad, flops = False, 0.0
    for part, (forwards, backwards) in passes.items():
        needs_grad = needs_grad or part in trained or ("embeddings" in trained) or (part == "L_level" and "recursion" in trained)
        matrices = shape.matrices[part]
        attention = 4 * shape.heads * seq_len * shape.layers.get(part, 0)
        forward = 2 * matrices + attention
        backward = 2 * matrices + 2 * attention if needs_grad else 0  # the gradient of the input
        backward += 2 * matrices if part in trained else 0
        if needs_grad and part == "lm_head":
            backward += forward if recomputes_logits else 0
        elif needs_grad and gradient_checkpointing:  # torch does not recompute the last product, the down projection: it is not saved
            backward += forward - 2 * shape.hidden * shape.inner * shape.layers[part]
        if part != "lm_head" or reads_logits:
            flops += forwards * forward + backwards * backward
    head_passes = 1 + recomputes_logits
    if teacher_config is not None:
        readouts = passes["lm_head"][0] * head_passes if reads_teacher_logits else 0
        flops += _forward_flops(shape_of(teacher_config), seq_len, {"lm_head": readouts})
    if self_distills and "L_level" in passes:
        more = {"L_level": passes["L_level"][0], "coda": 1, "lm_head": 0} if backprop == "cycle" else dict.fromkeys(passes, 0)
        flops += _forward_flops(shape, seq_len, more | {"prelude": 0, "lm_head": (passes["lm_head"][0] - 1) * head_passes})
    return flops * tokens


def _pass_counts(
    config: Any, shape: Shape, H_cycles: int | None, L_cycles: int | None, supervised: int, backprop: str
) -> dict[str, tuple[int, int]]:
    """Part -> number of its forward and of its backward passes, in the order of the forward pass."""
    if not isinstance(config, RecursiveLLMConfig):
        return {"layers": (1, 1), "lm_head": (1, 1)}
    H = config.H_cycles if H_cycles is None else H_cycles
    L = config.L_cycles if L_cycles is None else L_cycles
    supervised = max(1, min(supervised, H))
    reached = {"full": H, "cycle": supervised, "last": 1}[backprop]
    own = int(config.is_adapter)  # the donor's own application, whose input has no gradient
    loop = (applications(H, L), min(applications(H, L) - own, applications(reached, L)))
    return {"prelude": (1, 1), "L_level": loop, "coda": (supervised, supervised), "lm_head": (supervised, supervised)}


def _forward_flops(shape: Shape, seq_len: int, passes: dict[str, int]) -> float:
    """FLOPs of the forward pass of one token.

    Args:
        passes: Part -> number of forward passes; 1 if missing.
    """
    return sum(
        passes.get(part, 1) * (2 * matrices + 4 * shape.heads * seq_len * shape.layers.get(part, 0))
        for part, matrices in shape.matrices.items()
    )


def recomputes_logits(config: PreTrainedConfig, tokens: int, *, by_token: bool = False, references: int = 0) -> bool:
    """Whether the logits of `tokens` tokens are computed in chunks that are recomputed in the backward pass (see `network.losses`).

    Args:
        by_token: Whether the loss has terms other than the next-token loss; without them the chunked loss needs no recomputation.
        references: Number of distributions that each cycle is distilled from; a chunk contains their logits as well.
    """
    return by_token and tokens * shape_of(config).vocabulary * (1 + references) > CHUNK_ELEMENTS


def layer_bytes(config: PreTrainedConfig, bf16: bool) -> int:
    """Bytes that autograd saves per layer application and token, for the layers of transformers with fused attention.

    In float32: for each of two norms its input, and its output before and after the weight (24 D); queries, keys, values and the output
    of attention (8 Q + 8 K); four vectors of the feed-forward (16 I). Under bfloat16 autocast the norms stay float32 (16 D), each of five
    projections casts its input separately (10 D), and the rest is halved (4 Q + 4 K + 8 I). Norms of queries and keys add 8 (Q + K), or 6.
    Q, K and I are the widths of all queries, all keys, and the feed-forward.
    """
    s = shape_of(config)
    heads = (6 if bf16 else 8) * (s.heads + s.keys) if s.norms_heads else 0
    if bf16:
        return 26 * s.hidden + 4 * (s.heads + s.keys) + 8 * s.inner + heads
    return 24 * s.hidden + 8 * (s.heads + s.keys) + 16 * s.inner + heads


@dataclass(frozen=True, kw_only=True)
class Parallelism:
    """Number of devices and kind of data parallelism.

    Args:
        fsdp: FSDP2; else DDP.
        accumulates: Whether a step has several micro-batches. FSDP2 then keeps unsharded gradients until the last of them.
    """

    devices: int = 1
    fsdp: bool = False
    accumulates: bool = False


def memory_by_part(
    config: PreTrainedConfig,
    tokens: int,
    *,
    H_cycles: int | None = None,
    L_cycles: int | None = None,
    supervised: int = 1,
    backprop: str = "full",
    gradient_checkpointing: bool = False,
    trained: Collection[str] | None = None,
    reads_logits: bool = True,
    by_token: bool = False,
    optimizer: str = "adamw",
    ema: bool = False,
    bf16: bool = True,
    load_in_4bit: bool = False,
    parallelism: Parallelism = Parallelism(),
    teacher_config: PreTrainedConfig | None = None,
) -> dict[str, float]:
    """Peak memory of a training step on one device, in bytes by purpose. An estimate; docs/scaling.md compares it with measurements.

    Weights, gradients and the moving average of the weights (ema) are float32; bfloat16 is autocast, which keeps a copy of every matrix
    for the step. Not counted: the device context, workspaces of kernels, and fragmentation.

    Args:
        tokens: Tokens of a micro-batch on one device.
        by_token: Whether the loss has terms other than the next-token loss.
        The others are those of `step_flops` and of `RunSettings`.
    """
    shape = shape_of(config)
    trained = everything(config) if trained is None else trained
    trained_count = sum(count for part, count in shape.parameters.items() if part in trained)
    in_layers = sum(shape.matrices[part] for part in shape.layers if part in trained)
    share = parallelism.devices if parallelism.fsdp else 1
    matrices = sum(shape.matrices.values()) - (0 if reads_logits else shape.matrices["lm_head"])
    total = sum(shape.parameters.values())
    stored_bf16 = bf16 and getattr(config, "is_adapter", False) and config.dtype == torch.bfloat16
    frozen_bf16 = total - trained_count if stored_bf16 else 0  # see `approaches.cast_for_training`
    in_4bit = sum(shape.matrices[part] for part in shape.layers) if load_in_4bit else 0
    saved_by_4bit = in_4bit * ((2 if frozen_bf16 else 4) - quantize.BYTES)
    kept = _applications_kept(config, shape, trained, H_cycles, L_cycles, supervised, backprop)
    parts = {
        "weights": (4 * (total - frozen_bf16) + 2 * frozen_bf16 - saved_by_4bit) / share,
        # "cycle" accumulates those of its cycles separately from the sum over the micro-batches
        "gradients": 4 * trained_count * (2 if backprop == "cycle" and parallelism.accumulates else 1) / share,
        "optimizer": (STATE_BYTES[optimizer] * trained_count - (MUON_BYTES * in_layers if optimizer == "muon" else 0)) / share,
        "ema": 4 * trained_count / share if ema else 0,
        "autocast": 2 * (matrices - in_4bit) if bf16 and not frozen_bf16 else 0,
        "exchange": _communication_bytes(shape, trained, parallelism, supervised),
        "activations": tokens * _activations(config, shape, kept, bf16, gradient_checkpointing),
        "logits": _logit_bytes(tokens * shape.vocabulary, kept["lm_head"], by_token) if reads_logits else 0,
        "teacher": 0 if teacher_config is None else (2 if bf16 else 4) * sum(parameters_by_part(teacher_config).values()),
    }
    return {name: float(count) for name, count in parts.items() if count}


def _logit_bytes(elements: int, readouts: int, by_token: bool) -> int:
    """Bytes of one chunk of logits, or of all logits if they fit in one (those of all readouts together, unless `by_token`)."""
    if elements * (1 if by_token else readouts) > CHUNK_ELEMENTS:
        return _LOGIT_BYTES * min(elements, CHUNK_ELEMENTS)
    return (_LOGIT_BYTES + _KEPT_LOGIT_BYTES * (readouts - 1)) * elements


def _communication_bytes(shape: Shape, trained: Collection[str], parallelism: Parallelism, supervised: int) -> float:
    """Bytes of communication buffers.

    DDP: buckets as large as the gradients. FSDP2: the unsharded weights and gradients of the root unit (see `training.parallel`), and
    three times a layer: the current one, its gradients, and the prefetched next one; or all gradients under gradient accumulation.
    """
    trained_count = sum(count for part, count in shape.parameters.items() if part in trained)
    if parallelism.devices == 1:
        return 0
    if not parallelism.fsdp:
        return 4 * trained_count
    units = {"prelude", "layers"} if supervised > 1 else {"prelude", "layers", "coda"}
    root = {part: count for part, count in shape.parameters.items() if part not in units}
    layer = sum(shape.matrices[part] for part in shape.layers) / sum(shape.layers.values())
    gradients = trained_count if parallelism.accumulates else sum(count for part, count in root.items() if part in trained) + layer
    return 4 * (sum(root.values()) + 2 * layer + gradients)


def _applications_kept(
    config: Any, shape: Shape, trained: Collection[str], H_cycles: int | None, L_cycles: int | None, supervised: int, backprop: str
) -> dict[str, int]:
    """Part -> applications whose activations are kept at the same time: with "cycle" those of one cycle, as with "last"."""
    passes = _pass_counts(config, shape, H_cycles, L_cycles, 1 if backprop == "cycle" else supervised, backprop)
    kept = {part: backward for part, (_, backward) in passes.items()}
    return kept if {"embeddings", "prelude"} & set(trained) else kept | {"prelude": 0}


def _activations(config: Any, shape: Shape, kept: dict[str, int], bf16: bool, gradient_checkpointing: bool) -> float:
    """Bytes per token: `layer_bytes` per layer application, or under checkpointing its input and all of the one that is being recomputed;
    two differences per injection; two states of the final norm and one of the head per readout."""
    layer, state = layer_bytes(config, bf16), 4 * shape.hidden
    passes = sum(layers * kept.get(part, 0) for part, layers in shape.layers.items())
    others = (2 * kept.get("L_level", 0) + 3 * kept["lm_head"]) * state
    return others + (passes * state + layer if gradient_checkpointing else passes * layer)


@dataclass(frozen=True)
class TrainingCost:
    """Cost of a training run.

    Args:
        steps, tokens: Optimizer steps, and their training tokens on all devices.
        flops: Of the whole run, on all devices, without validation.
        parameters, trained_parameters: Of the model, and of the parts that are trained.
        memory: Bytes on one device, by purpose.
        devices: Number of devices.
        kept: Step checkpoints on the disk at the end of the run.
        disk: Bytes of these and of the best model.
    """

    steps: int
    tokens: int
    flops: float
    parameters: int
    trained_parameters: int
    memory: dict[str, float]
    devices: int = 1
    kept: int = 0
    disk: float = 0.0

    @property
    def memory_total(self) -> float:
        return sum(self.memory.values())

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return {**asdict(self), "memory_total": self.memory_total}

    def render(self) -> str:
        """As text for the console."""
        devices = f", each of {self.devices} devices" if self.devices > 1 else ""
        (unit, size), (disk_unit, disk_size) = _unit(self.memory_total), _unit(self.disk)
        disk = f"disk in {disk_unit:<6} {self.disk / disk_size:>8.2f}"
        lines = [
            f"{'steps':<12} {self.steps:>16,}",
            f"{'tokens':<12} {self.tokens:>16,}",
            f"{'FLOPs':<12} {self.flops:>16.2e}   {self.flops / max(1, self.tokens):.2e} per token",
            f"{'parameters':<12} {self.parameters:>16,}   {self.trained_parameters:,} trainable",
            "",
            f"memory in {unit}{devices} (estimated)",
            *(f"  {name:<12} {count / size:>8.2f}" for name, count in self.memory.items()),
            f"  {'total':<12} {self.memory_total / size:>8.2f}   plus 1 to 2 GB for the device context and libraries",
            "",
            f"{disk}   {self.kept} step checkpoints (--save_every, --keep_last) and the best model",
        ]
        return "\n".join(lines)


def _unit(count: float) -> tuple[str, float]:
    """The unit that shows a number of bytes best, and its bytes."""
    return ("GB", GB) if count >= GB else ("MB", MB)


def estimate(
    config: PreTrainedConfig, settings: Any, steps: int, world_size: int = 1, teacher_config: PreTrainedConfig | None = None
) -> TrainingCost:
    """The cost of a run with these settings.

    Args:
        config: Of the trained model.
        settings: A `RunSettings`. `bf16` None counts as True. The DeepSpeed file is not read: memory is estimated as for DDP.
        steps: Optimizer steps.
        world_size: Number of devices.
        teacher_config: Of the teacher of knowledge distillation, if any.
    """
    tokens, bf16, trained = settings.batch_size * settings.seq_len, settings.bf16 is not False, trained_parts(config, settings)
    depths = depth_shares(config, settings)
    flops = sum(share * pass_flops(config, settings, tokens, H, teacher_config) for H, share in depths.items())
    memory = memory_by_part(
        config,
        tokens,
        H_cycles=max(depths),
        supervised=_scored_cycles(max(depths), settings),
        backprop=settings.backprop,
        gradient_checkpointing=settings.gradient_checkpointing,
        trained=trained,
        reads_logits=settings.approach != "embedding",
        by_token=_by_token(settings, teacher_config),
        optimizer=settings.optimizer,
        ema=settings.ema_decay > 0,
        bf16=bf16,
        load_in_4bit=getattr(settings, "load_in_4bit", False),
        parallelism=Parallelism(devices=world_size, fsdp=settings.fsdp, accumulates=settings.grad_accum_steps > 1),
        teacher_config=teacher_config,
    )
    parameters, passes = parameters_by_part(config), steps * settings.grad_accum_steps * world_size
    return TrainingCost(
        steps=steps,
        tokens=passes * tokens,
        flops=passes * flops,
        parameters=sum(parameters.values()),
        trained_parameters=sum(count for part, count in parameters.items() if part in trained),
        memory=memory,
        devices=world_size,
        **_disk(config, settings, steps, sum(parameters.values()), sum(parameters[part] for part in parameters if part in trained)),
    )


def _disk(config: PreTrainedConfig, settings: Any, steps: int, parameters: int, trained: int) -> dict[str, Any]:
    """Step checkpoints that are kept, and bytes of these and the best model; the state to resume from is in the two newest."""
    made = steps // settings.save_every if settings.save_every else 0
    kept = min(made, settings.keep_last or made)
    size = config.dtype.itemsize if isinstance(config.dtype, torch.dtype) else 4
    state = STATE_BYTES[settings.optimizer] * trained
    state += 4 * parameters if size < 4 or settings.ema_decay else 0
    state += 4 * trained if settings.ema_decay else 0
    return {"kept": kept, "disk": float((kept + 1) * size * parameters + min(kept, 2) * state)}


def _references(settings: Any, teacher_config: PreTrainedConfig | None) -> int:
    """Number of distributions that each cycle is distilled from."""
    return (teacher_config is not None and settings.distill_weight > 0) + (settings.self_distill_weight > 0)


def _by_token(settings: Any, teacher_config: PreTrainedConfig | None) -> bool:
    """Whether the loss has terms other than the next-token loss."""
    others = (settings.monotone_weight, settings.halting_weight, settings.match_hidden_weight)
    return bool(_references(settings, teacher_config) or any(others))


def pass_flops(
    config: PreTrainedConfig, settings: Any, tokens: int, H_cycles: int, teacher_config: PreTrainedConfig | None = None
) -> float:
    """`step_flops` of one micro-batch with these settings at a sampled depth."""
    by_token, references = _by_token(settings, teacher_config), _references(settings, teacher_config)
    return step_flops(
        config,
        tokens,
        settings.seq_len,
        H_cycles=H_cycles,
        supervised=_scored_cycles(H_cycles, settings),
        backprop=settings.backprop,
        gradient_checkpointing=settings.gradient_checkpointing,
        trained=trained_parts(config, settings),
        reads_logits=settings.approach != "embedding",
        recomputes_logits=recomputes_logits(config, tokens, by_token=by_token, references=references),
        self_distills=settings.self_distill_weight > 0,
        teacher_config=teacher_config,
        reads_teacher_logits=settings.distill_weight > 0,
    )


def _scored_cycles(H_cycles: int, settings: Any) -> int:
    return H_cycles if settings.enable_deep_supervision else 1


def depth_shares(config: Any, settings: Any) -> dict[int, float]:
    """Cycle count -> expected share of the steps that sample it. A plain donor has one "cycle".

    The curriculum divides its part of the run into as many equal stages as there are choices; in stage k the first k can be sampled.
    """
    choices = settings.cycle_choices or (getattr(config, "H_cycles", 1),)
    weights = settings.cycle_weights or (1.0,) * len(choices)
    stages = [(settings.depth_curriculum / len(choices), k) for k in range(1, len(choices) + 1)]
    shares = dict.fromkeys(choices, 0.0)
    for share, k in [*stages, (1 - settings.depth_curriculum, len(choices))]:
        for H, weight in zip(choices[:k], weights[:k], strict=True):
            shares[H] += share * weight / sum(weights[:k])
    return shares
