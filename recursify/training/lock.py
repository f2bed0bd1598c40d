"""One run at a time in an output folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import filelock
from accelerate import PartialState

from ..errors import UserError

LOCK = ".recursify.lock"


@contextmanager
def sole_run(folder: Path) -> Iterator[Callable[[], None]]:
    """Until the end no other run writes to the folder.

    Yields what takes the lock where the folder has been made meanwhile; one that is there is locked at once. The lock is the operating
    system's (flock), so that of a killed process is free. Rank 0 holds it.

    Raises:
        UserError: Another run holds it.
    """
    lock = filelock.FileLock(folder / LOCK, timeout=0)

    def take() -> None:
        if not PartialState().is_main_process or lock.is_locked or not folder.is_dir():
            return
        try:
            lock.acquire()
        except filelock.Timeout:
            raise UserError(
                f"--output_dir: another run is writing to {folder}; wait until it ends, stop it, or choose another folder"
            ) from None
        except (OSError, NotImplementedError):  # a folder that cannot be written, which `make_folder` says, or a disk without locks
            return

    try:
        take()
        yield take
    finally:
        lock.release()
