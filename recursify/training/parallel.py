"""Several processes: DDP, FSDP2 and DeepSpeed, and full state dicts of sharded runs.

    torchrun --nproc_per_node N          every process holds the model and sees its own part of each batch (DDP, by transformers' Trainer)
    ... with --fsdp                      every process holds 1/N of the weights, gradients and optimizer state (FSDP2, `shard` below)
    ... with --deepspeed CONFIG.json     1/N of the optimizer state and, in stage 2, of the gradients, by DeepSpeed through the Trainer

FSDP2 gathers the weights of a unit right before it is used and frees them after. Where the units end is decided here: every layer that
a pass applies once is one. What a pass applies again and again - the looped block, and the coda where every cycle is read out - stays
in the root unit, with embeddings, norm and head: it is gathered once per pass and its gradients are reduced once, however deep the pass.

The arithmetic is that of one process: weights, gradients and what is sent are float32, and bfloat16 comes from autocast as everywhere.
FSDP2's own mixed precision would round gains, norms and the states between the layers, too.

A state as it is written knows nothing of processes: `full_state` and `full_optimizer_state` are what one process alone would have.
Calls marked "collective" must be made by all processes, else the others wait forever.
"""

from __future__ import annotations

import json
import logging
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from ..errors import UserError
from ..utils.models import is_recursive
from .settings import RunSettings

if TYPE_CHECKING:
    from transformers import Trainer as _TrainerBase
else:
    _TrainerBase = object

logger = logging.getLogger(__name__)
_FSDP_FLAG = "_is_fsdp_managed_module"  # torch's, on every module whose weights are sharded


# Before the run


def processes() -> int:
    """How many processes share the run: those that have found each other, else as many as the launcher has promised."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_world_size()
    return int(os.environ.get("WORLD_SIZE", "1"))


def check_launch(settings: RunSettings, device: torch.device) -> None:
    """Whether a run could be spread as its flags say.

    Raises:
        UserError: --fsdp without a second process, or with --deepspeed, --backprop cycle or --optimizer adamw_8bit; --deepspeed without the
            package or a launcher, on a device that it does not know, with a file that cannot be read or partitions the weights, or with
            --gradient_checkpointing, --resume or another optimizer than adamw.
    """
    if settings.fsdp and settings.deepspeed is not None:
        raise UserError("--fsdp and --deepspeed: expected one of the two, got both; each of them spreads the model in its own way")
    if settings.fsdp:
        _check_fsdp(settings)
    if settings.deepspeed is not None:
        _check_deepspeed(settings, settings.deepspeed, device)


def _check_fsdp(settings: RunSettings) -> None:
    if processes() == 1:
        raise UserError("--fsdp: expected several processes to spread the model over, got 1; start with torchrun --nproc_per_node N")
    if settings.backprop == "cycle":
        raise UserError(
            "--fsdp: expected --backprop full or last, got cycle: weights and gradients are gathered and reduced unit by unit, once per "
            "backward pass, and cycle makes several; --gradient_checkpointing saves memory, too"
        )
    if settings.optimizer == "adamw_8bit":
        raise UserError(
            "--fsdp: expected --optimizer adamw or muon, got adamw_8bit: its 8-bit state cannot be put together from its parts, so the run "
            "could not be saved"
        )


def _check_deepspeed(settings: RunSettings, file: str, device: torch.device) -> None:
    if find_spec("deepspeed") is None:
        raise UserError("--deepspeed: the package deepspeed is not installed; pip install deepspeed, or use --fsdp, which needs no package")
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--deepspeed: expected --device cpu or cuda, got {device}")
    if "RANK" not in os.environ:
        raise UserError("--deepspeed: expected processes that a launcher has started; start with torchrun --nproc_per_node N")
    if _zero_stage(file) == 3:
        raise UserError(
            f"--deepspeed: expected ZeRO stage 0, 1 or 2, got 3 in {file}: it partitions the weights, which are then in no place to be "
            "saved from; --fsdp spreads weights, too"
        )
    if settings.gradient_checkpointing:
        raise UserError(
            "--deepspeed: expected no --gradient_checkpointing: whether DeepSpeed sees each gradient once where layers are applied several "
            "times and computed again is an open question (deepspeedai/DeepSpeed issue 2103); --fsdp does"
        )
    if settings.optimizer != "adamw":
        raise UserError(f"--deepspeed: expected --optimizer adamw, got {settings.optimizer}: DeepSpeed makes one row of all matrices")
    if settings.resume:
        raise UserError(
            "--deepspeed: expected no --resume: each process keeps its part of the optimizer's state, and they are not put together"
        )


def _zero_stage(file: str) -> int:
    try:
        config = json.loads(Path(file).read_text(encoding="utf-8"))
        return int(config.get("zero_optimization", {}).get("stage", 0))
    except OSError as error:
        raise UserError(f"--deepspeed: expected DeepSpeed's JSON file, got {file}: {error.strerror}") from error
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"--deepspeed: expected DeepSpeed's JSON file, got {file}, which is none: {error}") from error


def describe_launch(settings: RunSettings, device: torch.device) -> str:
    """One line for the start of a run, such as "cpu, 2 processes (DDP over gloo)"; once the processes have found each other."""
    count = processes()
    if count == 1 and settings.deepspeed is None:
        return f"{device.type}, 1 process{_ignored_launcher(device)}"
    how = "FSDP2" if settings.fsdp else "DDP" if settings.deepspeed is None else f"DeepSpeed, ZeRO stage {_zero_stage(settings.deepspeed)}"
    return f"{device.type}, {count} process{'es' if count > 1 else ''} ({how} over {distributed.get_backend()})"


def _ignored_launcher(device: torch.device) -> str:
    """On a CPU `accelerate launch --num_processes N` starts one process without a word; it leaves an address to meet at, and no count."""
    if device.type == "cpu" and {"ACCELERATE_USE_CPU", "MASTER_ADDR"} <= set(os.environ) and "WORLD_SIZE" not in os.environ:
        return "; accelerate launch starts only one on a CPU, whatever --num_processes says: torchrun --nproc_per_node N starts several"
    return ""


# Sharding


def shard(loss_module: Any, device: torch.device, *, reads_every_cycle: bool, methods: Sequence[str] = ("row_sums",)) -> None:
    """Spread a model over all processes with FSDP2, in place, and move it to the device. Collective.

    What is frozen must be frozen and the weights must be float32 before; the optimizer is made after. The Trainer then takes the model
    as it is. The parameters are DTensors from here on, and plain tensors while the model computes.

    Args:
        loss_module: A module whose `model` is a recursive model, or a plain causal model of transformers.
        reads_every_cycle: Whether a training pass reads out every cycle, so that the coda is applied several times.
        methods: Names of methods of `loss_module` that compute as `forward` does, without gradients.
    """
    mesh = init_device_mesh(device.type, (distributed.get_world_size(),))
    for unit in _units(loss_module.model, reads_every_cycle):
        fully_shard(unit, mesh=mesh)
    fully_shard(loss_module, mesh=mesh)
    for name in methods:
        register_fsdp_forward_method(loss_module, name)
        setattr(loss_module, name, _reset_after(loss_module, getattr(loss_module, name)))
    loss_module._get_fsdp_state()._lazy_init()  # now: else the first unit that computes by itself would take itself for the root
    # What the Trainer looks for, beside _FSDP_FLAG, in a model that was sharded before it came: it prepares the optimizer and wraps nothing.
    loss_module.is_distributed_loading_by_transformers = True


def _units(model: Any, reads_every_cycle: bool) -> list[nn.Module]:
    """The layers that a pass applies once."""
    names = model._no_split_modules or ()
    layers = [module for module in model.modules() if type(module).__name__ in names]
    if not is_recursive(model):
        return layers
    first, behind = model.config.prelude_layers, model.config.prelude_layers + model.config.L_layers
    return layers[:first] + ([] if reads_every_cycle else layers[behind:])


def _reset_after(root: Any, method: Callable[..., Any]) -> Callable[..., Any]:
    def scored(*args: Any, **kwargs: Any) -> Any:
        try:
            return method(*args, **kwargs)
        finally:
            _reset_fsdp_state(root)

    return scored


def _reset_fsdp_state(root: Any) -> None:
    """After passes without a backward pass: free what is gathered, which would outlive the next change of the weights, and drop the order
    in which it was used, which the next backward pass would follow. Not between the micro-batches of a step, whose gradients it drops."""
    root.reset_iter_state()


@contextmanager
def gathered(root: nn.Module) -> Iterator[None]:
    """Inside, every process holds the full model, as if it were alone, and may use it or leave that to one of them; without gradients.

    Collective at both ends. Not between the micro-batches of a step. A model that is not sharded is left as it is.
    """
    units = [module for module in root.modules() if isinstance(module, FSDPModule)]
    if not units:
        yield
        return
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    try:
        with _without_fsdp_flags(root), torch.no_grad():
            yield
    finally:
        for unit in units:
            unit.set_reshard_after_forward(unit is not root, recurse=False)
        _reset_fsdp_state(root)
        distributed.barrier()


@contextmanager
def _without_fsdp_flags(root: nn.Module) -> Iterator[None]:
    """Inside, nothing tells that the model is a sharded one: `generate` waits for no other process, `state_dict` gives what is there."""
    modules: list[Any] = list(root.modules())
    marks = [(module, getattr(module, _FSDP_FLAG, False), module._state_dict_pre_hooks) for module in modules]
    for module in modules:
        module._state_dict_pre_hooks = OrderedDict()  # FSDP2's would free the weights and give this process's part of them
        setattr(module, _FSDP_FLAG, False)
    try:
        yield
    finally:
        for module, mark, hooks in marks:
            module._state_dict_pre_hooks = hooks
            setattr(module, _FSDP_FLAG, mark)


def check_sharding(prepared: Any, settings: RunSettings) -> None:
    """Whether what the flags ask for has happened to the model that the Trainer has prepared.

    Raises:
        RuntimeError: It has not, and every process would train a model of its own.
    """
    kind = type(prepared).__name__
    if settings.fsdp and not any(isinstance(module, FSDPModule) for module in prepared.modules()):
        raise RuntimeError(f"--fsdp was asked for, but the model is not sharded: {kind}")
    if settings.deepspeed is not None and kind != "DeepSpeedEngine":
        raise RuntimeError(f"--deepspeed was asked for, but the model is not DeepSpeed's: {kind}")
    if processes() > 1 and not isinstance(prepared, DistributedDataParallel | FSDPModule) and kind != "DeepSpeedEngine":
        raise RuntimeError(f"{processes()} processes train models that know nothing of each other: {kind}")


# Whole states


def full_state(module: nn.Module) -> dict[str, Tensor]:
    """The state dict of one process alone, on the CPU, in the first process; the others get an empty one. Collective.

    Tied weights are one tensor under both names.
    """
    full: dict[int, Tensor] = {}
    state = {name: _gathered_tensor(tensor, full) for name, tensor in module.state_dict(keep_vars=True).items()}
    return state if _is_first() else {}


def full_optimizer_state(optimizer: Any) -> dict[str, Any]:
    """`optimizer.state_dict()` as one process alone would have it, on the CPU, in the first process; the others get an empty one.
    Collective."""
    state = _map_tensors(optimizer.state_dict(), lambda tensor: _gathered_tensor(tensor, {}))
    return state if _is_first() else {}


def load_full_state(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Set the weights from a state dict of one process alone; every process brings it and keeps its part."""
    own = module.state_dict()
    module.load_state_dict({name: part_like(own[name], tensor) if name in own else tensor for name, tensor in state.items()})


def load_full_optimizer_state(optimizer: Any, state: Mapping[str, Any]) -> None:
    """Set an optimizer from the state dict of one process alone; every process brings it and keeps its part."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    owners = dict(zip(numbers, parameters, strict=True))
    parts = {number: _map_tensors(entry, partial(part_like, owners[number])) for number, entry in state["state"].items()}
    optimizer.load_state_dict({**state, "state": parts})


def _is_first() -> bool:
    return processes() == 1 or distributed.get_rank() == 0


def _gathered_tensor(tensor: Tensor, seen: dict[int, Tensor]) -> Tensor:
    """A tensor on the CPU, in the first process; anything in the others. Collective for a DTensor."""
    if id(tensor) not in seen:
        bare = tensor.detach()
        if isinstance(bare, DTensor):
            bare = bare.full_tensor()
        seen[id(tensor)] = bare.cpu() if _is_first() else bare.new_empty(0)
    return seen[id(tensor)]


def part_like(like: Tensor, full: Tensor) -> Tensor:
    """This process's part of a tensor that is spread as `like` is; a tensor of another shape, such as a step count, is everyone's."""
    if not isinstance(like, DTensor) or like.shape != full.shape:
        return full
    return distribute_tensor(full.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def _map_tensors(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """The same nest of dicts and lists with every tensor changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: _map_tensors(item, change) for key, item in value.items()}
    if isinstance(value, list):
        return [_map_tensors(item, change) for item in value]
    return value


class ShardedTrainerMixin(_TrainerBase):
    """What a Trainer needs for a model that `shard` has spread, before `Trainer` among the bases. Without one it changes nothing."""

    @contextmanager
    def _defer_fsdp_gradient_reduction(self) -> Iterator[None]:
        """Around all micro-batches of a step but the last. The Trainer's own looks into the configuration of a model it has sharded."""
        root: Any = self.model
        root.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            root.set_requires_gradient_sync(True)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The norm over all processes, which torch leaves as a sum that is yet to be made."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """From files that know nothing of processes; DeepSpeed has its own."""
        if checkpoint is None or self.is_deepspeed_enabled:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        load_full_optimizer_state(self.optimizer, read_state(Path(checkpoint) / OPTIMIZER_NAME))
        scheduler: Any = self.lr_scheduler
        scheduler.load_state_dict(read_state(Path(checkpoint) / SCHEDULER_NAME))


def read_state(path: Path) -> Any:
    """What a checkpoint's state folder holds in one file, on the CPU."""
    return torch.load(path, map_location="cpu", weights_only=True)


def announce(text: str) -> None:
    """A line of the log, from the first process alone."""
    if PartialState().is_main_process:
        logger.info("%s", text)
