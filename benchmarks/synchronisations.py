"""Where the host waits for the device: counted by place, on a GPU as torch reports it, on a CPU by the operations that would wait.

with counted(device) as waits:
    work()
waits["training/trainer.py evaluate: item"]  # how often: folder, file and function, and what waits there
"""

from __future__ import annotations

import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerCallback

# Operations whose result the host has to know: a number, or how many elements there are. Operation -> as it is called here.
WAITING = {"_local_scalar_dense": "item"} | {
    name: name for name in ("nonzero", "masked_select", "_unique2", "unique_consecutive", "unique_dim", "equal", "is_nonzero")
}
INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_")  # by a boolean mask, as nonzero
READING = ("cpu", "numpy", "tolist")  # of a tensor; what is on a CPU needs no operation for them
MAKING = (torch.tensor, torch.as_tensor)  # on a device, of what is not a tensor: a copy that the host waits for
# The gradient norm, which was sent to the host a step before: nothing is left to wait for, and a GPU reports nothing.
ARRIVED = "training/finite.py read: item"
TORCH = str(Path(torch.__file__).parent)


@contextmanager
def counted(device: torch.device) -> Iterator[Counter[str]]:
    """Inside, every wait of this thread and of its backward passes is counted at the innermost place outside torch."""
    found: Counter[str] = Counter()
    with _reported(found) if device.type == "cuda" else _expected(found):
        yield found


@contextmanager
def _reported(found: Counter[str]) -> Iterator[None]:
    def show(message: Any, *args: Any, **kwargs: Any) -> None:
        if "synchronizing" in str(message):
            found[_place("waits")] += 1

    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = show
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)


@contextmanager
def _expected(found: Counter[str]) -> Iterator[None]:
    with _Calls(found), _Operations(found):
        yield


class Steps(TrainerCallback):
    """The waits of each step of a run.

    Args:
        waits: Of `counted`, inside of which the run is.
    """

    def __init__(self, waits: Counter[str]):
        self.waits, self.seen = waits, [Counter(waits)]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seen.append(Counter(self.waits))

    def between(self) -> list[Counter[str]]:
        """Of all steps but the first two, which prepare and log, and the last, in which the order of another epoch is drawn."""
        return [after - before for before, after in zip(self.seen[2:-2], self.seen[3:-1], strict=True)]


class _Operations(TorchDispatchMode):
    """What reaches the device, whoever sends it."""

    def __init__(self, found: Counter[str]):
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        name = func.overloadpacket.__name__
        if name in INDEXING and any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]):
            name = "nonzero"
        if name in WAITING:
            self.found[_place(WAITING[name])] += 1
        return func(*args, **(kwargs or {}))


class _Calls(TorchFunctionMode):
    """What is asked of tensors in Python."""

    def __init__(self, found: Counter[str]):
        super().__init__()
        self.found = found

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        makes = func in MAKING and kwargs.get("device") is not None and not isinstance(args[0], torch.Tensor)
        if makes or (name in READING and func is getattr(torch.Tensor, name)):
            self.found[_place(name)] += 1
        return func(*args, **kwargs)


def _place(what: str) -> str:
    frames = [frame for frame, _ in traceback.walk_stack(sys._getframe(2))]
    frame: FrameType = next((frame for frame in frames if not frame.f_code.co_filename.startswith((TORCH, __file__))), frames[-1])
    file = Path(frame.f_code.co_filename)
    return f"{file.parent.name}/{file.name} {frame.f_code.co_name}: {what}"
