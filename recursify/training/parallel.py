"""Several processes: DDP, FSDP2 and DeepSpeed, and full state dicts of sharded runs.

    torchrun --nproc_per_node N          every process holds the model and its own part of each batch (DDP, by transformers' Trainer)
    ... with --fsdp                      every process holds 1/N of the weights, gradients and optimizer state (FSDP2, `shard` below)
    ... with --deepspeed CONFIG.json     1/N of the optimizer state and, in stage 2, of the gradients, by DeepSpeed through the Trainer

FSDP2 gathers the weights of a unit right before use and frees them afterwards. The units are chosen here: every layer that a pass applies
once is one. Layers that a pass applies several times - the looped block, and the coda if every cycle is scored - stay in the root unit,
with embeddings, norm and head: it is gathered once per pass, and its gradients are reduced once, at any depth.

The numerics are those of one process: weights, gradients and communication are float32, and bfloat16 comes from autocast. FSDP2's mixed
precision would also round gains, norms and the states between layers.

Saved states do not depend on the number of processes: `full_state` and `full_optimizer_state` equal those of a single process.
Functions marked "collective" must be called by all processes, otherwise they deadlock.
"""

from __future__ import annotations

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
from ..utils.files import parse_json
from ..utils.models import is_recursive
from .settings import RunSettings

if TYPE_CHECKING:
    from transformers import Trainer as _TrainerBase
else:
    _TrainerBase = object

logger = logging.getLogger(__name__)
_FSDP_FLAG = "_is_fsdp_managed_module"  # set by torch on every module with sharded weights


# Before the run


def processes() -> int:
    """World size: that of the process group if it is initialised, else that of the launcher's environment."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_world_size()
    return int(os.environ.get("WORLD_SIZE", "1"))


def check_launch(settings: RunSettings, device: torch.device) -> None:
    """Check the flags of distributed training.

    Raises:
        UserError: --fsdp without a second process, or with --deepspeed, --backprop cycle or --optimizer adamw_8bit; --deepspeed without the
            package or a launcher, on an unsupported device, with a file that cannot be read or that sets ZeRO stage 3, or with
            --gradient_checkpointing, --resume or another optimizer than adamw.
    """
    if settings.fsdp and settings.deepspeed is not None:
        raise UserError("--fsdp and --deepspeed: expected one of the two, got both; both shard the training state, each in its own way")
    if settings.fsdp:
        _check_fsdp(settings)
    if settings.deepspeed is not None:
        _check_deepspeed(settings, settings.deepspeed, device)


def _check_fsdp(settings: RunSettings) -> None:
    if processes() == 1:
        raise UserError("--fsdp: expected several processes to shard the model over, got 1; start with torchrun --nproc_per_node N")
    if settings.backprop == "cycle":
        raise UserError(
            "--fsdp: expected --backprop full or last, got cycle: weights and gradients are gathered and reduced unit by unit, once per "
            "backward pass, and cycle makes several; --gradient_checkpointing saves memory as well"
        )
    if settings.optimizer == "adamw_8bit":
        raise UserError(
            "--fsdp: expected --optimizer adamw or muon, got adamw_8bit: its 8-bit state cannot be gathered from its shards, so the run "
            "could not be saved"
        )


def _check_deepspeed(settings: RunSettings, file: str, device: torch.device) -> None:
    if find_spec("deepspeed") is None:
        raise UserError("--deepspeed: the package deepspeed is not installed; pip install deepspeed, or use --fsdp, which needs no package")
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--deepspeed: expected --device cpu or cuda, got {device}")
    if "RANK" not in os.environ:
        raise UserError("--deepspeed: expected processes started by a launcher, got none; start with torchrun --nproc_per_node N")
    if _zero_stage(file) == 3:
        raise UserError(
            f"--deepspeed: expected ZeRO stage 0, 1 or 2, got 3 in {file}: it partitions the weights, which could then not be "
            "saved; --fsdp shards the weights as well"
        )
    if settings.gradient_checkpointing:
        raise UserError(
            "--deepspeed: expected no --gradient_checkpointing: whether DeepSpeed reduces each gradient once if a layer is applied several "
            "times and recomputed is an open question (deepspeedai/DeepSpeed issue 2103); --fsdp does"
        )
    if settings.optimizer != "adamw":
        raise UserError(
            f"--deepspeed: expected --optimizer adamw, got {settings.optimizer}: DeepSpeed flattens all parameters into one vector"
        )
    if settings.resume:
        raise UserError(
            "--deepspeed: expected no --resume: each process keeps its part of the optimizer state, and the parts are not gathered"
        )


def _zero_stage(file: str) -> int:
    try:
        config = parse_json(Path(file).read_text(encoding="utf-8"))
        return int(config.get("zero_optimization", {}).get("stage", 0))
    except OSError as error:
        raise UserError(f"--deepspeed: expected DeepSpeed's JSON file, got {file}: {error.strerror}") from error
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"--deepspeed: expected DeepSpeed's JSON file, got {file}, which is not one: {error}") from error


def describe_launch(settings: RunSettings, device: torch.device) -> str:
    """One line such as "cpu, 2 processes (DDP over gloo)"; requires an initialised process group if there are several processes."""
    count = processes()
    if count == 1 and settings.deepspeed is None:
        return f"{device.type}, 1 process{_ignored_launcher(device)}"
    how = "FSDP2" if settings.fsdp else "DDP" if settings.deepspeed is None else f"DeepSpeed, ZeRO stage {_zero_stage(settings.deepspeed)}"
    return f"{device.type}, {count} process{'es' if count > 1 else ''} ({how} over {distributed.get_backend()})"


def _ignored_launcher(device: torch.device) -> str:
    """On a CPU `accelerate launch --num_processes N` silently starts one process; it sets MASTER_ADDR, but not WORLD_SIZE."""
    if device.type == "cpu" and {"ACCELERATE_USE_CPU", "MASTER_ADDR"} <= set(os.environ) and "WORLD_SIZE" not in os.environ:
        return "; on a CPU accelerate launch starts only one, whatever --num_processes is: torchrun --nproc_per_node N starts several"
    return ""


# Sharding


def shard(loss_module: Any, device: torch.device, *, reads_every_cycle: bool, methods: Sequence[str] = ("row_sums", "plain_sums")) -> None:
    """Shard a model over all processes with FSDP2, in place, and move it to the device. Collective.

    Parameters must be frozen and cast to float32 before, and the optimizer created after. The Trainer then uses the model as it is.
    Parameters become DTensors, and are plain tensors during the forward and backward pass.

    Args:
        loss_module: A module whose `model` is a recursive model, or a plain causal model of transformers.
        reads_every_cycle: Whether a training pass scores every cycle, so that the coda is applied several times.
        methods: Names of further methods of `loss_module` that run the model, without gradients.
    """
    mesh = init_device_mesh(device.type, (distributed.get_world_size(),))
    for unit in _units(loss_module.model, reads_every_cycle):
        fully_shard(unit, mesh=mesh)
    fully_shard(loss_module, mesh=mesh)
    for name in methods:
        register_fsdp_forward_method(loss_module, name)
        setattr(loss_module, name, _reset_after(loss_module, getattr(loss_module, name)))
    loss_module._get_fsdp_state()._lazy_init()  # now: otherwise the first unit to run would become the root
    # With this and _FSDP_FLAG the Trainer treats the model as already sharded: it prepares the optimizer and does not wrap the model.
    loss_module.is_distributed_loading_by_transformers = True


def _units(model: Any, reads_every_cycle: bool) -> list[nn.Module]:
    """The FSDP2 units besides the root: the layers that a pass applies once."""
    if not is_recursive(model):
        names = model._no_split_modules or ()
        return [module for module in model.modules() if type(module).__name__ in names]
    layers = [*model.base_model.layers]
    first, end = model.config.prelude_layers, model.config.prelude_layers + model.config.L_layers
    return layers[:first] + ([] if reads_every_cycle else layers[end:])


def _reset_after(root: Any, method: Callable[..., Any]) -> Callable[..., Any]:
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            return method(*args, **kwargs)
        finally:
            _reset_fsdp_state(root)

    return wrapped


def _reset_fsdp_state(root: Any) -> None:
    """Call after forward passes without a backward pass: frees gathered weights, which would become stale at the next update, and discards
    the recorded order of units, which the next backward pass would follow. Not between micro-batches: it discards their gradients."""
    root.reset_iter_state()


@contextmanager
def gathered(root: nn.Module) -> Iterator[None]:
    """Inside, every process holds the full, unsharded model, and each can run it independently of the others; without gradients.

    Collective on entry and exit. Not between the micro-batches of a step. Without effect on a model that is not sharded.
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
    """Inside, the model does not count as sharded: `generate` does not synchronise, and `state_dict` returns the gathered tensors."""
    modules: list[Any] = list(root.modules())
    marks = [(module, getattr(module, _FSDP_FLAG, False), module._state_dict_pre_hooks) for module in modules]
    for module in modules:
        module._state_dict_pre_hooks = OrderedDict()  # those of FSDP2 would free the weights and return this process's shard
        setattr(module, _FSDP_FLAG, False)
    try:
        yield
    finally:
        for module, mark, hooks in marks:
            module._state_dict_pre_hooks = hooks
            setattr(module, _FSDP_FLAG, mark)


def check_sharding(prepared: Any, settings: RunSettings) -> None:
    """Check that the model prepared by the Trainer is distributed as the flags require.

    Raises:
        RuntimeError: It is not, so every process would train its own model.
    """
    kind = type(prepared).__name__
    if settings.fsdp and not any(isinstance(module, FSDPModule) for module in prepared.modules()):
        raise RuntimeError(f"--fsdp is set, but the model is not sharded: {kind}")
    if settings.deepspeed is not None and kind != "DeepSpeedEngine":
        raise RuntimeError(f"--deepspeed is set, but the model is not a DeepSpeedEngine: {kind}")
    if processes() > 1 and not isinstance(prepared, DistributedDataParallel | FSDPModule) and kind != "DeepSpeedEngine":
        raise RuntimeError(f"{processes()} processes would each train their own model, without synchronisation: {kind}")


# Full states


def full_state(module: nn.Module) -> dict[str, Tensor]:
    """The unsharded state dict, on the CPU, in the first process; the others get an empty one. Collective.

    Tied weights are one tensor under both names.
    """
    seen: dict[int, Tensor] = {}
    state = {name: _gathered_tensor(tensor, seen) for name, tensor in module.state_dict(keep_vars=True).items()}
    return state if _is_first() else {}


def full_optimizer_state(optimizer: Any) -> dict[str, Any]:
    """The unsharded `optimizer.state_dict()`, on the CPU, in the first process; the others get an empty one. Collective."""
    state = _map_tensors(optimizer.state_dict(), lambda tensor: _gathered_tensor(tensor, {}))
    return state if _is_first() else {}


def load_full_state(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load an unsharded state dict, of an adapter without its donor's tensors; every process passes it and keeps its shard."""
    own = module.state_dict()
    module.load_state_dict(own | {name: shard_like(own[name], tensor) if name in own else tensor for name, tensor in state.items()})


def load_full_optimizer_state(optimizer: Any, state: Mapping[str, Any]) -> None:
    """Load an unsharded optimizer state dict; every process passes it and keeps its shard."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    indices = [index for group in state["param_groups"] for index in group["params"]]
    owners = dict(zip(indices, parameters, strict=True))
    shards = {index: _map_tensors(entry, partial(shard_like, owners[index])) for index, entry in state["state"].items()}
    optimizer.load_state_dict({**state, "state": shards})


def _is_first() -> bool:
    return processes() == 1 or distributed.get_rank() == 0


def _gathered_tensor(tensor: Tensor, seen: dict[int, Tensor]) -> Tensor:
    """The full tensor on the CPU, in the first process; an empty one in the others. Collective for a DTensor."""
    if id(tensor) not in seen:
        value = tensor.detach()
        if isinstance(value, DTensor):
            value = value.full_tensor()
        seen[id(tensor)] = value.cpu() if _is_first() else value.new_empty(0)
    return seen[id(tensor)]


def shard_like(like: Tensor, full: Tensor) -> Tensor:
    """This process's shard of a tensor, sharded as `like`; a tensor of another shape, such as a step count, is replicated."""
    if not isinstance(like, DTensor) or like.shape != full.shape:
        return full
    return distribute_tensor(full.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def _map_tensors(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """Apply a function to all tensors in nested dicts and lists."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: _map_tensors(item, change) for key, item in value.items()}
    if isinstance(value, list):
        return [_map_tensors(item, change) for item in value]
    return value


class ShardedTrainerMixin(_TrainerBase):
    """Support in a Trainer for models sharded by `shard`; comes before `Trainer` in the bases. Without effect on other models."""

    @contextmanager
    def _defer_fsdp_gradient_reduction(self) -> Iterator[None]:
        """Around all micro-batches of a step but the last. The Trainer's version expects a model that it sharded itself."""
        root: Any = self.model
        root.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            root.set_requires_gradient_sync(True)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The norm over all processes, which torch returns as a DTensor with a pending reduction."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """From files with unsharded states; DeepSpeed has its own."""
        if checkpoint is None or self.is_deepspeed_enabled:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        scheduler: Any = getattr(self.lr_scheduler, "scheduler", self.lr_scheduler)
        optimizer: Any = self.optimizer
        rates = list(scheduler.base_lrs)
        options = [{name: value for name, value in group.items() if name not in ("params", "lr")} for group in optimizer.param_groups]
        load_full_optimizer_state(optimizer, read_state(Path(checkpoint) / OPTIMIZER_NAME))
        scheduler.load_state_dict(read_state(Path(checkpoint) / SCHEDULER_NAME))
        # Moments and the step come from the checkpoint, learning rates and decay from the settings of this run.
        scheduler.base_lrs = rates
        for group, option, rate, factor in zip(optimizer.param_groups, options, rates, scheduler.lr_lambdas, strict=True):
            group.update(option)
            now = rate * factor(scheduler.last_epoch)
            group["lr"] = torch.full_like(group["lr"], now) if isinstance(group["lr"], torch.Tensor) else now
        scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]


def read_state(path: Path) -> Any:
    """Load a file of a checkpoint's state folder to the CPU."""
    return torch.load(path, map_location="cpu", weights_only=True)


def announce(text: str) -> None:
    """Log a message, from the first process only."""
    if PartialState().is_main_process:
        logger.info("%s", text)
