"""Measure on a GPU what fits into some minutes, the most valuable first; `make gpu MINUTES=8 RESULTS=folder`.

    python -m benchmarks.gpu --minutes 8 --results runs/gpu      needs torch, transformers, accelerate and this checkout, and no network
    python -m benchmarks.gpu training decoding                   these jobs alone
    python -m benchmarks.gpu --rehearse --minutes 3              all of it at toy size on a CPU, as a test before a GPU run
    python -m benchmarks.gpu --list                              the jobs, in order, with their estimates
    python -m benchmarks.gpu_merge runs/gpu                      merge the results into the committed ones and the pages; `make gpu-merge`

Each job is a process of its own with a time limit, and its result a file of its own, written as it ends. Results of this code on this
device that are there already are not measured again. Exit status 1 if a job failed, or a check or a bound of one that ran.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import tempfile
from pathlib import Path

# Before torch is imported. Looking for a GPU must not begin to use one: jobs are forked from this process. And what tries everything at toy
# size on a busy CPU is quicker without threads that wait for each other.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
if __name__ == "__main__" and "--rehearse" in sys.argv:
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}

import psutil
import torch

from recursify.training import fit  # noqa: F401  (imported once, for all jobs)

from .case import registry
from .gpu_jobs import committed_seconds, jobs
from .job_queue import Place, Queue, Source, in_process, summary
from .record import ROOT, commit

MARGIN = 3.0  # seconds before the end in which nothing runs any more
LANES = 2  # jobs at once in a rehearsal
LOOK = 60.0  # seconds that a driver has to name its GPU
SOURCES = ("recursify", "benchmarks", "recipes/evidence")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("jobs", nargs="*", metavar="JOB", help="these alone; see --list")
    parser.add_argument("--minutes", type=float, default=8.0, help="all is over by then, imports included")
    parser.add_argument("--results", type=Path, default=Path("runs/gpu"), help="folder of the results, a file for each job")
    parser.add_argument("--donor", type=Path, help="folder of a pretrained donor, such as Qwen2-0.5B, for the job that needs one")
    parser.add_argument("--rehearse", action="store_true", help="toy sizes on the CPU; measures nothing")
    parser.add_argument("--list", action="store_true", help="say what there is, and stop")
    args = parser.parse_args(argv)
    args.size = "quick" if args.rehearse else "cuda"
    args.chosen = jobs(args.size)
    known = {job.name for job in args.chosen}
    if unknown := sorted(set(args.jobs) - known):
        parser.error(f"{', '.join(unknown)}: no such job; --list names them")
    if args.jobs:
        args.chosen = [job for job in args.chosen if job.name in args.jobs]
    if not args.minutes > 0:
        parser.error(f"--minutes: expected a number above 0, got {args.minutes:g}")
    return args


def main(argv: list[str] | None = None, began: float | None = None) -> int:
    """The exit status.

    Args:
        began: When the time began, on the clock of `time.time`; when this process did, where None.
    """
    args = parse(argv)
    place = Place(args.size, args.results / "rehearsal" if args.rehearse else args.results, args.donor)
    if args.list:
        print("\n".join(f"{job.declared(place):>6.0f} s  {job.name}" for job in args.chosen))
        return 0
    until = (psutil.Process().create_time() if began is None else began) + 60 * args.minutes - MARGIN
    device = "CPU" if args.rehearse else gpu()
    if device is None:
        print("no GPU: torch finds none here; --rehearse runs everything at toy size on a CPU", file=sys.stderr)
        return 2
    registry()  # once, for all jobs
    source = Source(device, code(), commit()["commit"])
    print(f"{device}; commit {source.commit}; {args.minutes:g} minutes; results in {place.results}", flush=True)
    queue = Queue(
        place, source, until,
        measured=lambda job: committed_seconds(job, place.size),
        say=lambda text: print(text, flush=True),
        lanes=min(LANES, os.cpu_count() or 1) if args.rehearse else 1,
    )  # fmt: skip
    ended = queue.run(args.chosen)
    print(summary(ended), flush=True)
    return int(any(one.bad for one in ended))


def gpu() -> str | None:
    """The name of the GPU, asked for by another process; None if there is none, or its driver does not answer."""
    with tempfile.TemporaryDirectory() as folder:
        name = Path(folder) / "name"

        def ask() -> None:
            if torch.cuda.is_available():
                name.write_text(torch.cuda.get_device_name(), encoding="utf-8")

        in_process(ask, Path(folder) / "log", LOOK)
        return name.read_text(encoding="utf-8") if name.exists() else None


def code(root: Path = ROOT) -> str:
    """A hash of the measured and the measuring code: changes of other files keep results valid. Works without git history, too."""
    digest = hashlib.sha256()
    for folder in SOURCES:
        for file in sorted((root / folder).rglob("*.py")):
            digest.update(json.dumps([file.relative_to(root).as_posix(), file.read_text(encoding="utf-8")]).encode())
    return digest.hexdigest()[:16]


if __name__ == "__main__":
    sys.exit(main())
